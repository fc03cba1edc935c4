"""A corpus with its scores: a status and a risk per row, from the score store or from columns of the input."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType
from typing import Any, TypedDict

import numpy as np
import pyarrow as pa

from sqsd_filter.corpus.conversation import BAD_JSON, NONFINITE, SCORED, RowError
from sqsd_filter.corpus.json_schema import to_rows
from sqsd_filter.corpus.row_formats import RowFormat
from sqsd_filter.corpus.sources import Chunk, Corpus, Row
from sqsd_filter.errors import InputError
from sqsd_filter.pipeline.scores.store import ScoreStore
from sqsd_filter.pipeline.selecting.groups import Groups, nth_riskiest
from sqsd_filter.pipeline.stage.shards import Index

SCORE_PREFIX = "sqsd_"
MOST_STATUSES = 255  # of a corpus; their codes are bytes


@dataclass(frozen=True)
class PerModule:
    """The cosines (n, m) float32 at the m modules of these names, NaN in rows without a score."""

    names: Sequence[str]
    cosines: np.ndarray

    def column(self, window: slice) -> pa.Array:
        """The cosines of some rows as lists, null where there is no score."""
        cosines = self.cosines[window]
        missing = pa.array(np.isnan(cosines).any(axis=1))
        return pa.FixedSizeListArray.from_arrays(cosines.ravel(), len(self.names), mask=missing)


class ScoreCounts(TypedDict):
    """How many rows were scored by the model, how many scores were known before, and how many rows have the
    conversation of an earlier row."""

    scored: int
    reused: int
    duplicates: int


@dataclass(frozen=True)
class Scored:
    """n rows: `codes` (n,) into `statuses`, `probes` and `risk` (n,) NaN where there is no score.

    `tokens` (n,) is 0 where it is not known. Scores that were read from columns of the input have no `probes`: the
    input has them already. `read` (n,) are the values of some of these columns, NaN where there is none, and `recut`
    says that the risk is not that of the input's column.
    """

    corpus: Corpus
    form: RowFormat | None
    statuses: list[str]
    codes: np.ndarray
    probes: Mapping[str, np.ndarray]
    risk: np.ndarray
    tokens: np.ndarray
    counts: ScoreCounts
    details: Mapping[int, str]  # why rows have no score, where the reason is stored
    groups: Groups | None = None
    modules: Mapping[str, PerModule] = field(default_factory=dict)  # by probe, where cosines per module are kept
    read: Mapping[str, np.ndarray] = field(default_factory=dict)
    recut: bool = False

    @property
    def values(self) -> Mapping[str, np.ndarray]:
        """The values (n,) that are known, wherever they come from."""
        return self.probes or self.read

    @cached_property
    def scored(self) -> np.ndarray:
        """(n,) bool."""
        mask: np.ndarray = (self.codes == self.statuses.index(SCORED)) & np.isfinite(self.risk)
        return mask

    def riskiest(self, count: int, among: np.ndarray | None = None) -> list[int]:
        """The `count` rows with the highest risks, or all that have one, riskiest first, equal risks in row order; of
        the rows `among` (n,) bool only, if it is given."""
        rows = np.flatnonzero(self.scored if among is None else self.scored & among)
        if count < len(rows):
            rows = rows[self.risk[rows] >= nth_riskiest(self.risk[rows], count - 1)]
        order: list[int] = rows[np.argsort(-self.risk[rows], kind="stable")][:count].tolist()
        return order

    def reasons(self) -> dict[str, int]:
        """How many rows have no score, by status, the most frequent first."""
        counted = Counter(dict(enumerate(np.bincount(self.codes, minlength=len(self.statuses)).tolist())))
        return {self.statuses[c]: n for c, n in counted.most_common() if n and self.statuses[c] != SCORED}

    def detail(self, chunk: Chunk, k: int) -> str:
        """What is wrong with row k of a chunk, in words."""
        if chunk.problems[k]:
            return chunk.problems[k]
        row = chunk.start + k
        for reason in (self.details.get(row), self.corpus.errors.reason(row)):
            if reason is not None:
                return reason
        if self.form is None:
            return ""
        columns = [name for name in self.form.columns if name in chunk.table.column_names]
        parsed = self.form.parse(next(to_rows(chunk.table.select(columns).slice(k, 1)), {}))
        return parsed.detail if isinstance(parsed, RowError) else ""

    def columns(self, start: int, stop: int) -> dict[str, pa.Array]:
        """The score columns of rows start..stop; null where there is no score."""
        window = slice(start, stop)
        values = {"sqsd_risk": self.risk, **{SCORE_PREFIX + name: v for name, v in self.probes.items()}}
        return {
            **{name: pa.array(v[window], pa.float64(), from_pandas=True) for name, v in values.items()},
            **{f"{SCORE_PREFIX}{name}_modules": each.column(window) for name, each in self.modules.items()},
            "sqsd_status": pa.array([self.statuses[c] for c in self.codes[window]], pa.string()),
        }


def from_store(
    corpus: Corpus,
    index: Index,
    store: ScoreStore,
    weights: Mapping[str, float],
    groups: Groups | None = None,
    modules: Mapping[str, Sequence[str]] = MappingProxyType({}),
) -> Scored:
    """Join every row with the stored score of its conversation, and with its cosines at each probe's `modules`, where
    these are kept. Raises `InputError` where a score is missing."""
    codes = index.codes.copy()
    statuses = list(index.statuses)
    all_of = index.conversations
    rows, which = all_of.rows, all_of.which
    stored = store.lookup(all_of.keys)
    if not stored.known.all():
        raise InputError(
            f"{int((~stored.known).sum())} rows have no score in {store.folder}: finish the scoring run first."
        )
    n = len(codes)
    tokens = np.zeros(n, np.int32)
    tokens[rows] = stored.tokens[which]
    probes = {name: np.full(n, np.nan) for name in weights}
    for name, values in probes.items():
        values[rows] = stored.probes[name][which]
    each = {name: PerModule(names, np.full((n, len(names)), np.nan, np.float32)) for name, names in modules.items()}
    for name, names in modules.items():
        for m, module in enumerate(names):
            each[name].cosines[rows, m] = stored.probes[f"{name}/{module}"][which]
    details = {}
    good = stored.has(SCORED)
    for at in np.flatnonzero(~good[which]).tolist():
        row, status = int(rows[at]), stored.statuses[stored.codes[which[at]]]
        if status not in statuses:
            statuses.append(status)
        codes[row] = statuses.index(status)
        details[row] = stored.details.get(int(which[at]), "")
    counts: ScoreCounts = {
        "scored": int((good & stored.own).sum()),
        "reused": int((good & ~stored.own).sum()),
        "duplicates": int(good[which].sum() - good.sum()),
    }
    risk = np.sum([weights[name] * values for name, values in probes.items()], axis=0)
    return Scored(corpus, index.form, statuses, codes, probes, risk, tokens, counts, details, groups, each)


def _number(value: object) -> float:
    """The value as a float; NaN for what is none, or an integer that no float can hold."""
    try:
        return float(value) if isinstance(value, int | float) else math.nan
    except OverflowError:
        return math.nan


class ColumnIndex:
    """Visits a corpus that has been scored before, and collects its scores from these columns, and the values of these
    names."""

    def __init__(self, values: Sequence[str] = ()) -> None:
        self._values: dict[str, list[float]] = {name: [] for name in values}
        self._details: dict[int, str] = {}
        self._risk: list[float] = []
        self._codes = bytearray()
        self._statuses = [SCORED]

    def visit(self, row: Row) -> None:
        value: Mapping[str, Any] = row.value or {}
        if row.value is not None and not {"sqsd_risk", "sqsd_status"} <= set(value):
            raise InputError(
                f"{row.file} has no columns sqsd_risk and sqsd_status (line {row.line}): score it first with "
                "'sqsd-filter score'."
            )
        risk, status = value.get("sqsd_risk"), value.get("sqsd_status", BAD_JSON)
        if not isinstance(status, str) or (status == SCORED and not isinstance(risk, int | float)):
            raise InputError(
                f"{row.file} has a row with the status '{SCORED}' but no risk (line {row.line}): score the file again."
            )
        if status == SCORED and not math.isfinite(_number(risk)):
            status = NONFINITE
        if status != SCORED and isinstance(reason := value.get("sqsd_reason"), str):
            self._details[row.index] = reason
        self._risk.append(_number(risk))
        for name, column in self._values.items():
            column.append(_number(value.get(SCORE_PREFIX + name)))
        if status not in self._statuses:
            if len(self._statuses) == MOST_STATUSES:
                raise InputError(
                    f"{row.file} has over {MOST_STATUSES} values of sqsd_status (line {row.line}): score it again."
                )
            self._statuses.append(status)
        self._codes.append(self._statuses.index(status))

    @property
    def columns(self) -> list[str]:
        return ["sqsd_risk", "sqsd_status", "sqsd_reason", *(SCORE_PREFIX + name for name in self._values)]

    def scored(self, corpus: Corpus, groups: Groups | None = None, form: RowFormat | None = None) -> Scored:
        codes, risk = np.frombuffer(bytes(self._codes), np.uint8), np.array(self._risk, dtype=np.float64)
        counts: ScoreCounts = {"scored": 0, "reused": int(((codes == 0) & np.isfinite(risk)).sum()), "duplicates": 0}
        tokens = np.zeros(len(codes), np.int64)
        read = {name: np.array(column, np.float64) for name, column in self._values.items()}
        return Scored(corpus, form, self._statuses, codes, {}, risk, tokens, counts, self._details, groups, read=read)
