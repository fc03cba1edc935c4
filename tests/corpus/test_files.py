"""Files behind URLs: what fails for good is said in one sentence, and each name opens the file that was found."""

from __future__ import annotations

import json
import logging
import math
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import httpx2
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFile

from sqsd_filter.corpus.addresses import Opener, Source
from sqsd_filter.corpus.sources import Corpus
from sqsd_filter.errors import InputError
from sqsd_filter.storage.folder import connect
from tests.hub import Hub


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sqsd_filter.storage.retries.FIRST_WAIT", 0.001)


def lines(*numbers: int) -> bytes:
    return b"".join(json.dumps({"n": n, "text": "yes"}).encode() + b"\n" for n in numbers)


def parquet(rows: int) -> bytes:
    sink = pa.BufferOutputStream()
    texts = [f"{n * 7919 % 1_000_003:>60}" for n in range(rows)]
    pq.write_table(pa.table({"n": range(rows), "text": texts}), sink, row_group_size=1000, compression="none")
    return bytes(sink.getvalue())


def numbers(*given: str) -> list[int]:
    return [row.value["n"] for row in rows(Opener().open(given)) if row.value]


def rows(sources: list[Source]) -> list[Any]:
    corpus = Corpus.scan(sources)
    return list(corpus.read(0, corpus.n_rows))


class Leaving(MemoryFile):  # type: ignore[misc]  # fsspec has no types
    """A remote file whose server has gone when it was read a number of times, for some tries."""

    before, gone = 0, 0.0

    def read(self, size: int = -1) -> bytes:
        if Leaving.before > 0:
            Leaving.before -= 1
        elif Leaving.gone > 0:
            Leaving.gone -= 1
            httpx2.get("http://127.0.0.1:1/nobody")
        return bytes(super().read(size))


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A bucket in which files are `Leaving`."""
    bucket = fsspec.filesystem("memory")
    bucket.pipe("/bucket/a.jsonl", lines(*range(100_000)))
    bucket.pipe("/bucket/b.parquet", parquet(200_000))
    monkeypatch.setattr(
        type(bucket), "_open", lambda self, path, *_, **__: Leaving(self, path, self.store[path].getvalue())
    )
    yield bucket
    Leaving.before, Leaving.gone = 0, 0
    bucket.rm("/bucket", recursive=True)


@pytest.mark.parametrize("name", ["a.jsonl", "b.parquet"])
@pytest.mark.parametrize("before", [0, 1, 3])
def test_a_server_that_goes_away_is_one_sentence_and_no_broken_content(memory: Any, name: str, before: int) -> None:
    said = rf"^Cannot read memory://bucket/{name}: [^\n]*refused\.$"
    sources = Opener().open([f"memory://bucket/{name}"])
    corpus = Corpus.scan(sources)
    Leaving.before, Leaving.gone = before, math.inf
    with pytest.raises(InputError, match=said):
        list(corpus.read(0, corpus.n_rows))
    Leaving.before = before
    with pytest.raises(InputError, match=said):
        Corpus.scan(sources)


def test_content_that_is_broken_is_called_so_wherever_it_is(hub: Hub, tmp_path: Path) -> None:
    whole = parquet(10_000)
    torn = whole[:1000] + bytes(100_000) + whole[201_000:]
    hub.add("org/sums", {"cut.parquet": whole[:-100], "torn.parquet": torn})
    for name, content in {"cut.parquet": whole[:-100], "torn.parquet": torn}.items():
        (tmp_path / name).write_bytes(content)
        for given in (str(tmp_path / name), f"hf://datasets/org/sums/{name}"):
            with pytest.raises(InputError, match=r"is truncated or corrupt \(.*write or fetch it again"):
                rows(Opener(streaming=True).open([given]))


@pytest.mark.parametrize("name", ["a.jsonl", "b.parquet"])
def test_a_pickled_corpus_is_read_as_patiently_and_tells_of_it(
    memory: Any, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="sqsd_filter")
    corpus: Corpus = pickle.loads(pickle.dumps(Corpus.scan(Opener().open([f"memory://bucket/{name}"]))))
    Leaving.gone = 3
    assert [row.value["n"] for row in corpus.read(0, 3000) if row.value] == list(range(3000))
    retries = [record for record in caplog.records if "refused; trying again in" in record.getMessage()]
    assert [record.levelname for record in retries] == ["INFO"] * 3


ODD = ["a#1.jsonl", "b?x=1.jsonl", "c%41.jsonl", "d é.jsonl", "e[1].jsonl", "f*.jsonl", "g=1/h+1,(2).jsonl", "e1.jsonl"]


@pytest.fixture(params=["memory", "s3", "file"])
def place(
    request: pytest.FixtureRequest, moto: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[str, str]]:
    """A folder that holds a row in each file of an odd name, with its own number: its URL and the query of that."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "anyone")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "anything")
    query = f"?endpoint_override={moto}&scheme=http&allow_bucket_creation=true" if request.param == "s3" else ""
    base = {"memory": "memory://odd/in", "s3": "s3://odd/in", "file": f"file://{tmp_path}"}[request.param]
    there, root = connect(base + query)
    there.create_dir(root.partition("/")[0] or root)
    for number, name in enumerate(ODD):
        there.create_dir(f"{root}/{name}".rpartition("/")[0], recursive=True)
        with there.open_output_stream(f"{root}/{name}") as sink:
            sink.write(lines(number))
    yield base, query
    there.delete_dir(root)


def test_each_name_that_was_found_opens_its_own_file_and_does_so_again_by_its_address(place: tuple[str, str]) -> None:
    base, query = place
    sources = Opener().open([f"{base}/**/*.jsonl{query}"])
    found = {source.spec: rows([source]) for source in sources}
    assert sorted(row.value["n"] for [row] in found.values()) == list(range(len(ODD)))
    for spec, [row] in found.items():
        [again] = Opener().open([spec])
        assert again.spec == again.reader.name == spec
        assert rows([again]) == [row]


def test_a_pattern_finds_odd_names_by_their_address(place: tuple[str, str]) -> None:
    base, query = place
    hash_, mark = ("#", "?") if base.startswith("memory") else ("%23", "%3F")
    assert numbers(f"{base}/a{hash_}*.jsonl{query}") == [0]
    assert numbers(f"{base}/b{mark}*.jsonl{query}") == [1]
    assert numbers(f"{base}/[bd]*.jsonl{query}") == [1, 3]
    with pytest.raises(InputError, match="No file matches"):
        numbers(f"{base}/a{mark}*.jsonl{query}")


def test_local_paths_with_odd_names_are_read_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for number, name in enumerate(ODD):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_bytes(lines(number))
    for number, name in enumerate(ODD):
        assert numbers(name) == numbers(str(tmp_path / name)) == [number]
    Path("a.jsonl?x").write_bytes(lines(0))
    with pytest.raises(InputError, match=r"a\.jsonl\?x has no extension that names its format"):
        numbers("a.jsonl?x")


@pytest.mark.parametrize("streaming", [False, True])
def test_odd_names_of_the_hub_are_read_kept_or_streamed(hub: Hub, streaming: bool) -> None:
    names = ["a#1.jsonl", "b%41.jsonl", "c é.jsonl"]
    hub.add("org/sums", {name: lines(number) for number, name in enumerate(names)})
    opener = Opener(streaming=streaming)
    for number, name in enumerate(names):
        [source] = opener.open([f"hf://datasets/org/sums/{name}"])
        assert [row.value for row in rows([source])] == [{"n": number, "text": "yes"}]
        assert [row.value for row in rows(opener.open([source.spec]))] == [{"n": number, "text": "yes"}]
