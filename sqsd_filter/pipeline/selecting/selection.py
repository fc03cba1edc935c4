"""Where to cut: which of the scored rows are dropped, decided on the risk column alone and exactly.

Rows are ordered by risk, highest first, equal risks in row order; the first k are dropped. A share p drops
k = ceil(p·n) of the n rows that have a score. Rows without one take no part in the cut: they are errors. Splits may be
cut one by one, and groups of rows may share a cut. Instead of being dropped, rows may be weighted.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Literal, TypedDict

import numpy as np

from sqsd_filter.errors import UsageError, option
from sqsd_filter.pipeline.selecting.groups import Groups, apportion, nth_riskiest

KEPT, DROPPED, ERROR = 0, 1, 2
ABOVE_REFERENCE = "above_reference"
KINDS = ("drop_top", "drop_count", "max_risk", "keep_lowest", ABOVE_REFERENCE)
FORMULA = "1 / (1 + exp((risk - threshold) / scale))"


def parse_share(value: str | float | Fraction, name: str = "drop_top", rows_name: str = "drop_count") -> Fraction:
    """A share as `5%`, `5pct` or `0.05`, exactly: 5 % of 60 rows is 3. Raises `UsageError`; a bare 5 could be rows.

    `name` is the option that takes the share, `rows_name` that for a number of rows, if any: an error names both.
    """
    text = str(value).strip().lower()
    number, divisor = text, 1
    for suffix in ("%", "pct"):
        if text.endswith(suffix):
            number, divisor = text.removesuffix(suffix).strip(), 100
    try:
        share = Fraction(number) / divisor
    except (ValueError, ZeroDivisionError):
        raise UsageError(f"'{value}' is not a share: write it like 5%, 5pct or 0.05.") from None
    if divisor == 1 and share >= 1 and text != "1.0":
        rows = f" or {option(rows_name)} {value}" if rows_name else ""
        raise UsageError(f"'{value}' could mean {value}% or {value} rows: write {option(name)} {value}%{rows}.")
    if not 0 <= share <= 1:
        raise UsageError(f"'{value}' is not a share between 0% and 100%.")
    return share


def _risk(given: str | float) -> float:
    with suppress(TypeError, ValueError, ArithmeticError):
        if math.isfinite(risk := float(given)):
            return risk
    raise UsageError(f"{option('max_risk')} must be a finite number, not {given!r}.")


def _count(name: str, given: str | float) -> int:
    with suppress(TypeError, ValueError, ArithmeticError):
        count = Fraction(given)
        if count >= 0 and count.denominator == 1:
            return int(count)
    raise UsageError(f"{option(name)} must be a whole number of rows, 0 or more, not {given!r}.")


@dataclass(frozen=True)
class Cut:
    """One way to cut: `kind` is one of `KINDS`, `value` a share, a count of rows, or a risk.

    `above_reference` drops the rows that are riskier than this share of the pack's benign reference rows; `level` is
    that risk, once the pack is known. `per_group` names the column whose groups share what is dropped; with `per_split`
    each split is cut on its own; with `weights` rows are weighted and none is dropped.
    """

    kind: str
    value: Fraction | int | float
    per_group: str | None = None
    per_split: bool = False
    weights: bool = False
    level: float | None = None

    @classmethod
    def of(
        cls,
        drop_top: str | float | None = None,
        drop_count: int | None = None,
        max_risk: float | None = None,
        keep_lowest: int | None = None,
        above_reference: str | float | None = None,
        *,
        per_group: str | None = None,
        per_split: bool = False,
        weights: bool = False,
    ) -> Cut:
        """The one cut that was asked for. Raises `UsageError` for none, several, or a senseless value."""
        value: Fraction | int | float
        values = (drop_top, drop_count, max_risk, keep_lowest, above_reference)
        given = {k: v for k, v in zip(KINDS, values, strict=True) if v is not None}
        if not given:
            options = ", ".join(map(option, KINDS))
            raise UsageError(f"No cut is given: add one of {options}; for the first, 5% for example.")
        if len(given) > 1:
            raise UsageError(f"{' and '.join(map(option, given))} are given: keep one of them.")
        kind, number = next(iter(given.items()))
        if kind == "drop_top":
            value = parse_share(number)
        elif kind == ABOVE_REFERENCE:
            value = parse_share(number, kind, "")
        elif kind == "max_risk":
            value = _risk(number)
            if per_group is not None or per_split:
                apart = "split" if per_group is None else "group"
                raise UsageError(
                    f"{option('max_risk')} is the same cut in every {apart}: leave out {option(f'per_{apart}')}, or "
                    f"cut with {option('drop_top')}."
                )
        else:
            value = _count(kind, number)
        return cls(kind, value, per_group, per_split, weights)

    def __str__(self) -> str:
        """Different for any two cuts: it is part of a run's identity."""
        is_share = self.kind in ("drop_top", ABOVE_REFERENCE)
        number = float(self.value * 100) if is_share else self.value
        sign = "%" if is_share else ""
        text = f"{self.kind.replace('_', '-')} {str(number).removesuffix('.0')}{sign}"
        text += f", per-group {json.dumps(self.per_group, ensure_ascii=False)}" if self.per_group is not None else ""
        return text + ", per-split" * self.per_split + ", weights" * self.weights

    def at(self, level: float) -> Cut:
        """The cut by the reference, above this risk."""
        return replace(self, level=level)

    @property
    def limit(self) -> float | None:
        """The risk above which rows are dropped, where that does not depend on the other rows."""
        return float(self.value) if self.kind == "max_risk" else self.level

    def count(self, risk: np.ndarray) -> int:
        """How many of n scored rows to drop."""
        n = len(risk)
        if self.kind == "drop_top":
            return math.ceil(Fraction(self.value) * n)
        if self.kind == "drop_count":
            return min(n, int(self.value))
        if self.kind == "keep_lowest":
            return max(0, n - int(self.value))
        assert self.limit is not None, "a cut by the reference has no level yet"
        return int((risk > self.limit).sum())

    def takes_all(self, k: int, n: int) -> bool:
        """Does the cut ask to drop all of n scored rows? A share below 100% does not, even if it rounds up to k = n."""
        return self.value == 1 if self.kind == "drop_top" else k == n

    def threshold(self, risk: np.ndarray, k: int) -> float | None:
        """The lowest risk among the k riskiest rows; None for k = 0."""
        if k == 0:
            return None
        return nth_riskiest(risk, k - 1) if self.limit is None else self.limit


