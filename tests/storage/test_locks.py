"""Locks between processes: one holder at a time, and none after a kill."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from sqsd_filter.storage.locks import take_lock

HOLD = (
    "import sys, pathlib; from sqsd_filter.storage.locks import take_lock; f = take_lock(pathlib.Path(sys.argv[1])); "
)


@contextmanager
def another_process(path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that holds the lock until it is killed or its standard input is closed."""
    code = f"{HOLD}print(flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", code, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        try:
            yield process
        finally:
            process.kill()


def test_a_lock_is_refused_while_another_process_holds_it_and_free_when_that_is_killed(tmp_path: Path) -> None:
    with another_process(tmp_path / "lock") as process:
        with pytest.raises(BlockingIOError):
            take_lock(tmp_path / "lock")
        process.kill()
        process.wait()
        take_lock(tmp_path / "lock").close()


def test_whoever_waits_for_a_lock_gets_it_when_it_is_released(tmp_path: Path) -> None:
    with another_process(tmp_path / "lock") as process:
        assert process.stdin is not None
        process.stdin.close()
        take_lock(tmp_path / "lock", wait=True).close()


def test_a_lock_is_refused_while_this_process_holds_it(tmp_path: Path) -> None:
    with take_lock(tmp_path / "lock"), pytest.raises(BlockingIOError):
        take_lock(tmp_path / "lock")
    take_lock(tmp_path / "lock").close()


def test_where_a_file_system_has_no_locks_nothing_is_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", no_locks)
    with take_lock(tmp_path / "lock") as first, take_lock(tmp_path / "lock") as second:
        assert not first.closed
        assert not second.closed
