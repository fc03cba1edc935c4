"""Publishing to a folder or a file behind a URL, of any kind that pyarrow or an installed fsspec package knows."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from typing import TypeVar

from pyarrow import fs

from sqsd_filter.errors import DestinationExists, SQSDError, first_line
from sqsd_filter.pipeline.publishing.target import MARKER, MARKER_FILE, REPORT, Finished, Marker, judge, marker
from sqsd_filter.pipeline.report import FinishedReport, Published
from sqsd_filter.storage.folder import OBJECT_STORES, TEMPORARY, connect, move_over
from sqsd_filter.storage.layout import BESIDE, ITSELF, REPORT_FILE, stored_path
from sqsd_filter.storage.retries import with_retries

T = TypeVar("T")


class Bucket:
    """A folder behind a URL, or a file and the folder beside it. The marker is written first and again at the end, so
    that it shows whether a run is complete. The names of files are those of a report."""

    def __init__(self, url: str, *, overwrite: bool = False, is_file: bool = False) -> None:
        """Raises `UsageError` for a URL of unknown kind or with a secret in it, `InputError` if it can't be reached."""
        self.url, self._overwrite = url, overwrite
        self._fs, root = connect(url)
        self._root = root.rstrip("/")
        self._is_file = is_file
        self._home = f"{self._root}{BESIDE}" if is_file else self._root
        self._marker, self._report = (MARKER_FILE, REPORT_FILE) if is_file else (MARKER, REPORT)

    def check(self) -> None:
        self._judge(None)

    def spare(self, given: str) -> None:
        """Raise `DestinationExists` for a URL below this one, which --overwrite would delete."""
        own, path = self.url.partition("?")[0].rstrip("/"), given.partition("?")[0]
        if isinstance(self._fs, fs.LocalFileSystem) and "://" not in given:
            own, path = os.path.realpath(self._root), os.path.realpath(given)
        inside = path.startswith(f"{own}{BESIDE}/" if self._is_file else f"{own}/") or path == own
        if self._overwrite and inside:
            raise DestinationExists(
                f"{self.url} holds the input {given}, which --overwrite would delete: choose another destination."
            )

    def published(self, run: str) -> FinishedReport | None:
        known = self._judge(run)
        if known.get("run") != run or not known.get("complete"):
            return None
        report: FinishedReport = json.loads(self.read(self._stored(REPORT_FILE, known["files"])))
        return report

    def publish(self, finished: Finished) -> Published:
        known = self._judge(finished.run)
        there = self.sizes()
        begun = known.get("run") == finished.run
        ours = finished.files.keys() | {self._marker}
        stale = (there.keys() if self._overwrite else set(known.get("files", []))) - ours
        rows = [str(file["config"]) for file in finished.report["files"]]
        self.write(self._marker, marker(finished.run, rows, ours | stale, complete=False))
        for name, path in finished.files.items():
            # a report holds times, so the same run may have left other bytes of the same size
            if not (begun and name != self._report and there.get(name) == path.stat().st_size):
                self.write(name, path)
        for name in sorted(stale & there.keys()):
            self._with_retries(partial(self._fs.delete_file, self._path(name)))
        self.write(self._marker, marker(finished.run, rows, ours, complete=True))
        return {"url": self.url}

    def _judge(self, run: str | None) -> Marker:
        sizes = self.sizes()
        marked = self._stored(MARKER_FILE, sizes)
        return judge(self.url, sizes, self.read(marked) if marked in sizes else None, run, overwrite=self._overwrite)

    def _stored(self, name: str, names: Collection[str]) -> str:
        """The name of one of a run's own files among these."""
        return name if self._is_file else stored_path(name, names)

    def _path(self, name: str) -> str:
        return self._root if name == ITSELF else f"{self._home}/{name}"

    def sizes(self) -> dict[str, int]:
        """The size of each file that is there, by its name."""
        selector = fs.FileSelector(self._home, recursive=True, allow_not_found=True)
        infos = self._with_retries(lambda: self._fs.get_file_info(selector))
        sizes = {i.path.removeprefix(self._home).lstrip("/"): i.size for i in infos if i.type == fs.FileType.File}
        if self._is_file:
            info = self._with_retries(lambda: self._fs.get_file_info(self._root))
            sizes |= {ITSELF: info.size} if info.type == fs.FileType.File else {}
        return sizes

    def read(self, name: str) -> bytes:
        def read() -> bytes:
            with self._fs.open_input_file(self._path(name)) as source:
                content: bytes = source.read()
                return content

        return self._with_retries(read)

    def write(self, name: str, content: bytes | Path) -> None:
        """Write a file. One that is the destination appears under its name when all of it is there."""
        path = self._path(name)
        folder, _, last = path.rpartition("/")
        in_place = name != ITSELF or self.url.partition("://")[0] in OBJECT_STORES
        written = path if in_place else f"{folder}/.{last}{TEMPORARY}"

        def write() -> None:
            self._fs.create_dir(folder, recursive=True)
            with self._fs.open_output_stream(written) as sink:
                if isinstance(content, bytes):
                    sink.write(content)
                else:
                    with content.open("rb") as source:
                        shutil.copyfileobj(source, sink, 1 << 22)
            if not in_place:
                move_over(self._fs, written, path)

        self._with_retries(write)

    def _with_retries(self, call: Callable[[], T]) -> T:
        try:
            return with_retries(call)
        except Exception as problem:
            raise SQSDError(
                f"{self.url} can't be written ({first_line(problem)}): fix that and run the same command again; what "
                "was scored and uploaded so far is kept."
            ) from problem
