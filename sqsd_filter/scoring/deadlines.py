"""A deadline for a stranger's program: a chat template may loop for ever, in Python code of this very process.

A thread watches the calls that have a deadline, and raises `DeadlineExceeded` in the one that is past it. Setting a
deadline takes a microsecond. What Python computes in a single step, as 9**9**9, can't be ended in this way.
"""

from __future__ import annotations

import ctypes
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

WATCH_EVERY = 0.25  # seconds


class DeadlineExceeded(BaseException):
    """A call took longer than it may."""


class _Watch:
    """The calls that have a deadline, by their threads, and the thread that ends them."""

    def __init__(self) -> None:
        self._due: dict[int, float] = {}
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def begin(self, caller: int, seconds: float) -> None:
        with self._lock:
            self._due[caller] = time.monotonic() + seconds
            if self._thread is None:
                self._thread = threading.Thread(target=self._keep_watching, daemon=True)
                self._thread.start()

    def end(self, caller: int) -> bool:
        """False if the call was past its deadline; no exception is on its way then."""
        with self._lock:
            in_time = self._due.pop(caller, None) is not None
            if not in_time:
                _raise_in(caller, None)
        return in_time

    def _keep_watching(self) -> None:
        while True:
            time.sleep(WATCH_EVERY)
            with self._lock:
                late = [caller for caller, due in self._due.items() if time.monotonic() > due]
                for caller in late:
                    del self._due[caller]
                    _raise_in(caller, DeadlineExceeded)


def _raise_in(thread: int, error: type[BaseException] | None) -> None:
    """Raise an error in another thread at its next step in Python, or with None take back one that was not raised."""
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), error and ctypes.py_object(error))


_watch = _Watch()


def _watch_anew() -> None:
    """A forked process has the lock as it was, and no thread that watches."""
    global _watch
    _watch = _Watch()


os.register_at_fork(after_in_child=_watch_anew)


@contextmanager
def deadline(seconds: float) -> Iterator[None]:
    """Raise `DeadlineExceeded` in the code within if it takes longer. Deadlines can't be nested."""
    caller = threading.get_ident()
    _watch.begin(caller, seconds)
    try:
        yield
    finally:
        if not _watch.end(caller):
            raise DeadlineExceeded
