"""Writers of rows in each output format: parquet, the Arrow files of `datasets`, JSON Lines, JSON arrays.

A file is closed when it has `shard_size` bytes. File names hold the number of files, so they are given at the end. A
file that is the whole destination has its name from the user.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any, ClassVar, Generic, Self, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from sqsd_filter.corpus.json_schema import with_marks
from sqsd_filter.errors import InputError, SQSDError, UsageError, option
from sqsd_filter.pipeline.report import WrittenFile
from sqsd_filter.pipeline.writing.json_lines import has_form
from sqsd_filter.pipeline.writing.one_file import OPENERS, FileForm
from sqsd_filter.storage.folder import TEMPORARY, sweep, write_text
from sqsd_filter.storage.layout import ITSELF

SHARD_SIZE = "500MB"
SAVED_DATASET = ("dataset_dict.json", "dataset_info.json", "state.json")  # what `load_from_disk` reads beside the rows
Batch = TypeVar("Batch", bound=Sized)


class FileWriter(Generic[Batch]):
    """A file that batches of rows are appended to."""

    suffix: ClassVar[str]
    _sink: IO[bytes]

    def __init__(self, path: Path, first: Batch) -> None:
        """`first` is the first batch that will be written; it may have no rows."""
        raise NotImplementedError

    def write(self, batch: Batch) -> None:
        raise NotImplementedError

    def size(self) -> int:
        """The bytes written so far."""
        return int(self._sink.tell())

    def close(self) -> None:
        self._sink.close()

    @staticmethod
    def holds(kind: pa.DataType) -> bool:
        """Can the format hold a column of this type, so that `datasets` reads it?"""
        raise NotImplementedError


class ParquetWriter(FileWriter[pa.Table]):
    """Tables of one schema; each batch is a row group."""

    suffix = ".parquet"

    def __init__(self, path: Path, first: pa.Table) -> None:
        self._sink = pa.OSFile(str(path), "wb")
        self._writer = pq.ParquetWriter(self._sink, first.schema)

    def write(self, batch: pa.Table) -> None:
        if batch.num_rows:
            self._writer.write_table(batch)

    def close(self) -> None:
        self._writer.close()
        super().close()

    @staticmethod
    def holds(kind: pa.DataType) -> bool:
        return parquet_holds(kind) and _datasets_reads(kind)


def parquet_holds(kind: pa.DataType) -> bool:
    """Can a parquet file hold a column of this type?"""
    try:
        pq.write_table(pa.table({"column": pa.nulls(1, kind)}), pa.BufferOutputStream())
    except pa.ArrowInvalid:
        pass  # parquet holds the type; the type holds no null
    except (NotImplementedError, OSError):
        return False
    return True


def _datasets_reads(kind: pa.DataType) -> bool:
    """Has `datasets` a feature for this type? A file with any other can't be loaded with it, as the card promises."""
    from datasets import Features

    try:
        Features.from_arrow_schema(pa.schema([pa.field("column", kind)]))
    except (ValueError, NotImplementedError):
        return False
    return True


class ArrowWriter(FileWriter[pa.Table]):
    """Tables of one schema as `datasets` maps them into memory; each batch is a record batch."""

    suffix = ".arrow"

    def __init__(self, path: Path, first: pa.Table) -> None:
        from datasets import Features

        self._schema = with_marks(Features.from_arrow_schema(first.schema).arrow_schema, first.schema)
        self._sink = pa.OSFile(str(path), "wb")
        self._writer = pa.ipc.new_stream(self._sink, self._schema)

    def write(self, batch: pa.Table) -> None:
        if batch.num_rows:
            pairs = zip(batch.columns, self._schema, strict=True)
            columns = [column if column.type == field.type else column.cast(field.type) for column, field in pairs]
            self._writer.write_table(pa.Table.from_arrays(columns, schema=self._schema).combine_chunks())

    def close(self) -> None:
        self._writer.close()
        super().close()

    @staticmethod
    def holds(kind: pa.DataType) -> bool:
        return _datasets_reads(kind)


class JsonLinesWriter(FileWriter[Sequence[bytes]]):
    """Lines of bytes without their newlines; `compression` is one of `OPENERS`."""

    suffix = ".jsonl"

    def __init__(self, path: Path, _first: Sequence[bytes], compression: str = "") -> None:
        self._sink = OPENERS[compression](path)

    def write(self, batch: Sequence[bytes]) -> None:
        self._sink.write(b"".join(line + b"\n" for line in batch))

    @staticmethod
    def holds(kind: pa.DataType) -> bool:
        return has_form(kind)


class JsonWriter(JsonLinesWriter):
    """A JSON array of such lines, each on a line of its own."""

    suffix = ".json"

    def __init__(self, path: Path, first: Sequence[bytes], compression: str = "") -> None:
        super().__init__(path, first, compression)
        self._sink.write(b"[")
        self._before = b"\n"

    def write(self, batch: Sequence[bytes]) -> None:
        for line in batch:
            self._sink.write(self._before + line)
            self._before = b",\n"

    def close(self) -> None:
        self._sink.write(b"\n]\n")
        super().close()


