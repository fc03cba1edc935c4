"""Trying again where it helps: a dropped connection, a server that is busy or asks for time."""

from __future__ import annotations

import errno
import logging
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

log = logging.getLogger(__name__)
T = TypeVar("T")

TRIES = 5
FIRST_WAIT, LONGEST_WAIT = 1.0, 300.0  # seconds
_BUSY = (408, 425, 429, 500, 502, 503, 504)
_UNREACHED = (errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EIO)
_CLIENTS = ("httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3", "aiohttp", "botocore")


def patiently(call: Callable[[], T], also: tuple[int, ...] = ()) -> T:
    """What `call` returns at the first try that succeeds; the last try's error goes through.

    Tried again is what may pass: a connection that broke, a server that was busy; not a missing file or right, a full
    disk, or an answer that would be the same again. A server's Retry-After is kept to. `also` are further
    status codes that may pass.
    """
    for number in range(1, TRIES + 1):
        try:
            return call()
        except Exception as problem:
            wait = _wait(problem, number, also)
            if wait is None or number == TRIES:
                raise
            log.info("%s; trying again in %.0f s", problem, wait)
            time.sleep(wait)
    raise AssertionError


def _wait(problem: Exception, number: int, also: tuple[int, ...]) -> float | None:
    """Seconds until the next try; None where none would help."""
    backoff = FIRST_WAIT * 2 ** (number - 1)
    for cause in _causes(problem):
        response = getattr(cause, "response", None)
        if response is not None:
            asked = response.headers.get("Retry-After", "")
            wait = float(asked) if asked.isdigit() else backoff
            return min(LONGEST_WAIT, wait) if response.status_code in (*_BUSY, *also) else None
        if _transient(cause):
            return backoff
    return None


def _causes(problem: BaseException | None) -> Iterator[BaseException]:
    """An error and what led to it: libraries wrap what a connection or a server said."""
    while problem is not None:
        yield problem
        problem = problem.__cause__ or problem.__context__


def _transient(problem: BaseException) -> bool:
    if isinstance(problem, OSError) and type(problem).__module__ == "builtins":
        untold = problem.errno is None and type(problem) is OSError  # as pyarrow's file systems raise
        return untold or isinstance(problem, ConnectionError | TimeoutError) or problem.errno in _UNREACHED
    return isinstance(problem, EOFError) or type(problem).__module__.split(".")[0] in _CLIENTS
