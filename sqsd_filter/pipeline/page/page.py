"""report.html, a run as one page that loads nothing else. Every run writes it; `report` adds sections to it.

It holds text of rows, mostly of dropped ones, so it is never pushed to a dataset of the Hub.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import cast

import jinja2
from markupsafe import Markup

from sqsd_filter.errors import InputError, SQSDError
from sqsd_filter.pictures import picture
from sqsd_filter.pipeline.explained import explained_of
from sqsd_filter.pipeline.page import run_parts, shown_rows
from sqsd_filter.pipeline.page.answer import answer
from sqsd_filter.pipeline.page.notes import Notes, length_figures
from sqsd_filter.pipeline.page.parts import Plot, Section, sensible
from sqsd_filter.pipeline.report import Report
from sqsd_filter.pipeline.writing.destination import (
    NOTES_FILE,
    PAGE_FILE,
    read_json,
    read_report,
    refuse_running,
)
from sqsd_filter.storage.folder import sweep, write_text
from sqsd_filter.storage.layout import home_beside, home_in

PLOTS = "plots"
ADDED = ("evaluation", "drift", "steering")  # ids of sections that other rooms give

# Characters that a browser does not show, or that HTML does not allow, and the signs shown for them
_SIGNS = {k: 0x2400 + k for k in range(32) if chr(k) not in "\n\t"} | {0x7F: 0x2421}
_SIGNS |= dict.fromkeys(range(0x80, 0xA0), 0xFFFD)


def write_page(home: Path, report: Report, notes: Notes) -> Path:
    """Write the page of a run, and the notes to make it again from, into the run's `home`, in place of an earlier page
    and its plots. Raises `OSError`.

    The same run gives the same bytes: the page does not show the report's timing.
    """
    shutil.rmtree(home / PLOTS, ignore_errors=True)
    _write(home / NOTES_FILE, json.dumps(notes, indent=1) + "\n")
    page = _render(home, report, notes, run_parts.histogram(report, notes), _sections(report, notes))
    return _write(home / PAGE_FILE, page)


def _write(path: Path, text: str) -> Path:
    write_text(path, text)
    return path


def remake_page(out: Path, sections: Iterable[Section] = ()) -> list[Path]:
    """Make the page of the run in `out` (a folder, or a file of scores) again, with these sections before the run's
    own folded ones, and write all its pictures as PNG files beside it.

    The sections are taken one by one once the run is known to be finished. Returns the paths that were written. Raises
    `InputError` where there is no finished run, `DestinationExists` where a run is at work there, and `SQSDError` where
    the files can't be written.
    """
    home = _home(out)
    refuse_running(home, out)
    report, notes = read_report(home), cast("Notes | None", read_json(home / NOTES_FILE))
    if not report or report.get("status") != "ok":
        raise InputError(f"{out} holds no finished run: name the destination of one.")
    if not notes:
        raise InputError(
            f"{out} has no {NOTES_FILE} to make a page from: start the same run again; its scores are kept."
        )
    more = list(sections)
    with sensible(f"{home} is damaged", f"delete {NOTES_FILE} there and start the same run again; its scores are kept"):
        histogram, own = run_parts.histogram(report, notes), _sections(report, notes)
        page = _render(home, report, notes, histogram, [*more, *own])
    plots = [histogram, *(plot for section in (*own, *more) for plot in section.plots)]
    try:
        return [_write(home / PAGE_FILE, page), *_write_plots(home / PLOTS, plots)]
    except OSError as problem:
        raise SQSDError(
            f"No page can be written to {home} ({problem}): check the free space and your rights there."
        ) from problem


def _home(out: Path) -> Path:
    return home_in(out) if out.is_dir() else home_beside(out)


def _write_plots(folder: Path, pictures: Sequence[Plot]) -> list[Path]:
    """Write all pictures, in place of those of an earlier page."""
    folder.mkdir(exist_ok=True)
    sweep(folder)
    plots = {folder / f"{plot.name}.png": plot for plot in pictures}
    for path, plot in plots.items():
        with picture(path, plot.width, plot.height) as figure:
            plot.draw(figure)
    for path in set(folder.glob("*.png")) - plots.keys():
        path.unlink()
    return list(plots)


def was_extended(out: Path) -> bool:
    """Does the page of the run in `out` have sections that `remake_page` was given?"""
    try:
        page = (_home(out) / PAGE_FILE).read_text(encoding="utf-8")
    except (OSError, ValueError):
        return False
    return any(f'<section id="{name}"' in page for name in ADDED)


def _sections(report: Report, notes: Notes) -> list[Section]:
    return [
        *run_parts.errors(report, notes),
        run_parts.lengths(report, notes),
        run_parts.risks(report),
        *run_parts.groups(report),
        *run_parts.modules(notes),
    ]


def _render(home: Path, report: Report, notes: Notes, plot: Plot, sections: Sequence[Section]) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        finalize=_visible,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    explained = explained_of(home)
    text = environment.get_template("page.html").render(
        answer=answer(report, length_figures(notes), explained=bool(explained)),
        histogram=plot,
        groups=shown_rows.groups(report, notes, explained),
        sections=sections,
        settings=run_parts.settings(report),
        version=report["versions"]["sqsd-filter"],
        svg=Markup,
    )
    return text.encode(errors="backslashreplace").decode()  # a path may be no UTF-8


def _visible(value: object) -> object:
    """Text in which characters that are invisible, or not valid in HTML, are replaced by visible signs."""
    if isinstance(value, str) and not isinstance(value, Markup):
        return re.sub("\r\n?", "\n", value).translate(_SIGNS)
    return value
