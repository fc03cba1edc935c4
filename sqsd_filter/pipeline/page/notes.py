"""Notes on rows for the page, taken while the rows are written: no row is read for them, and little is kept."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypedDict

import numpy as np
import pyarrow as pa

from sqsd_filter.corpus.conversation import Message, RowError, is_supervised
from sqsd_filter.corpus.json_schema import to_rows
from sqsd_filter.corpus.row_formats import Columns, RowFormat
from sqsd_filter.corpus.sources import Chunk
from sqsd_filter.errors import SQSDError
from sqsd_filter.pipeline.meaning import Meaning
from sqsd_filter.pipeline.report import LengthFigures, RunFigures
from sqsd_filter.pipeline.scores.scored import SCORE_PREFIX, PerModule, Scored
from sqsd_filter.pipeline.selecting.selection import DROPPED, KEPT, Selection
from sqsd_filter.pipeline.writing.histogram import BLOCK, Bars, count_bars
from sqsd_filter.scoring.explain import layer_and_type
from sqsd_filter.statistics import spearman

MOST_ROWS = 50  # that are shown
MOST_DROPPED = 40  # of these, so that there is room for kept ones
AT_CUT = 10  # of the dropped rows that are shown, if not all are: the least risky ones
MOST_TEXT = 600  # characters of a prompt or an answer
MOST_DETAIL = 200  # characters of what is wrong with a row
MOST_ORIGINS = 3  # of each kind of error
MOST_LENGTHS = 2**14  # rows whose answers are measured
MOST_POINTS = 800  # of these that are drawn
BANDS = 10  # groups of equally many rows, by length
SAMPLE = 100  # rows to infer the format from


class Excerpt(TypedDict):
    """The head of a text, and how many characters follow it."""

    text: str
    more: int


class RowOrigin(TypedDict):
    """A row's index in the corpus, its file and its line there."""

    row: int
    file: str
    line: int


class _ShownRow(RowOrigin):
    prompt: Excerpt
    answer: Excerpt


class _Ranked(TypedDict, total=False):
    percentile: float  # in the pack's benign reference, if it has one
    rank: int  # 1 for the riskiest row of all


class RiskyRow(_ShownRow, _Ranked):
    """One of the riskiest rows, or of those next to the cut."""

    risk: float
    dropped: bool
    probes: dict[str, float]


class UnscoredRow(RowOrigin):
    """A row without a score."""

    why: str


class Lengths(TypedDict):
    """Risk against length: each of the `points` is a row's length, its risk and whether it is dropped; each of the
    `bands` the median length of its rows and the quartiles of their risk."""

    rows: int
    spearman: float | None
    points: list[list[float]]
    bands: list[list[float]]


class ModuleMeans(TypedDict):
    """Mean cosines of modules, over all scored rows and the riskiest; `places` has the modules' layers and types."""

    places: list[tuple[int | None, str]]
    all: list[float]
    riskiest: list[float]


class Notes(TypedDict):
    """What notes.json holds: `riskiest` are the rows that are shown, the dropped ones first; `errors` has rows by
    status, `modules` means by probe."""

    histogram: Bars
    lengths: Lengths | None
    riskiest: list[RiskyRow]
    errors: dict[str, list[UnscoredRow]]
    modules: dict[str, ModuleMeans]


def length_figures(notes: Notes) -> LengthFigures | None:
    """How risk and length are related, in figures for report, card and page."""
    lengths = notes["lengths"]
    return lengths and {"rows": lengths["rows"], "spearman": lengths["spearman"]}


