"""A flat folder of files that are whole or not there: on a disk, or in a bucket named by a URL."""

from __future__ import annotations

import io
import json
import os
import re
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any
from urllib.parse import parse_qsl, urlsplit

import pyarrow as pa
from pyarrow import fs

from sqsd_filter.errors import InputError, UsageError, first_line

TEMPORARY = ".tmp"
# Where an object appears at once, when all of it is there; elsewhere a file is written under another name first.
OBJECT_STORES = ("s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "hf", "memory", "r2", "oss")
TRIES = 3  # at reading a file from a server
_SECRET = re.compile(r"secret|token|sig|pass|key", re.IGNORECASE)


class Folder:
    """The files directly in one folder. Their names never start with a dot.

    Whatever a file system raises comes out as an `OSError` with one line, or as the errors named here.
    """

    def __init__(self, where: str | Path) -> None:
        """A path, or a URL of a kind that pyarrow or an installed fsspec package knows.

        Raises `UsageError` for a URL of no such kind or with a secret in it, `InputError` where it can't be reached.
        """
        self._where = str(where)
        self._scheme = urlsplit(self._where).scheme if "://" in self._where else ""
        here: tuple[Any, str, Callable[[], Any]] = (fs.LocalFileSystem(), self._where, lambda: None)
        self._fs, self._root, self._forget = _connect(self._where) if self._scheme else here
        self.local = Path(self._root) if isinstance(self._fs, fs.LocalFileSystem) else None

    def __str__(self) -> str:
        return self._where

    def path(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}"

    def names(self, *, must_exist: bool = False) -> list[str]:
        """Sorted. Raises `InputError` where there has to be a folder and is none, or where it can't be reached."""
        try:
            with self._plainly():
                self._forget()
                found = self._fs.get_file_info(fs.FileSelector(self._root, allow_not_found=not must_exist))
        except FileNotFoundError as problem:
            raise InputError(f"{self} does not exist; check the path.") from problem
        except NotADirectoryError as problem:
            raise InputError(f"{self} is not a folder; check the path.") from problem
        except OSError as problem:
            raise _unreachable(self._where, problem) from problem
        return sorted(i.base_name for i in found if i.type == fs.FileType.File and not i.base_name.startswith("."))

    def has(self, name: str) -> bool:
        with self._plainly():
            return bool(self._fs.get_file_info(self.path(name)).type == fs.FileType.File)

    def read(self, name: str) -> pa.Buffer:
        """The whole file. Raises `FileNotFoundError`, or `InputError` where it can't be read at several tries."""
        for left in reversed(range(TRIES)):
            try:
                with self._plainly(), self._fs.open_input_file(self.path(name)) as source:
                    return source.read_buffer()
            except FileNotFoundError:
                raise
            except OSError as problem:
                if not left:
                    raise InputError(
                        f"{self.path(name)} can't be read ({problem}): check the connection and your rights."
                    ) from problem
                if self.local is None:
                    time.sleep(1.0)
        raise AssertionError

    def delete(self, name: str) -> None:
        """Also where it is gone already. Raises `OSError`."""
        with suppress(FileNotFoundError), self._plainly():
            self._fs.delete_file(self.path(name))

    def write(self, name: str, write: Callable[[Any], Any]) -> None:
        """Call `write(file)`, and let the file appear under its name when all is written. Raises `OSError`."""
        if self.local is not None:
            self.local.mkdir(parents=True, exist_ok=True)
            write_whole(self.local / name, write)
            return
        content = io.BytesIO()
        write(content)
        direct = self._scheme in OBJECT_STORES
        path = self.path(name if direct else f".{name}.{uuid.uuid4().hex}{TEMPORARY}")
        with self._plainly():
            self._fs.create_dir(self._root, recursive=True)
            with self._fs.open_output_stream(path) as sink:
                sink.write(content.getbuffer())
            if not direct:
                self._fs.move(path, self.path(name))

    @contextmanager
    def _plainly(self) -> Iterator[None]:
        """The libraries of services raise errors of their own: hand them on as `OSError`."""
        try:
            yield
        except OSError:
            raise
        except Exception as problem:
            raise OSError(first_line(problem)) from problem


def connect(url: str) -> tuple[Any, str]:
    """The pyarrow file system that a URL names, and the path there.

    Raises `UsageError` for a URL of no kind that pyarrow or an installed fsspec package knows, or with a secret in it,
    `InputError` where it can't be reached.
    """
    return _connect(url)[:2]


def _connect(url: str) -> tuple[Any, str, Callable[[], Any]]:
    parts = urlsplit(url)
    if parts.password or any(_SECRET.search(name) for name, _ in parse_qsl(parts.query)):
        raise UsageError("A URL must not hold a password or a key: give those in the environment.")
    try:
        return *fs.FileSystem.from_uri(url), lambda: None
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, ImportError, ValueError):
        pass  # not one of pyarrow's own
    except OSError as problem:
        raise _unreachable(url, problem) from problem
    try:
        import fsspec

        there, root = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as problem:
        raise UsageError(
            f"{url} can't be used ({first_line(problem)}): name a folder, or install what it needs."
        ) from problem
    except Exception as problem:  # whatever the service's library raises
        raise _unreachable(url, problem) from problem
    return fs.PyFileSystem(fs.FSSpecHandler(there)), root, there.invalidate_cache


def _unreachable(url: str, problem: BaseException) -> InputError:
    return InputError(f"{url} can't be reached ({first_line(problem)}): check the address and your rights.")


def write_whole(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Call `write(file)` on a temporary file beside `path`, sync it and rename it: the file is whole or not there."""
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
    _sync_folder(path.parent)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a whole file at once, as `write_whole` does."""
    write_whole(path, lambda sink: sink.write(content))


def write_text(path: Path, text: str) -> None:
    """Write a whole UTF-8 file at once. Half a character, as a model that was cut off may leave, is written as "?"."""
    write_bytes(path, text.encode(errors="replace"))


def write_json(path: Path, value: object) -> None:
    """Write a value as indented JSON, as `write_text` does."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def sweep(folder: Path, older_than: float = 0.0) -> None:
    """Remove the temporary files of killed processes here, if their last change is `older_than` seconds ago."""
    for path in folder.glob(f".*{TEMPORARY}"):
        with suppress(FileNotFoundError):
            if time.time() - path.stat().st_mtime >= older_than:
                path.unlink()


def _sync_folder(folder: Path) -> None:
    """Make the names in a folder survive a crash of the machine."""
    if os.name == "nt":
        return  # Windows opens no folders
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)
