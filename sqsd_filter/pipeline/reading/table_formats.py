"""Corpora that are Arrow already: parquet files and folders that `datasets` saved. Their schema, with its metadata, is
taken as it is; a batch is read at a time.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from sqsd_filter.errors import InputError
from sqsd_filter.pipeline.reading.json_schema import to_rows, with_marks

BATCH_BYTES = 1 << 26
UNDECODABLE = (pa.ArrowException, OverflowError, ValueError)  # the year 10000, an unknown time zone, text not in UTF-8


def _within_bytes(rows: int, row_size: int) -> int:
    """As many rows of this size as a batch may hold, at most `rows`."""
    return max(1, min(rows, BATCH_BYTES // max(row_size, 1)))


class Table:
    """Rows that are Arrow already, with a schema of their own, readable from any row on."""

    schema: pa.Schema
    n_rows: int

    def __init__(self, path: Path) -> None:
        self.path = path

    def tables(self, start: int, stop: int, columns: Sequence[str] | None, rows: int) -> Iterator[pa.Table]:
        """Rows start..stop in tables of at most `rows` rows, with those of `columns` that exist."""
        raise NotImplementedError

    def decode(self, table: pa.Table) -> Iterator[dict[str, Any]]:
        """The rows of one of its tables as Python values. Raises InputError for a value that Python does not have."""
        try:
            yield from list(to_rows(table))
        except UNDECODABLE as error:
            for name in table.column_names:
                try:
                    table.column(name).to_pylist()
                except UNDECODABLE as reason:
                    raise InputError(
                        f"Column {name!r} of {self.path} holds a value that can't be read ({reason}); correct it."
                    ) from error
            raise

    def glimpse(self, rows: int) -> Iterator[dict[str, Any]]:
        """Its first rows; columns that hold a value which Python does not have are None."""
        for table in self.tables(0, rows, None, rows):
            columns: dict[str, Sequence[Any]] = {}
            for name in table.column_names:
                try:
                    columns[name] = [row[name] for row in to_rows(table.select([name]))]
                except UNDECODABLE:
                    columns[name] = [None] * table.num_rows
            yield from (dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True))

    def check_types(self) -> None:
        """Raise InputError for a column whose rows can't be sorted out."""
        for field in self.schema:
            try:
                pa.nulls(0, field.type).take(pa.array([], pa.int64()))
            except pa.ArrowNotImplementedError as error:
                raise InputError(
                    f"Column {field.name!r} of {self.path} is of the type {field.type}, which can't be filtered; "
                    "cast it to a plain one."
                ) from error

    def fingerprint(self, absorb: Callable[[bytes], None]) -> int:
        """Give every byte of its files to `absorb`; how many there were."""
        size = 0
        for path in self.files():
            with path.open("rb") as file:
                while block := file.read(1 << 20):
                    absorb(block)
                    size += len(block)
        return size

    def files(self) -> list[Path]:
        return [self.path]

    @contextmanager
    def errors(self) -> Iterator[None]:
        """What goes wrong in reading, as an error the user can act on."""
        try:
            yield
        except (pa.ArrowException, OSError, ValueError) as error:
            reason = " ".join(str(error).split()).rstrip(".")
            raise InputError(f"{self.path} is truncated or corrupt ({reason}); write or fetch it again.") from error


class Parquet(Table):
    def __init__(self, path: Path) -> None:
        super().__init__(path)
        with self.errors(), pq.ParquetFile(path) as file:
            self.schema, self.n_rows = file.schema_arrow, file.metadata.num_rows
        names = self.schema.names
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise InputError(f"{path} has two columns named {twice[0]!r}; rename one.")
        self.check_types()

    def tables(self, start: int, stop: int, columns: Sequence[str] | None, rows: int) -> Iterator[pa.Table]:
        with self.errors(), pq.ParquetFile(self.path) as file:
            names = None if columns is None else [name for name in self.schema.names if name in columns]
            groups, at, skipped, size = [], 0, 0, 0
            for index in range(file.num_row_groups):
                group = file.metadata.row_group(index)
                if at + group.num_rows <= start:
                    skipped += group.num_rows
                elif at < stop:
                    groups.append(index)
                    size = max(size, group.total_byte_size // max(group.num_rows, 1))
                at += group.num_rows
            at = skipped
            rows = _within_bytes(rows, size)
            for batch in file.iter_batches(batch_size=rows, row_groups=groups, columns=names):
                first, last = max(start - at, 0), min(stop - at, batch.num_rows)
                if first < last:
                    yield pa.Table.from_batches([batch.slice(first, last - first)])
                at += batch.num_rows
                if at >= stop:
                    return


class SavedDataset(Table):
    """A folder that `datasets.Dataset.save_to_disk` left, read as Arrow: images and audio are never decoded."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        dataset = self._open()
        self.schema, self.n_rows = with_marks(dataset.features.arrow_schema, dataset.data.schema), len(dataset)
        self.check_types()

    def _open(self) -> Any:
        from datasets import load_from_disk

        with self.errors():
            return load_from_disk(str(self.path)).with_format("arrow")

    def tables(self, start: int, stop: int, columns: Sequence[str] | None, rows: int) -> Iterator[pa.Table]:
        dataset = self._open()
        if columns is not None:
            dataset = dataset.select_columns([name for name in self.schema.names if name in columns])
        with self.errors():
            rows = _within_bytes(rows, dataset.data.nbytes // max(dataset.data.num_rows, 1))
            for at in range(start, min(stop, self.n_rows), rows):
                yield dataset[at : min(at + rows, stop)]

    def files(self) -> list[Path]:
        return sorted(file for file in self.path.iterdir() if file.is_file())
