"""Retries where they help: after a dropped connection, or when a server is busy or asks for time."""

from __future__ import annotations

import errno
import logging
import re
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TypeVar

from sqsd_filter.errors import SQSDError, first_line

log = logging.getLogger(__name__)
T = TypeVar("T")

TRIES = 5
FIRST_WAIT, LONGEST_WAIT = 1.0, 600.0  # seconds: before the second try; in all waits of one call together
_BUSY = (408, 425, 429, 500, 502, 503, 504)
_UNREACHED = (errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EIO)
_HTTPX = ("NetworkError", "TimeoutException", "RemoteProtocolError", "ProxyError")
# Which errors of a library may pass. By name: none of them has to be installed.
_PASSING: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(("httpx", "httpx2", "httpcore", "httpcore2"), _HTTPX),
    "requests": ("ConnectionError", "Timeout", "ChunkedEncodingError"),
    "urllib3": ("ProtocolError", "TimeoutError", "ProxyError", "IncompleteRead", "InvalidChunkLength"),
    "aiohttp": ("ClientConnectionError", "ClientPayloadError"),
    "botocore": ("HTTPClientError",),
    "fsspec": ("FSTimeoutError",),
}
# pyarrow's S3 reports errors in words only.
_AWS = re.compile(r"AWS Error (\w+|\[code \d+\])(?: \(HTTP status (\d+)\))?")
_AWS_BUSY = ("REQUEST_TIMEOUT", "SLOW_DOWN", "THROTTLING", "SERVICE_UNAVAILABLE", "INTERNAL_FAILURE")


def with_retries(call: Callable[[], T], transient_statuses: tuple[int, ...] = ()) -> T:
    """Call `call` until it succeeds, at most `TRIES` times, and return its result. The last try's error is raised.

    Only errors that may pass are tried again: a connection that broke, a server that was busy, an HTTP status among
    `transient_statuses`. Final are a missing file, missing rights, a full disk, an answer that would be the same again,
    and an `SQSDError`, which was tried again before it was raised. A server's Retry-After is obeyed; if it asks for
    more time than is left, there is no further try.
    """
    left = LONGEST_WAIT
    for number in range(1, TRIES + 1):
        try:
            return call()
        except Exception as problem:
            wait = _wait(problem, number, transient_statuses)
            if wait is None or wait > left or number == TRIES:
                raise
            log.info("%s; trying again in %.0f s", first_line(problem), wait)
            left -= wait
            time.sleep(wait)
    raise AssertionError


def _wait(problem: Exception, number: int, transient_statuses: tuple[int, ...]) -> float | None:
    """Seconds until the next try; None if no further try would help."""
    backoff = FIRST_WAIT * 2.0 ** (number - 1)
    for cause in _causes(problem):
        if isinstance(cause, SQSDError):
            return None
        status, retry_after = _answer(cause)
        if status is not None:
            wait: float = float(retry_after) if retry_after.isdecimal() else backoff
            return wait if status in (*_BUSY, *transient_statuses) else None
        if _transient(cause):
            return backoff
    return None


def _causes(problem: BaseException | None) -> Iterator[BaseException]:
    """An error and its causes: libraries wrap the errors of connections and servers."""
    while problem is not None:
        yield problem
        problem = problem.__cause__ or problem.__context__


def _answer(problem: BaseException) -> tuple[int | None, str]:
    """The HTTP status code of an error and the Retry-After that came with it, else ""."""
    response = getattr(problem, "response", None)
    if isinstance(response, Mapping):  # botocore's
        metadata = response.get("ResponseMetadata", {})
        return metadata.get("HTTPStatusCode"), metadata.get("HTTPHeaders", {}).get("retry-after", "")
    if response is not None and hasattr(response, "status_code"):
        return response.status_code, response.headers.get("retry-after", "")
    if _library(type(problem)) == "aiohttp" and (status := getattr(problem, "status", 0)):
        return status, (getattr(problem, "headers", None) or {}).get("retry-after", "")
    return None, ""


def _transient(problem: BaseException) -> bool:
    if isinstance(problem, OSError) and type(problem).__module__ == "builtins":
        if problem.errno is None and type(problem) is OSError:  # as pyarrow's file systems raise
            aws = _AWS.search(str(problem))
            return aws is None or aws[1] in ("NETWORK_CONNECTION", *_AWS_BUSY) or int(aws[2] or 0) in _BUSY
        return isinstance(problem, ConnectionError | TimeoutError) or problem.errno in _UNREACHED
    passing = (cls.__name__ in _PASSING.get(_library(cls), ()) for cls in type(problem).__mro__)
    return isinstance(problem, EOFError) or any(passing)


def _library(cls: type) -> str:
    return cls.__module__.partition(".")[0]
