"""Mutated lines and files: no crash, no traceback, every line in one place, every value as a second parser reads it.

    python recipes/robustness/mutations.py --work DIR --lines 1000000 --files 10000

Rows are generated, then bytes and structure are changed at random. Lines of JSON Lines go through a whole run (`--to
jsonl`), whose kept, dropped and error lines must be the input's, each once; and through the reader, whose values must
be those of Python's json. Parquet, Arrow, gzip, zstandard and CSV files go through the reader, compared with pyarrow
and Python's own modules, and one in ten through a whole run. Readers and runs are processes of their own. Stop it at
any time; the same command goes on. Figures are printed and written to DIR/mutations.json.
"""

from __future__ import annotations

import json
import multiprocessing
import random
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mutate import KINDS, mutate_line, mutated_file
from second_parser import examine
from workbench import PATIENCE, Child, Journal, make_pack, make_row, misbehaved, parser, publish, until_stopped

RUN = ["out", "--drop-top", "30%", "--scorer", "length", "--pack", "../pack", "--max-error-rate", "100%", "--quiet"]
ALPACA = ["--format", "alpaca"]
FILES = 100  # of a round
WHOLE_RUN = 10  # one in so many files goes through a whole run, too


def of_lines(work: Path, number: int, count: int) -> dict[str, Any]:
    """A round of mutated lines: those in the file, where they went, and what is wrong with that."""
    source, folder = random.Random(f"lines {number}"), _empty(work / "round")
    rows = [make_row(k, source) for k in range(count)]
    first, last = (json.dumps(row).encode() for row in (rows[0], rows[-1]))
    mutated = [mutate_line(row, source) for row in rows[1:-1]]
    (folder / "in.jsonl").write_bytes(b"\n".join([first, *mutated, last]) + b"\n")
    child = Child(folder, "in.jsonl", *RUN, *ALPACA, "--to", "jsonl")
    faults = misbehaved(*child.wait(), 0)
    fates, misplaced = placed(folder) if not faults else ({}, [])
    [read] = _examined([folder / "in.jsonl"], folder / "values.jsonl")
    faults += misplaced + read["faults"]
    _keep(work, folder, f"lines-{number}", faults)
    facts = {"compared": read.get("compared", 0), "stricter": read.get("stricter", {})}
    return {"what": "lines", **fates, **facts, "faults": [f"lines, round {number}: {fault}" for fault in faults]}


def placed(folder: Path) -> tuple[dict[str, int], list[str]]:
    """How many lines of in.jsonl the run kept, dropped and set apart, and which are not in exactly one place."""
    from tests.corpora import unnamed

    given = {
        number: line
        for number, line in enumerate((folder / "in.jsonl").read_bytes().split(b"\n"), 1)
        if line and not line.isspace()
    }
    home, faults = folder / "out" / "_sqsd", []
    reasons = [json.loads(line) for line in (home / "reasons.jsonl").read_bytes().splitlines()]
    dropped, errors, kept = (_lines(place) for place in (home / "dropped", home / "errors", folder / "out" / "data"))
    named = [(int(json.loads(line)["sqsd_row"].rpartition(":")[2]), line) for line in dropped]
    named += [(reason["line"], line) for reason, line in zip(reasons, errors, strict=True)]
    left = dict(given)
    for number, line in named:
        own = left.pop(number, None)
        if own is None:
            faults.append(f"line {number} is in two places, or nowhere in the input")
        elif line != own and unnamed(line, "in.jsonl", number) != own:
            faults.append(f"line {number} has other bytes")
    if list(left.values()) != kept:
        faults.append(f"{len(kept)} lines are kept and {len(left)} are left, or their bytes or order differ")
    return {"lines": len(given), "kept": len(kept), "dropped": len(dropped), "errors": len(errors)}, faults


def _lines(folder: Path) -> list[bytes]:
    content = b"".join(path.read_bytes() for path in sorted(folder.glob("*.jsonl")))
    return content.split(b"\n")[:-1]


