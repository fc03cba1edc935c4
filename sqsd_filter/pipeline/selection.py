"""Where to cut: which of the scored rows are dropped, decided on the risk column alone and exactly.

Rows are ordered by risk, highest first, equal risks in row order; the first k are dropped. A share p drops
k = ceil(p·n) of the n rows that have a score. Rows without one are nobody's: they go to the errors.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from sqsd_filter.errors import UsageError

KEPT, DROPPED, ERROR = 0, 1, 2
KINDS = ("drop_top", "drop_count", "max_risk", "keep_lowest")


def parse_share(value: str | float | Fraction, flag: str = "--drop-top", rows_flag: str = "--drop-count") -> Fraction:
    """A share as `5%`, `5pct` or `0.05`, exactly: 5 % of 60 rows is 3. Raises `UsageError`; a bare 5 could be rows.

    `flag` takes the share and `rows_flag`, if any, a number of rows: an error says how to write either.
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
        rows = f" or {rows_flag} {value}" if rows_flag else ""
        raise UsageError(f"'{value}' could mean {value}% or {value} rows: write {flag} {value}%{rows}.")
    if not 0 <= share <= 1:
        raise UsageError(f"'{value}' is not a share between 0% and 100%.")
    return share


@dataclass(frozen=True)
class Cut:
    """One way to cut: `kind` is one of `KINDS`, `value` a share, a count of rows, or a risk."""

    kind: str
    value: Fraction | int | float

    @classmethod
    def of(
        cls,
        drop_top: str | float | None = None,
        drop_count: int | None = None,
        max_risk: float | None = None,
        keep_lowest: int | None = None,
    ) -> Cut:
        """The one cut that was asked for. Raises `UsageError` for none, several, or a senseless value."""
        given = {
            k: v for k, v in zip(KINDS, (drop_top, drop_count, max_risk, keep_lowest), strict=True) if v is not None
        }
        flags = ", ".join("--" + k.replace("_", "-") for k in KINDS)
        if len(given) != 1:
            raise UsageError(f"Say how to cut with exactly one of {flags} (for example --drop-top 5%).")
        kind, value = next(iter(given.items()))
        if kind == "drop_top":
            return cls(kind, parse_share(value))
        if kind == "max_risk":
            if not math.isfinite(float(value)):
                raise UsageError("--max-risk must be a finite number.")
            return cls(kind, float(value))
        if int(value) < 0:
            raise UsageError(f"--{kind.replace('_', '-')} must not be negative.")
        return cls(kind, int(value))

    def __str__(self) -> str:
        """Tells any two cuts apart: it is part of what makes two runs the same."""
        number = float(self.value * 100) if self.kind == "drop_top" else self.value
        sign = "%" if self.kind == "drop_top" else ""
        return f"{self.kind.replace('_', '-')} {str(number).removesuffix('.0')}{sign}"

    def count(self, risk: np.ndarray) -> int:
        """How many of n scored rows to drop."""
        n = len(risk)
        if self.kind == "drop_top":
            return math.ceil(Fraction(self.value) * n)
        if self.kind == "drop_count":
            return min(n, int(self.value))
        if self.kind == "keep_lowest":
            return max(0, n - int(self.value))
        return int((risk > self.value).sum())


@dataclass(frozen=True)
class Selection:
    """`place` (n,) is KEPT, DROPPED or ERROR for each row; `threshold` the lowest risk that was dropped (None when
    nothing was); `ties` how many kept rows have that very risk."""

    place: np.ndarray
    threshold: float | None
    ties: int

    def count(self, place: int) -> int:
        return int((self.place == place).sum())


def cut_rows(risk: np.ndarray, scored: np.ndarray, cut: Cut) -> Selection:
    """Place every row: `risk` (n,) float, `scored` (n,) bool, true where the risk is to be believed."""
    place = np.full(len(risk), ERROR, dtype=np.uint8)
    place[scored] = KEPT
    rows = np.flatnonzero(scored)
    values = risk[rows]
    k = cut.count(values)
    if k == 0:
        return Selection(place, None, 0)
    threshold = np.partition(values, len(values) - k)[len(values) - k]
    above = values > threshold
    level = rows[values == threshold]
    chosen = k - int(above.sum())
    place[rows[above]] = DROPPED
    place[level[:chosen]] = DROPPED
    return Selection(place, float(threshold), len(level) - chosen)
