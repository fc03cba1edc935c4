"""The figures of this folder's scripts in one file, and as the table of docs/output.md.

python recipes/robustness/table.py DIR      put the figures in DIR, where the scripts worked, into results.json
python recipes/robustness/table.py          print the table
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).with_name("results.json")
SCRIPTS = ("kills", "mutations", "nightly", "million")


def gather(work: Path) -> None:
    """Put the figures that are there into results.json, beside those that it has."""
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    found = {name: work / f"{name}.json" for name in SCRIPTS}
    results |= {name: json.loads(path.read_text(encoding="utf-8")) for name, path in found.items() if path.exists()}
    RESULTS.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def table(results: Mapping[str, Any]) -> str:
    """A row for each kind of load: what was done, and how many faults it found."""
    kills, mutations, nights, rows = (results[name] for name in SCRIPTS)
    by_form = dict(kills["by form"])
    replicas = by_form.pop("replica")
    refused = mutations["outcomes"].get("refused", 0)
    lines = [
        (
            "kills.py",
            f"{kills['kills'] - replicas:,} SIGKILLs of the driver ({_counts(by_form)}) and {replicas:,} of replicas; "
            f"{kills['runs compared']:,} finished outputs compared",
            kills,
        ),
        (
            "mutations.py",
            f"{mutations['lines']:,} mutated lines: {mutations['kept']:,} kept, {mutations['dropped']:,} dropped, "
            f"{mutations['errors']:,} errors; the values of {mutations['values compared']:,} compared. "
            f"{sum(mutations['files'].values()):,} mutated files ({_counts(mutations['files'])}): {refused:,} refused, "
            f"the values of {mutations['rows compared']:,} rows of the others compared",
            mutations,
        ),
        (
            "nightly.py",
            f"{nights['nights']:,} nights in {nights['minutes']:,} minutes ({_counts(nights['faults injected'])}); "
            f"{nights['rows']:,} rows, {nights['reused']:,} with a score of an earlier night",
            nights,
        ),
        (
            "million.py",
            f"{rows['rows']:,} rows, at most {rows['peak MB']:,} MB resident",
            rows,
        ),
    ]
    body = [f"| `{name}` | {done} | {len(facts['faults'])} | {facts['machine']} |" for name, done, facts in lines]
    return "\n".join(["| script | what was run | faults | machine |", "| --- | --- | --- | --- |", *body])


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in counts.items())


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, nargs="*", help="folders that scripts worked in")
    given = parser.parse_args(arguments)
    for work in given.work:
        gather(work)
    print(table(json.loads(RESULTS.read_text(encoding="utf-8"))))


if __name__ == "__main__":
    main()
