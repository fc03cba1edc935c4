"""The destination's manners: the same run goes on or is done, anything else is left alone, nothing is half replaced."""

from __future__ import annotations

import fcntl
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from sqsd_filter.errors import DestinationExists, InputError
from sqsd_filter.pipeline.store import write_whole

RUN_FILE = "run.json"
REPORT_FILE = "report.json"


class Destination:
    """Where a run writes. `home` is its folder for run.json, report.json and scores/; `root` the folder or file asked
    for. With `overwrite` both stand beside the old ones until `publish` swaps them."""

    def __init__(self, target: Path, home_of: Any, products: list[str], *, overwrite: bool) -> None:
        """`home_of(root)` gives the home of a root; `products` are the paths a finished run leaves below the root."""
        self.target, self._home_of, self._products = target, home_of, products
        self._beside = target.with_name(f".{target.name}.sqsd-new")
        self._old = target.with_name(f".{target.name}.sqsd-old")
        if not target.exists() and self._old.exists():  # killed in the middle of a swap
            self._old.rename(target)
        self.replaces = overwrite and (target.exists() or home_of(target).exists())
        self.root = self._beside if self.replaces else target
        self.home: Path = home_of(self.root)
        self._lock: IO[str] | None = None
        if not target.parent.is_dir():
            raise InputError(f"The folder {target.parent} does not exist: create it first.")

    @property
    def old_home(self) -> Path | None:
        """The home of the run that is being replaced."""
        return self._home_of(self.target) if self.replaces else None

    def claim(self, identity: Mapping[str, Any]) -> bool:
        """Take the destination for the run with this identity; True when that run is here and done already.

        Raises `DestinationExists` for foreign files, another run (naming what differs) or one at work right now.
        """
        run_file = self.home / RUN_FILE
        known = _read_json(run_file)
        if known is None:
            if self._foreign():
                if not self.replaces:
                    raise DestinationExists(
                        f"{self.target} exists and was not written by this command: choose another destination, or "
                        "replace it with --overwrite."
                    )
                _remove(self.root)
        elif known != json.loads(json.dumps(identity)):
            if not self.replaces:
                raise DestinationExists(
                    f"{self.target} holds another run ({_difference(known, identity)}): choose another destination, "
                    "or replace it with --overwrite."
                )
            _remove(self.root)
            _remove(self.home)
        self.home.mkdir(parents=True, exist_ok=True)
        self._lock = (self.home / "lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise DestinationExists(f"Another run is writing to {self.target} right now: wait for it.") from None
        if self.finished():
            return True
        write_whole(run_file, lambda sink: sink.write(json.dumps(identity, indent=1, sort_keys=True).encode()))
        return False

    def finished(self) -> bool:
        report = _read_json(self.home / REPORT_FILE)
        return bool(report) and report["status"] == "ok" and all((self.root / p).exists() for p in self._products)

    def publish(self) -> None:
        """Let go of the lock, and swap what stands beside into place."""
        if self._lock is not None:
            (self.home / "lock").unlink(missing_ok=True)
            self._lock.close()
            self._lock = None
        if not self.replaces:
            return
        moves = [(self.root, self.target)]
        if self.home.parent == self.root.parent:  # the home lies beside the root, not in it
            moves.append((self.home, self._home_of(self.target)))
        for new, final in moves:
            old = final.with_name(f".{final.name}.sqsd-old") if final != self.target else self._old
            _remove(old)
            if final.exists():
                final.rename(old)
            new.rename(final)
            _remove(old)

    def release(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _foreign(self) -> bool:
        """Is there anything here that is not an empty folder or a home that is only just beginning?"""
        starting = {"lock", f".{RUN_FILE}.tmp"}
        if self.root.is_dir():
            others = [p for p in self.root.iterdir() if p != self.home]
            begun = [p for p in self.home.iterdir() if p.name not in starting] if self.home.is_dir() else []
            return bool(others or begun)
        return self.root.exists()


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError:
        return {}


def _difference(known: Mapping[str, Any], asked: Mapping[str, Any]) -> str:
    """The first few settings that differ, as "name: there → here"."""
    parts = []
    for key in sorted({*known, *asked}):
        before, now = known.get(key), json.loads(json.dumps(asked.get(key)))
        if before == now:
            continue
        if isinstance(before, dict) and isinstance(now, dict):
            parts.append(_difference(before, now))
        elif key == "inputs":
            parts.append("other input files or contents")
        else:
            parts.append(f"{key}: {before} there, {now} here")
    return "; ".join(parts[:4])


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
