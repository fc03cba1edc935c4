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

from sqsd_filter.errors import InputError
from sqsd_filter.pipeline.reading.addresses import Opener, Source
from sqsd_filter.pipeline.reading.sources import Corpus
from tests.hub import Hub


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sqsd_filter.pipeline.patience.FIRST_WAIT", 0.001)


def lines(*numbers: int) -> bytes:
    return b"".join(json.dumps({"n": n, "text": "yes"}).encode() + b"\n" for n in numbers)


def parquet(rows: int) -> bytes:
    sink = pa.BufferOutputStream()
    texts = [f"{n * 7919 % 1_000_003:>60}" for n in range(rows)]
    pq.write_table(pa.table({"n": range(rows), "text": texts}), sink, row_group_size=1000, compression="none")
    return sink.getvalue().to_pybytes()


def numbers(*given: str) -> list[int]:
    return [row.value["n"] for row in rows(Opener().open(given)) if row.value]


def rows(sources: list[Source]) -> list[Any]:
    corpus = Corpus.scan(sources)
    return list(corpus.read(0, corpus.n_rows))


class Leaving(MemoryFile):
    """A remote file whose server has gone when it was read a number of times, for some tries."""

    before, gone = 0, 0.0

    def read(self, size: int = -1) -> bytes:
        if Leaving.before > 0:
            Leaving.before -= 1
        elif Leaving.gone > 0:
            Leaving.gone -= 1
            httpx2.get("http://127.0.0.1:1/nobody")
        return super().read(size)


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A bucket in which files are `Leaving`."""
    bucket = fsspec.filesystem("memory")
    bucket.pipe("/bucket/a.jsonl", lines(*range(100_000)))
    bucket.pipe("/bucket/b.parquet", parquet(100_000))
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
    told = [record for record in caplog.records if "refused; trying again in" in record.getMessage()]
    assert [record.levelname for record in told] == ["INFO"] * 3
