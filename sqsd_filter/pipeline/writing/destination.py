"""The rules of a destination: the same run resumes or is done, anything else stays, and nothing is half replaced."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

from sqsd_filter.errors import DestinationExists, InputError, UsageError
from sqsd_filter.pipeline.report import FinishedReport, WrittenFile
from sqsd_filter.pipeline.writing.export import REASONS_FILE
from sqsd_filter.pipeline.writing.writers import temporary_of
from sqsd_filter.storage.folder import TEMPORARY, sweep, write_text
from sqsd_filter.storage.layout import REPORT_FILE, RUN_FILE, Layout, home_beside, is_beside, is_old, modernise
from sqsd_filter.storage.locks import take_lock

# These hold text of rows, so they are not among the files that a report names:
EXPLAINED_FILE = "explained.json"
PAGE_FILE = "report.html"
NOTES_FILE = "notes.json"  # what the page shows of rows
LOCK_FILE = "lock"
OF_A_CUT = {"cut", "reference"}  # in run.json: what a cut is made by, which changes no score
BASE = "base"  # in run.json, no part of the run's identity: the path from its folder to the one that paths start at


def _has_beside(known: Mapping[str, Any], asked: Mapping[str, Any]) -> bool:
    """Does the run that is known have the values of the risk that is asked for, beside its own?"""
    scoring = known.get("scoring", {}), asked.get("scoring", {})
    return scoring[1].get("pack") in (scoring[0].get("beside") or {}).values()


class Destination:
    """Where a run writes. `home` is its folder for run.json, report.json and scores/, `root` the output folder or file.
    If `overwrite` replaces something, both are written beside it until `publish` swaps them."""

    def __init__(self, target: Path, home_of: Callable[[Path], Path], *, overwrite: bool) -> None:
        """`home_of(root)` is the home of a root: inside a folder, or beside a file."""
        self.target, self._home_of = target, home_of
        self._overwrite, self.replaces = overwrite, False
        self._lock: IO[bytes] | None = None
        with self._access():
            self.target = target = _resolved(target)
            self.root, self.home = target, home_of(target)
            if not target.parent.is_dir():
                raise InputError(f"The folder {target.parent} does not exist: create it first.")
            if self.layout.is_file and target.is_dir():
                raise DestinationExists(
                    f"{target} is a folder, but the output is a file: choose another name. (A name that ends in / is "
                    "that of a folder.)"
                )
            if not target.exists() and _neighbour(target, "old").exists():  # killed in the middle of a swap
                _neighbour(target, "old").rename(target)
            if not overwrite and read_run(self.home) is None and self.holds_work():
                raise DestinationExists(
                    f"{target} exists and was not written by this command: choose another destination, or replace it "
                    "with --overwrite."
                )

    @property
    def layout(self) -> Layout:
        return Layout(self.root, self.home)

    @property
    def _owned(self) -> list[Path]:
        """What a run that replaces the target replaces."""
        return [self.target, self._home_of(self.target)]

    @property
    def old_home(self) -> Path | None:
        """The home of the run that will be replaced."""
        return self._home_of(self.target) if self.replaces else None

    def claim(self, identity: Mapping[str, object], *, to_publish: bool = False) -> bool:
        """Claim the destination for the run with this identity; True if that run is already finished here, and if it
        is `to_publish`, in the layout of today.

        Raises `DestinationExists` for another run (naming what differs), for one that is writing right now, or where
        the working directory would be replaced; `InputError` where nothing can be written.
        """
        asked = json.loads(json.dumps(identity))
        known = read_run(self.home)
        if known != asked and self.holds_work():
            if not self._overwrite:
                if not known and (self.home / RUN_FILE).exists():
                    raise DestinationExists(
                        f"{self.home / RUN_FILE} is damaged, so nothing says which run {self.target} holds: choose "
                        "another destination, or replace it with --overwrite, which uses its scores again."
                    )
                raise DestinationExists(self._other_run(known or {}, asked))
            if any(Path.cwd().is_relative_to(own.resolve()) or own.is_mount() for own in self._owned):
                raise DestinationExists(
                    f"{self.target} can't be replaced, since it is or holds the working directory, or is mounted: "
                    "choose another destination."
                )
            refuse_running(self.home, self.target)
            self.replaces = True
            self.root = _neighbour(self.target, "new")
            self.home = self._home_of(self.root)
        with self._access():
            self._take_lock()
            if (
                self.layout.is_file
            ):  # what a killed run wrote in a folder that is the user's, so nothing else goes there
                for rows in {self.target, self.root}:
                    temporary_of(rows).unlink(missing_ok=True)
            if self.replaces and read_run(self.home) != asked:
                self._clear()
            if self.finished() and not (to_publish and is_old(self.root, self.home)):
                return True
            self.home = modernise(self.root, self.home)
            (self.home / REPORT_FILE).unlink(missing_ok=True)  # from here on it would be wrong
            for folder in (self.root, self.home, self.home / "scores"):
                sweep(folder)
            content = json.dumps({**asked, BASE: os.path.relpath(".", self.home.resolve())}, indent=1, sort_keys=True)
            write_text(self.home / RUN_FILE, content)
        return False

    def _other_run(self, known: Mapping[str, object], asked: Mapping[str, object]) -> str:
        """What to do about the other run that the destination holds."""
        said = f"{self.target} holds another run ({difference(known, asked)}):"
        differing = {name for name in {*known, *asked} if known.get(name) != asked.get(name)}
        report = read_report(self.home)
        finished = report is not None and report.get("status") == "ok"
        if finished and differing == {"explain"}:
            return f"{said} explain rows of it with 'sqsd-filter explain {self.target}', which reuses its scores."
        has_scores = finished and (self.home / "scores").is_dir()
        if has_scores and differing <= {*OF_A_CUT, "scoring"} and _has_beside(known, asked):
            return (
                f"{said} it has the scores of this cut, too; cut them into another destination with 'sqsd-filter "
                f"select {self.target} OTHER'."
            )
        if has_scores and differing <= OF_A_CUT:
            return (
                f"{said} cut its scores into another destination with 'sqsd-filter select {self.target} OTHER', or "
                "replace it with --overwrite, which reuses its scores."
            )
        return f"{said} choose another destination, or replace it with --overwrite."

    def others(self, given: Sequence[Any]) -> list[Any]:
        """These sources without what an earlier run left here; see `without`."""
        return without(self.target, self._owned, given)

    def spare(self, given: Iterable[object]) -> None:
        """Raise `DestinationExists` if --overwrite would delete one of these inputs."""
        if self._overwrite:
            spare(self.target, given)

    def keep_out(self, folder: Path) -> None:
        """Raise `UsageError` for a score store inside what this run writes."""
        for own in self._owned:
            if folder.resolve().is_relative_to(own.resolve()):
                raise UsageError(f"The score store {folder} lies in {own}, which belongs to one run: put it elsewhere.")

    @contextmanager
    def _access(self) -> Iterator[None]:
        try:
            yield
        except OSError as problem:
            raise InputError(
                f"{self.target} can't be written ({problem.strerror}): fix that, or choose another destination."
            ) from problem

    def _take_lock(self) -> None:
        self.home.mkdir(parents=True, exist_ok=True)
        self._lock = lock_run(self.home / LOCK_FILE, self.target)

    def _clear(self) -> None:
        """Remove what another run left here, except for the lock."""
        for top in (self.root, self.home):
            for path in list(top.iterdir()) if top.is_dir() else [top]:
                if path not in (self.home, self.home / LOCK_FILE):
                    _remove(path)

    def finished(self) -> bool:
        """Is the run of this home finished, and are all files that its report names still here?"""
        report = read_report(self.home)
        if not report or report["status"] != "ok" or _neighbour(self.root, "old").exists():
            return False
        files = report.get("files", [])
        empty = [] if report["rows"]["errors"] else [self.layout.own(REASONS_FILE)]
        try:
            whole = all(self._is_whole(file) for file in files)
            beside = all(self._is_written(path) for path in report.get("extra_files", []) if path not in empty)
            beside &= "explained" not in report or (self.home / EXPLAINED_FILE).is_file()
            notes = read_json(self.home / NOTES_FILE)
            beside &= bool(notes) and (self.home / PAGE_FILE).is_file()
        except OSError:
            return False
        return whole and beside and sum(file["rows"] for file in files) == report["rows"]["total"]

    def _is_whole(self, file: WrittenFile) -> bool:
        with self.layout.path(file["path"]).open("rb") as content:
            if os.fstat(content.fileno()).st_size != file["bytes"]:
                return False
            return hashlib.file_digest(content, "sha256").hexdigest() == file["sha256"]

    def _is_written(self, path: str) -> bool:
        """Does the file begin with a byte other than the NULs that a power failure leaves?"""
        with self.layout.path(path).open("rb") as content:
            return content.read(1) not in (b"", b"\0")

    def publish(self) -> None:
        """Swap what was written beside the target into its place."""
        finals = self._owned if self.layout.is_file else [self.target]
        if self.replaces:
            for new, final in zip((self.root, self.home), finals, strict=False):
                _remove(_neighbour(final, "old"))
                if final.exists():
                    final.rename(_neighbour(final, "old"))
                new.rename(final)
            self.root, self.home = self.target, self._home_of(self.target)
        for final in finals:
            _remove(_neighbour(final, "old"))

    def release(self) -> None:
        if self._lock is not None:
            (self.home / LOCK_FILE).unlink(missing_ok=True)
            self._lock.close()
            self._lock = None

    def holds_work(self) -> bool:
        """Is there anything here worth keeping: more than an empty folder, or the files of a run that failed before its
        first score (with a mistyped model, say)?"""
        leavings = (LOCK_FILE, RUN_FILE, REPORT_FILE)
        starting = {self.home, *(self.home / name for name in leavings), *self.home.glob(f".*{TEMPORARY}")}
        paths = [path for top in (self.root, self.home) if top.is_dir() for path in top.iterdir()]
        return not starting.issuperset(paths) or (self.root.exists() and not self.root.is_dir())


def _resolved(target: Path) -> Path:
    """What a link leads to: it is replaced there, and the link stays. Raises `InputError` where that is neither a file
    nor a folder."""
    there = Path(os.path.realpath(target)) if target.is_symlink() else target
    if there.is_symlink():
        raise InputError(f"{target} is a link that leads to itself: choose another destination.")
    if there.exists() and not (there.is_dir() or there.is_file()):
        raise InputError(
            f"{target} is neither a file nor a folder, but a device or a pipe: choose another destination."
        )
    return there


def lock_run(path: Path, target: object) -> IO[bytes]:
    """The open file of a lock that lasts until it is closed. Raises `DestinationExists` where another run has it."""
    try:
        return take_lock(path)
    except BlockingIOError:
        raise DestinationExists(f"Another run is writing to {target} right now: wait for it.") from None


def spare(target: Path, given: Iterable[object]) -> None:
    """Raise `DestinationExists` if replacing the target would delete one of these inputs."""
    beside = home_beside(target)
    owned = [os.path.realpath(own) for own in (target, *([beside] if is_beside(beside) else []))]
    for path in given:
        if isinstance(path, str | Path) and any(Path(path).resolve().is_relative_to(own) for own in owned):
            raise DestinationExists(
                f"{target} holds the input {path}, which --overwrite would delete: choose another destination."
            )


def refuse_running(home: Path, target: object) -> None:
    """Raise `DestinationExists` if a run is writing to this home right now."""
    if (home / LOCK_FILE).exists():
        lock_run(home / LOCK_FILE, target).close()


def without(target: Path, homes: Iterable[Path], given: Sequence[Any]) -> list[Any]:
    """These sources without the target and its homes, which a glob may match; all of them if nothing else is left."""
    own = {target.resolve(), *(home.resolve() for home in homes)}
    there = [Path(item).resolve() if isinstance(item, str | Path) else None for item in given]
    return [item for item, path in zip(given, there, strict=True) if path not in own] or list(given)


def _neighbour(path: Path, kind: str) -> Path:
    """The hidden path beside `path` that holds its `new` or `old` content during a swap."""
    absolute = Path(os.path.abspath(path))
    return absolute.parent / f".{absolute.name}.sqsd-{kind}"


def read_run(home: Path) -> dict[str, Any] | None:
    """The identity of the run in this home, if there is one."""
    known = read_json(home / RUN_FILE)
    return known and {key: value for key, value in known.items() if key != BASE}


def input_specs(output: Path, home: Path) -> list[str]:
    """The sources of the run in this home as paths from here; a source that means the same from here stays as given.

    Raises `InputError` where one was not a file.
    """
    known = read_json(home / RUN_FILE) or {}
    base = home.resolve() / known.get(BASE, "")
    if not all(known["sources"]):
        raise InputError(
            f"{output} was made from standard input or from a dataset in memory, which can't be read again: "
            "write all rows with their scores by 'sqsd-filter score', and select from that file."
        )
    return [_from_here(spec, base) for spec in known["sources"]]


def path_from_here(path: str, home: Path) -> str:
    """A path that the run in this home was started with, as one from here."""
    return _from_here(path, home.resolve() / (read_json(home / RUN_FILE) or {}).get(BASE, ""))


def _from_here(spec: str, base: Path) -> str:
    if "://" in spec:
        return spec
    path, part = (spec, "") if (base / spec).exists() else spec.rpartition(":")[::2]
    there = base / path
    if not there.exists() or (Path(path).exists() and there.samefile(path)):
        return spec
    return os.path.relpath(there) + (f":{part}" if part else "")


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file of a run: None where there is no file, {} where it is damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def read_report(home: Path) -> FinishedReport | None:
    """The report of the run in this home, if there is one: of a run that failed, or of an earlier version, it lacks
    some keys; of a damaged file all."""
    return cast("FinishedReport | None", read_json(home / REPORT_FILE))


def difference(known: Mapping[str, object], asked: Mapping[str, object]) -> str:
    """The first few settings that differ, as "name: 1 there, 2 here"."""
    parts = []
    for key in sorted({*known, *asked}):
        before, now = known.get(key), json.loads(json.dumps(asked.get(key)))
        if before == now:
            continue
        if isinstance(before, dict) and isinstance(now, dict):
            parts.append(difference(before, now))
        elif key == "inputs":
            parts.append("other input files or contents")
        else:
            parts.append(f"{key}: {before} there, {now} here")
    return "; ".join(parts[:4])


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