Open = Callable[[Path, Batch], FileWriter[Batch]]  # begins a file with its first batch
FORMATS: dict[str, type[FileWriter[Any]]] = {
    "parquet": ParquetWriter,
    "arrow": ArrowWriter,
    "jsonl": JsonLinesWriter,
    "json": JsonWriter,
}
DEFAULT_FORMAT = "parquet"
JSON_AS = ("json", "text")  # how values without a common type are written
OF_LINES = ("jsonl", "json")  # formats that are made of the input's own lines


def bytes_of(shard_size: str | int) -> int:
    """A file size in bytes. Raises `UsageError`."""
    from datasets.utils.py_utils import convert_file_size_to_int

    try:
        # in capitals, since a small b would mean bits
        size = int(convert_file_size_to_int(shard_size.upper() if isinstance(shard_size, str) else shard_size))
    except ValueError:
        size = 0
    if size < 1:
        raise UsageError(f"'{shard_size}' is not a file size: write it like 100MB or 1GB.")
    return size


def check_json_as(json_as: str) -> None:
    """Raise `UsageError` for another value than those of `JSON_AS`."""
    if json_as not in JSON_AS:
        raise UsageError(f"Values without a common type can be written as {' or '.join(JSON_AS)}, not '{json_as}'.")


@dataclass(frozen=True)
class Output:
    """How rows are written: `to` is one of `FORMATS`, `shard_size` in bytes, `with_scores` only for lines of JSON.
    With `rows_column` kept rows say where they come from. Values without a common type are written `json_as` text or
    json. `compression` is that of the kept rows, if these are one file."""

    to: str
    shard_size: int
    with_scores: bool
    rows_column: bool = False
    json_as: str = JSON_AS[0]
    compression: str = ""

    @classmethod
    def of(
        cls,
        to: str | None,
        shard_size: str | int,
        with_scores: bool,
        *,
        rows_column: bool = False,
        json_as: str = JSON_AS[0],
        form: FileForm | None = None,
    ) -> Output:
        """`form` is that of the one file that the kept rows become; without `to`, its format is taken, else parquet.

        Raises `UsageError`.
        """
        if to is None:
            to = form.to if form is not None else DEFAULT_FORMAT
        if to not in FORMATS:
            raise UsageError(f"Rows can be written to {', '.join(FORMATS)}, not to '{to}'.")
        if form is not None and form.to != to:
            raise UsageError(
                f"The name of the destination says {form.to}, and {option('to')} says {to}: leave out the option, or "
                "name another file or a folder."
            )
        if with_scores and to not in OF_LINES:
            raise UsageError(
                f"{to} files always hold scores: leave out {option('with_scores')}, which is for jsonl and json."
            )
        check_json_as(json_as)
        if json_as != JSON_AS[0] and to in OF_LINES:
            raise UsageError(f"{to} holds every value as it is: leave out {option('json_as')}, or use --to parquet.")
        size = bytes_of(shard_size)
        return cls(to, size, with_scores, rows_column, json_as, form.compression if form is not None else "")

    def identity(self) -> dict[str, object]:
        """The settings that make it another run, later ones only where they are used: runs of earlier versions are the
        same. The compression follows from the destination's name."""
        own: dict[str, object] = {"to": self.to, "shard_size": self.shard_size, "with_scores": self.with_scores}
        own |= {"rows_column": True} if self.rows_column else {}
        return own | ({"json_as": self.json_as} if self.json_as != JSON_AS[0] else {})

    def check(self, schema: pa.Schema) -> None:
        """Raise `InputError` for a column that the format can't hold."""
        for field in schema:
            if not FORMATS[self.to].holds(field.type):
                others = " or ".join(to for to, kind in FORMATS.items() if kind.holds(field.type))
                raise InputError(
                    f"Column {field.name!r} holds {field.type}, which can't be written to {self.to}"
                    + ("" if self.to in OF_LINES else " for `datasets` to read")
                    + ": "
                    + (f"use --to {others}." if others else "give it another type, or leave it out.")
                )

    def files(self, root: Path, stem: str) -> ShardedWriter[Any]:
        """A writer of the files below `root` whose paths begin with `stem`."""
        kind = FORMATS[self.to]
        return ShardedWriter(kind, root, stem, self.shard_size, kind.suffix)

    def file(self, path: Path) -> ShardedWriter[Any]:
        """A writer of this one file."""
        begin: Callable[..., FileWriter[Any]] = FORMATS[self.to]
        return ShardedWriter(partial(begin, compression=self.compression) if self.compression else begin, path, ITSELF)


