"""One file to read, wherever it is: on a disk, behind a URL, or in a repository of the Hub."""

from __future__ import annotations

import errno
import io
import os
import stat
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

    def stamp(self) -> str:
        """What changes when the file is written again, found without reading it. Raises `OSError`."""
        raise NotImplementedError


class LocalFile(SourceFile):
    def __init__(self, path: str | Path, name: str | None = None) -> None:
        super().__init__(name or str(path))
        self.path = Path(path)

    @property
    def suffixes(self) -> list[str]:
        return self.path.suffixes

    def open(self) -> IO[bytes]:
        self._stat()
        return self.path.open("rb")

    def size(self) -> int:
        return self._stat().st_size

    def stamp(self) -> str:
        found = self._stat()
        return f"{found.st_size}-{found.st_mtime_ns}-{found.st_ino}"

    def _stat(self) -> os.stat_result:
        """Raises `OSError` also for a pipe, a socket or a device: it could block for ever, and can't be read twice."""
        found = self.path.stat()
        if not (stat.S_ISREG(found.st_mode) or stat.S_ISDIR(found.st_mode)):  # a folder can't be opened anyway
            raise OSError(
                errno.ESPIPE, f"it is a {_kind(found.st_mode)}, not a file; write its content to one, or use -"
            )
        return found


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
        return int(self._info().size)

    def stamp(self) -> str:
        filesystem, path = self._locate()
        info = self._info()
        with as_os_errors():
            return f"{info.size}-{info.mtime_ns}-{with_retries(lambda: _version(filesystem, path))}"

    def _info(self) -> fs.FileInfo:
        filesystem, path = self._locate()
        with as_os_errors():
            info = with_retries(lambda: filesystem.get_file_info(path))
        if not info.is_file:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), self.name)
        return info

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

    def stamp(self) -> str:
        return LocalFile(self._local()).stamp()

    def _local(self) -> Path:
        from huggingface_hub import hf_hub_download

        def fetch() -> str:
            return hf_hub_download(self._repo, self._path, repo_type="dataset", revision=self._commit)

        with hub_errors(self._repo, self._commit):
            return Path(with_retries(fetch))


def _version(filesystem: fs.FileSystem, path: str) -> str:
    """The service's own mark of a file's content, its etag mostly; "" where it has none."""
    if isinstance(filesystem, fs.PyFileSystem):
        about: dict[str, object] = filesystem.handler.fs.info(path)
        return " ".join(str(about[name]) for name in sorted(about) if name.lower() in _MARKS)
    if isinstance(filesystem, fs.LocalFileSystem):
        return ""
    with filesystem.open_input_stream(path) as opened:
        return str((opened.metadata() or {}).get(b"ETag", ""))


_MARKS = ("etag", "e_tag", "md5", "md5hash", "generation", "version_id", "last-modified", "lastmodified", "created")


def _kind(mode: int) -> str:
    """A file that is neither regular nor a folder, in words."""
    return "pipe" if stat.S_ISFIFO(mode) else "socket" if stat.S_ISSOCK(mode) else "device"


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
