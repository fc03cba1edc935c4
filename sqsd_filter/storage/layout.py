"""Where the parts of an output lie. In a folder: kept rows in data/, all else in _sqsd/, which readers of folders pass
over. If the output is one file with the kept rows: all else in a folder beside it.

Earlier versions kept their own files in sqsd/, and kept, dropped and error rows side by side. All that is known of that
layout is here: such runs are read where they are, and one that is unfinished or to be published is moved to the layout
of today.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

DATA = "data"
DEFAULT = "default"  # the configuration with the kept rows
HOME = "_sqsd"
RUN_FILE = "run.json"
REPORT_FILE = "report.json"
ITSELF = "."  # in a report: the path of the rows in an output that is one file
BESIDE = ".sqsd"

_OLD_HOME = "sqsd"
_OLD_CONFIGS = ("kept", "dropped", "errors")
_OLD_FILES = (
    *(f"data/{config}*-?????-of-?????.*" for config in _OLD_CONFIGS),
    *(f"data/.{config}*.tmp" for config in _OLD_CONFIGS),
    "data/reasons.jsonl",
    *(
        f"{config}*/{name}"
        for config in _OLD_CONFIGS
        for name in ("data-?????-of-?????.arrow", ".data-*.tmp", "state.json", "dataset_info.json")
    ),
    "dataset_dict.json",
)


@dataclass(frozen=True)
class Layout:
    """Where the files of one output lie: `root` is the folder, or the file with the rows, and `home` the folder for a
    run's own files, in the one or beside the other."""

    root: Path
    home: Path

    @property
    def is_file(self) -> bool:
        return self.home.parent != self.root

    @property
    def base(self) -> Path:
        """The folder that the report's paths start at."""
        return self.home if self.is_file else self.root

    def path(self, name: str) -> Path:
        """Where the file with this path in the report lies."""
        return self.root if name == ITSELF else self.base / name

    def own(self, name: str) -> str:
        """The path in the report of one of the run's own files."""
        return own_path(name, in_file=self.is_file)


def home_in(folder: Path) -> Path:
    """The folder for a run's own files in an output folder. It is that of an old run if one is there."""
    new, old = folder / HOME, folder / _OLD_HOME
    return old if (old / RUN_FILE).is_file() and not (new / RUN_FILE).is_file() else new


def home_beside(file: Path) -> Path:
    """The folder for a run's own files beside an output file; where that is a link, beside what it leads to."""
    return Path(f"{os.path.realpath(file) if file.is_symlink() else file}{BESIDE}")


def homes_of(output: Path) -> list[Path]:
    """The folders in which a run that wrote this folder or file may have its own files."""
    return [home_in(output), home_beside(output)]


def holds_run(folder: Path) -> bool:
    """Is this the output folder of a run?"""
    return (home_in(folder) / RUN_FILE).is_file()


def is_beside(folder: Path) -> bool:
    """Is this the folder beside an output file, with a run's own files?"""
    return folder.name.endswith(BESIDE) and (folder / RUN_FILE).is_file()


def kept_part(folder: Path) -> str | None:
    """The configuration with the kept rows of an output folder, or the saved split where it has none; None where the
    folder is no output of a run."""
    if not holds_run(folder):
        return None
    is_old_arrow = home_in(folder).name == _OLD_HOME and (folder / "dataset_dict.json").exists()
    return "kept" if is_old_arrow else DEFAULT


def old_saved_splits(paths: Iterable[str]) -> list[str]:
    """The saved splits that these files of an output are in, if it has the old layout of Arrow files."""
    arrow = (path for path in paths if path.endswith(".arrow"))
    tops = dict.fromkeys(path.split("/")[0] for path in arrow)
    return [top for top in tops if top not in (DATA, HOME)]


def own_path(name: str, *, in_file: bool = False) -> str:
    """The path in the report of one of a run's own files; `in_file` where the output is one file."""
    return name if in_file else f"{HOME}/{name}"


def own_paths(name: str) -> tuple[str, str]:
    """The paths in an output at which one of the run's own files may be, that of today first."""
    return own_path(name), f"{_OLD_HOME}/{name}"


def stored_path(name: str, names: Collection[str]) -> str:
    """The path of one of a run's own files among the files of a published output."""
    new, old = own_paths(name)
    return old if old in names and new not in names else new


def is_old(root: Path, home: Path) -> bool:
    """Is this the home of a run in the old layout?"""
    return home == root / _OLD_HOME


def modernise(root: Path, home: Path) -> Path:
    """Bring the unfinished run in `root` into the layout of today. Its scores stay, its rows will be written again.

    Returns its home. Safe to call again after a crash. Raises `OSError`.
    """
    if not is_old(root, home):
        return home
    stale = [path for pattern in _OLD_FILES for path in root.glob(pattern)]
    for path in stale:
        path.unlink()
    for folder in {path.parent for path in stale} - {root}:
        with suppress(OSError):  # it holds files of others
            folder.rmdir()
    return home.rename(root / HOME)
