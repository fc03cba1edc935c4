"""The corpus: every row of every input in order, with its origin, unchanged and within bounded memory.

One scan counts the rows, fingerprints the files and finds the schema that holds every value; after that any range of
rows can be read again, as Python values for scoring or as Arrow tables for writing.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, NotRequired, TypedDict

import pyarrow as pa

from sqsd_filter.corpus.addresses import SPLIT, Source
from sqsd_filter.corpus.conversation import Conversation, RowError
from sqsd_filter.corpus.files import unreadable
from sqsd_filter.corpus.json_schema import Shape, to_table, with_features, without_nulls
from sqsd_filter.corpus.parts import MARK_EVERY, Part
from sqsd_filter.corpus.row_errors import RowErrors
from sqsd_filter.corpus.row_formats import RowFormat
from sqsd_filter.corpus.schemas import conform, merge_schemas
from sqsd_filter.corpus.table_formats import BATCH_BYTES, Table
from sqsd_filter.corpus.text_formats import Record, TextFile
from sqsd_filter.errors import InputError, SQSDError


@dataclass(frozen=True, slots=True)
class Row:
    """One row and where it comes from. An unreadable row has no value; it has a problem and its own bytes."""

    index: int  # in the corpus, from 0
    value: dict[str, Any] | None
    file: str
    line: int  # of its first line, from 1; of the row itself in parquet files and saved datasets
    problem: str
    raw: bytes | None
    conversation: Conversation | RowError | None = None  # by the scan's format; None where the scan has none


Visit = Callable[[Row], None]


@dataclass(frozen=True)
class Chunk:
    """Consecutive rows of one split as a table.

    In `table` an unreadable row is all null. `scorable` holds the same rows under the corpus's `scorable_schema`; there
    a row without a conversation may be all null, too.
    """

    start: int
    split: str
    table: pa.Table
    scorable: pa.Table
    files: list[str]
    lines: list[int]
    problems: list[str]
    raws: list[bytes | None]  # of unreadable rows, and of every row of a JSON Lines file; without the newline


class InputFile(TypedDict):
    """One input of a corpus; `blake2b` is the digest of what was read of it, in hexadecimal. `blank_lines` are no rows;
    their number is there only if there are any."""

    path: str
    bytes: int
    rows: int
    blake2b: str
    blank_lines: NotRequired[int]


@dataclass(frozen=True)
class Corpus:
    """All inputs as one sequence of rows. Small and picklable: paths, offsets and the schema, no open file."""

    n_rows: int
    schema: pa.Schema  # holds every row
    scorable_schema: pa.Schema  # the same columns, wide enough for the rows that have a conversation
    inputs: list[InputFile]
    parts: list[Part]
    errors: RowErrors  # readable rows without a conversation by the scan's format; of tables, those that were visited

    @classmethod
    def scan(
        cls,
        sources: Sequence[Source],
        *,
        limit: int | None = None,
        visit: Visit | None = None,
        columns: Sequence[str] | None = None,
        form: RowFormat | None = None,
    ) -> Corpus:
        """Read every input once, giving each row to `visit`; `columns` as in `read`.

        With `form` each row is parsed once, and `visit` gets it with its conversation; `columns` must include those of
        the form. Rows without a conversation leave the schema of the others as it is, and are listed in `errors`.
        With `limit` the corpus is its first `limit` rows: later inputs are not read, and the fingerprint of a text
        file covers only the bytes read.
        """
        parts: list[Part] = []
        inputs: list[InputFile] = []
        shapes = _Shapes()
        errors = RowErrors()

        def visit_parsed(row: Row) -> None:
            if row.value is not None and isinstance(row.conversation, RowError):
                errors.add(row.index, row.conversation.detail)
            if visit:
                visit(row)

        start = 0
        for opened in sources:
            if limit is not None and start >= limit:
                break
            most = None if limit is None else limit - start
            digest = hashlib.blake2b(digest_size=32)
            source, stamp = opened.reader, ""
            if isinstance(source, TextFile):
                try:
                    size = source.file.size()
                except OSError as problem:
                    raise unreadable(source.file, problem) from problem
                rows, marks = _scan_text(source, start, most, digest.update, shapes, form, visit_parsed)
            else:
                stamp = source.stamp()
                size = source.fingerprint(digest.update)
                rows, marks = source.n_rows if most is None else min(most, source.n_rows), []
                if visit:
                    _visit_table(source, rows, start, columns, form, visit_parsed)
            read, whole = digest.hexdigest(), most is None or rows < most
            parts.append(Part(source, start, rows, size, marks, opened.split, read, stamp, whole))
            inputs.append({"path": source.name, "bytes": size, "rows": rows, "blake2b": read})
            if isinstance(source, TextFile) and source.blank_lines:
                inputs[-1]["blank_lines"] = source.blank_lines
            start += rows
        schema = scorable = _schema(parts, shapes.all)
        if shapes.scorable is not shapes.all:
            scorable = _schema(parts, {name: shapes.scorable.get(name, Shape()) for name in shapes.all})
            scorable = schema if scorable.equals(schema, check_metadata=True) else scorable
        return cls(start, schema, scorable, inputs, parts, errors)

    @property
    def splits(self) -> list[str]:
        """The names of all splits, in the order of their first rows."""
        return list(dict.fromkeys(part.split for part in self.parts)) or [SPLIT]

    def read(self, start: int, stop: int, columns: Sequence[str] | None = None) -> Iterator[Row]:
        """Rows start..stop. Of parquet files and saved datasets only these `columns` are read; text is read whole."""
        for part in self.parts:
            first, last = max(start - part.start, 0), min(stop - part.start, part.rows)
            if first >= last:
                continue
            if isinstance(part.source, Table):
                yield from _read_table(part.source, first, last, part.start, columns)
                continue
            file = part.source.name
            for index, record in enumerate(part.records(first, last), part.start + first):
                _, line, value, problem, raw = record
                yield Row(index, value, file, line, problem, raw if problem else None)

    def chunks(self, rows: int = 2048) -> Iterator[Chunk]:
        """The whole corpus in order, at most `rows` rows at a time, fewer if they are large.

        Raises `InputError` before it ends if an input is not what was scanned.
        """
        if not self.schema.names:  # tables without columns lose their row count when joined
            yield from self._pieces(rows)
            return
        held: list[Chunk] = []
        n = size = 0
        for piece in self._pieces(rows):
            full = n + piece.table.num_rows > rows or size + piece.table.nbytes > BATCH_BYTES
            if held and (full or piece.split != held[0].split):
                yield _join(held)
                held, n, size = [], 0, 0
            held.append(piece)
            n += piece.table.num_rows
            size += piece.table.nbytes
        if held:
            yield _join(held)

    def check(self) -> None:
        """Raise `InputError` if an input is not what was scanned."""
        for part in self.parts:
            part.check()

    def _pieces(self, rows: int) -> Iterator[Chunk]:
        for part in self.parts:
            try:
                if isinstance(part.source, Table):
                    yield from self._table_pieces(part, part.source, rows)
                    part.check()
                else:
                    yield from self._text_pieces(part, part.source, rows)
            except Exception as problem:  # rows that were not scanned may not fit the schema
                if isinstance(part.source, Table) or not isinstance(problem, InputError):  # text has said so itself
                    part.check()
                raise

    def _table_pieces(self, part: Part, source: Table, rows: int) -> Iterator[Chunk]:
        done = 0
        for table in source.tables(0, part.rows, None, rows):
            n = table.num_rows
            lines = list(range(done + 1, done + n + 1))
            both = conform(table, self.schema), conform(table, self.scorable_schema)
            yield Chunk(part.start + done, part.split, *both, [source.name] * n, lines, [""] * n, [None] * n)
            done += n

    def _text_pieces(self, part: Part, source: TextFile, rows: int) -> Iterator[Chunk]:
        start = part.start
        for batch in _batches(part.scanned_records(), rows):
            n = len(batch)
            _, lines, values, problems, raws = (list(column) for column in zip(*batch, strict=True))
            if not source.verbatim:
                raws = [raw if problem else None for raw, problem in zip(raws, problems, strict=True)]
            table = scorable = to_table(values, self.schema)
            if self.scorable_schema is not self.schema:
                errors = self.errors.within(start, start + n)
                scorable = to_table(
                    [None if row in errors else value for row, value in enumerate(values, start)],
                    self.scorable_schema,
                )
            yield Chunk(start, part.split, table, scorable, [source.name] * n, lines, problems, raws)
            start += n


class _Shapes:
    """The types in the columns of text files: in all rows, and in those that have a conversation.

    The two are the same object until the first row without a conversation.
    """

    def __init__(self) -> None:
        self.all: dict[str, Shape] = {}
        self.scorable = self.all

    def see(self, row: dict[str, Any], scorable: bool) -> None:
        if not scorable and self.scorable is self.all:
            self.scorable = copy.deepcopy(self.all)
        for shapes in [self.all] if self.scorable is self.all or not scorable else [self.all, self.scorable]:
            for name, cell in row.items():
                shape = shapes.get(name)
                if shape is None:
                    shape = shapes[name] = Shape()
                if type(cell) is not str or shape.kind is not str:
                    shape.see(cell)


def _scan_text(
    source: TextFile,
    start: int,
    most: int | None,
    absorb: Callable[[bytes], None],
    shapes: _Shapes,
    form: RowFormat | None,
    visit: Visit,
) -> tuple[int, list[tuple[int, int]]]:
    """Visit a text file's rows and note the types of their values in `shapes`. Returns the number of rows and the
    marks."""
    marks: list[tuple[int, int]] = []
    rows = 0
    file = source.name
    for offset, line, value, problem, raw in islice(source.records(absorb=absorb), most):
        if rows % MARK_EVERY == 0 and source.seekable:
            marks.append((offset, line))
        conversation = form.parse(value, problem) if form else None
        if value is not None:
            shapes.see(value, scorable=not isinstance(conversation, RowError))
        visit(Row(start + rows, value, file, line, problem, raw if problem else None, conversation))
        rows += 1
    return rows, marks


def _read_table(
    source: Table, start: int, stop: int, base: int, columns: Sequence[str] | None, form: RowFormat | None = None
) -> Iterator[Row]:
    at = start
    for table in source.tables(start, stop, columns, MARK_EVERY):
        for value in source.decode(table):
            conversation = form.parse(value) if form else None
            yield Row(base + at, value, source.name, at + 1, "", None, conversation)
            at += 1


def _visit_table(
    source: Table, rows: int, base: int, columns: Sequence[str] | None, form: RowFormat | None, visit: Visit
) -> None:
    """Visit its first `rows` rows. Raises `SQSDError` where it has fewer."""
    seen = 0
    for row in _read_table(source, 0, rows, base, columns, form):
        visit(row)
        seen += 1
    if seen != rows:
        raise SQSDError(f"Of the {rows} rows of {source.name} {seen} were read: report this as a bug.")


def _batches(records: Iterator[Record], rows: int) -> Iterator[list[Record]]:
    batch: list[Record] = []
    size = 0
    for record in records:
        batch.append(record)
        size += len(record[4])
        if len(batch) >= rows or size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _join(chunks: list[Chunk]) -> Chunk:
    if len(chunks) == 1:
        return chunks[0]
    return Chunk(
        chunks[0].start,
        chunks[0].split,
        pa.concat_tables([chunk.table for chunk in chunks]),
        pa.concat_tables([chunk.scorable for chunk in chunks]),
        [file for chunk in chunks for file in chunk.files],
        [line for chunk in chunks for line in chunk.lines],
        [problem for chunk in chunks for problem in chunk.problems],
        [raw for chunk in chunks for raw in chunk.raws],
    )


def _schema(parts: list[Part], columns: dict[str, Shape]) -> pa.Schema:
    """The schema that holds all inputs' values unchanged. Raises `InputError`, naming the column, if there is none."""
    text = next((part.source.name for part in parts if isinstance(part.source, TextFile)), None)
    inferred = pa.schema([shape.field(name) for name, shape in columns.items()])
    schemas: list[tuple[str, pa.Schema]] = []  # in the order of the inputs; all text shares one schema
    for part in parts:
        if isinstance(part.source, Table):
            schemas.append((part.source.name, part.source.schema))
        elif part.source.name == text:
            schemas.append((text, inferred))
            text = None
    if not schemas:
        return inferred
    if len(schemas) == 1 and isinstance(parts[0].source, TextFile):
        return with_features(pa.schema([without_nulls(field) for field in inferred]))
    _, first = schemas[0]
    if all(schema.equals(first, check_metadata=True) for _, schema in schemas):
        return first
    return merge_schemas(schemas)
