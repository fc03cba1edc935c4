"""What everything around the model costs when corpora grow: engines, replicas, the second night, a million rows.

    python recipes/benchmarks/scale.py engines      Ray against this process; two replicas against one
    python recipes/benchmarks/scale.py nightly      a second night with 1 % new rows against the first
    python recipes/benchmarks/scale.py known        everything but the model: a million rows whose scores are known
    python recipes/benchmarks/scale.py memory       peak memory of driver and replica at 10^5 and 10^6 rows
    python recipes/benchmarks/scale.py lookup       a score store with 10 million keys
    python recipes/benchmarks/scale.py selection    a cut through 10^8 scores; with --groups, within groups

Models are small and random, rows random words: the figures are of the pipeline, on whatever machine this runs.
What a run costs before its first row (Ray's and the model's start) is measured by a run of one row, and left out.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import psutil
import random_pack
import transformers

from sqsd_filter import SQSDScorer, filter_dataset
from sqsd_filter.corpus.addresses import Opener
from sqsd_filter.corpus.row_formats import Columns
from sqsd_filter.pipeline.scores.keys import KEYS
from sqsd_filter.pipeline.scores.store import ScoreStore
from sqsd_filter.pipeline.selecting.groups import Groups
from sqsd_filter.pipeline.selecting.selection import Cut, cut_rows
from sqsd_filter.pipeline.stage.engines import Engine, LocalEngine
from sqsd_filter.pipeline.stage.scan import Scan
from sqsd_filter.progress import Silent
from sqsd_filter.scoring.pack import Pack
from sqsd_filter.scoring.results import Scores

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
AT_ONCE = 1 << 20  # keys in a segment
MIDDLE = {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 3}


def write_rows(path: Path, count: int, words: tuple[int, int], *, prompt: int = 8, seed: int = 0) -> Path:
    """`count` different rows with prompts of `prompt` random words and answers of between `words` of them."""
    source = random.Random(seed)
    letters = "abcdefghijklmnopqrstuvwxyz"
    vocabulary = ["".join(source.choices(letters, k=source.randint(2, 9))) for _ in range(2000)]
    with path.open("w") as sink:
        for k in range(count):
            question = f"{seed} {k} {' '.join(source.choices(vocabulary, k=prompt))}?"
            answer = " ".join(source.choices(vocabulary, k=source.randint(*words)))
            sink.write(json.dumps({"instruction": question, "output": answer}) + "\n")
    return path


def make_pack(folder: Path, rows: Path, shape: dict[str, int], vocabulary: int = 4096) -> Pack:
    with rows.open() as lines:
        texts = [line for line, _ in zip(lines, range(2000), strict=False)]
    return random_pack.make_pack(folder, random_pack.make_tokenizer(texts, vocabulary), **shape)


def timed(
    pack: Pack, source: Path, folder: Path, engine: Engine, *, score_store: Path | None = None
) -> tuple[float, int]:
    """Seconds of a run into a fresh destination, and how many rows it scored."""
    dest = folder / "out"
    shutil.rmtree(dest, ignore_errors=True)
    scorer = SQSDScorer(pack.path)
    began = time.perf_counter()
    report = filter_dataset(source, dest, drop_top="5%", scorer=scorer, engine=engine, score_store=score_store)
    return time.perf_counter() - began, report["rows"]["scored"]


def engines(options: argparse.Namespace, folder: Path) -> dict[str, object]:
    import ray

    from sqsd_filter.pipeline.stage.ray_engine import RayEngine

    rows = write_rows(folder / "rows.jsonl", options.rows, (10, 120))
    one = write_rows(folder / "one.jsonl", 1, (10, 120))
    pack = make_pack(folder / "pack", rows, MIDDLE)
    ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    kinds: dict[str, Callable[[], Engine]] = {
        "local": LocalEngine,
        "ray": lambda: RayEngine(1),
        "one replica of one thread": lambda: RayEngine(1, threads=1),
        "two replicas of one thread": lambda: RayEngine(2, threads=1),
    }
    spent: dict[str, list[float]] = {kind: [] for kind in kinds}
    for _ in range(options.rounds):
        for kind, engine in kinds.items():
            start = timed(pack, one, folder, engine())[0]
            spent[kind].append(timed(pack, rows, folder, engine())[0] - start)
    ray.shutdown()
    middle = {kind: statistics.median(seconds) for kind, seconds in spent.items()}
    by_one, by_two = spent["one replica of one thread"], spent["two replicas of one thread"]
    return {
        "rows": options.rows,
        "seconds": {kind: [round(s, 2) for s in seconds] for kind, seconds in spent.items()},
        "ray / local": statistics.median(r / s for r, s in zip(spent["ray"], spent["local"], strict=True)),
        "one / two replicas": statistics.median(a / b for a, b in zip(by_one, by_two, strict=True)),
        "rows/s": {kind: options.rows / seconds for kind, seconds in middle.items()},
    }


def nightly(options: argparse.Namespace, folder: Path) -> dict[str, object]:
    rows = write_rows(folder / "first.jsonl", options.rows, (10, 120))
    added = max(1, options.rows // 100)
    new = write_rows(folder / "new.jsonl", added, (10, 120), seed=1)
    second = folder / "second.jsonl"
    second.write_text(rows.read_text() + new.read_text())
    one = write_rows(folder / "one.jsonl", 1, (10, 120))
    pack = make_pack(folder / "pack", rows, MIDDLE)
    rounds = []
    for number in range(options.rounds):
        store = folder / f"store-{number}"
        start = timed(pack, one, folder, LocalEngine())[0]
        first_seconds = timed(pack, rows, folder, LocalEngine(), score_store=store)[0] - start
        seconds, scored = timed(pack, second, folder, LocalEngine(), score_store=store)
        assert scored == added
        rounds.append((first_seconds, seconds - start))
    return {
        "rows": options.rows,
        "new": added,
        "seconds of first and second": [(round(a, 2), round(b, 2)) for a, b in rounds],
        "second / first": statistics.median(b / a for a, b in rounds),
    }


def known(options: argparse.Namespace, folder: Path) -> dict[str, object]:
    rows = write_rows(folder / "rows.jsonl", options.rows, (5, 15))
    pack = make_pack(folder / "pack", rows, SMALL, vocabulary=512)
    keys = Scan(Opener().open([rows]), Columns(), None, Silent()).index.conversations.keys
    fill(ScoreStore(folder / "store", SQSDScorer(pack.path).settings(), ["danger", "safety"]), keys)
    runs = [watched(rows, options.rows, folder, pack, "local", folder / "store") for _ in range(options.rounds)]
    assert all(run["scored"] == 0 for run in runs)
    return {f"{options.rows} rows": sorted(runs, key=lambda run: float(str(run["seconds"])))[len(runs) // 2]}


def memory(options: argparse.Namespace, folder: Path) -> dict[str, object]:
    sizes = sorted({max(1, options.rows // 10), options.rows})
    rows = write_rows(folder / "rows.jsonl", sizes[-1], (1, 3), prompt=2)
    pack = make_pack(folder / "pack", rows, SMALL, vocabulary=512)
    return {
        f"{size} rows, {engine}": watched(rows, size, folder, pack, engine, folder / f"store-{engine}-{size}")
        for size in sizes
        for engine in options.engine
    }


def fill(store: ScoreStore, keys: np.ndarray) -> None:
    """Random scores for these keys."""
    for start in range(0, len(keys), AT_ONCE):
        part = keys[start : start + AT_ONCE]
        n = len(part)
        values = np.random.default_rng(start).normal(size=n)
        probes = {"danger": values, "safety": np.zeros(n)}
        store.append(f"part-{start}", part, Scores(probes, values, ["scored"] * n, [""] * n, np.ones(n, np.int32)))


def watched(rows: Path, size: int, folder: Path, pack: Pack, engine: str, store: Path) -> dict[str, object]:
    """One run of the command: seconds and rows/s by phase, peak MiB of the command and of the largest replica."""
    out = folder / "watched"
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-m", "sqsd_filter", str(rows), str(out), "--drop-top", "5%", "--pack", str(pack.path)]
    command += ["--limit", str(size), "--score-store", str(store), "--engine", engine, "--token-budget", "2048"]
    with (folder / "report.json").open("w") as sink:
        process = psutil.Popen([*command, "--json", "--quiet"], stdout=sink)
        driver = replica = 0.0
        while process.poll() is None:
            driver = max(driver, peak_memory(process.pid))
            workers = [p for p in psutil.process_iter(["name"]) if (p.info["name"] or "").startswith("ray::MapWorker")]
            replica = max([replica, *(peak_memory(worker.pid) for worker in workers)])
            time.sleep(0.5)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed")
    report = json.loads((folder / "report.json").read_text())
    assert report["rows"]["kept"] + report["rows"]["dropped"] == report["rows"]["total"] == size
    seconds = report["timing"]["seconds"]
    return {
        "scored": report["rows"]["scored"],
        "seconds": seconds,
        "rows/s": size / seconds,
        "rows/s by phase": {name: phase["rows_per_second"] for name, phase in report["timing"]["phases"].items()},
        "peak MiB of the driver": driver,
        **({"peak MiB of a replica": replica} if engine == "ray" else {}),
    }


def peak_memory(pid: int | str) -> float:
    """MiB that were resident at most; 0 when the process is gone. Not ru_maxrss, which a process inherits."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM")), 0.0)


