"""A working folder for the command, and processes that run it and die at a chosen moment."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path

import pytest

from tests.cli.children import run_command
from tests.corpora import make_rows, write_jsonl


@pytest.fixture
def folder(tmp_path: Path, tiny_pack: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with 60 rows in in.jsonl and a tiny pack as the default one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SQSD_FILTER_PACK", str(tiny_pack))
    write_jsonl(tmp_path / "in.jsonl", make_rows(60))
    return tmp_path


@pytest.fixture(scope="session")
def processes() -> ForkServerContext:
    """Starts processes that have imported everything and run nothing."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["tests.cli.children", "sqsd_filter.scoring.scoring_model", "sqsd_filter.pipeline.run", "datasets"]
    )
    forkserver.ensure_running()
    return context


@pytest.fixture
def started(processes: ForkServerContext, folder: Path, tiny_pack: Path) -> Callable[..., ForkServerProcess]:
    """Starts the command in a process that sends itself a signal at a moment; see `run_command`."""

    def start(moment: int, kind: int, *arguments: str) -> ForkServerProcess:
        process = processes.Process(target=run_command, args=(folder, tiny_pack, moment, kind, list(arguments)))
        process.start()
        return process

    return start


@pytest.fixture
def killed(started: Callable[..., ForkServerProcess]) -> Callable[..., int]:
    """Runs the command in such a process to its end, and gives its exit code."""

    def run(moment: int, kind: int, *arguments: str) -> int:
        process = started(moment, kind, *arguments)
        process.join(60)
        assert process.exitcode is not None
        return process.exitcode

    return run
