"""What all places that a run is published to have in common: whose they are, and when they are done."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from sqsd_filter.errors import DestinationExists
from sqsd_filter.pipeline.report import FinishedReport, Published, Report

MARKER = "sqsd/published.json"  # says which run a place holds, and whether all of it
REPORT = "sqsd/report.json"


@dataclass(frozen=True)
class Finished:
    """A run that is done, on this disk: its files by their place below the destination, and its report.

    `card(report, name)` is the text of its card for a report that may name fewer files, and loads the dataset by
    that name.
    """

    run: str
    files: Mapping[str, Path]
    report: FinishedReport
    card: Callable[[Report, str], str]


class Target(Protocol):
    """A place to publish to."""

    def check(self) -> None:
        """Raise `SQSDError` where it can't be written to, or holds what is not of this tool, before any work."""

    def spare(self, given: str) -> None:
        """Raise `DestinationExists` for a source that would be lost there."""

    def published(self, run: str) -> FinishedReport | None:
        """The report of this run if all of it is there. Raises `DestinationExists` where another one is."""

    def publish(self, finished: Finished) -> Published:
        """Put it there, and say where. Safe to call again after a failure."""


def run_id(identity: Mapping[str, Any]) -> str:
    """16 hex digits that tell a run from any other."""
    return hashlib.blake2b(json.dumps(identity, sort_keys=True).encode(), digest_size=8).hexdigest()


def marker(run: str, rows: Iterable[str], files: Iterable[str], *, complete: bool) -> bytes:
    """What tells this run's files from anybody else's."""
    known = {"run": run, "rows": sorted(set(rows)), "files": sorted(files), "complete": complete}
    return (json.dumps(known) + "\n").encode()


def judge(
    where: str, names: Iterable[str], stored: bytes | None, run: str | None, *, overwrite: bool
) -> dict[str, Any]:
    """What the marker of a place says; {} where there is none.

    Raises `DestinationExists`, unless it may be overwritten, for a place with `names` in it but no marker, or with that
    of another run.
    """
    known = _known(stored)
    if overwrite:
        return known
    if not known and (foreign := sorted(names)):
        raise DestinationExists(
            f"{where} holds {foreign[0]}{f' and {len(foreign) - 1} more' if len(foreign) > 1 else ''}, which this "
            "command did not write: choose another place, or replace what is there with --overwrite."
        )
    if known and run is not None and known.get("run") != run:
        raise DestinationExists(
            f"{where} holds another run of this command: choose another place, or replace it with --overwrite."
        )
    return known


def _known(stored: bytes | None) -> dict[str, Any]:
    try:
        known = json.loads(stored or b"{}")
    except ValueError:
        return {}
    whole = isinstance(known, dict) and known.keys() >= {"run", "rows", "files", "complete"}
    return known if whole else {}
