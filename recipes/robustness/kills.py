"""Runs that are killed at random moments and started again end with the bytes of a run that was left alone.

    python recipes/robustness/kills.py --work DIR --kills 200 --replicas 10

Each round takes one form of output, kills the command (SIGKILL) at one to three random moments, runs it to its end and
compares what is there with an undisturbed run. In the form `replica` the run is on Ray, and a replica is killed instead
of the driver. Stop it at any time; the same command goes on. Figures are printed and written to DIR/kills.json.
"""

from __future__ import annotations

import json
import random
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
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

from tests.hub import Hub

REPOSITORY = "org/out"
REPLICA = "ray::MapWorker"
FILTER = ["in.jsonl", "out", "--drop-top", "5%", "--scorer", "random", "--pack", "../pack", "--quiet"]
FORMS: dict[str, list[str]] = {
    "parquet": FILTER,
    "jsonl": [*FILTER, "--to", "jsonl"],
    "store": [*FILTER, "--score-store", "store"],
    "overwrite": [*FILTER, "--overwrite"],
    "push": [*FILTER, "--push-to", REPOSITORY],
    "compact": ["store", "compact", "store", "--json"],
    "replica": [word if word != "random" else "sqsd" for word in FILTER] + ["--engine", "ray", "--replicas", "2"],
}


@dataclass
class Undisturbed:
    """What a run leaves that nothing happens to, and how long it takes."""

    left: dict[str, Any]
    seconds: float


