"""Publishing to a folder behind a URL: all of it or known as half of it, and nobody else's files touched."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, ClassVar, cast

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from pyarrow import fs

from sqsd_filter.corpus.addresses import Opener
from sqsd_filter.corpus.sources import Corpus
from sqsd_filter.errors import DestinationExists, SQSDError, UsageError
from sqsd_filter.pipeline.publishing.bucket import Bucket
from sqsd_filter.pipeline.publishing.target import MARKER, Finished
from sqsd_filter.pipeline.report import FinishedReport
from sqsd_filter.storage.layout import ITSELF

FILES = {
    "README.md": b"card",
    "data/kept.jsonl": b"{}\n" * 1000,
    "data/dropped.jsonl": b"{}\n",
    "_sqsd/report.json": b"",
}


def finished(folder: Path, run: str = "one", files: dict[str, bytes] = FILES) -> Finished:
    report = {"status": "ok", "files": [{"path": name, "config": "kept"} for name in files if "data" in name]}
    files = {**files, "_sqsd/report.json": json.dumps(report).encode()}
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return Finished(
        run, {name: folder / name for name in files}, cast("FinishedReport", report), lambda report, name: ""
    )


@pytest.fixture
def memory() -> Iterator[str]:
    yield "memory://bucket/out"
    fsspec.filesystem("memory").rm("/bucket", recursive=True)


@pytest.fixture
def s3(moto: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "anyone")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "anything")
    options = f"endpoint_override={moto}&scheme=http&allow_bucket_creation=true"
    there, path = fs.FileSystem.from_uri(f"s3://bucket?{options}")
    there.create_dir(path)
    return f"s3://bucket/{tmp_path.name}?{options}"


@pytest.fixture(params=["memory", "s3"])
def url(request: pytest.FixtureRequest) -> str:
    address: str = request.getfixturevalue(request.param)
    return address


def content(url: str) -> dict[str, bytes]:
    bucket = Bucket(url)
    return {name: bucket.read(name) for name in bucket.sizes()}


def test_a_run_is_published_whole_and_known_again(url: str, tmp_path: Path) -> None:
    bucket, run = Bucket(url), finished(tmp_path)
    bucket.check()
    assert bucket.published("one") is None
    assert bucket.publish(run) == {"url": url}
    files = content(url)
    marked = {"run": "one", "rows": ["kept"], "files": sorted([*FILES, MARKER]), "complete": True}
    assert json.loads(files.pop(MARKER)) == marked
    assert files == {name: path.read_bytes() for name, path in run.files.items()}
    assert bucket.published("one") == run.report
    with pytest.raises(DestinationExists, match="holds another run"):
        bucket.published("two")


def test_what_this_tool_did_not_write_is_left_alone_unless_asked(url: str, tmp_path: Path) -> None:
    Bucket(url).write("theirs/a.txt", b"theirs")
    with pytest.raises(DestinationExists, match=r"holds theirs/a\.txt, which this command did not write"):
        Bucket(url).check()
    Bucket(url, overwrite=True).publish(finished(tmp_path))
    assert set(content(url)) == {*FILES, MARKER}


def test_an_interrupted_upload_goes_on_and_is_not_taken_for_whole(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = finished(tmp_path)
    written: list[str] = []
    write = Bucket.write

    def failing(self: Bucket, name: str, data: Any) -> None:
        if len(written) == 3:
            raise KeyboardInterrupt
        written.append(name)
        write(self, name, data)

    monkeypatch.setattr(Bucket, "write", failing)
    with pytest.raises(KeyboardInterrupt):
        Bucket(url).publish(run)
    assert Bucket(url).published("one") is None
    with pytest.raises(DestinationExists, match="holds another run"):
        Bucket(url).published("two")
    written.append("")
    Bucket(url).publish(run)
    assert written[4:] == [MARKER, "data/dropped.jsonl", "_sqsd/report.json", MARKER]
    assert Bucket(url).published("one") == run.report


def test_what_others_put_beside_a_run_stays_there(url: str, tmp_path: Path) -> None:
    run = finished(tmp_path)
    Bucket(url).publish(run)
    Bucket(url).write("notes.txt", b"theirs")
    Bucket(url).publish(run)
    assert set(content(url)) == {*FILES, MARKER, "notes.txt"}


class Plain(MemoryFileSystem):  # type: ignore[misc]  # fsspec is not typed
    """A server whose rename takes two names and no options, and refuses a name that is taken: silently or not."""

    protocol = "plain"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    silent = False
    moved: ClassVar[list[str]] = []

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return "/" + path.removeprefix("plain://").strip("/")

    def mv(self, old: str, new: str) -> None:
        self.moved.append(new)
        if not self.exists(new):
            super().mv(old, new)
        elif not self.silent:
            raise FileExistsError(new)


@pytest.fixture(params=[False, True], ids=["raises", "silent"])
def plain(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    for name, value in (("store", {}), ("pseudo_dirs", [""]), ("moved", []), ("silent", request.param)):
        monkeypatch.setattr(Plain, name, value)
    monkeypatch.setattr("sqsd_filter.storage.retries.FIRST_WAIT", 0.0)
    fsspec.register_implementation("plain", Plain, clobber=True)
    return "plain://bucket/out"


def test_a_folder_is_written_in_place_where_renaming_is_not_to_be_relied_on(plain: str, tmp_path: Path) -> None:
    Bucket(plain).publish(finished(tmp_path / "a"))
    Bucket(plain, overwrite=True).publish(finished(tmp_path / "b", "two", {**FILES, "README.md": b"CARD"}))
    assert set(content(plain)) == {*FILES, MARKER}
    assert content(plain)["README.md"] == b"CARD"
    assert Plain.moved == []


def test_the_file_that_is_the_destination_takes_the_place_of_another_by_renaming(plain: str) -> None:
    url = f"{plain}.jsonl"
    for rows in (b"old", b"new rows"):
        Bucket(url, is_file=True).write(ITSELF, rows)
        assert Bucket(url, is_file=True).read(ITSELF) == rows
    assert list(Plain.store) == ["/bucket/out.jsonl"]
    assert Plain.moved == ["/bucket/out.jsonl"] * 2


def test_a_rename_that_does_nothing_is_noticed(plain: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Plain, "mv", lambda *_: None)
    with pytest.raises(SQSDError, match=r"can't be written .*out\.jsonl\.tmp was not renamed to /bucket/out\.jsonl"):
        Bucket(f"{plain}.jsonl", is_file=True).write(ITSELF, b"rows")


@pytest.mark.parametrize("stored", [b"[1]", b"{", b'{"run": "one"}'])
def test_a_broken_marker_is_foreign(memory: str, stored: bytes) -> None:
    Bucket(memory).write(MARKER, stored)
    with pytest.raises(DestinationExists, match="which this command did not write"):
        Bucket(memory).published("one")


def test_inputs_below_the_replaced_folder_are_seen() -> None:
    memory = "memory://bucket/out"
    Bucket(memory, overwrite=True).spare("memory://bucket/outside/a.jsonl")
    Bucket(memory).spare(f"{memory}/a.jsonl")
    with pytest.raises(DestinationExists, match=r"holds the input memory://bucket/out/a\.jsonl"):
        Bucket(memory, overwrite=True).spare(f"{memory}/a.jsonl")


def test_overwriting_replaces_another_run_and_leaves_nothing_of_it(url: str, tmp_path: Path) -> None:
    Bucket(url).publish(finished(tmp_path / "a", files={**FILES, "data/kept-2.jsonl": b"old"}))
    other = finished(tmp_path / "b", "two", {**FILES, "README.md": b"CARD"})
    Bucket(url, overwrite=True).publish(other)
    files = content(url)
    assert set(files) == {*FILES, MARKER}
    assert files["README.md"] == b"CARD"


@pytest.mark.slow
def test_a_server_that_is_not_there_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sqsd_filter.storage.retries.FIRST_WAIT", 0.0)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "anyone")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "anything")
    monkeypatch.setattr("sqsd_filter.storage.retries.TRIES", 2)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    url = f"s3://bucket/x?endpoint_override=127.0.0.1:{port}&scheme=http&region=us-east-1"
    with pytest.raises(SQSDError, match=r"s3://bucket/x.*can't be written .*run the same command again"):
        Bucket(url).check()


def test_a_url_with_a_secret_is_refused() -> None:
    with pytest.raises(UsageError, match="must not hold a password or a key"):
        Bucket("s3://user:pass@bucket/x")


@pytest.fixture
def weed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A bucket on a SeaweedFS of its own."""
    keys = {"accessKey": "anyone", "secretKey": "anything"}
    identity = {"name": "anyone", "credentials": [keys], "actions": ["Admin", "Read", "Write", "List"]}
    (tmp_path / "s3.json").write_text(json.dumps({"identities": [identity]}))
    (tmp_path / "weed").mkdir()
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(8)]
        for free in sockets:
            free.bind(("127.0.0.1", 0))
        ports = [free.getsockname()[1] for free in sockets]
    names = [f"{part}.port{kind}" for part in ("master", "volume", "filer", "s3") for kind in ("", ".grpc")]
    command = ["weed", "server", f"-dir={tmp_path / 'weed'}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-filer", "-s3"]
    command += [f"-{name}={port}" for name, port in zip(names, ports, strict=True)]
    command += [f"-s3.config={tmp_path / 's3.json'}", "-master.volumeSizeLimitMB=16", "-volume.max=20"]
    command[0] = str(Path(sys.executable).with_name("weed"))
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "anyone")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "anything")
    options = f"endpoint_override=127.0.0.1:{ports[6]}&scheme=http&allow_bucket_creation=true&region=us-east-1"
    with (tmp_path / "weed.log").open("wb") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        for _ in range(60):
            try:
                there, _ = fs.FileSystem.from_uri(f"s3://bucket?{options}")
                there.create_dir("bucket")
                with there.open_output_stream("bucket/ready") as sink:
                    sink.write(b"yes")
                break
            except OSError:
                time.sleep(0.5)
        there.delete_file("bucket/ready")
        yield f"s3://bucket/out?{options}"
    finally:
        server.kill()
        server.wait()


@pytest.mark.slow
def test_a_real_object_store_holds_the_same_and_is_read_back(weed: str, tmp_path: Path) -> None:
    run = finished(tmp_path / "run", files={**FILES, "data/kept.jsonl": b'{"n": 1}\n' * 1_000_000})
    Bucket(weed).publish(run)
    assert {name: data for name, data in content(weed).items() if name != MARKER} == {
        name: path.read_bytes() for name, path in run.files.items()
    }
    assert Bucket(weed).published("one") == run.report
    where, _, options = weed.partition("?")
    corpus = Corpus.scan(Opener().open([f"{where}/data/k*.jsonl?{options}"]))
    assert corpus.n_rows == 1_000_000
    assert [row.value for row in corpus.read(999_998, 2_000_000)] == [{"n": 1}] * 2
