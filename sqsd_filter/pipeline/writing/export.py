"""Back to disk: every row to exactly one file, in input order, with its own values unchanged."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sqsd_filter.corpus.json_schema import feature, json_columns
from sqsd_filter.corpus.json_text import json_as_text, json_features
from sqsd_filter.corpus.sources import Chunk, Corpus
from sqsd_filter.errors import InputError, SQSDError
from sqsd_filter.pipeline.report import Config, Written, WrittenFile
from sqsd_filter.pipeline.scores.scored import SCORE_PREFIX, Scored
from sqsd_filter.pipeline.selecting.selection import DROPPED, ERROR, KEPT, Selection
from sqsd_filter.pipeline.writing.json_lines import dump, lines, splice
from sqsd_filter.pipeline.writing.writers import (
    OF_LINES,
    JsonLinesWriter,
    Output,
    ParquetWriter,
    ShardedWriter,
    describe,
    parquet_holds,
)
from sqsd_filter.progress import Progress
from sqsd_filter.storage.layout import DATA, ITSELF, Layout

FATES: dict[Config, int] = {"kept": KEPT, "dropped": DROPPED, "errors": ERROR}  # of the rows in each config
REASONS_FILE = "reasons.jsonl"  # among a run's own files: why each line in errors has no score

RAW = "sqsd_raw"  # the bytes of a line that could not be read as a row
ORIGIN = {"sqsd_reason": pa.string(), "sqsd_file": pa.string(), "sqsd_line": pa.int64(), RAW: pa.binary()}
MODULES = b"sqsd_modules"  # in a parquet file's metadata: the modules behind each probe's list, in its order
WEIGHT = "sqsd_weight"  # of a row for training, where rows are weighted
PERCENTILE = "sqsd_percentile"  # the share of the pack's benign reference rows below the risk, where it is asked for
OTHERS = {**ORIGIN, WEIGHT: pa.float64()}  # beside the scores
ROW = "sqsd_row"  # the row's file and line in the input, as FILE:LINE
See = Callable[[Chunk], None]
Added = Mapping[str, np.ndarray]  # columns (n,) of float64 beside the scores, by name


def _look_away(_: Chunk) -> None:
    pass


def check_columns(corpus: Corpus, output: Output) -> None:
    """Raise `InputError` where the rows have a column that the output format can't hold, or one that `ROW` would
    replace."""
    own = _own_fields(corpus.schema)
    for field in own:
        if field.name == ROW and not _is_text(field.type):
            raise InputError(
                f"Column {ROW!r} holds {field.type}, and the file and line of a row are written to a column of this "
                "name: rename yours."
            )
    output.check(pa.schema(own))


def check_scorable_columns(corpus: Corpus) -> None:
    """Raise `InputError` where the rows have a column that the one parquet file with all scores can't hold."""
    for field in _own_fields(corpus.schema):
        if not parquet_holds(field.type):
            raise InputError(
                f"Column {field.name!r} holds {field.type}, which a parquet file can't hold: give it another type, or "
                "leave it out."
            )


def _own_fields(schema: pa.Schema) -> list[pa.Field]:
    """The fields that no earlier run added as scores or beside them."""
    scores, others = _earlier_columns(schema)
    return [field for field in schema if field.name not in (*scores, *others)]


def _is_text(kind: pa.DataType) -> bool:
    """Is this a type of text, or of nulls only?"""
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return kind in (pa.string(), pa.large_string(), pa.string_view(), pa.null())


