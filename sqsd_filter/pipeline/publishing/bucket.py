"""Publishing to a folder behind a URL, of any kind that pyarrow or an installed fsspec package knows."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

from pyarrow import fs

from sqsd_filter.errors import DestinationExists, SQSDError, first_line
from sqsd_filter.pipeline.publishing.target import MARKER, MARKER_FILE, REPORT, Finished, Marker, judge, marker
from sqsd_filter.pipeline.report import FinishedReport, Published
from sqsd_filter.storage.folder import connect
from sqsd_filter.storage.layout import REPORT_FILE, stored_path
from sqsd_filter.storage.retries import with_retries

T = TypeVar("T")


class Bucket:
    """A folder behind a URL. The marker is written first and again at the end, so that it shows whether a run is
    complete."""

    def __init__(self, url: str, *, overwrite: bool = False) -> None:
        """Raises `UsageError` for a URL of unknown kind or with a secret in it, `InputError` if it can't be reached."""
        self.url, self._overwrite = url, overwrite
        self._fs, root = connect(url)
        self._root = root.rstrip("/")

    def check(self) -> None:
        self._judge(None)

    def spare(self, given: str) -> None:
        """Raise `DestinationExists` for a URL below this one, which --overwrite would delete."""
        inside = given.partition("?")[0].startswith(self.url.partition("?")[0].rstrip("/") + "/")
        if self._overwrite and inside:
            raise DestinationExists(
                f"{self.url} holds the input {given}, which --overwrite would delete: choose another destination."
            )

    def published(self, run: str) -> FinishedReport | None:
        known = self._judge(run)
        if known.get("run") != run or not known.get("complete"):
            return None
        report: FinishedReport = json.loads(self.read(stored_path(REPORT_FILE, known["files"])))
        return report

    def publish(self, finished: Finished) -> Published:
        known = self._judge(finished.run)
        there = self.sizes()
        begun = known.get("run") == finished.run
        ours = finished.files.keys() | {MARKER}
        stale = (there.keys() if self._overwrite else set(known.get("files", []))) - ours
        rows = [str(file["config"]) for file in finished.report["files"]]
        self.write(MARKER, marker(finished.run, rows, ours | stale, complete=False))
        for name, path in finished.files.items():
            # a report holds times, so the same run may have left other bytes of the same size
            if not (begun and name != REPORT and there.get(name) == path.stat().st_size):
                self.write(name, path)
        for name in sorted(stale & there.keys()):
            self._with_retries(partial(self._fs.delete_file, f"{self._root}/{name}"))
        self.write(MARKER, marker(finished.run, rows, ours, complete=True))
        return {"url": self.url}

    def _judge(self, run: str | None) -> Marker:
        sizes = self.sizes()
        marked = stored_path(MARKER_FILE, sizes)
        return judge(self.url, sizes, self.read(marked) if marked in sizes else None, run, overwrite=self._overwrite)

    def sizes(self) -> dict[str, int]:
        """The size of each file below the URL, by its path from there."""
        selector = fs.FileSelector(self._root, recursive=True, allow_not_found=True)
        infos = self._with_retries(lambda: self._fs.get_file_info(selector))
        return {
            info.path.removeprefix(self._root).lstrip("/"): info.size for info in infos if info.type == fs.FileType.File
        }

    def read(self, name: str) -> bytes:
        def read() -> bytes:
            with self._fs.open_input_file(f"{self._root}/{name}") as source:
                content: bytes = source.read()
                return content

        return self._with_retries(read)

    def write(self, name: str, content: bytes | Path) -> None:
        path = f"{self._root}/{name}"

        def write() -> None:
            self._fs.create_dir(path.rpartition("/")[0], recursive=True)
            with self._fs.open_output_stream(path) as sink:
                if isinstance(content, bytes):
                    sink.write(content)
                else:
                    with content.open("rb") as source:
                        shutil.copyfileobj(source, sink, 1 << 22)

        self._with_retries(write)

    def _with_retries(self, call: Callable[[], T]) -> T:
        try:
            return with_retries(call)
        except Exception as problem:
            raise SQSDError(
                f"{self.url} can't be written ({first_line(problem)}): fix that and run the same command again; what "
                "was scored and uploaded so far is kept."
            ) from problem
