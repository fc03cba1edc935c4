"""The folder that steering writes: each point once it is measured, finally the report, table, picture and answers.

steer.json, steer.csv, steer.png     the curves
answers.jsonl                        every generated answer, for another judge; some may be harmful
.steer/                              the points measured so far, removed at the end
"""

from __future__ import annotations

import csv
import io
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sqsd_filter.directions.steering.plot import draw
from sqsd_filter.errors import DestinationExists
from sqsd_filter.pictures import picture
from sqsd_filter.storage.folder import sweep, write_json, write_text

REPORT, TABLE, PICTURE, ANSWERS = "steer.json", "steer.csv", "steer.png", "answers.jsonl"
WORK, SETTINGS = ".steer", "settings.json"
FIGURES = ("prompts", "refusals", "refusal_rate", "refusal_low", "refusal_high", "degenerate_rate")
LIKELIHOODS = ("safe", "unsafe", "margin")


class SteerFiles:
    """The files of one run. `report` is None until the run is finished."""

    def __init__(self, out: Path, settings: Mapping[str, Any]) -> None:
        """Raises `DestinationExists` if `out` holds anything but a run with these settings."""
        self.out, self.work = out, out / WORK
        self.report = self._claim(json.loads(json.dumps(settings)))

    def _claim(self, settings: dict[str, Any]) -> dict[str, Any] | None:
        mine = self.work / SETTINGS
        if self.out.exists() and not self.out.is_dir():
            raise DestinationExists(f"{self.out} is a file: choose a folder.")
        names = {path.name for path in self.out.iterdir()} if self.out.is_dir() else set()
        if REPORT in names:
            report: dict[str, Any] = json.loads((self.out / REPORT).read_text(encoding="utf-8"))
            self._check(report.get("settings"), settings)
            shutil.rmtree(self.work, ignore_errors=True)
            return report
        if any(path.name != SETTINGS for path in self.work.glob("*.json")):
            self._check(json.loads(mine.read_text(encoding="utf-8")), settings)
            sweep(self.work)
        elif names - {WORK}:
            raise DestinationExists(f"{self.out} holds other files: choose another folder.")
        else:
            self.work.mkdir(parents=True, exist_ok=True)  # may exist from a run that failed before its first point
            write_json(mine, settings)
        return None

    def _check(self, theirs: object, settings: Mapping[str, Any]) -> None:
        if theirs == settings:
            return
        known = theirs if isinstance(theirs, dict) else {}
        differing = ", ".join(sorted(k for k in {*known, *settings} if known.get(k) != settings.get(k)))
        raise DestinationExists(
            f"{self.out} holds a run with other settings ({differing}): choose another folder or remove it."
        )

    def has(self, point: str) -> bool:
        return (self.work / f"{point}.json").is_file()

    def keep(self, point: str, figures: Mapping[str, Any]) -> None:
        write_json(self.work / f"{point}.json", figures)

    def read(self, point: str) -> dict[str, Any]:
        figures: dict[str, Any] = json.loads((self.work / f"{point}.json").read_text(encoding="utf-8"))
        return figures

    def finish(self, report: Mapping[str, Any], answers: Sequence[Mapping[str, Any]]) -> None:
        """Write all files, the report last: if it exists, all others do."""
        lines = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in answers)
        write_text(self.out / ANSWERS, lines)
        write_text(self.out / TABLE, _table(report))
        pairs = report["settings"]["rows"]["pairs"] > 0
        with picture(self.out / PICTURE, 5.5 * len(report["directions"]), 10 if pairs else 4) as figure:
            draw(figure, report["directions"], likelihoods=pairs)
        write_json(self.out / REPORT, report)
        shutil.rmtree(self.work)


def _table(report: Mapping[str, Any]) -> str:
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    columns = ("alpha", *FIGURES, *LIKELIHOODS)
    rows.writerow(("direction", *columns))
    for curve in report["directions"]:
        for point in curve["points"]:
            rows.writerow((curve["name"], *(point[column] for column in columns)))
    return text.getvalue()
