"""DEST that is one file with the kept rows: what its name says of their format, and the compression of lines."""

from __future__ import annotations

import gzip
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, cast

from sqsd_filter.corpus.formats import TABLE_FORMATS, TEXT_FORMATS
from sqsd_filter.corpus.repositories import HUB
from sqsd_filter.errors import UsageError

_LINES = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json"}
_TABLES = {".parquet": "parquet", ".arrow": "arrow"}
_DATA = {*_LINES, *_TABLES, *TEXT_FORMATS, *TABLE_FORMATS}
_OTHER_COMPRESSIONS = (".bz2", ".xz", ".zip", ".lz4")
_ZSTD_LEVEL = 3  # the library's default


class _Gzip(gzip.GzipFile):
    """Closes the file that it was given, too."""

    def __init__(self, opened: IO[bytes]) -> None:
        self._opened = opened
        # neither name nor time in its header: the same rows give the same bytes
        super().__init__(filename="", mode="wb", fileobj=opened, mtime=0)

    def close(self) -> None:
        try:
            super().close()
        finally:
            self._opened.close()


def _gzip(path: Path) -> IO[bytes]:
    return cast("IO[bytes]", _Gzip(path.open("wb")))


def _zstd(path: Path) -> IO[bytes]:
    import zstandard

    return cast("IO[bytes]", zstandard.ZstdCompressor(_ZSTD_LEVEL).stream_writer(path.open("wb"), closefd=True))


OPENERS: dict[str, Callable[[Path], IO[bytes]]] = {"": lambda path: path.open("wb"), ".gz": _gzip, ".zst": _zstd}


@dataclass(frozen=True)
class FileForm:
    """The format of the one file, and its compression: one of `OPENERS`."""

    to: str
    compression: str = ""

    @property
    def suffix(self) -> str:
        return f".{self.to}{self.compression}"


def file_form(dest: str | Path) -> FileForm | None:
    """The form of the file that DEST names; None where it names a folder or a dataset of the Hub.

    A path that ends in a slash names a folder. Raises `UsageError` for a file of rows that can't be written.
    """
    text = os.fspath(dest)
    if text.startswith(HUB) or text.endswith("/"):
        return None
    path = text.partition("?")[0] if "://" in text else text
    *before, last = ["", *(suffix.lower() for suffix in PurePosixPath(path).suffixes)]
    compression = last if last in (*OPENERS, *_OTHER_COMPRESSIONS) and before else ""
    kind = before[-1] if compression else last
    if kind not in _DATA:
        return None
    if kind in _LINES and compression in OPENERS:
        return FileForm(_LINES[kind], compression)
    if kind in _TABLES and not compression:
        return FileForm(_TABLES[kind])
    raise UsageError(
        f"{dest} is named like a {kind}{compression} file, which can't be written: name a .jsonl or .json file (also "
        ".gz or .zst), a .parquet or .arrow file, or a folder."
    )
