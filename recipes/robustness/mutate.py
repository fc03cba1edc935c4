"""Harmless rows and files, and what chance does to their bytes and structure."""

from __future__ import annotations

import csv
import gzip
import io
import json
import random
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

Chance = random.Random
MARKS = b'{}[]",:\\\n0-9eE.+u\x00\xff'
TOKENS = [
    *(b"NaN", b"-Infinity", b"1e400", b"1e-400", b"-0", b"007", b"9" * 25, b"9" * 5000, b"0.1e1", b"true", b"null"),
    *(rb"\ud800", rb"\u0000", rb"\x", rb"\u00e9", b"\xff", b"\xc3", b"\xef\xbb\xbf", b"\xe2\x80\xa8", b"\x00"),
    *(b'"id":1,"id":2,', b'"":0,', b"{}", b"[]", b'""', b"[" * 300, b'{"a":' * 300, b"//", b"/* */", b"'", b"  "),
    *(b"\r", b"\n", b"\t"),
]
VALUES: list[Any] = [
    *(None, True, 0, -1, 2**63, 2**64, -(10**30), 0.1, 1e308, 5e-324, "", " ", "\0", "\u2028", "007", "2024-01-31"),
    *([], {}, [[]], [None], {"": ""}, [1, "1", 1.0], {"role": "user"}, [{"role": "user", "content": "?"}], "[1, 2]"),
]


def mutate_bytes(data: bytes, source: Chance, tokens: list[bytes]) -> bytes:
    """The data after one change: a byte, a range, or one of the tokens in it."""
    at = source.randrange(len(data) + 1)
    end = min(len(data), at + source.choice((1, 2, 8, 64)))
    changes: list[Callable[[], bytes]] = [
        lambda: data[:at] + bytes([byte ^ (1 << source.randrange(8)) for byte in data[at : at + 1]]) + data[at + 1 :],
        lambda: data[:at] + bytes([source.randrange(256)]) + data[at + 1 :],
        lambda: data[:at] + bytes([source.choice(MARKS)]) + data[at + 1 :],
        lambda: data[:at] + data[end:],
        lambda: data[:end] + data[at:],
        lambda: data[:at] + bytes(end - at) + data[end:],
        lambda: data[:at] + source.choice(tokens) + data[at:],
        lambda: data[:at],
    ]
    return source.choice(changes)()


def mutate_value(row: dict[str, Any], source: Chance) -> dict[str, Any]:
    """The row after one change to its structure."""
    names = list(row)
    name = source.choice(names)
    changes: list[Callable[[], dict[str, Any]]] = [
        lambda: {**row, name: source.choice(VALUES)},
        lambda: {**row, name: [row[name]]},
        lambda: {**row, name: {"value": row[name]}},
        lambda: {**row, name: json.dumps(row[name])},
        lambda: {key: value for key, value in row.items() if key != name},
        lambda: {key: row[key] for key in source.sample(names, len(names))},
        lambda: {**row, f"extra_{source.randrange(3)}": source.choice(VALUES)},
    ]
    return source.choice(changes)()


def mutate_line(row: dict[str, Any], source: Chance) -> bytes:
    """The row as a line of JSON after one to three changes; a newline may be among them."""
    for _ in range(source.randrange(2)):
        row = mutate_value(row, source) or row
    line = json.dumps(row, ensure_ascii=source.random() < 0.5).encode()
    for _ in range(source.randint(0, 2)):
        line = mutate_bytes(line, source, TOKENS)
    return line


def _parquet(rows: list[dict[str, Any]], source: Chance) -> bytes:
    sink = io.BytesIO()
    how = {"compression": source.choice(("none", "snappy", "zstd", "gzip")), "use_dictionary": source.random() < 0.5}
    version = source.choice(("1.0", "2.0"))
    checked = source.random() < 0.5
    pq.write_table(_table(rows), sink, row_group_size=20, data_page_version=version, write_page_checksum=checked, **how)
    return sink.getvalue()


def _arrow(rows: list[dict[str, Any]], source: Chance) -> bytes:
    table, sink = _table(rows), io.BytesIO()
    options = pa.ipc.IpcWriteOptions(compression=source.choice((None, "lz4", "zstd")))
    with source.choice((pa.ipc.new_stream, pa.ipc.new_file))(sink, table.schema, options=options) as writer:
        writer.write_table(table, max_chunksize=20)
    return sink.getvalue()


def _csv(rows: list[dict[str, Any]], _: Chance) -> bytes:
    sink = io.StringIO()
    writer = csv.DictWriter(sink, [name for name in rows[0] if name != "nested"], extrasaction="ignore")
    writer.writeheader()
    writer.writerows({**row, "output": f'{row["output"]}, "quoted"\nand on'} for row in rows)
    return sink.getvalue().encode()


def _lines(rows: list[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)


def _table(rows: list[dict[str, Any]]) -> pa.Table:
    """The rows with what Arrow has types for."""
    nested = [{"n": [row["id"], None], "of": row["nested"]["b"][2], "none": None} for row in rows]
    return pa.Table.from_pylist(
        [{**row, "big": str(row["big"]), "nested": inner} for row, inner in zip(rows, nested, strict=True)]
    )


KINDS: dict[str, Callable[[list[dict[str, Any]], Chance], bytes]] = {
    "parquet": _parquet,
    "arrow": _arrow,
    "jsonl.gz": lambda rows, _: gzip.compress(_lines(rows), mtime=0),
    "jsonl.zst": lambda rows, source: zstandard.ZstdCompressor(write_checksum=source.random() < 0.5).compress(
        _lines(rows)
    ),
    "csv": _csv,
}


def mutated_file(kind: str, rows: list[dict[str, Any]], source: Chance) -> bytes:
    """A file of this kind with these rows, after one to three changes."""
    data = KINDS[kind](rows, source)
    for _ in range(source.randint(1, 3)):
        data = mutate_bytes(data, source, [b"\x00" * 64, b"\xff" * 8, b'"', b",", b"\r\n", b"\xef\xbb\xbf"])
    return data