def temporary_of(path: Path, number: int = 0) -> Path:
    """Where the numbered file of this path is written, until it is whole."""
    return path.with_name(f".{path.name}-{number:05d}{TEMPORARY}")


class ShardedWriter(Generic[Batch]):
    """Writes rows to numbered files of about `shard_size` bytes, whose names end in `suffix`, or without a size to one
    file at the path `stem`.

    Leaving the context without `publish` removes the files. Raises `SQSDError` when they can't be written.
    """

    def __init__(
        self, begin: Open[Batch], root: Path, stem: str, shard_size: int | None = None, suffix: str = ""
    ) -> None:
        self._new_file, self._root, self._stem, self._shard_size, self._suffix = begin, root, stem, shard_size, suffix
        self._open: FileWriter[Batch] | None = None
        self._temporaries: list[Path] = []
        self._rows: list[int] = []  # in each file

    def prepare(self) -> None:
        """Make the folder, without what killed processes left; that of a file that is the destination is the user's."""
        if self._stem != ITSELF:
            folder = (self._root / self._stem).parent
            folder.mkdir(parents=True, exist_ok=True)
            sweep(folder)

    @property
    def rows(self) -> int:
        return sum(self._rows)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._open is not None:
            with suppress(OSError):
                self._open.close()
        for path in self._temporaries:
            path.unlink(missing_ok=True)

    def write(self, batch: Batch) -> None:
        """Append a batch. The first one creates a file, even if it has no rows."""
        with self._write_errors():
            if self._open is None or (len(batch) and self._rows[-1] and self._is_full(self._open)):
                self._begin(batch)
            assert self._open is not None
            self._open.write(batch)
            self._rows[-1] += len(batch)

    def publish(self) -> list[WrittenFile]:
        """Give the files their names, and remove such files of an earlier attempt. Returns the files."""
        with self._write_errors():
            self._close()
            written: list[WrittenFile] = []
            for number, (temporary, rows) in enumerate(zip(self._temporaries, self._rows, strict=True)):
                with temporary.open("rb") as file:
                    digest = hashlib.file_digest(file, "sha256").hexdigest()  # the Hub's name for it, too
                    os.fsync(file.fileno())
                path, size = self._path(f"{number:05d}", f"{len(self._rows):05d}"), temporary.stat().st_size
                temporary.replace(self._root / path)
                written.append({"path": path, "rows": rows, "bytes": size, "sha256": digest})
            if self._shard_size is not None:
                stale = set(self._root.glob(self._path("?????", "?????"))) - {
                    self._root / file["path"] for file in written
                }
                for left in stale:
                    left.unlink()
        return written

    def _path(self, number: str, count: str) -> str:
        return self._stem if self._shard_size is None else f"{self._stem}-{number}-of-{count}{self._suffix}"

    def _is_full(self, file: FileWriter[Batch]) -> bool:
        return self._shard_size is not None and file.size() >= self._shard_size

    def _begin(self, first: Batch) -> None:
        self._close()
        target = self._root / self._stem
        temporary = temporary_of(target, len(self._temporaries))
        self._temporaries.append(temporary)
        self._rows.append(0)
        self._open = self._new_file(temporary, first)

    def _close(self) -> None:
        if self._open is not None:
            self._open.close()
            self._open = None

    @contextmanager
    def _write_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as problem:
            raise SQSDError(
                f"{self._root / self._stem} can't be written ({problem}): free some space and run the same command "
                "again; no score is lost."
            ) from problem


def describe(root: Path, folder: str, splits: Mapping[str, Sequence[WrittenFile]]) -> list[str]:
    """Write the metadata with which `datasets.load_from_disk` loads the Arrow files of these splits as a DatasetDict
    from a folder below `root`. The files may lie elsewhere. Returns the paths of the metadata files."""
    from datasets import DatasetInfo, Features

    written = []
    for split, files in splits.items():
        own = root / folder / split
        with pa.memory_map(str(root / files[0]["path"])) as source:
            features = Features.from_arrow_schema(pa.ipc.open_stream(source).schema)
        own.mkdir(parents=True, exist_ok=True)
        sweep(own)
        DatasetInfo(features=features).write_to_directory(str(own))
        content = "".join(file["sha256"] for file in files).encode()
        state: dict[str, Any] = {
            "_data_files": [{"filename": os.path.relpath(root / file["path"], own)} for file in files],
            "_fingerprint": hashlib.sha256(content).hexdigest()[:16],
            "_format_columns": None,
            "_format_kwargs": {},
            "_format_type": None,
            "_output_all_columns": False,
            "_split": None,
        }
        _write_json(own / "state.json", state)
        written += [own / "state.json", own / "dataset_info.json"]
    _write_json(root / folder / "dataset_dict.json", {"splits": list(splits)})
    return [str(path.relative_to(root)) for path in [root / folder / "dataset_dict.json", *written]]


def _write_json(path: Path, value: object) -> None:
    write_text(path, json.dumps(value, indent=2))
