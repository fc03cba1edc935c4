"""Corpora in Arrow's types: parquet and Arrow files, folders saved by `datasets`, and its datasets themselves.

Their schema and its metadata are kept as they are; rows are read one batch at a time.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import IO, TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from sqsd_filter.corpus.files import LocalFile, RemoteFile, SourceFile, unreadable
from sqsd_filter.corpus.json_schema import bare_rows, to_rows, with_marks
from sqsd_filter.corpus.schemas import has_list_view, plain_schema
from sqsd_filter.errors import InputError, first_line
from sqsd_filter.storage.layout import DATA

if TYPE_CHECKING:
    from datasets import Dataset, Features
    from typing_extensions import Buffer

BATCH_BYTES = 1 << 26
# The year 10000, a time zone that Python (or pytz, for older Arrow versions) does not know, text that is not UTF-8
UNDECODABLE = (pa.ArrowException, LookupError, OverflowError, ValueError)


def _within_bytes(rows: int, row_size: int) -> int:
    """How many rows of `row_size` bytes a batch may hold, at most `rows`."""
    return max(1, min(rows, BATCH_BYTES // max(row_size, 1)))


class Table:
    """Rows in Arrow's types, with a schema of their own, readable from any row on."""

    schema: pa.Schema
    n_rows: int

    def __init__(self, name: str) -> None:
        self.name = name

    def tables(self, start: int, stop: int, columns: Sequence[str] | None, rows: int) -> Iterator[pa.Table]:
        """Rows start..stop in tables of at most `rows` rows, with those of `columns` that exist. Tables keep their
        number of rows even where no column exists."""
        raise NotImplementedError

    def decode(self, table: pa.Table) -> Iterator[dict[str, Any]]:
        """The rows of one of its tables as Python values. Raises `InputError` for a value that Python can't hold."""
        try:
            yield from list(to_rows(table))
        except UNDECODABLE as error:
            for name in table.column_names:
                try:
                    table.column(name).to_pylist()
                except UNDECODABLE as reason:
                    raise InputError(
                        f"Column {name!r} of {self.name} holds a value that can't be read ({reason}); correct it."
                    ) from error
            raise

    def glimpse(self, rows: int) -> Iterator[dict[str, Any]]:
        """Its first rows; a column with a value that Python can't hold is None in all of them."""
        for table in self.tables(0, rows, None, rows):
            columns: dict[str, Sequence[Any]] = {}
            for name in table.column_names:
                try:
                    columns[name] = [row[name] for row in to_rows(table.select([name]))]
                except UNDECODABLE:
                    columns[name] = [None] * table.num_rows
            yield from (dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True))

    def check_types(self) -> None:
        """Raise `InputError` for a column of a type from which Arrow can't select rows."""
        for field in self.schema:
            try:
                pa.nulls(0, field.type).take(pa.array([], pa.int64()))
                filtered = not has_list_view(field.type)
            except pa.ArrowNotImplementedError:
                filtered = False
            if not filtered:
                raise InputError(
                    f"Column {field.name!r} of {self.name} is of the type {field.type}, which can't be filtered; "
                    "cast it to a plain one."
                )

    def fingerprint(self, absorb: Callable[[bytes], None]) -> int:
        """Pass every byte in which its rows are stored to `absorb`. Returns the number of bytes."""
        size = 0
        for file in self.files():
            with self.errors(), file.open() as opened:
                while block := opened.read(1 << 20):
                    absorb(block)
                    size += len(block)
        return size

    def files(self) -> Sequence[SourceFile]:
        raise NotImplementedError

    @property
    def remote(self) -> bool:
        """Is a file of it behind a URL?"""
        return any(isinstance(file, RemoteFile) for file in self.files())

    def stamp(self) -> str:
        """Different for files that have been written again, without reading them."""
        with self.errors():
            return " ".join(file.stamp() for file in self.files())

    @contextmanager
    def errors(self) -> Iterator[None]:
        """Turn errors of reading into an `InputError` that the user can act on."""
        try:
            yield
        except (pa.ArrowException, OSError, OverflowError, LookupError, ValueError) as error:
            raise self.damaged(error) from error

    def damaged(self, error: BaseException) -> InputError:
        """The error for content that can't be read."""
        # errors of a disk or a network have an errno; pyarrow's errors about the content have none
        if isinstance(error, FileNotFoundError) or getattr(error, "errno", None) is not None:
            return unreadable(self.name, error)
        reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        return InputError(f"{self.name} is truncated or corrupt ({reason}); write or fetch it again.")


def _check_features(schema: pa.Schema, name: str) -> None:
    """Raise `InputError` where the Hugging Face features in a file's metadata can't be read."""
    try:
        stored = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        readable = isinstance((stored.get("info") or {}).get("features") or {}, dict)
    except (ValueError, AttributeError, RecursionError):
        readable = False
    if not readable:
        raise InputError(f"{name} has metadata for `datasets` that can't be read: write the file again without it.")


