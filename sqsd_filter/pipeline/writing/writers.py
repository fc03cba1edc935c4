"""Files of rows in each format that they can be written in: parquet, the Arrow files of `datasets`, JSON Lines.

A file is closed as soon as it has `shard_size` bytes. Names say how many files there are, so all get theirs in the end.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pyarrow as pa
import pyarrow.parquet as pq

from sqsd_filter.corpus.json_schema import with_marks
from sqsd_filter.errors import InputError, SQSDError, UsageError, option
from sqsd_filter.pipeline.report import WrittenFile
from sqsd_filter.pipeline.writing.json_lines import has_form
from sqsd_filter.storage.folder import TEMPORARY, write_text

SHARD_SIZE = "500MB"


class File:
    """A file open for writing: batches of one kind are appended to it. `stem` and `suffix` make its path."""

    stem: ClassVar[str] = "data/{}"
    suffix: ClassVar[str]
    _sink: Any

    def __init__(self, path: Path, first: Any) -> None:
        """`first` is the first batch that will be written, perhaps without rows."""
        raise NotImplementedError

    def write(self, rows: Any) -> None:
        raise NotImplementedError

    def size(self) -> int:
        """Bytes so far."""
        return int(self._sink.tell())

    def close(self) -> None:
        self._sink.close()

    @staticmethod
    def holds(kind: pa.DataType) -> bool:
        """Can it hold a column of this type?"""
        raise NotImplementedError


class ParquetFile(File):
    """Tables of one schema; each batch is a row group."""

    suffix = ".parquet"

    def __init__(self, path: Path, first: pa.Table) -> None:
        self._sink = pa.OSFile(str(path), "wb")
        self._writer = pq.ParquetWriter(self._sink, first.schema)

    def write(self, table: pa.Table) -> None:
        if table.num_rows:
            self._writer.write_table(table)

    def close(self) -> None:
        self._writer.close()
        super().close()

    @staticmethod
    def holds(kind: pa.DataType) -> bool:
        try:
            pq.write_table(pa.table({"column": pa.nulls(1, kind)}), pa.BufferOutputStream())
        except pa.ArrowInvalid:
            return True  # it holds the type, but the type no null
        except (NotImplementedError, OSError):
            return False
        return True


class ArrowFile(File):
    """Tables of one schema as `datasets` maps them into memory; each batch is a record batch."""

    stem, suffix = "{}/data", ".arrow"

    def __init__(self, path: Path, first: pa.Table) -> None:
        from datasets import Features

        self._schema = with_marks(Features.from_arrow_schema(first.schema).arrow_schema, first.schema)
        self._sink = pa.OSFile(str(path), "wb")
        self._writer = pa.ipc.new_stream(self._sink, self._schema)

    def write(self, table: pa.Table) -> None:
        if table.num_rows:
            pairs = zip(table.columns, self._schema, strict=True)
            columns = [column if column.type == field.type else column.cast(field.type) for column, field in pairs]
            self._writer.write_table(pa.Table.from_arrays(columns, schema=self._schema).combine_chunks())

    def close(self) -> None:
        self._writer.close()
        super().close()

    @staticmethod
    def holds(kind: pa.DataType) -> bool:
        from datasets import Features

        try:
            Features.from_arrow_schema(pa.schema([pa.field("column", kind)]))
        except (ValueError, NotImplementedError):
            return False
        return True


class JsonLinesFile(File):
    """Lines of bytes, which get their newlines here."""

    suffix = ".jsonl"

    def __init__(self, path: Path, first: Sequence[bytes]) -> None:
        self._sink = path.open("wb")

    def write(self, lines: Sequence[bytes]) -> None:
        self._sink.write(b"".join(line + b"\n" for line in lines))

    @staticmethod
    def holds(kind: pa.DataType) -> bool:
        return has_form(kind)


FORMATS: dict[str, type[File]] = {"parquet": ParquetFile, "arrow": ArrowFile, "jsonl": JsonLinesFile}


@dataclass(frozen=True)
class Output:
    """How rows are written: `to` is one of `FORMATS`, `shard_size` in bytes, `with_scores` for JSON Lines only."""

    to: str
    shard_size: int
    with_scores: bool

    @classmethod
    def of(cls, to: str, shard_size: str | int, with_scores: bool) -> Output:
        """Raises `UsageError`."""
        if to not in FORMATS:
            raise UsageError(f"Rows can be written to {', '.join(FORMATS)}, not to '{to}'.")
        if with_scores and to != "jsonl":
            raise UsageError(f"{to} files always hold scores: leave out {option('with_scores')}, which is for jsonl.")
        from datasets.utils.py_utils import convert_file_size_to_int

        try:
            # in capitals, since it takes a small b for bits
            size = convert_file_size_to_int(shard_size.upper() if isinstance(shard_size, str) else shard_size)
        except ValueError:
            size = 0
        if size < 1:
            raise UsageError(f"'{shard_size}' is not a size of files: write it like 100MB or 1GB.")
        return cls(to, size, with_scores)

    def check(self, schema: pa.Schema) -> None:
        """Raise `InputError` for a column that can't be written so."""
        for field in schema:
            if not FORMATS[self.to].holds(field.type):
                others = " or ".join(to for to, kind in FORMATS.items() if kind.holds(field.type))
                raise InputError(
                    f"Column {field.name!r} holds {field.type}, which can't be written to {self.to}: "
                    + (f"use --to {others}." if others else "give it another type, or leave it out.")
                )

    def files(self, root: Path, name: str) -> Files:
        """The files below `root` of what is called so."""
        return Files(FORMATS[self.to], root, FORMATS[self.to].stem.format(name), self.shard_size)


