"""Trying again where it helps: a dropped connection, a server that is busy or asks for time."""

from __future__ import annotations

import errno
import logging
import time
from collections.abc import Callable
from typing import TypeVar

log = logging.getLogger(__name__)
T = TypeVar("T")

TRIES = 5
FIRST_WAIT, LONGEST_WAIT = 1.0, 300.0  # seconds
_BUSY = (408, 425, 429, 500, 502, 503, 504)
_UNREACHED = (errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EIO)
_CLIENTS = ("httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3", "aiohttp", "botocore")


def patiently(call: Callable[[], T], tries: int = TRIES, also: tuple[int, ...] = ()) -> T:
    """What `call` returns at the first try that succeeds; the last try's error goes through.

    Tried again is what may pass: a connection that broke, a server that was busy; not a missing file or right, a full
    disk, or an answer that would be the same again. A server's Retry-After is kept to. `also` are further
    status codes that may pass.
    """
    for number in range(1, tries + 1):
        try:
            return call()
        except Exception as problem:
            wait = _wait(problem, number, also)
            if wait is None or number == tries:
                raise
            log.info("%s; trying again in %.0f s", problem, wait)
            time.sleep(wait)
    raise AssertionError


def _wait(problem: Exception, number: int, also: tuple[int, ...]) -> float | None:
    """Seconds until the next try; None where none would help."""
    response = getattr(problem, "response", None)
    backoff = FIRST_WAIT * 2 ** (number - 1)
    if response is not None:
        if response.status_code not in (*_BUSY, *also):
            return None
        asked = response.headers.get("Retry-After", "")
        return min(LONGEST_WAIT, float(asked) if asked.isdigit() else backoff)
    if isinstance(problem, OSError) and type(problem).__module__ == "builtins":
        untold = problem.errno is None and type(problem) is OSError  # as pyarrow's file systems raise
        transient = untold or isinstance(problem, ConnectionError | TimeoutError) or problem.errno in _UNREACHED
    else:
        transient = isinstance(problem, EOFError) or type(problem).__module__.split(".")[0] in _CLIENTS
    return backoff if transient else None