class FileTable(Table):
    """A table in one file."""

    def __init__(self, file: SourceFile) -> None:
        super().__init__(file.name)
        self.file = file
        self._look()
        self._stored, self.schema = self.schema, plain_schema(self.schema)
        names = self.schema.names
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise InputError(f"{file} has two columns named {twice[0]!r}; rename one.")
        _check_features(self.schema, self.name)
        self.check_types()

    def _look(self) -> None:
        """Set `schema` and `n_rows`."""
        raise NotImplementedError

    def tables(self, start: int, stop: int, columns: Sequence[str] | None, rows: int) -> Iterator[pa.Table]:
        stored = self._tables(start, stop, columns, rows)
        if self._stored.equals(self.schema):
            yield from stored
            return
        for table in stored:
            yield table.cast(pa.schema([self.schema.field(name) for name in table.column_names], self.schema.metadata))

    def _tables(self, start: int, stop: int, columns: Sequence[str] | None, rows: int) -> Iterator[pa.Table]:
        """As `tables`, in the types of the file."""
        raise NotImplementedError

    def files(self) -> Sequence[SourceFile]:
        return [self.file]


class ParquetTable(FileTable):
    def _look(self) -> None:
        with self.errors(), self._opened() as file:
            self.schema, self.n_rows = file.schema_arrow, file.metadata.num_rows

    @contextmanager
    def _opened(self) -> Iterator[pq.ParquetFile]:
        with (
            self.file.open() as opened,
            pq.ParquetFile(opened, page_checksum_verification=True) as file,  # of pages that have one
        ):
            yield file

    def _tables(self, start: int, stop: int, columns: Sequence[str] | None, rows: int) -> Iterator[pa.Table]:
        with self.errors(), self._opened() as file:
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


