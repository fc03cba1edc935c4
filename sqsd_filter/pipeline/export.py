"""Back to disk: every row to exactly one place, in input order, its own values untouched."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sqsd_filter.errors import SQSDError
from sqsd_filter.pipeline.scored import SCORE_PREFIX, Scored
from sqsd_filter.pipeline.selection import DROPPED, ERROR, KEPT, Selection
from sqsd_filter.pipeline.sources import Chunk
from sqsd_filter.scoring.conversation import BAD_JSON

SPLITS = {"kept": KEPT, "dropped": DROPPED, "errors": ERROR}

RAW = "sqsd_raw"  # the bytes of a line that is no row


def data_file(split: str) -> str:
    return f"{split}-00000-of-00001.parquet"


def export_splits(scored: Scored, selection: Selection, folder: Path) -> dict[str, int]:
    """Write kept, dropped and errors into `folder`, and say how many rows each got.

    Kept and dropped rows carry the score columns; error rows their status, the reason in words and where they came
    from, with the line's own bytes where it could not be read. Raises `SQSDError` when the disk refuses, or when a
    row would not be accounted for.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written = dict.fromkeys(SPLITS, 0)
    with ExitStack() as stack:
        sinks = {split: stack.enter_context(_writer(folder / data_file(split))) for split in SPLITS}
        for chunk, own, with_scores in _chunks(scored):
            place = selection.place[chunk.start : chunk.start + own.num_rows]
            for split, code in SPLITS.items():
                where = np.flatnonzero(place == code)
                part = _errors(scored, chunk, own, where) if code == ERROR else with_scores.take(where)
                sinks[split](part)
                written[split] += part.num_rows
    if sum(written.values()) != scored.corpus.n_rows:
        raise SQSDError(f"{scored.corpus.n_rows} rows came in, but {written} went out: please report this as a bug.")
    return written


def export_scored(scored: Scored, path: Path) -> None:
    """Write every row, in order, with its score columns; `sqsd_raw` holds the bytes of lines that can't be read."""
    unreadable = BAD_JSON in scored.reasons() or RAW in scored.corpus.schema.names
    with _writer(path) as sink:
        for chunk, own, with_scores in _chunks(scored):
            raw = {RAW: _raw(chunk, range(own.num_rows))} if unreadable else {}
            sink(_with_columns(with_scores, raw))


def _chunks(scored: Scored) -> Iterator[tuple[Chunk, pa.Table, pa.Table]]:
    """The corpus in chunks, each without and with score columns: those of an earlier run make way for new ones."""
    for chunk in scored.corpus.chunks():
        names = chunk.table.column_names
        own = _only(chunk.table, [n for n in names if not n.startswith(SCORE_PREFIX)])
        if scored.probes:
            yield chunk, own, _with_columns(own, scored.columns(chunk.start, chunk.start + own.num_rows))
        else:
            scores = [n for n in names if n.startswith(SCORE_PREFIX) and n != RAW]
            yield chunk, own, _only(chunk.table, [*own.column_names, *scores])


def _only(table: pa.Table, names: list[str]) -> pa.Table:
    if table.column_names == names:
        return table
    dropped = set(table.column_names) - set(names)
    metadata = _features(table.schema, lambda features: [features.pop(name, None) for name in dropped])
    return table.select(names).replace_schema_metadata(metadata)


def _with_columns(table: pa.Table, columns: dict[str, pa.Array]) -> pa.Table:
    added = {name: {"dtype": str(a.type).replace("double", "float64"), "_type": "Value"} for name, a in columns.items()}
    metadata = _features(table.schema, lambda features: features.update(added))
    for name, values in columns.items():
        table = table.append_column(name, values)
    return table.replace_schema_metadata(metadata)


def _features(schema: pa.Schema, change: Any) -> dict[bytes, bytes] | None:
    """The schema's metadata with the Hugging Face features in it, if there are any, changed."""
    metadata = dict(schema.metadata or {})
    if b"huggingface" in metadata:
        info = json.loads(metadata[b"huggingface"])
        if features := (info.get("info") or {}).get("features"):
            change(features)
            metadata[b"huggingface"] = json.dumps(info).encode()
    return metadata or None


def _errors(scored: Scored, chunk: Chunk, own: pa.Table, where: np.ndarray) -> pa.Table:
    names = [scored.statuses[c] for c in scored.codes[chunk.start + where]]
    return _with_columns(
        own.take(where),
        {
            "sqsd_status": pa.array(names, pa.string()),
            "sqsd_reason": pa.array([scored.detail(chunk, k) for k in where.tolist()], pa.string()),
            "sqsd_file": pa.array([chunk.files[k] for k in where], pa.string()),
            "sqsd_line": pa.array([chunk.lines[k] for k in where], pa.int64()),
            RAW: _raw(chunk, where.tolist()),
        },
    )


def _raw(chunk: Chunk, rows: Any) -> pa.Array:
    """The bytes of lines that could not be read, now or when their scores were written; null for those that could."""
    before = chunk.table[RAW].to_pylist() if RAW in chunk.table.column_names else [None] * chunk.table.num_rows
    return pa.array([chunk.raws[k] if chunk.problems[k] else before[k] for k in rows], pa.binary())


@contextmanager
def _writer(path: Path) -> Iterator[Any]:
    """A function that appends tables to a parquet file, which gets its name when all has been written."""
    temporary = path.with_name(f".{path.name}.tmp")
    sink: pq.ParquetWriter | None = None

    def write(table: pa.Table) -> None:
        nonlocal sink
        if sink is None:
            sink = pq.ParquetWriter(temporary, table.schema)
        if table.num_rows:
            sink.write_table(table)

    try:
        yield write
        if sink is not None:
            sink.close()
            temporary.replace(path)
    except OSError as problem:
        raise SQSDError(
            f"{path} can't be written ({problem}): make room and run the same command again; no score is lost."
        ) from problem
    finally:
        if sink is not None:
            with suppress(OSError):
                sink.close()
        temporary.unlink(missing_ok=True)
