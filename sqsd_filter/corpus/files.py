"""One file to read, wherever it is: on a disk, behind a URL, or in a repository of the Hub."""

from __future__ import annotations

import errno
import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, TYPE_CHECKING
from urllib.parse import urlsplit

import pyarrow as pa
from pyarrow import fs

from sqsd_filter.errors import InputError, first_line
from sqsd_filter.storage.folder import connect
from sqsd_filter.storage.hub_errors import hub_errors
from sqsd_filter.storage.retries import with_retries

if TYPE_CHECKING:
    from typing_extensions import Buffer

BUFFER = 1 << 20


class SourceFile:
    """A file and the name by which messages call it. Small and picklable: nothing is open."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __str__(self) -> str:
        return self.name

    @property
    def suffixes(self) -> list[str]:
        """As `pathlib` gives them."""
        raise NotImplementedError

    @property
    def compression(self) -> str:
        """The last suffix, which names the compression of a compressed file."""
        return self.suffixes[-1] if self.suffixes else ""

    def open(self) -> IO[bytes]:
        """Open it for reading, seekable. Raises `OSError`."""
        raise NotImplementedError

    def size(self) -> int:
        """In bytes. Raises `OSError`."""
        raise NotImplementedError


class LocalFile(SourceFile):
    def __init__(self, path: str | Path, name: str | None = None) -> None:
        super().__init__(name or str(path))
        self.path = Path(path)

    @property
    def suffixes(self) -> list[str]:
        return self.path.suffixes

    def open(self) -> IO[bytes]:
        return self.path.open("rb")

    def size(self) -> int:
        return self.path.stat().st_size


class RemoteFile(SourceFile):
    """Behind a URL that pyarrow or an fsspec package knows: only the bytes that are read are fetched, none stored."""

    def __init__(self, url: str, folder: str | None = None, path: str | None = None) -> None:
        """`path` is the file's path in the file system that the URL `folder` names, if that is known."""
        super().__init__(url)
        self._folder, self._path = folder or url, path

    @property
    def suffixes(self) -> list[str]:
        path = self._path or self.name
        has_query = "://" in path and not path.startswith("hf://")
        return PurePosixPath(urlsplit(path).path if has_query else path).suffixes

    def open(self) -> IO[bytes]:
        return io.BufferedReader(_ResumingFile(*self._locate()), BUFFER)

    def size(self) -> int:
        filesystem, path = self._locate()
        with as_os_errors():
            info = with_retries(lambda: filesystem.get_file_info(path))
        if not info.is_file:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), self.name)
        return int(info.size)

    def _locate(self) -> tuple[fs.FileSystem, str]:
        filesystem, path = connect(self._folder)
        return filesystem, self._path or path


class HubFile(SourceFile):
    """In a dataset repository, at a commit: fetched whole into the Hub's cache when it is first opened."""

    def __init__(self, repo: str, commit: str, path: str) -> None:
        super().__init__(f"hf://datasets/{repo}@{commit}/{path}")
        self._repo, self._commit, self._path = repo, commit, path

    @property
    def suffixes(self) -> list[str]:
        return PurePosixPath(self._path).suffixes

    def open(self) -> IO[bytes]:
        return self._local().open("rb")

    def size(self) -> int:
        return self._local().stat().st_size

    def _local(self) -> Path:
        from huggingface_hub import hf_hub_download

        def fetch() -> str:
            return hf_hub_download(self._repo, self._path, repo_type="dataset", revision=self._commit)

        with hub_errors(self._repo, self._commit):
            return Path(with_retries(fetch))


class _ResumingFile(io.RawIOBase):
    """A remote file that survives dropped connections: it is reopened at the byte where reading stopped."""

    def __init__(self, filesystem: fs.FileSystem, path: str) -> None:
        self._filesystem, self._path = filesystem, path
        self._file: pa.NativeFile | None = None
        self._at = 0
        with as_os_errors():
            self._size = with_retries(lambda: self._open().size())

    def _open(self) -> pa.NativeFile:
        if self._file is None:
            self._file = self._filesystem.open_input_file(self._path)
        return self._file

    def _read(self, count: int) -> bytes:
        try:
            file = self._open()
            if file.tell() != self._at:
                file.seek(self._at)
            data: bytes = file.read(min(count, self._size - self._at))
            if not data and count and self._at < self._size:
                raise ConnectionError(f"{self._path} ended at byte {self._at} of {self._size}")
            return data
        except Exception:
            self._file = None
            raise

    def readinto(self, buffer: Buffer) -> int:
        target = memoryview(buffer).cast("B")
        with as_os_errors():
            data = with_retries(lambda: self._read(len(target)))
        target[: len(data)] = data
        self._at += len(data)
        return len(data)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = max(0, offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence])
        return self._at

    def tell(self) -> int:
        return self._at

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True


@contextmanager
def as_os_errors() -> Iterator[None]:
    """Turn the errors of services' libraries into `OSError`, with an errno and a one-line message."""
    try:
        yield
    except FileNotFoundError as problem:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT)) from problem
    except Exception as problem:
        number, reason = getattr(problem, "errno", None), getattr(problem, "strerror", None)
        raise OSError(number or errno.EIO, reason or first_line(problem)) from problem


def unreadable(file: object, problem: BaseException) -> InputError:
    """The error for a file that can't be read."""
    reason = getattr(problem, "strerror", None) or first_line(problem)
    return InputError(f"Cannot read {file}: {reason.rstrip('.')}.")