def of_files(work: Path, number: int, count: int) -> dict[str, Any]:
    """A round of mutated files."""
    source, folder = random.Random(f"files {number}"), _empty(work / "round")
    paths, kinds = [], Counter[str]()
    for k in range(count):
        kind = list(KINDS)[k % len(KINDS)]
        rows = [make_row(n, source) for n in range(source.randint(1, 60))]
        paths.append(folder / f"{k}.{kind}")
        paths[-1].write_bytes(mutated_file(kind, rows, source))
        kinds[kind] += 1
    results = _examined(paths, folder / "values.jsonl")
    faults = [f"{facts['file']}: {fault}" for facts in results for fault in facts["faults"]]
    runs = range(number % WHOLE_RUN, count, WHOLE_RUN)
    for k in runs:
        shutil.rmtree(folder / "out", ignore_errors=True)
        code, errors = Child(folder, paths[k].name, *RUN, *(ALPACA if paths[k].suffix != ".csv" else [])).wait()
        wrong = misbehaved(code, errors, 0, 3, 4)
        if code == 0 and not wrong:
            rows_by_fate = json.loads((folder / "out" / "_sqsd" / "report.json").read_text())["rows"]
            if sum(rows_by_fate[fate] for fate in ("kept", "dropped", "errors")) != results[k]["rows"]:
                wrong.append(f"{rows_by_fate} of {results[k]['rows']} rows")
        faults += [f"{paths[k].name}: {fault}" for fault in wrong]
    _keep(work, folder, f"files-{number}", faults)
    outcomes = Counter(facts["outcome"] for facts in results)
    return {
        "what": "files",
        "files": count,
        "kinds": kinds,
        "outcomes": outcomes,
        "runs": len(runs),
        "rows": sum(facts.get("rows", 0) for facts in results),
        "rows compared": sum(facts.get("compared", 0) for facts in results),
        "faults": [f"files, round {number}: {fault}" for fault in faults],
    }


def unfinished(journal: Journal, lines: int, files: int) -> list[tuple[str, int]]:
    """What is still to be done, and how much of it; first that of which less is done."""
    wanted = {"lines": lines, "files": files}
    left = [(what, count - journal.total(what)) for what, count in wanted.items()]
    return sorted([(what, n) for what, n in left if n > 0], key=lambda item: -item[1] / wanted[item[0]])


def _examined(paths: list[Path], sink: Path) -> list[dict[str, Any]]:
    """What the second parser says of each file. A file that ends the process is a fault, and the rest is read on."""
    context = multiprocessing.get_context("forkserver")
    found: list[dict[str, Any]] = []
    while len(found) < len(paths):
        sink.unlink(missing_ok=True)
        process = context.Process(target=examine, args=(paths[len(found) :], sink))
        process.start()
        process.join(PATIENCE)
        if late := process.exitcode is None:
            process.kill()
            process.join()
        lines = [json.loads(line) for line in sink.read_text().splitlines()] if sink.exists() else []
        found += [line for line in lines if "file" in line]
        if len(found) < len(paths):
            end = "took too long" if late else f"ended the process with {process.exitcode}"
            found.append({"file": paths[len(found)].name, "outcome": "crashed", "faults": [end]})
    return found


def _empty(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def _keep(work: Path, folder: Path, name: str, faults: list[str]) -> None:
    if faults:
        shutil.copytree(folder, work / f"fault-{name}", dirs_exist_ok=True)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser(__doc__)
    options.add_argument("--lines", type=int, default=1_000_000, help="mutated lines [default: 1,000,000]")
    options.add_argument("--files", type=int, default=10_000, help="mutated files [default: 10,000]")
    options.add_argument("--block", type=int, default=10_000, help="lines of a round [default: 10,000]")
    given = options.parse_args(arguments)
    make_pack(given.work)
    journal = Journal(given.work / "mutations.jsonl")
    with until_stopped():
        while rounds := unfinished(journal, given.lines, given.files):
            what, left = rounds[0]
            number = journal.count("what").get(what, 0)
            if what == "lines":
                journal.add(of_lines(given.work, number, max(3, min(given.block, left))))
            else:
                journal.add(of_files(given.work, number, min(FILES, left)))
    figures = {
        **{name: journal.total(name) for name in ("lines", "kept", "dropped", "errors")},
        "values compared": journal.total("compared"),
        "stricter than Python's json": journal.add_up("stricter"),
        "files": journal.add_up("kinds"),
        "outcomes": journal.add_up("outcomes"),
        **{name: journal.total(name) for name in ("rows", "rows compared", "runs")},
    }
    return publish(given.work, "mutations", {**figures, "faults": journal.faults})


if __name__ == "__main__":
    raise SystemExit(main())