def export_splits(
    scored: Scored,
    selection: Selection,
    layout: Layout,
    output: Output,
    progress: Progress,
    see: See = _look_away,
    *,
    percentile: np.ndarray | None = None,
) -> Written:
    """Write kept, dropped and errors, each split of the corpus on its own. A layout with one file is for one split.

    Kept and dropped rows have score columns. Rows in errors have their status, the reason in words and their origin,
    and the bytes of a line that could not be read; their values don't change the columns of the other rows. Dropped
    rows and errors say in `ROW` where they come from, kept rows on request. Lines of JSON hold less: see `Lines`. Each
    chunk is also passed to `see`. Raises `SQSDError` when the files can't be written, or when a row is missing in them.
    """
    corpus = scored.corpus
    schema = _kept_schema(scored, selection)
    added = _added(percentile, selection.row_weights)
    with ExitStack() as stack:
        files: dict[tuple[Config, str], ShardedWriter[Any]] = {
            (config, split): stack.enter_context(_writer(config, split, layout, output))
            for config in FATES
            for split in corpus.splits
        }
        reasons = stack.enter_context(ShardedWriter(JsonLinesWriter, layout.base, layout.own(REASONS_FILE)))
        for writer in (*files.values(), reasons):
            writer.prepare()
        for chunk in _from_nothing(corpus):
            fate = selection.fate[chunk.start : chunk.start + chunk.table.num_rows]
            rows: Lines | Tables
            if output.to in OF_LINES:
                rows = Lines(scored, chunk, added, output)
                reasons.write(rows.reasons(np.flatnonzero(fate == ERROR)))
            else:
                table = chunk.scorable if schema is corpus.scorable_schema else chunk.table
                rows = Tables(scored, chunk, table, added, output)
            for config, code in FATES.items():
                where = np.flatnonzero(fate == code)
                named = code == DROPPED or output.rows_column
                files[config, chunk.split].write(rows.bad(where) if code == ERROR else rows.good(where, named))
            see(chunk)
            progress.advance(len(fate))
        written = {" ".join(part): writer.rows for part, writer in files.items()}
        if sum(written.values()) != corpus.n_rows:
            raise SQSDError(f"{corpus.n_rows} rows were read, but {written} written: please report this as a bug.")
        published = {part: writer.publish() for part, writer in files.items()}
        extra = [file["path"] for file in reasons.publish()]
    if output.to == "arrow":
        for config in FATES:
            if not (config == "kept" and layout.is_file):
                top = "." if config == "kept" else layout.own(config)
                extra += describe(layout.base, top, {split: published[config, split] for split in corpus.splits})
    entries: list[WrittenFile] = [
        {"config": c, "split": s, **file} for (c, s), several in published.items() for file in several
    ]
    content: Written = {"files": entries, "extra_files": extra, "json_columns": []}
    if output.to not in OF_LINES:
        content["json_columns"] = json_columns(schema)
        if output.json_as == "json" and (features := json_features(schema)):
            content["json_features"] = features
    return content


def _writer(config: Config, split: str, layout: Layout, output: Output) -> ShardedWriter[Any]:
    if config == "kept":
        return output.file(layout.root) if layout.is_file else output.files(layout.base, f"{DATA}/{split}")
    return output.files(layout.base, f"{layout.own(config)}/{split}")


def _from_nothing(corpus: Corpus) -> Iterator[Chunk]:
    """The chunks of the corpus, after an empty one for each split, so that every config and split has a file."""
    table, scorable = (pa.Table.from_batches([], schema) for schema in (corpus.schema, corpus.scorable_schema))
    for split in corpus.splits:
        yield Chunk(0, split, table, scorable, [], [], [], [])
    yield from corpus.chunks()


def _kept_schema(scored: Scored, selection: Selection) -> pa.Schema:
    """The schema of the input's columns in kept and dropped; rows that are in neither don't affect it."""
    whole = bool((selection.fate[~scored.scored] == KEPT).any())
    return scored.corpus.schema if whole else scored.corpus.scorable_schema


