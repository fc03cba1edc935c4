"""Reads files as a run reads them, in a process that may die of it, and compares each value with a second parser's."""

from __future__ import annotations

import csv
import gzip
import io
import json
import resource
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from sqsd_filter.corpus.addresses import Opener
from sqsd_filter.corpus.table_formats import Table
from sqsd_filter.corpus.text_formats import Csv, TextFile
from sqsd_filter.errors import InputError

MEMORY = 8 << 30  # bytes of addresses: a file that asks for more must be refused, and not take the machine with it
STRICTER = (  # what is refused although Python's parser reads something: it would be changed, or can't be written
    "not an object",
    "stands twice in one object",
    "a number too large for a float",
    "a number too small for a float",
    "nested deeper than",
    "NUL in a column name",
    "lone surrogate",
)
UNREADABLE = object()


def examine(paths: Sequence[Path], sink: Path) -> None:
    """Compare every file. A line of JSON goes to `sink` before each and one after it: the last says where this process
    has died."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    with sink.open("a") as results:
        for path in paths:
            print(json.dumps({"begun": path.name}), file=results, flush=True)
            print(json.dumps({"file": path.name, **_examine(path)}), file=results, flush=True)


def _examine(path: Path) -> dict[str, Any]:
    try:
        reader = Opener().open([path])[0].reader
        return _compare_table(reader, path) if isinstance(reader, Table) else _compare_text(reader, path)
    except InputError as refusal:
        wrong = [] if str(refusal).endswith(".") and "\n" not in str(refusal) else [f"not a sentence: {refusal!s:.200}"]
        return {"outcome": "refused", "faults": wrong}
    except BaseException:
        return {"outcome": "failed", "faults": [traceback.format_exc()[-600:]]}


def _compare_table(reader: Table, path: Path) -> dict[str, Any]:
    ours = [row for table in reader.tables(0, reader.n_rows, None, 1000) for row in reader.decode(table)]
    try:
        theirs = _pyarrow_rows(path)
    except (pa.ArrowException, OSError, ValueError):
        return {"outcome": "read", "rows": len(ours), "compared": 0, "faults": []}
    wrong = [] if len(ours) == len(theirs) == reader.n_rows else [f"{len(ours)} rows, {len(theirs)} by pyarrow"]
    return {"outcome": "read", "rows": len(ours), "compared": len(theirs), "faults": wrong + _differing(ours, theirs)}


def _pyarrow_rows(path: Path) -> list[dict[str, Any]]:
    if path.suffix == ".parquet":
        return list(pq.ParquetFile(path).read().to_pylist())
    data = path.read_bytes()
    opened = pa.ipc.open_file(data) if data.startswith(b"ARROW1") else pa.ipc.open_stream(data)
    return list(opened.read_all().to_pylist())


def _compare_text(reader: Any, path: Path) -> dict[str, Any]:  # noqa: ANN401  (a JSON reader has the same records)
    assert isinstance(reader, TextFile)
    ours = list(reader.records())
    theirs = list((_csv_rows if isinstance(reader, Csv) else _json_rows)(_plain(path)))
    facts: dict[str, Any] = {"outcome": "read", "rows": len(ours), "compared": 0, "faults": []}
    if len(ours) != len(theirs):
        return {**facts, "faults": [f"{len(ours)} rows, {len(theirs)} by the second parser"]}
    stricter: Counter[str] = Counter()
    for (_, line, value, problem, raw), (their_raw, other) in zip(ours, theirs, strict=True):
        if their_raw is not None and raw != their_raw:
            facts["faults"].append(f"line {line} has other bytes")
        if value is None and other is not UNREADABLE and not isinstance(reader, Csv):
            reason = next((known for known in STRICTER if known in problem), "")
            stricter[reason] += 1
            facts["faults"] += [] if reason else [f"line {line} is refused ({problem}), and Python's json reads it"]
        elif value is not None:
            facts["compared"] += 1
            facts["faults"] += _differing([value], [None if other is UNREADABLE else other])
    return {**facts, "stricter": dict(stricter)}


def _plain(path: Path) -> bytes:
    data = path.read_bytes()
    if path.suffix == ".gz":
        return gzip.decompress(data)
    if path.suffix == ".zst":
        with zstandard.ZstdDecompressor().stream_reader(data, read_across_frames=True) as opened:
            return bytes(opened.read())
    return data


def _json_rows(data: bytes) -> Iterator[tuple[bytes | None, object]]:
    for raw in data.removeprefix(b"\xef\xbb\xbf").split(b"\n"):
        if raw and not raw.isspace():
            try:
                yield raw, json.loads(raw.decode())
            except (ValueError, RecursionError):
                yield raw, UNREADABLE


def _csv_rows(data: bytes) -> Iterator[tuple[bytes | None, object]]:
    """Rows that Python's reader makes of the whole text, as dicts where they fit the header."""
    text = data.removeprefix(b"\xef\xbb\xbf").decode("utf-8", "surrogateescape")
    reader, header = csv.reader(io.StringIO(text, newline="\n"), strict=True), None
    while True:
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error:
            yield None, UNREADABLE
            continue
        if not row or (len(row) == 1 and row[0] and not row[0].strip(" \r")):
            continue
        if header is None:
            header = row
        else:
            yield None, dict(zip(header, row, strict=True)) if len(row) == len(header) else UNREADABLE


def _differing(ours: list[Any], theirs: list[Any]) -> list[str]:
    """Compared as text, which keeps 1, 1.0 and True, -0.0 and the order of keys apart."""
    return [
        f"{a!r:.100} is {b!r:.100} by the second parser"
        for a, b in zip(ours, theirs, strict=False)
        if repr(a) != repr(b)
    ][:3]
