"""Files for tests of the corpus reader, and the rows that it finds in them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from sqsd_filter.corpus import addresses
from sqsd_filter.corpus.addresses import Opener, Source, expand
from sqsd_filter.corpus.sources import Corpus

ROWS: list[dict[str, Any]] = [
    {"id": i, "messages": [{"role": "user", "content": f"é\u2028 {i}"}, {"role": "assistant", "content": "ok\n" * i}]}
    for i in range(1300)
]


def jsonl(rows: list[Any]) -> bytes:
    return b"".join(json.dumps(row, ensure_ascii=i % 2 == 0).encode() + b"\n" for i, row in enumerate(rows))


def write(path: Path, data: bytes) -> str:
    path.write_bytes(data)
    return str(path)


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> str:
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=200)
    return str(path)


def opened(*sources: Any) -> list[Source]:
    return Opener().open(expand(sources))


def peek(sources: list[str], n: int = 1000) -> list[dict[str, Any]]:
    return addresses.peek(opened(*sources), n)


def values(corpus: Corpus) -> list[dict[str, Any] | None]:
    return [row.value for row in corpus.read(0, corpus.n_rows)]


def exact(value: Any) -> str:
    """A text that tells 1 from 1.0 and from True, and NaN equal to itself."""
    return json.dumps(value, sort_keys=True)