class Bench:
    """A folder in which runs of every form are made, killed and compared."""

    def __init__(self, work: Path, rows: int, hub: Hub, sessions: Path) -> None:
        self.work, self.rows, self.hub, self.sessions = work, rows, hub, sessions
        self.known: dict[str, Undisturbed] = {}
        make_pack(work)
        Child(work, "--version").wait()  # so that no later one waits for the imports

    def prepare(self, form: str, folder: Path) -> Path:
        """The folder as it is before the run: with its input, an earlier output, or a store of several files."""
        shutil.rmtree(folder, ignore_errors=True)
        template = self.work / f"before-{form}"
        if not template.exists():
            making = self.work / "making"
            shutil.rmtree(making, ignore_errors=True)
            making.mkdir()
            source = random.Random(form)
            rows = [make_row(k, source) for k in range(2 * self.rows)]
            earlier = {"overwrite": [rows[self.rows // 2 :]], "compact": [rows[: self.rows], rows[self.rows // 2 :]]}
            for k, part in enumerate(earlier.get(form, [])):
                write_rows(making / "in.jsonl", part)
                dest = "out" if form == "overwrite" else f"out-{k}"
                sharing = ["--score-store", "store"] if form == "compact" else []
                first = Child(making, "in.jsonl", dest, *FILTER[2:], *sharing)
                assert not misbehaved(*first.wait(), 0)
            write_rows(making / "in.jsonl", rows[: self.rows])
            making.rename(template)
        shutil.copytree(template, folder)
        self.hub.repos.clear()
        return folder

    def start(self, form: str, folder: Path) -> Child:
        return Child(folder, *FORMS[form], hub=self.hub.url if form == "push" else None, sessions=self.sessions)

    def undisturbed(self, form: str) -> Undisturbed:
        if form not in self.known:
            folder = self.prepare(form, self.work / "straight")
            child = self.start(form, folder)
            wrong = misbehaved(*child.wait(), 0)
            if wrong:
                raise SystemExit(f"The undisturbed run of {form} failed: {wrong[0]}")
            self.known[form] = Undisturbed(self.left(form, folder), child.seconds)
        return self.known[form]

    def left(self, form: str, folder: Path) -> dict[str, Any]:
        """What is compared: every file of the output; of stores and repositories what they hold."""
        if form == "compact":
            return {"store": stored(folder / "store"), "files": len(list((folder / "store").glob("[!.]*")))}
        found: dict[str, Any] = {
            p.relative_to(folder).as_posix(): p.read_bytes() for p in (folder / "out").rglob("*") if p.is_file()
        }
        if form == "store":
            found["store"] = stored(folder / "store")
        if form == "push":
            found |= {f"hub/{path}": data for path, data in self.hub.files(REPOSITORY).items()}
        return {name: without_timing(value) if name.endswith("report.json") else value for name, value in found.items()}

    def round(self, form: str, number: int) -> dict[str, Any]:
        """One round: kills, then a run to the end."""
        straight, source = self.undisturbed(form), random.Random(number)
        folder = self.prepare(form, self.work / "round")
        kills, faults = 0, []
        for _ in range(source.randint(1, 3) if form != "replica" else 1):
            child = self.start(form, folder)
            moment = source.uniform(0, straight.seconds)
            if form == "replica":
                kills += kill_replica(child, source.uniform(0, 3))
                break
            if not child.kill_after(moment):
                break
            kills += 1
            faults += [f"{name} is not whole" for name in torn(folder, straight.left, self.work / f"before-{form}")]
        else:
            child = self.start(form, folder)
        faults += misbehaved(*child.wait(), 0)
        if not kills:  # the undisturbed run was slower: the machine had more to do
            straight.seconds = min(straight.seconds, child.seconds)
        left = {} if faults else self.left(form, folder)
        differing = sorted(n for n in {*left, *straight.left} if left.get(n) != straight.left.get(n))
        if not faults and differing:
            faults.append(f"other bytes in {', '.join(differing)}")
        if faults:
            shutil.copytree(folder, self.work / f"fault-{form}-{number}", dirs_exist_ok=True)
        return {"form": form, "kills": kills, "faults": [f"{form}, round {number}: {fault}" for fault in faults]}


def kill_replica(child: Child, seconds: float) -> int:
    """Kill one of the run's replicas some seconds after the first has started. 0 if the run ended before."""
    while child.process.exitcode is None and not child.descendants(REPLICA):
        time.sleep(0.2)
    time.sleep(seconds)
    with suppress(psutil.NoSuchProcess, IndexError):
        child.descendants(REPLICA)[0].kill()
        return 1
    return 0


def torn(folder: Path, whole: Mapping[str, Any], before: Path) -> list[str]:
    """The rows' files of the output that are neither as the run leaves them nor as they were before it."""
    files = [path for path in (folder / "out").glob("data/[!.]*") if path.is_file()]
    names = {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}
    return [
        name
        for name, content in names.items()
        if content != whole.get(name) and not ((before / name).exists() and content == (before / name).read_bytes())
    ]


def stored(store: Path) -> list[dict[str, Any]]:
    """The scores in a store, by key, whatever files they are in."""
    tables = [pq.read_table(path) for path in sorted(store.glob("[!.]*.parquet"))]
    rows = pa.concat_tables(tables).to_pylist() if tables else []
    return sorted({row["key"]: row for row in rows}.values(), key=lambda row: bytes(row["key"]))


def without_timing(report: bytes) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads(report)
    del facts["timing"]
    return facts


def by_form(journal: Journal) -> dict[str, int]:
    """The kills so far."""
    return {form: sum(facts["kills"] for facts in journal.rounds if facts["form"] == form) for form in FORMS}


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser(__doc__)
    options.add_argument("--kills", type=int, default=200, help="of the driver [default: 200]")
    options.add_argument("--replicas", type=int, default=0, help="replicas to kill [default: 0]")
    options.add_argument("--rows", type=int, default=500, help="rows of a run [default: 500]")
    options.add_argument("--forms", nargs="+", choices=FORMS, default=[form for form in FORMS if form != "replica"])
    given = options.parse_args(arguments)
    journal = Journal(given.work / "kills.jsonl")
    with until_stopped(), Hub() as hub, ray_sessions() as sessions:
        bench = Bench(given.work, given.rows, hub, sessions)
        for forms, wanted in [(given.forms, given.kills), (["replica"], given.replicas)]:
            while sum(by_form(journal)[form] for form in forms) < wanted:
                number = len(journal.rounds)
                journal.add(bench.round(forms[number % len(forms)], number))
    figures = {"kills": journal.total("kills"), "by form": by_form(journal), "runs compared": len(journal.rounds)}
    return publish(given.work, "kills", {**figures, "faults": journal.faults})


if __name__ == "__main__":
    raise SystemExit(main())
