"""Trying again: what may pass and what is final, by the errors that the real clients raise."""

from __future__ import annotations

import logging
import math
import socket
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import boto3
import botocore.exceptions
import httpx2
import pytest
import requests
from botocore.config import Config
from pyarrow import fs

from sqsd_filter.errors import InputError
from sqsd_filter.storage import retries
from sqsd_filter.storage.retries import with_retries
from tests.hub import Hub, Rule
from tests.hub_routes import Answer


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries, "FIRST_WAIT", 0.001)


def tries(call: Callable[[], Any], error: type[Exception], said: str | None = None, **how: Any) -> int:
    """How often `with_retries` calls what ends in this error."""
    count = 0

    def counted() -> Any:
        nonlocal count
        count += 1
        return call()

    with pytest.raises(error, match=said):
        with_retries(counted, **how)
    return count


def raising(problem: Exception, cause: Exception | None = None) -> Callable[[], Any]:
    def call() -> None:
        raise problem from cause

    return call


@pytest.fixture
def closed() -> Iterator[str]:
    """An address where nobody listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{taken.getsockname()[1]}"


def boto(url: str) -> Any:
    once = Config(retries={"total_max_attempts": 1})
    keys = {"aws_access_key_id": "anyone", "aws_secret_access_key": "anything", "region_name": "us-east-1"}
    return boto3.client("s3", endpoint_url=url, config=once, **keys)


def pyarrow_s3(address: str) -> fs.S3FileSystem:
    once = fs.AwsStandardS3RetryStrategy(max_attempts=1)
    where = {"endpoint_override": address, "scheme": "http", "region": "us-east-1"}
    return fs.S3FileSystem(**where, access_key="anyone", secret_key="anything", retry_strategy=once)


@pytest.mark.parametrize(("status", "expected"), [(403, 1), (404, 1), (409, 1), (429, 5), (500, 5), (503, 5)])
def test_each_client_is_tried_again_by_the_status_that_the_server_answers(hub: Hub, status: int, expected: int) -> None:
    def httpx_get() -> None:
        httpx2.get(f"{hub.url}/bucket/file").raise_for_status()

    def requests_get() -> None:
        requests.get(f"{hub.url}/bucket/file", timeout=10).raise_for_status()

    hub.fail("GET", "/bucket/file", status=status, times=math.inf)
    assert tries(httpx_get, httpx2.HTTPStatusError, str(status)) == expected
    assert tries(requests_get, requests.HTTPError, str(status)) == expected
    client = boto(hub.url)
    get = tries(lambda: client.get_object(Bucket="bucket", Key="file"), botocore.exceptions.ClientError)
    assert get == expected
    assert len(hub.seen("GET", "/bucket/file")) == 3 * expected


@pytest.mark.parametrize(
    ("status", "code", "words", "expected"),
    [
        (403, "AccessDenied", "ACCESS_DENIED", 1),
        (403, "InvalidAccessKeyId", "INVALID_ACCESS_KEY_ID", 1),
        (403, "SignatureDoesNotMatch", "SIGNATURE_DOES_NOT_MATCH", 1),
        (404, "NoSuchBucket", "NO_SUCH_BUCKET", 1),
        (400, "ExpiredToken", r"UNKNOWN \(HTTP status 400\)", 1),
        (400, "InvalidRequest", r"\[code \d+\]", 1),
        (503, "SlowDown", "SLOW_DOWN", 5),
        (500, "InternalError", "INTERNAL_FAILURE", 5),
        (502, "Other", r"UNKNOWN \(HTTP status 502\)", 5),
    ],
)
def test_an_answer_of_s3_that_would_be_the_same_again_is_final(
    hub: Hub, status: int, code: str, words: str, expected: int
) -> None:
    body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>no</Message></Error>".encode()
    hub.rules.append(Rule("GET", "/bucket", math.inf, answer=Answer(body, status)))
    there = pyarrow_s3(hub.url.removeprefix("http://"))
    look = tries(lambda: there.get_file_info(fs.FileSelector("bucket")), OSError, f"AWS Error {words}")
    assert look == expected


def test_nobody_at_the_address_is_tried_again_whichever_client_says_so(closed: str, hub: Hub) -> None:
    url = f"http://{closed}/bucket/file"
    assert tries(lambda: httpx2.get(url), httpx2.ConnectError) == 5
    assert tries(lambda: requests.get(url, timeout=10), requests.ConnectionError) == 5
    client = boto(f"http://{closed}")
    assert tries(lambda: client.list_buckets(), botocore.exceptions.EndpointConnectionError) == 5
    there = pyarrow_s3(closed)
    assert tries(lambda: there.open_input_file("bucket/file"), OSError, "NETWORK_CONNECTION") == 5
    hub.cut("GET", "/bucket/file", sent=0, times=math.inf)
    assert tries(lambda: httpx2.get(f"{hub.url}/bucket/file"), httpx2.RemoteProtocolError) == 5
    assert tries(lambda: requests.get(f"{hub.url}/bucket/file", timeout=10), requests.ConnectionError) == 5


@pytest.mark.parametrize(
    ("ask", "error"),
    [
        (lambda: httpx2.get("nowhere://host/file"), httpx2.UnsupportedProtocol),
        (lambda: httpx2.get("http://host:port/file"), httpx2.InvalidURL),
        (lambda: requests.get("nowhere://host/file", timeout=10), requests.exceptions.InvalidSchema),
        (lambda: requests.get("http:///file", timeout=10), requests.exceptions.InvalidURL),
        (lambda: boto3.client("s3", region_name="a", endpoint_url="x"), ValueError),
        (Path("/nothing/here").read_bytes, FileNotFoundError),
        (Path("/").read_bytes, IsADirectoryError),
    ],
    ids=["httpx-scheme", "httpx-url", "requests-scheme", "requests-url", "boto-url", "missing", "folder"],
)
def test_a_request_that_can_never_succeed_is_made_once(ask: Callable[[], Any], error: type[Exception]) -> None:
    assert tries(ask, error) == 1


def test_what_was_tried_with_retries_is_not_tried_again_around_it(hub: Hub) -> None:
    hub.fail("GET", "/bucket/file", status=503, times=math.inf)

    def ask() -> None:
        try:
            with_retries(lambda: httpx2.get(f"{hub.url}/bucket/file").raise_for_status())
        except httpx2.HTTPError as problem:
            raise InputError("The file can't be had.") from problem

    assert tries(ask, InputError) == 1
    assert len(hub.seen("GET", "/bucket/file")) == 5


def test_an_error_that_wraps_one_for_the_user_is_final_too() -> None:
    final = InputError("final")
    final.__cause__ = ConnectionResetError("reset")
    assert tries(raising(RuntimeError("wrapped"), final), RuntimeError) == 1
    assert tries(raising(RuntimeError("wrapped"), ConnectionResetError("reset")), RuntimeError) == 5


def test_a_server_is_given_the_time_it_asks_for_unless_that_is_more_than_a_call_may_wait(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    def get(url: str) -> None:
        httpx2.get(url).raise_for_status()

    assert retries.LONGEST_WAIT == 600
    monkeypatch.setattr(retries, "LONGEST_WAIT", 2.5)
    for asked, expected in [("1", 3), ("3", 1), ("soon", 5)]:
        hub.fail("GET", f"/{asked}$", status=429, headers={"Retry-After": asked}, times=math.inf)
        start = time.monotonic()
        assert tries(partial(get, f"{hub.url}/{asked}"), httpx2.HTTPStatusError) == expected
        assert time.monotonic() - start >= (expected - 1 if asked == "1" else 0)


def test_other_statuses_may_pass_where_the_caller_says_so(hub: Hub) -> None:
    hub.fail("GET", "/file", status=412, times=math.inf)

    def ask() -> None:
        httpx2.get(f"{hub.url}/file").raise_for_status()

    assert tries(ask, httpx2.HTTPStatusError) == 1
    assert tries(ask, httpx2.HTTPStatusError, transient_statuses=(412,)) == 5


def test_each_further_try_is_told_in_one_line(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger=retries.__name__)
    left = [ConnectionResetError("reset\nby peer"), EOFError("ended")]
    assert with_retries(lambda: raising(left.pop(0))() if left else "done") == "done"
    assert [record.getMessage() for record in caplog.records] == [
        "reset; trying again in 0 s",
        "ended; trying again in 0 s",
    ]
    assert {record.levelname for record in caplog.records} == {"INFO"}