class NoteTaker:
    """Sees all chunks of a corpus and notes its riskiest rows, the origins of errors, and the lengths of answers."""

    def __init__(self, scored: Scored, selection: Selection | None, meaning: Meaning | None = None) -> None:
        """Without a selection no row is dropped; `meaning` has the reference to compare risks with."""
        self.scored, self.meaning = scored, meaning
        self.fate = np.full(len(scored.risk), KEPT, np.uint8) if selection is None else selection.fate
        self._riskiest = _shown_rows(scored, self.fate)
        self._measured = _some(np.flatnonzero(scored.scored))
        of = {status: scored.codes == scored.statuses.index(status) for status in scored.reasons()}
        self._failed = {status: np.flatnonzero(rows)[:MOST_ORIGINS].tolist() for status, rows in of.items()}
        self._form, self._has_form = scored.form, scored.form is not None
        self._lengths: dict[int, int] = {}
        self._shown: dict[int, _ShownRow] = {}
        self._errors: dict[int, UnscoredRow] = {}

    def see(self, chunk: Chunk) -> None:
        if not self._has_form and chunk.table.num_rows:
            self._form, self._has_form = _inferred(chunk.table), True
        start, stop = chunk.start, chunk.start + chunk.table.num_rows
        shown = [row for row in self._riskiest if start <= row < stop]
        first, last = np.searchsorted(self._measured, [start, stop]) if self._form else (0, 0)
        wanted = sorted({*self._measured[first:last].tolist(), *shown})
        for row, value in zip(wanted, _values(chunk, wanted, self._form), strict=True):
            turns = self._turns(value)
            if turns is not None:
                self._lengths[row] = len(_answer(turns))
            if row in shown:
                prompt = json.dumps(value, ensure_ascii=False, default=str) if turns is None else _prompt(turns)
                answer = "" if turns is None else _answer(turns)
                self._shown[row] = {**_origin(chunk, row), "prompt": _cut(prompt), "answer": _cut(answer)}
        for row in (row for rows in self._failed.values() for row in rows if start <= row < stop):
            why = self.scored.detail(chunk, row - start)[:MOST_DETAIL]
            self._errors[row] = {**_origin(chunk, row), "why": why}

    def _turns(self, value: Mapping[str, Any]) -> list[Message] | None:
        try:
            return self._form.conversation(value) if self._form else None
        except RowError:  # possible only where the format was inferred
            return None

    def notes(self, figures: RunFigures) -> Notes:
        """The notes, after all chunks were seen; the figures are the run's."""
        scored = self.scored
        probes = {name: values[self._riskiest].tolist() for name, values in scored.probes.items()}
        risks, reference = scored.risk[self._riskiest], None if self.meaning is None else self.meaning.reference
        ranks: list[_Ranked] = [{"rank": 1 + int((scored.risk[scored.scored] > risk).sum())} for risk in risks]
        if self.meaning is not None and reference is not None:
            places = self.meaning.percentiles(risks).tolist()
            ranks = [{**own, "percentile": place} for own, place in zip(ranks, places, strict=True)]
        return {
            "histogram": count_bars(scored.risk, scored.scored, self.fate, figures, reference),
            "lengths": self._by_length(),
            "riskiest": [
                {
                    **self._shown[row],
                    "risk": float(scored.risk[row]),
                    "dropped": bool(self.fate[row] == DROPPED),
                    "probes": {name: values[k] for name, values in probes.items()},
                    **ranks[k],
                }
                for k, row in enumerate(self._riskiest)
            ],
            "errors": {status: [self._errors[row] for row in rows] for status, rows in self._failed.items()},
            "modules": {name: self.means(each) for name, each in scored.modules.items()},
        }

    def _by_length(self) -> Lengths | None:
        """Risk against the length of the answer, of measured rows; None where no answer was measured."""
        measured = [row for row in self._measured.tolist() if row in self._lengths]
        if not measured:
            return None
        risk, length = self.scored.risk[measured], np.array([self._lengths[row] for row in measured])
        few = slice(None, None, -(-len(measured) // MOST_POINTS))
        dropped = self.fate[measured] == DROPPED
        points = zip(length[few].tolist(), risk[few].tolist(), dropped[few].tolist(), strict=True)
        bands = np.array_split(np.argsort(length, kind="stable"), min(BANDS, max(1, len(measured) // BANDS)))
        return {
            "rows": len(measured),
            "spearman": spearman(risk, length),
            "points": [list(point) for point in points],
            "bands": [[float(np.median(length[b])), *np.quantile(risk[b], [0.25, 0.5, 0.75]).tolist()] for b in bands],
        }

    def means(self, modules: PerModule) -> ModuleMeans:
        """A probe's mean cosine at each of its modules, over all scored rows and over the riskiest ones."""
        total, scored = np.zeros(len(modules.names)), self.scored.scored
        for start in range(0, len(scored), BLOCK):
            block = slice(start, start + BLOCK)
            total += modules.cosines[block].sum(axis=0, dtype=np.float64, where=scored[block, None])
        rows = self.scored.riskiest(MOST_ROWS)
        riskiest = modules.cosines[rows].sum(axis=0, dtype=np.float64)
        return {
            "places": [layer_and_type(name) for name in modules.names],
            "all": (total / max(1, scored.sum())).tolist(),
            "riskiest": (riskiest / max(1, len(rows))).tolist(),
        }


def _shown_rows(scored: Scored, fate: np.ndarray) -> list[int]:
    """The riskiest of the dropped rows, those next to the cut, and the riskiest of the kept rows."""
    is_dropped = fate == DROPPED
    dropped = scored.riskiest(MOST_DROPPED, is_dropped)
    if int((scored.scored & is_dropped).sum()) > MOST_DROPPED:
        rows = np.flatnonzero(scored.scored & is_dropped)
        lowest = rows[np.argpartition(scored.risk[rows], AT_CUT)[:AT_CUT]]
        dropped = [row for row in dropped if row not in lowest][: MOST_DROPPED - AT_CUT]
        dropped += lowest[np.argsort(-scored.risk[lowest], kind="stable")].tolist()
    return dropped + scored.riskiest(MOST_ROWS - len(dropped), fate == KEPT)


def _some(rows: np.ndarray) -> np.ndarray:
    """These rows (n,), ascending, or if there are too many, a random sample of them, which is always the same."""
    if len(rows) <= MOST_LENGTHS:
        return rows
    return rows[np.sort(np.random.default_rng(0).choice(len(rows), MOST_LENGTHS, replace=False, shuffle=False))]


def _inferred(table: pa.Table) -> RowFormat | None:
    """The format of rows, inferred from their columns and values; None where it can't be inferred."""
    try:
        return Columns().choose(to_rows(_bare(table).slice(0, SAMPLE)))
    except SQSDError:
        return None


def _bare(table: pa.Table) -> pa.Table:
    return table.select([name for name in table.column_names if not name.startswith(SCORE_PREFIX)])


def _values(chunk: Chunk, rows: Sequence[int], form: RowFormat | None) -> Iterable[dict[str, Any]]:
    """The values of these rows of the chunk in the columns of the format; in all columns without a format."""
    if form is None:
        table = _bare(chunk.table)
    else:
        table = chunk.table.select([name for name in form.columns if name in chunk.table.column_names])
    if not table.num_columns:
        return [{} for _ in rows]
    return to_rows(table.take(np.array(rows, np.int64) - chunk.start))


def _origin(chunk: Chunk, row: int) -> RowOrigin:
    k = row - chunk.start
    return {"row": row, "file": chunk.files[k], "line": chunk.lines[k]}


def _answer(turns: Sequence[Message]) -> str:
    """The text of all supervised turns."""
    return "\n\n".join(_said(turn) for turn in turns if is_supervised(turn))


def _prompt(turns: Sequence[Message]) -> str:
    """The text of all other turns, each with its role if they are several."""
    others = [turn for turn in turns if not is_supervised(turn) and isinstance(turn["content"], str)]
    return "\n\n".join(_said(turn) if len(others) == 1 else f"{turn['role']}: {_said(turn)}" for turn in others)


def _said(turn: Message) -> str:
    calls = turn.get("tool_calls")
    parts = [turn["content"], json.dumps(calls, ensure_ascii=False, default=str) if calls else ""]
    return "\n".join(part for part in parts if part.strip())


def _cut(text: str) -> Excerpt:
    return {"text": text[:MOST_TEXT], "more": max(0, len(text) - MOST_TEXT)}
