"""What the scripts in this folder share: commands in processes of their own, and a journal that survives a stop.

Each script works in a folder (--work) and notes every finished round in a journal there. Started again with the same
folder it goes on with the next round; a round depends on its number and nothing else.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from multiprocessing import forkserver
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "recipes" / "benchmarks")]
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

PATIENCE = 1800.0  # seconds for one command, on a machine that does much else
SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
WORDS = ["river", "stone", "lamp", "paper", "winter", "music", "garden", "letter", "bridge", "morning", "été", "水"]
PRELOADED = [
    "tests.cli.children",
    "tests.hub",
    "sqsd_filter.scoring.scoring_model",
    "sqsd_filter.pipeline.run",
    "sqsd_filter.scoring.baselines",
    "datasets",
    "matplotlib.pyplot",
    "matplotlib.backends.backend_agg",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.llama.modeling_llama",
    "transformers.conversion_mapping",
]


class Journal:
    """Finished rounds, a line of JSON each. A line that was cut off when its process was ended is left out."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        whole = [line for line in lines if line.endswith(b"\n")]
        if len(whole) < len(lines):
            path.write_bytes(b"".join(whole))
        self.rounds: list[dict[str, Any]] = [json.loads(line) for line in whole]

    def add(self, facts: dict[str, Any]) -> None:
        self.rounds.append(facts)
        with self.path.open("a") as sink:
            sink.write(json.dumps(facts) + "\n")

    def total(self, name: str) -> int:
        """The sum of a number over all rounds."""
        return sum(facts.get(name, 0) for facts in self.rounds)

    def count(self, name: str) -> dict[str, int]:
        """How many rounds have each value of a fact."""
        return dict(sorted(Counter(facts[name] for facts in self.rounds if name in facts).items()))

    def add_up(self, name: str) -> dict[str, int]:
        """The counts that each round has under this name, added up."""
        joint: Counter[str] = Counter()
        for facts in self.rounds:
            joint.update(facts.get(name, {}))
        return dict(sorted(joint.items()))

    @property
    def faults(self) -> list[str]:
        return [fault for facts in self.rounds for fault in facts["faults"]]


class Child:
    """The command `sqsd-filter` in a process of its own, in `folder`; what it prints goes to stdout and stderr there.

    With `largest` no file of it may grow past that many bytes, as on a full disk. With `hub` it talks to the tests'
    Hub at this address. Ray works in the folder `sessions`.
    """

    def __init__(
        self,
        folder: Path,
        *arguments: object,
        largest: int | None = None,
        hub: str | None = None,
        sessions: Path | None = None,
    ) -> None:
        self.folder, self.began = folder, time.monotonic()
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        forkserver.ensure_running()
        self.process: ForkServerProcess = context.Process(
            target=_run, args=(folder, [str(a) for a in arguments], largest, hub, sessions)
        )
        self.process.start()

    def wait(self) -> tuple[int, str]:
        """Its exit code, minus the signal's number where one ended it, and stderr."""
        self.process.join(PATIENCE)
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join()
        self.seconds = time.monotonic() - self.began
        errors = self.folder / "stderr"
        return self.process.exitcode or 0, errors.read_text(errors="replace") if errors.exists() else ""

    def kill_after(self, seconds: float) -> bool:
        """Send SIGKILL after this time. False if the process has ended before."""
        self.process.join(seconds)
        if self.process.exitcode is not None:
            return False
        self.process.kill()
        self.process.join()
        return self.process.exitcode == -signal.SIGKILL

    def descendants(self, name: str = "") -> list[psutil.Process]:
        """The processes below it whose names begin like this."""
        try:
            found = psutil.Process(self.process.pid).children(recursive=True)
            return [process for process in found if process.name().startswith(name)]
        except psutil.NoSuchProcess:
            return []


def _run(
    folder: Path, arguments: list[str], largest: int | None, hub: str | None, sessions: Path | None = None
) -> None:
    if sessions is not None:
        os.environ["RAY_TMPDIR"] = str(sessions)
    if hub is not None:
        import pytest

        from tests.hub import connect

        connect(hub, folder / "huggingface", pytest.MonkeyPatch())
    if largest is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest, resource.RLIM_INFINITY))
    from tests.cli.children import run_command  # which imports all that a run needs: only where it runs

    run_command(folder, folder.parent / "pack", 0, 0, arguments)


def misbehaved(code: int, errors: str, *expected: int) -> list[str]:
    """What is wrong with how a command ended, apart from its result: nothing, or a list of one."""
    if "Traceback" in errors or "This is a bug" in errors or code not in expected:
        return [f"exit code {code}: {errors.strip()[-300:]}"]
    return []


def make_pack(work: Path) -> Path:
    """A pack with random weights in this folder, made once."""
    folder = work / "pack"
    if not (folder / "pack.json").exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        import random_pack

        random_pack.make_pack(folder, random_pack.make_tokenizer([" ".join(WORDS)] * 4, 300), **SMALL)
    return folder


def make_row(k: int, source: random.Random) -> dict[str, Any]:
    """A harmless row with this number, and values that are easily changed on their way."""
    return {
        "id": k,
        "instruction": f"Say {k}: {' '.join(source.choices(WORDS, k=source.randint(1, 6)))}?",
        "output": " ".join(source.choices(WORDS, k=source.randint(1, 20))),
        "zip": f"{k % 1000:03}",
        "big": 2**70 + k,
        "share": source.random(),
        "nested": {"b": [k, None, {"c": source.choice(WORDS)}], "a": None},
    }


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """As JSON Lines, whole or not at all."""
    temporary = path.with_name(f".{path.name}")
    temporary.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    temporary.replace(path)


def parser(about: str | None) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--work", type=Path, required=True, help="folder for the journal and what is being worked on")
    return made


@contextmanager
def until_stopped() -> Iterator[None]:
    """Ctrl-C ends what is done within, and the process that runs; the round is done again at the next start."""
    try:
        yield
    except KeyboardInterrupt:
        for process in multiprocessing.active_children():
            process.kill()


@contextmanager
def ray_sessions() -> Iterator[Path]:
    """A folder for as long as the context lasts, with a path that is short enough for the sockets of Ray."""
    folder = Path(tempfile.mkdtemp(prefix="r-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def publish(work: Path, name: str, figures: Mapping[str, object]) -> int:
    """Print the figures, and write them to NAME.json in the folder. Returns the exit code: 1 if there are faults."""
    cpus = len(os.sched_getaffinity(0))
    facts = {**figures, "machine": f"{cpus} CPU cores, {platform.machine()}", "python": platform.python_version()}
    text = json.dumps(facts, indent=1, ensure_ascii=False)
    (work / f"{name}.json").write_text(text + "\n", encoding="utf-8")
    print(text)
    return 1 if figures["faults"] else 0