def lookup(options: argparse.Namespace, folder: Path) -> dict[str, object]:
    store = ScoreStore(folder, {"pack": "random"}, ["danger", "safety"])
    keys = np.random.default_rng(0).integers(0, 2**63, 2 * options.keys, dtype=np.uint64).view(KEYS)
    fill(store, keys)
    np.save(folder / "keys.npy", keys[np.random.default_rng(1).permutation(options.keys)])
    code = f"""
import sys, time; sys.path.insert(0, {str(Path(__file__).parent)!r})
import numpy as np
from pathlib import Path
from scale import ScoreStore, peak_memory
keys = np.load({str(folder / "keys.npy")!r})
store = ScoreStore(Path({str(folder)!r}), {{"pack": "random"}}, ["danger", "safety"])
before, began = peak_memory("self"), time.perf_counter()
assert store.lookup(keys).known.all()
print(time.perf_counter() - began, peak_memory("self") - before, keys.nbytes / 2**20)
"""
    spent, added, given = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    ).stdout.split()
    return {"keys": options.keys, "seconds": float(spent), "MiB": float(added), "MiB of the keys": float(given)}


def selection(options: argparse.Namespace, _: Path) -> dict[str, object]:
    risk = np.random.default_rng(0).normal(size=options.scores)
    risk[::7] = np.round(risk[::7], 2)  # with ties
    cut, groups = Cut.of(drop_top="5%"), None
    if options.groups:
        codes = np.random.default_rng(1).integers(0, options.groups, options.scores, dtype=np.int32)
        cut, groups = Cut.of(drop_top="5%", per_group="group"), Groups(codes, list(range(options.groups)))
    began = time.perf_counter()
    fates = cut_rows(risk, np.ones(len(risk), dtype=bool), cut, groups=groups)
    seconds = time.perf_counter() - began
    k = -(-options.scores // 20)
    assert fates.count(1) == k
    exact = np.lexsort((np.arange(len(risk)), -risk))[:k] if options.check else None
    return {
        "scores": options.scores,
        "groups": options.groups,
        "seconds": seconds,
        "dropped": fates.count(1),
        **({"the same as by sorting": bool((fates.fate[exact] == 1).all())} if exact is not None else {}),
        "peak MiB": peak_memory("self"),
    }


def rounded(value: object) -> object:
    if isinstance(value, dict):
        return {name: rounded(part) for name, part in value.items()}
    if isinstance(value, float):
        return round(value, 3) if value < 100 else round(value)
    return value


MEASUREMENTS: dict[str, Callable[[argparse.Namespace, Path], dict[str, object]]] = {
    "engines": engines,
    "nightly": nightly,
    "known": known,
    "memory": memory,
    "lookup": lookup,
    "selection": selection,
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(dest="kind", required=True)
    for kind, default in (("engines", 2000), ("nightly", 2000), ("known", 10**6), ("memory", 10**6)):
        sub = kinds.add_parser(kind)
        sub.add_argument("--rows", type=int, default=default)
        if kind == "memory":
            sub.add_argument("--engine", nargs="+", choices=["local", "ray"], default=["local", "ray"])
        else:
            sub.add_argument("--rounds", type=int, default=3)
    kinds.add_parser("lookup").add_argument("--keys", type=int, default=10_000_000)
    sub = kinds.add_parser("selection")
    sub.add_argument("--scores", type=int, default=100_000_000)
    sub.add_argument("--groups", type=int, default=0, help="number of groups to cut within (0: no groups)")
    sub.add_argument("--check", action="store_true", help="compare a cut without groups with a full sort, for minutes")
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    transformers.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        measured = MEASUREMENTS[options.kind](options, Path(folder))
    machine = f"{platform.machine()} with {os.cpu_count()} CPUs, Python {platform.python_version()}"
    print(json.dumps({options.kind: rounded(measured), "machine": machine}, indent=2))


if __name__ == "__main__":
    main()