class PieceKey(TypedDict, total=False):
    """The split and the group of rows that were cut together, where these are cut apart; `value` is the group's."""

    split: str
    value: object


@dataclass(frozen=True)
class Piece:
    """Rows that were cut together.

    `threshold` is the lowest risk that was dropped, None when nothing was; `ties` of the kept rows have that very risk.
    With weights nothing is dropped: `threshold` and `scale` are the formula's, and `total` is the weights' sum.
    """

    key: PieceKey
    scored: int
    dropped: int
    threshold: float | None
    ties: int
    scale: float | None = None
    total: float = 0.0


@dataclass(frozen=True)
class Selection:
    """`fate` (n,) is KEPT, DROPPED or ERROR for each row.

    `row_weights` (n,) are in [0, 1], NaN for a row without a score; None unless the cut asked for weights. `spared` is
    the number of rows that the cut would drop and that are kept, so that no group is emptied.
    """

    fate: np.ndarray
    pieces: list[Piece]
    spared: int = 0
    row_weights: np.ndarray | None = None

    def count(self, fate: int) -> int:
        return int((self.fate == fate).sum())

    @property
    def threshold(self) -> float | None:
        """The lowest risk that was dropped; None when nothing was, or when rows were cut apart."""
        whole = self.row_weights is None and [piece.key for piece in self.pieces] == [{}]
        return self.pieces[0].threshold if whole else None

    @property
    def ties(self) -> int:
        return sum(piece.ties for piece in self.pieces)