def export_scored(
    scored: Scored, layout: Layout, progress: Progress, see: See = _look_away, *, percentile: np.ndarray | None = None
) -> Written:
    """Write every row, in order, with its score columns; if rows have no score, also with the columns of errors.

    Each chunk is also passed to `see`.
    """
    errors = bool(scored.reasons())
    with ShardedWriter(ParquetWriter, layout.root, ITSELF) as file:
        for chunk in scored.corpus.chunks():
            table = _with_scores(scored, chunk.start, chunk.table, _added(percentile, None))
            file.write(_with_columns(table, _origin(scored, chunk, np.arange(table.num_rows))) if errors else table)
            see(chunk)
            progress.advance(table.num_rows)
        return {"files": file.publish(), "extra_files": [], "json_columns": json_columns(scored.corpus.schema)}


class Tables:
    """A chunk's rows as parquet and Arrow files hold them."""

    def __init__(self, scored: Scored, chunk: Chunk, table: pa.Table, added: Added, output: Output) -> None:
        """`table` has the chunk's rows with the columns of kept and dropped."""
        self.scored, self.chunk, self.as_text = scored, chunk, output.json_as == "text"
        self.with_scores = _with_scores(scored, chunk.start, table, added)

    def good(self, where: np.ndarray, named: bool) -> pa.Table:
        """Rows with their scores, and if they are `named` with their origin."""
        table = self.with_scores.take(where)
        return self._finished(_with_columns(table, {ROW: _names(self.chunk, where)}) if named else table)

    def bad(self, where: np.ndarray) -> pa.Table:
        scored, chunk = self.scored, self.chunk
        columns = {"sqsd_status": _statuses(scored, chunk, where), **_origin(scored, chunk, where)}
        scores, others = _earlier_columns(chunk.table.schema)
        rows = _without(chunk.table, [*scores, *others]).take(where)
        return self._finished(_with_columns(rows, {**columns, ROW: _names(chunk, where)}))

    def _finished(self, table: pa.Table) -> pa.Table:
        return json_as_text(table) if self.as_text else table


class Lines:
    """A chunk's rows as lines of JSON: the lines of the input, byte for byte, where it was JSON Lines.

    The `added` columns are added to the lines, scores only `with_scores`, the origin to those that are `named` and to
    errors; reasons are in a file of their own. A record that could not be read is written as its bytes; if these have a
    newline, or belong into an array, as their text in an object.
    """

    def __init__(self, scored: Scored, chunk: Chunk, added: Added, output: Output) -> None:
        self.scored, self.chunk, self.added, self.with_scores = scored, chunk, added, output.with_scores
        self.in_array = output.to == "json"
        self.old_scores, self.old_others = _earlier_columns(chunk.table.schema)

    def good(self, where: np.ndarray, named: bool) -> list[bytes]:
        start, count = self.chunk.start, self.chunk.table.num_rows
        new = {
            **(_scores(self.scored, start, count) if self.with_scores else {}),
            **_columns(self.added, start, count),
        }
        new = {name: values.take(pa.array(where)) for name, values in new.items()}
        new |= {ROW: _names(self.chunk, where)} if named else {}
        old = [*self.old_others, *(self.old_scores if self.scored.probes or not self.with_scores else [])]
        old += [PERCENTILE] if self.scored.recut and PERCENTILE in self.old_scores and PERCENTILE not in old else []
        own = self._lines(where, old)
        if not new:
            return own
        replaced = [name for name in new if name in self.chunk.table.column_names]
        replaced += old if self.with_scores else []
        return _spliced(own, pa.table(new), replaced)

    def bad(self, where: np.ndarray) -> list[bytes]:
        raws = _origin(self.scored, self.chunk, where)[RAW].to_pylist()
        names = _names(self.chunk, where)
        read = np.array([raw is None for raw in raws], dtype=bool)
        own = self._lines(where[read], [*self.old_scores, *self.old_others])
        replaced = [ROW] if ROW in self.chunk.table.column_names else []
        lines = iter(_spliced(own, pa.table({ROW: names.filter(pa.array(read))}), replaced))
        return [
            next(lines) if raw is None else _unread(raw, name) if self.in_array or b"\n" in raw else raw
            for raw, name in zip(raws, names.to_pylist(), strict=True)
        ]

    def reasons(self, where: np.ndarray) -> list[bytes]:
        origin = _origin(self.scored, self.chunk, where)
        columns = {
            "file": origin["sqsd_file"],
            "line": origin["sqsd_line"],
            "status": _statuses(self.scored, self.chunk, where),
            "reason": origin["sqsd_reason"],
        }
        return lines(pa.table(columns))

    def _lines(self, where: np.ndarray, without: Collection[str]) -> list[bytes]:
        """The lines of these rows in the input, or new lines without these columns."""
        raws = [self.chunk.raws[k] for k in where.tolist()]
        others = where[[raw is None for raw in raws]]
        made = iter(lines(_without(self.chunk.table, without).take(others)))
        return [next(made) if raw is None else raw for raw in raws]