class ArrowTable(FileTable):
    """A file in Arrow's IPC format: as a stream, which `datasets` writes, or with the footer of its file format.

    Arrow trusts the offsets in such a file: a wrong one would end the process. So every batch is validated when the
    file is opened, and again where the file is no longer the same.
    """

    def _look(self) -> None:
        self.n_rows = 0
        self._validated = self.stamp()
        with self._batches() as (self.schema, batches):
            for batch in batches:
                batch.validate(full=True)
                self.n_rows += batch.num_rows

    @contextmanager
    def _batches(self) -> Iterator[tuple[pa.Schema, Iterator[pa.RecordBatch]]]:
        with self.errors(), self._opened() as opened:
            footer = bytes(opened.read(len(_FOOTED))) == _FOOTED
            opened.seek(0)
            if footer:
                file = pa.ipc.open_file(opened)
                yield file.schema, (file.get_batch(k) for k in range(file.num_record_batches))
            else:
                stream = pa.ipc.open_stream(opened)
                yield stream.schema, iter(stream)

    def _opened(self) -> pa.NativeFile | IO[bytes]:
        if isinstance(self.file, LocalFile):
            return pa.memory_map(str(self.file.path))  # skipping rows costs nothing
        return self.file.open()

    def _tables(self, start: int, stop: int, columns: Sequence[str] | None, rows: int) -> Iterator[pa.Table]:
        with self._batches() as (schema, batches):
            names = schema.names if columns is None else [name for name in schema.names if name in columns]
            changed = self.stamp() != self._validated
            at = 0
            for batch in batches:
                if at >= stop:
                    return
                if changed:
                    batch.validate(full=True)
                first, last = max(start - at, 0), min(stop - at, batch.num_rows)
                step = _within_bytes(rows, batch.nbytes // max(batch.num_rows, 1))
                for k in range(first, last, step):
                    yield pa.Table.from_batches([batch.slice(k, min(step, last - k)).select(names)])
                at += batch.num_rows


_FOOTED = b"ARROW1"


class DatasetTable(Table):
    """A `datasets.Dataset`, read as Arrow: images and audio are never decoded."""

    def __init__(self, name: str, dataset: Dataset) -> None:
        super().__init__(name)
        with self.errors():
            dataset.data.table.validate(full=True)  # its Arrow files may be damaged; see `ArrowTable`
        self._dataset = dataset
        self.schema, self.n_rows = with_marks(dataset.features.arrow_schema, dataset.data.schema), len(dataset)
        self.check_types()

    def _open(self) -> Dataset:
        return self._dataset.with_format("arrow")

    def tables(self, start: int, stop: int, columns: Sequence[str] | None, rows: int) -> Iterator[pa.Table]:
        names = [name for name in self.schema.names if columns is None or name in columns]
        dataset, stop = self._open().select_columns(names), min(stop, self.n_rows)
        with self.errors():
            rows = _within_bytes(rows, dataset.data.nbytes // max(dataset.data.num_rows, 1))
            for at in range(start, stop, rows):
                end = min(at + rows, stop)
                yield dataset[at:end] if names else bare_rows(end - at)  # without columns a dataset has no rows

    def files(self) -> Sequence[SourceFile]:
        return []  # none by whose names it could be read again

    def fingerprint(self, absorb: Callable[[bytes], None]) -> int:
        """Its rows as an Arrow stream, in tables of a fixed size."""
        sink = _Absorbing(absorb)
        with self.errors(), pa.ipc.new_stream(pa.PythonFile(sink, "w"), self.schema) as stream:
            for table in self.tables(0, self.n_rows, None, 1000):
                stream.write_table(table.combine_chunks().cast(self.schema))
        return sink.size


class _Absorbing(io.RawIOBase):
    def __init__(self, absorb: Callable[[bytes], None]) -> None:
        self._absorb, self.size = absorb, 0

    def writable(self) -> bool:
        return True

    def write(self, data: Buffer) -> int:
        content = bytes(data)
        self._absorb(content)
        self.size += len(content)
        return len(content)


class SavedDataset(DatasetTable):
    """A folder written by `datasets.Dataset.save_to_disk`, or a split of an output in Arrow files."""

    def __init__(self, folder: Path) -> None:
        self.name, self._folder = str(folder), folder
        self._validated = self.stamp()
        super().__init__(str(folder), self._load())
        del self._dataset  # opened again at each use, so that this stays small

    def _load(self) -> Dataset:
        from datasets import Dataset, DatasetInfo, load_from_disk

        named = self._data_files()
        try:
            if named:
                return load_from_disk(str(self._folder))
            features = DatasetInfo.from_directory(str(self._folder)).features
            return Dataset(features.arrow_schema.empty_table())  # `datasets` saves such a dataset, but can't load it
        except Exception as error:  # `datasets` raises what its JSON files lead it to
            raise self.damaged(error) from error

    def _open(self) -> Dataset:
        dataset = self._load()
        if self.stamp() != self._validated:
            with self.errors():
                dataset.data.table.validate(full=True)
        return dataset.with_format("arrow")

    def fingerprint(self, absorb: Callable[[bytes], None]) -> int:
        return Table.fingerprint(self, absorb)

    def files(self) -> Sequence[SourceFile]:
        own = {file for file in self._folder.iterdir() if file.is_file()}
        return [LocalFile(file) for file in sorted(own.union(self._data_files()))]

    def _data_files(self) -> list[Path]:
        """The files with its rows. Raises `InputError` for one that lies elsewhere: a stranger's folder would have our
        own files read."""
        try:
            with LocalFile(self._folder / "state.json").open() as opened:
                names = [PurePath(entry["filename"]) for entry in json.load(opened)["_data_files"]]
            folders = [(), *([("..",), ("..", DATA)] if self._is_split() else [])]
        except (OSError, TypeError, LookupError, RecursionError, ValueError) as error:
            raise self.damaged(error) from error
        if outside := [name for name in names if name.name in ("", "..") or name.parent.parts not in folders]:
            raise InputError(f"{self.name} names the file '{outside[0]}' outside of it: save the dataset again.")
        return [self._folder / name for name in names]

    def _is_split(self) -> bool:
        """Is it a split of a saved dataset in the folder above? In a run's output the rows lie there or in data/."""
        described = self._folder.absolute().parent / "dataset_dict.json"
        return described.is_file() and self._folder.name in json.loads(described.read_bytes())["splits"]


class Recast(Table):
    """A file's table with the features that its dataset declares, cast as `datasets` casts it."""

    def __init__(self, inner: FileTable, features: Features) -> None:
        super().__init__(inner.name)
        self._inner, self._features = inner, features
        self.schema, self.n_rows = features.arrow_schema, inner.n_rows
        if other := [name for name in inner.schema.names if name not in features]:
            raise InputError(
                f"Column {other[0]!r} of {self.name} is not among those that its dataset declares in dataset_info: "
                "declare it there, or remove it."
            )

    def tables(self, start: int, stop: int, columns: Sequence[str] | None, rows: int) -> Iterator[pa.Table]:
        from datasets.table import table_cast

        names = [name for name in self.schema.names if columns is None or name in columns]
        schema = type(self._features)({name: self._features[name] for name in names}).arrow_schema
        for table in self._inner.tables(start, stop, names, rows):
            try:
                yield table_cast(table, schema) if names else table
            except (pa.ArrowException, TypeError, ValueError) as error:
                raise InputError(
                    f"The types of {self.name} are not those that its dataset declares in dataset_info "
                    f"({first_line(error)}): correct one of the two."
                ) from error

    def files(self) -> Sequence[SourceFile]:
        return self._inner.files()
