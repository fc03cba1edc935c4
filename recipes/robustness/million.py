"""A million rows through everything but a model, with the peak memory of the process.

    python recipes/robustness/million.py --work DIR --rows 1000000

Rows with random words are scored by chance (`--scorer random`), cut and written as parquet. Every row must be in
exactly one place, and the process may have at most 1.5 GB resident. Stopped and started again, the run goes on with its
scores. Figures are printed and written to DIR/million.json.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

import pyarrow.parquet as pq
from workbench import Child, Journal, make_pack, make_row, misbehaved, parser, publish

LIMIT = 1500  # MB
RUN = ["in.jsonl", "out", "--drop-top", "5%", "--scorer", "random", "--pack", "../pack", "--quiet"]


def write_input(path: Path, count: int) -> None:
    """`count` different rows, the same at every call; nothing if they are there."""
    if path.exists():
        return
    source, temporary = random.Random(0), path.with_suffix(".part")
    with temporary.open("w", encoding="utf-8") as sink:
        for k in range(count):
            sink.write(json.dumps(make_row(k, source), ensure_ascii=False) + "\n")
    temporary.replace(path)


def measure(folder: Path, count: int) -> dict[str, object]:
    """Run, and count what came of every row."""
    from scale import peak_memory  # which imports torch

    child, peak = Child(folder, *RUN), 0.0
    while child.process.exitcode is None:
        peak = max(peak, peak_memory(str(child.process.pid)))
        child.process.join(0.2)
    faults = misbehaved(*child.wait(), 0)
    seen = bytearray(count)
    places = {"kept": folder / "out" / "data", "dropped": folder / "out" / "_sqsd" / "dropped"}
    rows = dict.fromkeys(places, 0)
    for name, place in places.items():
        for file in place.glob("*.parquet"):
            for batch in pq.ParquetFile(file).iter_batches(columns=["id"]):
                rows[name] += len(batch)
                for k in batch["id"].to_pylist():
                    seen[k] += 1
    if seen != b"\1" * count:
        faults.append(f"{seen.count(0)} rows are lost, {count - seen.count(0) - seen.count(1)} are doubled")
    if peak > LIMIT:
        faults.append(f"{peak:.0f} MB were resident, more than {LIMIT}")
    report = json.loads((folder / "out" / "_sqsd" / "report.json").read_text()) if not faults else {"timing": {}}
    return {"rows": count, **rows, "peak MB": round(peak), "seconds": report["timing"].get("seconds"), "faults": faults}


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser(__doc__)
    options.add_argument("--rows", type=int, default=1_000_000, help="[default: 1,000,000]")
    given = options.parse_args(arguments)
    make_pack(given.work)
    journal, folder = Journal(given.work / "million.jsonl"), given.work / f"rows-{given.rows}"
    folder.mkdir(exist_ok=True)
    write_input(folder / "in.jsonl", given.rows)
    if not any(facts["rows"] == given.rows for facts in journal.rounds):
        journal.add(measure(folder, given.rows))
    return publish(given.work, "million", next(facts for facts in journal.rounds if facts["rows"] == given.rows))


if __name__ == "__main__":
    raise SystemExit(main())
