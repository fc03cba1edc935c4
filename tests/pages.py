"""Runs without a model for tests of the page, and what a browser would find in one."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from sqsd_filter.corpus.row_formats import RowFormat
from sqsd_filter.pipeline.page.notes import Notes, NoteTaker, length_figures
from sqsd_filter.pipeline.page.page import write_page
from sqsd_filter.pipeline.report import Explained, OutputFacts, Report, RunFacts, Written
from sqsd_filter.pipeline.selecting.selection import KEPT, Cut, cut_rows
from sqsd_filter.pipeline.summary import summarise
from tests.corpora import by_hand, make_rows, open_corpus, write_jsonl

Command = Callable[..., tuple[int, str, str]]  # its words to its exit code, stdout and stderr
ALPACA = RowFormat("alpaca", prompt="instruction", answer="output")


def noted(
    folder: Path, rows: Sequence[Any], risk: ArrayLike | None = None, form: RowFormat | None = ALPACA, **cut: Any
) -> tuple[Report, Notes]:
    """Report and notes of a run on these rows with these risks; without, a later row has a higher one."""
    corpus = open_corpus([write_jsonl(folder / "in.jsonl", rows)])
    scored, _ = by_hand(corpus, [KEPT] * len(rows), [k for k, row in enumerate(rows) if isinstance(row, bytes)])
    scored = replace(scored, form=form, risk=scored.risk if risk is None else np.array(risk, np.float64))
    how = Cut.of(**(cut or {"drop_count": 2}))
    selection = cut_rows(scored.risk, scored.scored, how)
    taker = NoteTaker(scored, selection)
    for chunk in corpus.chunks():
        taker.see(chunk)
    report: Report = {
        **RunFacts(settings={}, versions={"sqsd-filter": "1"}),
        **summarise(scored, selection, how),
        **OutputFacts(to="parquet"),
        **Written(files=[], extra_files=[], json_columns=[]),
        **Explained(),
    }
    notes = taker.notes(report)
    if (length := length_figures(notes)) is not None:
        report["length"] = length
    return report, notes


def page_of(folder: Path, rows: Sequence[Any], **how: Any) -> str:
    return write_page(folder, *noted(folder, rows, **how)).read_text(encoding="utf-8")


def bare_cells(page: str) -> str:
    """The page without the names of columns that a phone shows in each cell."""
    return re.sub(' data-head="[^"]*"', "", page)


def finished_run(folder: Path) -> Path:
    """The destination of a finished run, as far as `report` looks at it."""
    home = folder / "out" / "_sqsd"
    home.mkdir(parents=True)
    report, notes = noted(folder, make_rows(30))
    write_page(home, report, notes)
    (home / "report.json").write_text(json.dumps({"status": "ok", **report}))
    return home.parent


@dataclass
class Seen(HTMLParser):
    """The elements of a page with their attributes, and the texts of those with the class `text`."""

    page: str
    elements: list[tuple[str, dict[str, str | None]]] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()
        self._inside = False
        self.feed(self.page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if dict(attrs).get("class") == "text":
            self._inside = True
            self.texts.append("")

    def handle_endtag(self, tag: str) -> None:
        self._inside = self._inside and tag != "div"

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.texts[-1] += data

    @property
    def requests(self) -> list[str]:
        """All that a browser could want to fetch."""
        named = [str(v) for _, a in self.elements for k, v in a.items() if k in ("src", "href", "xlink:href", "action")]
        return [url for url in [*named, *re.findall(r"url\(([^)]*)\)", self.page)] if not url.startswith("#")]
