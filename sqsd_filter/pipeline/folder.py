"""A flat folder of files that are whole or not there: on a disk, or in a bucket named by a URL."""

from __future__ import annotations

import io
import os
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

import pyarrow as pa
from pyarrow import fs

from sqsd_filter.errors import InputError, UsageError

TEMPORARY = ".tmp"


class Folder:
    """The files directly in one folder. Their names never start with a dot."""

    def __init__(self, where: str | Path) -> None:
        """A path, or a URL of a kind that pyarrow or an installed fsspec package knows. Raises `UsageError`."""
        self._where = str(where)
        self.local = None if "://" in self._where else Path(where)
        if self.local is None:
            self._fs, self._root = _at_url(self._where)
        else:
            self._fs, self._root = fs.LocalFileSystem(), str(self.local)

    def __str__(self) -> str:
        return self._where

    def path(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}"

    def names(self, *, must_exist: bool = False) -> list[str]:
        """Sorted. Raises `InputError` where there has to be a folder and is none, or where it can't be reached."""
        try:
            found = self._fs.get_file_info(fs.FileSelector(self._root, allow_not_found=not must_exist))
        except FileNotFoundError as problem:
            raise InputError(f"{self} does not exist; check the path.") from problem
        except NotADirectoryError as problem:
            raise InputError(f"{self} is not a folder; check the path.") from problem
        except OSError as problem:
            raise InputError(
                f"{self} can't be reached ({_first_line(problem)}): check the address and rights."
            ) from problem
        return sorted(i.base_name for i in found if i.type == fs.FileType.File and not i.base_name.startswith("."))

    def size(self, name: str) -> int:
        return int(self._fs.get_file_info(self.path(name)).size)

    def open(self, name: str) -> pa.NativeFile:
        return self._fs.open_input_file(self.path(name))

    def delete(self, name: str) -> None:
        """Also where it is gone already."""
        with suppress(FileNotFoundError):
            self._fs.delete_file(self.path(name))

    def write(self, name: str, write: Callable[[Any], Any]) -> None:
        """Call `write(file)`, and let the file appear under its name when all is written. Raises `OSError`."""
        if self.local is not None:
            self.local.mkdir(parents=True, exist_ok=True)
            write_whole(self.local / name, write)
            return
        content = io.BytesIO()  # a bucket takes an object at once; a stream that breaks off might leave half of one
        write(content)
        self._fs.create_dir(self._root, recursive=True)
        with self._fs.open_output_stream(self.path(name)) as sink:
            sink.write(content.getbuffer())


def write_whole(path: Path, write: Callable[[IO[bytes]], Any]) -> None:
    """Call `write(file)` on a temporary neighbour, sync it and give it its name: the file is whole or not there."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}{TEMPORARY}")
    try:
        with temporary.open("wb") as sink:
            write(sink)
            sink.flush()
            os.fsync(sink.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def sweep(folder: Path, older_than: float = 0.0) -> None:
    """Remove what killed processes were writing here, if nothing was added to it for so many seconds."""
    for path in folder.glob(f".*{TEMPORARY}"):
        with suppress(FileNotFoundError):
            if time.time() - path.stat().st_mtime >= older_than:
                path.unlink()


def _at_url(url: str) -> tuple[fs.FileSystem, str]:
    if "@" in urlsplit(url).netloc:
        raise UsageError("A URL must not hold a user name or a secret: give those in the environment.")
    try:
        return fs.FileSystem.from_uri(url)
    except pa.ArrowException:
        pass  # not one of pyarrow's own
    try:
        import fsspec

        there, root = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as problem:
        raise UsageError(
            f"{url} can't be used ({_first_line(problem)}): name a folder, or install what it needs."
        ) from problem
    return fs.PyFileSystem(fs.FSSpecHandler(there)), root


def _first_line(problem: BaseException) -> str:
    return next(iter(str(problem).strip().splitlines()), type(problem).__name__)
