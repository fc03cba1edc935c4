"""A flat folder of files, on a disk or in a bucket named by a URL. Each file is whole or not there."""

from __future__ import annotations

import io
import json
import os
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO
from urllib.parse import urlsplit

import pyarrow as pa
from pyarrow import fs

from sqsd_filter.errors import InputError, UsageError, first_line
from sqsd_filter.storage.secrets import check_address

TEMPORARY = ".tmp"
# Here an object appears at once, when all of it is there. Elsewhere a file is written under another name first.
OBJECT_STORES = ("s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "hf", "memory", "r2", "oss")
TRIES = 3  # to read a file from a server


class Folder:
    """The files directly in one folder, except those whose names start with a dot.

    Errors of the file system are raised as `OSError` with a one-line message, or as the errors named here.
    """

    def __init__(self, where: str | Path) -> None:
        """A path, or a URL of a kind that pyarrow or an installed fsspec package knows.

        Raises `UsageError` for a URL of any other kind or with a secret in it, `InputError` if it can't be reached.
        """
        self._where = str(where)
        self._scheme = urlsplit(self._where).scheme if "://" in self._where else ""
        local: _Connection = (fs.LocalFileSystem(), self._where, lambda: None)
        self._fs, self._root, self._forget = _connect(self._where) if self._scheme else local
        self.local = Path(self._root) if isinstance(self._fs, fs.LocalFileSystem) else None

    def __str__(self) -> str:
        return self._where

    def path(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}"

    def names(self, *, must_exist: bool = False) -> list[str]:
        """Sorted. Raises `InputError` if the folder can't be reached, or with `must_exist` if it does not exist."""
        try:
            with self._as_os_errors():
                self._forget()
                infos = self._fs.get_file_info(fs.FileSelector(self._root, allow_not_found=not must_exist))
        except FileNotFoundError as problem:
            raise InputError(f"{self} does not exist; check the path.") from problem
        except NotADirectoryError as problem:
            raise InputError(f"{self} is not a folder; check the path.") from problem
        except OSError as problem:
            raise _unreachable(self._where, problem) from problem
        return sorted(i.base_name for i in infos if i.type == fs.FileType.File and not i.base_name.startswith("."))

    def has(self, name: str) -> bool:
        with self._as_os_errors():
            return bool(self._fs.get_file_info(self.path(name)).type == fs.FileType.File)

    def read(self, name: str) -> pa.Buffer:
        """The whole file. Raises `FileNotFoundError`, or `InputError` if it can't be read in several tries."""
        for left in reversed(range(TRIES)):
            try:
                with self._as_os_errors(), self._fs.open_input_file(self.path(name)) as source:
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
        """Delete a file; it is no error if it does not exist. Raises `OSError`."""
        with suppress(FileNotFoundError), self._as_os_errors():
            self._fs.delete_file(self.path(name))

    def write(self, name: str, write: Callable[[IO[bytes]], object]) -> None:
        """Call `write(file)`; the file appears under its name when all is written. Raises `OSError`."""
        if self.local is not None:
            self.local.mkdir(parents=True, exist_ok=True)
            write_whole(self.local / name, write)
            return
        content = io.BytesIO()
        write(content)
        direct = self._scheme in OBJECT_STORES
        path = self.path(name if direct else f".{name}.{uuid.uuid4().hex}{TEMPORARY}")
        with self._as_os_errors():
            self._fs.create_dir(self._root, recursive=True)
            with self._fs.open_output_stream(path) as sink:
                sink.write(content.getbuffer())
            if not direct:
                move_over(self._fs, path, self.path(name))

    @contextmanager
    def _as_os_errors(self) -> Iterator[None]:
        """Turn the errors of services' libraries into `OSError`."""
        try:
            yield
        except OSError:
            raise
        except Exception as problem:
            raise OSError(first_line(problem)) from problem


# A file system, the path in it, and a call that makes the file system forget what it cached.
_Connection = tuple[fs.FileSystem, str, Callable[[], object]]


def connect(url: str) -> tuple[fs.FileSystem, str]:
    """The pyarrow file system that a URL names, and the path there.

    Raises `UsageError` for a URL of a kind that neither pyarrow nor an installed fsspec package knows, or with a secret
    in it; `InputError` if it can't be reached.
    """
    return _connect(url)[:2]


def _connect(url: str) -> _Connection:
    check_address(url)
    try:
        return *fs.FileSystem.from_uri(url), lambda: None
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, ImportError, ValueError):
        pass  # pyarrow does not know this kind
    except OSError as problem:
        raise _unreachable(url, problem) from problem
    try:
        import fsspec

        filesystem, root = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as problem:
        raise UsageError(
            f"{url} can't be used ({first_line(problem)}): name a folder, or install the package for such URLs."
        ) from problem
    except Exception as problem:  # whatever the service's library raises
        raise _unreachable(url, problem) from problem
    return fs.PyFileSystem(fs.FSSpecHandler(filesystem)), root, filesystem.invalidate_cache


def move_over(filesystem: fs.FileSystem, path: str, target: str) -> None:
    """Give a file another name, in place of a file that has it. Raises `OSError` where it isn't there afterwards."""
    if isinstance(filesystem, fs.LocalFileSystem):
        filesystem.move(path, target)
        return
    if filesystem.get_file_info(target).type == fs.FileType.File:
        filesystem.delete_file(target)  # many servers don't rename onto a file, and not all of them say so
    if isinstance(filesystem, fs.PyFileSystem):
        # not `filesystem.move`, which passes options that not every kind of file system has
        filesystem.handler.fs.mv(path, target)
    else:
        filesystem.move(path, target)
    if filesystem.get_file_info(target).type != fs.FileType.File:
        raise OSError(f"{path} was not renamed to {target}")


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
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)
