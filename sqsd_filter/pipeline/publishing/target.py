"""What publishing targets have in common: a marker, which says whose run a target holds and whether it is complete."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypedDict, cast

from sqsd_filter.errors import DestinationExists
from sqsd_filter.pipeline.report import FinishedReport, Published, Report
from sqsd_filter.storage.layout import ITSELF, REPORT_FILE, own_path

MARKER_FILE = "published.json"
MARKER = own_path(MARKER_FILE)
REPORT = own_path(REPORT_FILE)


class Marker(TypedDict, total=False):
    """The content of a marker: the run, the configs and the files of it that the target holds, and whether all."""

    run: str
    rows: list[str]
    files: list[str]
    complete: bool


@dataclass(frozen=True)
class Finished:
    """A finished run on this disk: its files by their path as the report names them, and its report.

    `card(report, name)` is the text of its card for a report that may name fewer files, of a dataset that is loaded by
    that name.
    """

    run: str
    files: Mapping[str, Path]
    report: FinishedReport
    card: Callable[[Report, str], str]


class Target(Protocol):
    """A repository or a folder behind a URL to publish to."""

    def check(self) -> None:
        """Raise `SQSDError` where it can't be written, or holds files of others. Called before any work."""

    def spare(self, given: str) -> None:
        """Raise `DestinationExists` for a source that publishing would delete."""

    def published(self, run: str) -> FinishedReport | None:
        """The report of this run if it is there completely. Raises `DestinationExists` where another run is."""

    def publish(self, finished: Finished) -> Published:
        """Upload the run, and say where it is. Safe to call again after a failure."""


def run_id(identity: Mapping[str, object]) -> str:
    """16 hex digits, different for any two runs."""
    return hashlib.blake2b(json.dumps(identity, sort_keys=True).encode(), digest_size=8).hexdigest()


def marker(run: str, rows: Iterable[str], files: Iterable[str], *, complete: bool) -> bytes:
    """The content of the marker file, which says that these files are the run's."""
    known = Marker(run=run, rows=sorted(set(rows)), files=sorted(files), complete=complete)
    return (json.dumps(known) + "\n").encode()


def judge(where: str, names: Iterable[str], stored: bytes | None, run: str | None, *, overwrite: bool) -> Marker:
    """What the marker of a target says; {} where there is none.

    Unless `overwrite`, raises `DestinationExists` for a target that holds files (`names`) but no marker, or the marker
    of another run.
    """
    known = _known(stored)
    if overwrite:
        return known
    if not known and (foreign := sorted(names)):
        holds = f"holds {foreign[0]}{f' and {len(foreign) - 1} more' if len(foreign) > 1 else ''}"
        raise DestinationExists(
            f"{where} {'is a file' if foreign[0] == ITSELF else holds}, which this command did not write: choose "
            "another destination, or replace what is there with --overwrite."
        )
    if known and run is not None and known.get("run") != run:
        raise DestinationExists(
            f"{where} holds another run of this command: choose another destination, or replace it with --overwrite."
        )
    return known


def _known(stored: bytes | None) -> Marker:
    try:
        known = json.loads(stored or b"{}")
    except ValueError:
        return {}
    whole = isinstance(known, dict) and known.keys() >= Marker.__annotations__.keys()
    return cast("Marker", known) if whole else {}