def _unread(raw: bytes, name: str) -> bytes:
    """An object with the text of a record that could not be read, and the row's name."""
    return dump({RAW: raw.decode("utf-8", "surrogateescape"), ROW: name})


def _spliced(own: list[bytes], members: pa.Table, replaced: Collection[str]) -> list[bytes]:
    """The lines with the members in the rows of the table, in place of those that are replaced."""
    return [splice(line, row, replaced) for line, row in zip(own, members.to_pylist(), strict=True)]


def _scores(scored: Scored, start: int, rows: int) -> dict[str, pa.Array]:
    """The score columns of rows start, start + 1, ... that the input does not have."""
    columns = scored.columns(start, start + rows)
    return columns if scored.probes else {"sqsd_risk": columns["sqsd_risk"]} if scored.recut else {}


def _added(percentile: np.ndarray | None, row_weights: np.ndarray | None) -> Added:
    """The columns beside the scores that were asked for."""
    columns = {PERCENTILE: percentile, WEIGHT: row_weights}
    return {name: values for name, values in columns.items() if values is not None}


def _columns(added: Added, start: int, rows: int) -> dict[str, pa.Array]:
    """The added columns of rows start, start + 1, ...; null in rows without a score."""
    window = slice(start, start + rows)
    return {name: pa.array(values[window], pa.float64(), from_pandas=True) for name, values in added.items()}


def _statuses(scored: Scored, chunk: Chunk, where: np.ndarray) -> pa.Array:
    return pa.array([scored.statuses[code] for code in scored.codes[chunk.start + where]], pa.string())


def _with_scores(scored: Scored, start: int, table: pa.Table, added: Added) -> pa.Table:
    """Rows start, start + 1, ... with score columns and the added ones, in place of those of an earlier run."""
    earlier, others = _earlier_columns(table.schema)
    columns = {**_scores(scored, start, table.num_rows), **_columns(added, start, table.num_rows)}
    if scored.recut and not scored.probes:  # scores are adjacent, from the risk to the status
        risk = columns.pop("sqsd_risk")
        metadata = _features(table.schema, lambda features: features.update(sqsd_risk=feature(risk.type)))
        table = table.set_column(table.column_names.index("sqsd_risk"), "sqsd_risk", risk)
        table = _without(table.replace_schema_metadata(metadata), [name for name in earlier if name == PERCENTILE])
    table = _with_columns(_without(table, [*earlier, *others] if scored.probes else others), columns)
    metadata = dict(table.schema.metadata or {})
    if scored.probes:
        metadata.pop(MODULES, None)
    if scored.modules:
        metadata[MODULES] = json.dumps({name: each.names for name, each in scored.modules.items()}).encode()
    return table.replace_schema_metadata(metadata or None)


