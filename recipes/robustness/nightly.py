"""A corpus that grows every night, a shared score store, and a fault: nothing is lost, nothing is doubled.

    python recipes/robustness/nightly.py --work DIR --minutes 120

Each night adds rows to the corpus and filters all of it over the last output. Meanwhile something happens, drawn at
random: the disk is full, the score store refuses, the command is killed, a replica is killed (with --ray), the input is
replaced or rewritten in place, or nothing. A command that failed is run again without the fault. Then every row of the
input must be in exactly one place with the values and the risk that it had on its first night. Stop it at any time; the
same command goes on. Figures are printed and written to DIR/nightly.json.
"""

from __future__ import annotations

import json
import math
import random
import shutil
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from kills import kill_replica
from workbench import (
    Child,
    Journal,
    make_pack,
    make_row,
    misbehaved,
    parser,
    publish,
    ray_sessions,
    until_stopped,
    write_rows,
)

RUN = ["in.jsonl", "out", "--drop-top", "5%", "--pack", "../pack", "--score-store", "store", "--overwrite", "--quiet"]
RANDOM = ["--scorer", "random"]
RAY = [*RANDOM, "--engine", "ray", "--replicas", "2"]
KILLED = -9


class Corpus:
    """The rows of a night: new ones are added, old ones stay, and after so many nights it begins again."""

    def __init__(self, added: int, period: int = 20) -> None:
        self.added, self.period = added, period

    def rows(self, night: int) -> list[dict[str, Any]]:
        era, age = divmod(night, self.period)
        source = random.Random(f"era {era}")
        return [make_row(k, source) for k in range(self.added * (age + 5))]


def nothing(_: Child, __: Path, ___: random.Random) -> None:
    """A quiet night."""


def killed(child: Child, _: Path, source: random.Random) -> None:
    child.kill_after(source.uniform(0, 5))


def replica_killed(child: Child, _: Path, source: random.Random) -> None:
    kill_replica(child, source.uniform(0, 3))


def store_refuses(child: Child, folder: Path, source: random.Random) -> None:
    """For a while a file is where the store was."""
    store, aside = folder / "store", folder / "aside"
    if source.random() < 0.5:
        child.process.join(source.uniform(0, 4))
    if store.is_dir():
        store.rename(aside)
    store.write_bytes(b"")
    child.process.join()
    store.unlink()
    if aside.exists():
        aside.rename(store)