class Files:
    """The files in which rows of one kind go on, or the one file at the path `stem` if there is no `shard_size`.

    Leaving the context without `publish` removes them. Raises `SQSDError` when the disk refuses.
    """

    def __init__(self, kind: type[File], root: Path, stem: str, shard_size: int | None = None) -> None:
        self._kind, self._root, self._stem, self._shard_size = kind, root, stem, shard_size
        self._open: File | None = None
        self._temporaries: list[Path] = []
        self._rows: list[int] = []  # in each

    @property
    def folder(self) -> Path:
        return (self._root / self._stem).parent

    @property
    def rows(self) -> int:
        return sum(self._rows)

    def __enter__(self) -> Files:
        return self

    def __exit__(self, *_: object) -> None:
        if self._open is not None:
            with suppress(OSError):
                self._open.close()
        for path in self._temporaries:
            path.unlink(missing_ok=True)

    def write(self, batch: Any) -> None:
        """Append a batch. The first one, even without rows, makes a file."""
        with self._told():
            if self._open is None or (len(batch) and self._rows[-1] and self._is_full(self._open)):
                self._begin(batch)
            assert self._open is not None
            self._open.write(batch)
            self._rows[-1] += len(batch)

    def publish(self) -> list[WrittenFile]:
        """Give the files their names, which no others may keep that a killed attempt left. Returns what they are."""
        with self._told():
            self._close()
            found: list[WrittenFile] = []
            for number, (temporary, rows) in enumerate(zip(self._temporaries, self._rows, strict=True)):
                with temporary.open("rb") as file:
                    digest = hashlib.file_digest(file, "sha256").hexdigest()  # the Hub's name for it, too
                    os.fsync(file.fileno())
                path, size = self._path(f"{number:05d}", f"{len(self._rows):05d}"), temporary.stat().st_size
                temporary.replace(self._root / path)
                found.append({"path": path, "rows": rows, "bytes": size, "sha256": digest})
            if self._shard_size is not None:
                stale = set(self._root.glob(self._path("?????", "?????"))) - {self._root / f["path"] for f in found}
                for left in stale:
                    left.unlink()
        return found

    def _path(self, number: str, count: str) -> str:
        return self._stem if self._shard_size is None else f"{self._stem}-{number}-of-{count}{self._kind.suffix}"

    def _is_full(self, file: File) -> bool:
        return self._shard_size is not None and file.size() >= self._shard_size

    def _begin(self, first: Any) -> None:
        self._close()
        target = self._root / self._stem
        temporary = target.with_name(f".{target.name}-{len(self._temporaries):05d}{TEMPORARY}")
        self._temporaries.append(temporary)
        self._rows.append(0)
        self._open = self._kind(temporary, first)

    def _close(self) -> None:
        if self._open is not None:
            self._open.close()
            self._open = None

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except OSError as problem:
            raise SQSDError(
                f"{self._root / self._stem} can't be written ({problem}): make room and run the same command again; "
                "no score is lost."
            ) from problem


def describe(root: Path, splits: Mapping[str, Sequence[WrittenFile]]) -> list[str]:
    """Make of the Arrow files of each split what `datasets.load_from_disk` takes for a DatasetDict; the names of the
    files that say so."""
    from datasets import DatasetInfo, Features

    for name, files in splits.items():
        with pa.memory_map(str(root / files[0]["path"])) as source:
            features = Features.from_arrow_schema(pa.ipc.open_stream(source).schema)
        DatasetInfo(features=features).write_to_directory(str(root / name))
        content = "".join(file["sha256"] for file in files).encode()
        state: dict[str, Any] = {
            "_data_files": [{"filename": os.path.basename(file["path"])} for file in files],
            "_fingerprint": hashlib.sha256(content).hexdigest()[:16],
            "_format_columns": None,
            "_format_kwargs": {},
            "_format_type": None,
            "_output_all_columns": False,
            "_split": None,
        }
        _write_json(root / name / "state.json", state)
    _write_json(root / "dataset_dict.json", {"splits": list(splits)})
    return ["dataset_dict.json", *(f"{name}/{file}.json" for name in splits for file in ("state", "dataset_info"))]


def _write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2))