def _earlier_columns(schema: pa.Schema) -> tuple[list[str], list[str]]:
    """The columns that an earlier run added: its scores, which are adjacent from risk to status, with the percentiles
    that belong to them, and its weights and the columns of rows without a score. Any other column whose name begins
    with sqsd_ is the user's."""
    names = schema.names
    scores, others = [], []
    if "sqsd_status" in names:
        end = names.index("sqsd_status")
        start = names.index("sqsd_risk") if "sqsd_risk" in names[:end] else end
        scores = [name for name in names[start : end + 1] if name.startswith(SCORE_PREFIX)]
        if PERCENTILE in names and PERCENTILE not in scores and schema.field(PERCENTILE).type == pa.float64():
            scores.append(PERCENTILE)
        others = [name for name, kind in OTHERS.items() if name in names and schema.field(name).type == kind]
    return scores, others


def _without(table: pa.Table, names: Collection[str]) -> pa.Table:
    if not names:
        return table
    metadata = _features(table.schema, lambda features: [features.pop(name, None) for name in names])
    return table.select([n for n in table.column_names if n not in names]).replace_schema_metadata(metadata)


def _with_columns(table: pa.Table, columns: dict[str, pa.Array]) -> pa.Table:
    """The table with these columns at its end, in place of columns of the same names."""
    table = _without(table, [name for name in columns if name in table.column_names])
    added = {name: feature(values.type) for name, values in columns.items()}
    metadata = _features(table.schema, lambda features: features.update(added))
    for name, values in columns.items():
        table = table.append_column(name, values)
    return table.replace_schema_metadata(metadata)


def _features(schema: pa.Schema, change: Callable[[dict[str, Any]], object]) -> dict[bytes, bytes] | None:
    """The schema's metadata, after `change` was called on the Hugging Face features in it, if there are any."""
    metadata = dict(schema.metadata or {})
    if b"huggingface" in metadata:
        info = json.loads(metadata[b"huggingface"])
        if features := (info.get("info") or {}).get("features"):
            change(features)
            metadata[b"huggingface"] = json.dumps(info).encode()
    return metadata or None


def _names(chunk: Chunk, where: np.ndarray) -> pa.Array:
    """The file and line of these rows of a chunk, or what an earlier run wrote in that column."""
    names = pa.array([f"{_file_name(chunk.files[k])}:{chunk.lines[k]}" for k in where.tolist()], pa.string())
    if ROW not in chunk.table.column_names:
        return names
    return pc.coalesce(chunk.table[ROW].cast(pa.string()).take(where).combine_chunks(), names)


def _file_name(path: str) -> str:
    """A path as text, also one that is no UTF-8."""
    return os.fsencode(path).decode(errors="backslashreplace")


def _origin(scored: Scored, chunk: Chunk, where: np.ndarray) -> dict[str, pa.Array]:
    """Why these rows of a chunk have no score, their file and line, and the bytes of those that could not be read:
    as an earlier run wrote them, or as they are now. Null for rows with a score."""
    before = dict.fromkeys(ORIGIN, [None] * chunk.table.num_rows)
    before |= {
        name: chunk.table[name].to_pylist() for name in _earlier_columns(chunk.table.schema)[1] if name in ORIGIN
    }
    columns: dict[str, list[Any]] = {name: [] for name in ORIGIN}
    good = scored.scored[chunk.start + where]
    for k, fine in zip(where.tolist(), good.tolist(), strict=True):
        if fine:
            for values in columns.values():
                values.append(None)
            continue
        then = {name: values[k] for name, values in before.items()}
        stale = scored.form is not None and then[RAW] is None  # this run has read the row again
        now = {
            "sqsd_reason": (None if stale else then["sqsd_reason"]) or scored.detail(chunk, k),
            "sqsd_file": then["sqsd_file"] or _file_name(chunk.files[k]),
            "sqsd_line": then["sqsd_line"] or chunk.lines[k],
            RAW: chunk.raws[k] if chunk.problems[k] else then[RAW],
        }
        for name, values in columns.items():
            values.append(now[name])
    return {name: pa.array(values, ORIGIN[name]) for name, values in columns.items()}