def input_replaced(child: Child, folder: Path, source: random.Random) -> None:
    """Other rows, as many, fewer or more, under the same name."""
    child.process.join(source.uniform(0, 4))
    rows = [json.loads(line) for line in (folder / "in.jsonl").read_text(encoding="utf-8").splitlines()]
    source.shuffle(rows)
    write_rows(folder / "in.jsonl", rows[: source.choice((len(rows), len(rows) // 2))] + rows[: source.choice((0, 9))])


def input_rewritten(child: Child, folder: Path, source: random.Random) -> None:
    """Other bytes in the same file, of the same size."""
    child.process.join(source.uniform(0, 4))
    path = folder / "in.jsonl"
    path.write_bytes(path.read_bytes().replace(b"river", b"lives").replace(b"stone", b"notes"))


Fault = Callable[[Child, Path, random.Random], None]
FAULTS: dict[str, tuple[Fault, tuple[int, ...]]] = {  # and the exit codes that it may lead to
    "none": (nothing, (0,)),
    "disk full": (nothing, (0, 1)),  # its process can't write large files
    "command killed": (killed, (0, KILLED)),
    "store refuses": (store_refuses, (0, 1, 3)),
    "input replaced": (input_replaced, (0, 3)),
    "input rewritten": (input_rewritten, (0, 3)),
    "replica killed": (replica_killed, (0,)),
}
CHANGING = ("input replaced", "input rewritten")


def run_night(work: Path, night: int, corpus: Corpus, fault: str, sessions: Path) -> dict[str, Any]:
    """One night: the command and its fault, the command again if it failed, and what is wrong with the result."""
    source, folder = random.Random(f"night {night}"), work / "nights"
    folder.mkdir(exist_ok=True)
    rows = corpus.rows(night)
    write_rows(folder / "in.jsonl", rows)
    before = fingerprint(folder / "out")
    largest = source.choice((0, 1_000, 20_000, 200_000)) if fault == "disk full" else None
    how = RAY if fault == "replica killed" else RANDOM
    child = Child(folder, *RUN, *how, largest=largest, sessions=sessions)
    happen, codes = FAULTS[fault]
    happen(child, folder, source)
    code, errors = child.wait()
    faults = misbehaved(code, errors, *codes)
    if code not in (0, KILLED) and fingerprint(folder / "out") != before:
        faults.append(f"exit code {code}, and the output has changed")
    if code == 0 and fault in CHANGING:  # it came before the first pass or after the last: either whole input will do
        now = [json.loads(line) for line in (folder / "in.jsonl").read_text(encoding="utf-8").splitlines()]
        either = [wrong_with(folder / "out", given) for given in (rows, now)]
        faults += [] if [] in either else either[0]
    again = code != 0 or fault in CHANGING
    if again:
        write_rows(folder / "in.jsonl", rows)
        faults += misbehaved(*Child(folder, *RUN, *RANDOM).wait(), 0)
    faults += wrong_with(folder / "out", rows)
    left = [path.name for path in folder.glob(".out*")]
    faults += [f"{name} is left" for name in left]
    if faults:
        shutil.copytree(folder, work / f"fault-{night}", dirs_exist_ok=True)
    report = json.loads((folder / "out" / "_sqsd" / "report.json").read_text())
    return {
        "fault": fault,
        "exit": str(code),
        "rows": len(rows),
        "reused": report["rows"]["reused"],
        "faults": [f"night {night}, {fault}: {wrong}" for wrong in faults],
    }


def fingerprint(out: Path) -> dict[str, bytes]:
    """The rows' files of an output. A run that fails may leave a report, but no other rows."""
    return {str(path): path.read_bytes() for path in sorted(out.rglob("train-*"))}


def wrong_with(out: Path, rows: list[dict[str, Any]]) -> list[str]:
    """What is lost, doubled or changed in an output of these rows."""
    places = {"kept": out / "data", "dropped": out / "_sqsd" / "dropped", "errors": out / "_sqsd" / "errors"}
    found = {
        name: [row for file in sorted(folder.glob("*.parquet")) for row in pq.read_table(file).to_pylist()]
        for name, folder in places.items()
    }
    ids = Counter(row["id"] for part in found.values() for row in part)
    wanted = Counter(row["id"] for row in rows)
    faults = [f"{(wanted - ids).total()} rows lost, {(ids - wanted).total()} doubled"] * (ids != wanted)
    given: dict[int, list[dict[str, Any]]] = {}
    for row in rows:
        given.setdefault(row["id"], []).append(row)
    scored = [row for name in ("kept", "dropped") for row in found[name]]
    plain = ("instruction", "output", "zip", "share")
    changed = [
        row["id"]
        for row in scored
        if not any(all(row[name] == own[name] for name in plain) for own in given.get(row["id"], []))
    ]
    faults += [f"{len(changed)} rows changed"] * bool(changed)
    if len(found["dropped"]) != math.ceil(0.05 * len(scored)):
        faults.append(f"{len(found['dropped'])} of {len(scored)} rows dropped")
    if scored and max((r["sqsd_risk"] for r in found["kept"]), default=0) > min(
        (r["sqsd_risk"] for r in found["dropped"]), default=1
    ):
        faults.append("a kept row is riskier than a dropped one")
    risks: dict[tuple[str, str], set[float]] = {}
    for row in scored:
        risks.setdefault((row["instruction"], row["output"]), set()).add(row["sqsd_risk"])
    expected = known_risks(out.parent / "risks.json", risks)
    return faults + [f"{len(expected)} rows have another risk"] * bool(expected)


def known_risks(path: Path, risks: dict[tuple[str, str], set[float]]) -> list[str]:
    """The conversations with another risk than at their first night; the others are noted for later nights."""
    known: dict[str, float] = json.loads(path.read_text()) if path.exists() else {}
    now = {"\n".join(turns): sorted(values) for turns, values in risks.items()}
    other = [turns for turns, values in now.items() if values != [known.get(turns, values[0])]]
    path.write_text(json.dumps({**known, **{turns: values[0] for turns, values in now.items() if turns not in known}}))
    return other


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser(__doc__)
    options.add_argument("--minutes", type=float, default=120, help="time of all nights [default: 120]")
    options.add_argument("--rows", type=int, default=100, help="rows that a night adds [default: 100]")
    options.add_argument("--ray", type=float, default=0.05, help="share of nights on Ray [default: 0.05]")
    given = options.parse_args(arguments)
    make_pack(given.work)
    journal, corpus = Journal(given.work / "nightly.jsonl"), Corpus(given.rows)
    local = [fault for fault in FAULTS if fault != "replica killed"]
    with until_stopped(), ray_sessions() as sessions:
        while journal.total("seconds") < 60 * given.minutes:
            began, night = time.monotonic(), len(journal.rounds)
            source = random.Random(night)
            fault = "replica killed" if source.random() < given.ray else source.choice(local)
            facts = run_night(given.work, night, corpus, fault, sessions)
            journal.add({**facts, "seconds": round(time.monotonic() - began)})
    figures = {
        "minutes": round(journal.total("seconds") / 60),
        "nights": len(journal.rounds),
        "faults injected": journal.count("fault"),
        "exit codes": journal.count("exit"),
        "rows": journal.total("rows"),
        "reused": journal.total("reused"),
    }
    return publish(given.work, "nightly", {**figures, "faults": journal.faults})


if __name__ == "__main__":
    raise SystemExit(main())
