"""Back to disk: every row to exactly one place, in input order, its own values untouched."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sqsd_filter.errors import SQSDError
from sqsd_filter.pipeline.reading.sources import Chunk
from sqsd_filter.pipeline.scores.scored import SCORE_PREFIX, Scored
from sqsd_filter.pipeline.selection import DROPPED, ERROR, KEPT, Selection
from sqsd_filter.progress import Progress

SPLITS = {"kept": KEPT, "dropped": DROPPED, "errors": ERROR}
REASONS = "data/reasons.jsonl"  # why each line in `errors` has no score

RAW = "sqsd_raw"  # the bytes of a line that is no row
ORIGIN = {"sqsd_reason": pa.string(), "sqsd_file": pa.string(), "sqsd_line": pa.int64(), RAW: pa.binary()}


def data_file(split: str) -> str:
    return f"{split}-00000-of-00001.parquet"


def export_splits(scored: Scored, selection: Selection, folder: Path, progress: Progress) -> dict[str, int]:
    """Write kept, dropped and errors into `folder`, and say how many rows each got.

    Kept and dropped rows carry the score columns; error rows their status, the reason in words and where they came
    from, with the line's own bytes where it could not be read. What rows in `errors` hold changes no column of the
    others. Raises `SQSDError` when the disk refuses, or when a row would not be accounted for.
    """
    apt = kept_schema(scored, selection) is scored.corpus.apt_schema
    folder.mkdir(parents=True, exist_ok=True)
    written = dict.fromkeys(SPLITS, 0)
    with ExitStack() as stack:
        sinks = {split: stack.enter_context(_writer(folder / data_file(split))) for split in SPLITS}
        for chunk in scored.corpus.chunks():
            place = selection.place[chunk.start : chunk.start + chunk.table.num_rows]
            with_scores = _with_scores(scored, chunk.start, chunk.apt if apt else chunk.table)
            for split, code in SPLITS.items():
                where = np.flatnonzero(place == code)
                sinks[split](_errors(scored, chunk, where) if code == ERROR else with_scores.take(where))
                written[split] += len(where)
            progress.advance(len(place))
    if sum(written.values()) != scored.corpus.n_rows:
        raise SQSDError(f"{scored.corpus.n_rows} rows came in, but {written} went out: please report this as a bug.")
    return written


def kept_schema(scored: Scored, selection: Selection | None) -> pa.Schema:
    """What the input's columns are in kept and dropped: rows that are in neither have no say."""
    whole = selection is None or bool((selection.place[~scored.scored] == KEPT).any())
    return scored.corpus.schema if whole else scored.corpus.apt_schema


def export_scored(scored: Scored, path: Path, progress: Progress) -> None:
    """Write every row, in order, with its score columns; where rows have no score, also the columns of `errors`."""
    errors = bool(scored.reasons())
    with _writer(path) as sink:
        for chunk in scored.corpus.chunks():
            table = _with_scores(scored, chunk.start, chunk.table)
            sink(_with_columns(table, _origin(scored, chunk, np.arange(table.num_rows))) if errors else table)
            progress.advance(table.num_rows)


def _with_scores(scored: Scored, start: int, table: pa.Table) -> pa.Table:
    """Rows start, start + 1, ... with score columns: those of an earlier run make way for new ones."""
    scores, origin = _earlier_columns(table.schema)
    if not scored.probes:
        return _without(table, origin)
    columns = scored.columns(start, start + table.num_rows)
    return _with_columns(_without(table, [*scores, *origin]), columns)


def _earlier_columns(schema: pa.Schema) -> tuple[list[str], list[str]]:
    """The columns that an earlier run added: its scores, which stand side by side from risk to status, and those of
    rows without one. Whatever else begins with sqsd_ is the user's."""
    names = schema.names
    scores, origin = [], []
    if "sqsd_status" in names:
        end = names.index("sqsd_status")
        start = names.index("sqsd_risk") if "sqsd_risk" in names[:end] else end
        scores = [name for name in names[start : end + 1] if name.startswith(SCORE_PREFIX)]
        origin = [name for name, kind in ORIGIN.items() if name in names and schema.field(name).type == kind]
    return scores, origin


def _without(table: pa.Table, names: list[str]) -> pa.Table:
    if not names:
        return table
    metadata = _features(table.schema, lambda features: [features.pop(name, None) for name in names])
    return table.select([n for n in table.column_names if n not in names]).replace_schema_metadata(metadata)


def _with_columns(table: pa.Table, columns: dict[str, pa.Array]) -> pa.Table:
    """The table with these columns at its end, in place of any of the same names."""
    table = _without(table, [name for name in columns if name in table.column_names])
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


def _errors(scored: Scored, chunk: Chunk, where: np.ndarray) -> pa.Table:
    scores, origin = _earlier_columns(chunk.table.schema)
    names = [scored.statuses[c] for c in scored.codes[chunk.start + where]]
    columns = {"sqsd_status": pa.array(names, pa.string()), **_origin(scored, chunk, where)}
    return _with_columns(_without(chunk.table, [*scores, *origin]).take(where), columns)


def _origin(scored: Scored, chunk: Chunk, where: np.ndarray) -> dict[str, pa.Array]:
    """Why these rows of a chunk have no score, where they came from, and the bytes of those that could not be read:
    as their scores were written, or now. Null for rows with a score."""
    before = dict.fromkeys(ORIGIN, [None] * chunk.table.num_rows)
    before |= {name: chunk.table[name].to_pylist() for name in _earlier_columns(chunk.table.schema)[1]}
    found: dict[str, list[Any]] = {name: [] for name in ORIGIN}
    good = scored.scored[chunk.start + where]
    for k, fine in zip(where.tolist(), good.tolist(), strict=True):
        then = {name: values[k] for name, values in before.items()}
        stale = scored.form is not None and then[RAW] is None  # read and judged once more
        now = {
            "sqsd_reason": (None if stale else then["sqsd_reason"]) or scored.detail(chunk, k),
            "sqsd_file": then["sqsd_file"] or os.fsencode(chunk.files[k]).decode(errors="backslashreplace"),
            "sqsd_line": then["sqsd_line"] or chunk.lines[k],
            RAW: chunk.raws[k] if chunk.problems[k] else then[RAW],
        }
        for name, values in found.items():
            values.append(None if fine else now[name])
    return {name: pa.array(values, ORIGIN[name]) for name, values in found.items()}


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