def cut_rows(
    risk: np.ndarray, scored: np.ndarray, cut: Cut, splits: Groups | None = None, groups: Groups | None = None
) -> Selection:
    """Decide the fate of every row: `risk` (n,) float, `scored` (n,) bool, true where the risk is valid.

    Each of `splits` is cut on its own. `groups` share a cut as `apportion` says, and each keeps at least one row unless
    the cut asks to drop all rows. A cut above one risk is the same in all of them.
    """
    fate = np.full(len(risk), ERROR, dtype=np.uint8)
    fate[scored] = KEPT
    row_weights = np.full(len(risk), np.nan) if cut.weights else None
    pieces, spared = [], 0
    for within, inside in _apart("split", splits, np.flatnonzero(scored)):
        k = cut.count(risk[inside])
        parts = [(within | key, rows, risk[rows]) for key, rows in _apart("value", groups, inside)]
        keeps_one = groups is not None and not cut.takes_all(k, len(inside))
        if cut.limit is None:
            shares = apportion(k, [values for _, _, values in parts], leave=int(keeps_one))
        else:
            shares = [cut.count(values) for _, _, values in parts]
        spared += k - sum(shares)
        for (key, rows, values), share in zip(parts, shares, strict=True):
            if row_weights is None:
                pieces.append(_drop(fate, key, rows, values, share))
            else:
                threshold = cut.threshold(values, share)
                row_weights[rows], scale = weigh(values, threshold)
                pieces.append(Piece(key, len(rows), 0, threshold, 0, scale, float(row_weights[rows].sum())))
    return Selection(fate, pieces, spared, row_weights)


def _apart(
    name: Literal["split", "value"], groups: Groups | None, rows: np.ndarray
) -> Iterator[tuple[PieceKey, np.ndarray]]:
    """The rows of each group under its name and value; all of them under none where there are no groups."""
    if groups is None:
        yield {}, rows
        return
    for value, members in groups.within(rows):
        yield ({"split": str(value)} if name == "split" else {"value": value}), members


def _drop(fate: np.ndarray, key: PieceKey, rows: np.ndarray, risk: np.ndarray, k: int) -> Piece:
    """Mark the k riskiest of these rows (n,), ascending, with these risks (n,)."""
    if k == 0:
        return Piece(key, len(rows), 0, None, 0)
    threshold = nth_riskiest(risk, k - 1)
    above = risk > threshold
    level = rows[risk == threshold]
    chosen = k - int(above.sum())
    fate[rows[above]] = DROPPED
    fate[level[:chosen]] = DROPPED
    return Piece(key, len(rows), k, threshold, len(level) - chosen)


def weigh(risk: np.ndarray, threshold: float | None) -> tuple[np.ndarray, float | None]:
    """Weights (n,) of rows with these risks (n,), and their scale: `FORMULA`, with a quarter of the risks'
    interquartile range as the scale.

    Where the scale is 0, also because it is too small for a float, weights are 1 below the threshold, 0.5 at it and 0
    above. Without a threshold all weights are 1.
    """
    if threshold is None:
        return np.ones(len(risk)), None
    quarters = risk / 4  # the difference of two of these never overflows
    low, high = np.quantile(quarters, [0.25, 0.75])
    scale = float(high - low)
    if scale == 0:
        return np.where(risk == threshold, 0.5, (risk < threshold).astype(np.float64)), scale
    with np.errstate(over="ignore"):  # at a distance of infinitely many scales the weight is 0 or 1
        z = 4 * ((quarters - threshold / 4) / scale)
    small = np.exp(-np.abs(z))  # at most 1
    return np.where(z > 0, small, 1.0) / (1.0 + small), scale
