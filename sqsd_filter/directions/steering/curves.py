"""What a model does along a direction, as curves over α: the grid, the intervals, and whether a direction steers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from decimal import Decimal, InvalidOperation
from typing import Any

import numpy as np

from sqsd_filter.errors import UsageError
from sqsd_filter.statistics import spearman

MOST_ALPHAS = 1000
STEADY = 0.9  # Spearman's correlation of α and the margin from which the margin counts as following α
RANDOM = 3  # random directions that each direction is compared with, at the ends of the range
STRONGER = 3.0  # times the largest change along the random directions that a direction's own has to be


def parse_alphas(text: str) -> list[Decimal]:
    """The values of α that `start:stop:step` or a list with commas names, ascending; 0, the model itself, is always
    among them.

    Decimals are exact: the last of -1:1:0.1 is 1. Raises `UsageError`.
    """
    try:
        parts = [Decimal(part.strip()) for part in text.split(":" if ":" in text else ",")]
    except InvalidOperation as problem:
        raise UsageError(f"alpha (--alpha) must be start:stop:step or a list as -1,0,1, not '{text}'.") from problem
    if not all(part.is_finite() and math.isfinite(part) for part in parts):
        raise UsageError(f"alpha (--alpha) must consist of finite numbers, not '{text}'.")
    if ":" in text:
        parts = _range(text, parts)
    grid = sorted({Decimal(0), *(part.normalize() for part in parts)})
    if len(grid) == 1:
        raise UsageError("alpha (--alpha) needs a value other than 0, which is the model itself.")
    return grid


def _range(text: str, parts: Sequence[Decimal]) -> list[Decimal]:
    if len(parts) != 3:
        raise UsageError(f"alpha (--alpha) must be start:stop:step, as -1:1:0.25, not '{text}'.")
    start, stop, step = parts
    if step <= 0 or stop < start:
        raise UsageError(f"alpha (--alpha) must go up from start to stop by a step above 0, not '{text}'.")
    if stop - start > step * MOST_ALPHAS:
        raise UsageError(f"alpha (--alpha) '{text}' has more than {MOST_ALPHAS} steps: take a larger step.")
    steps, rest = divmod(stop - start, step)
    if rest:
        raise UsageError(f"alpha (--alpha) '{text}' does not end at {stop}: choose a step that divides {stop - start}.")
    return [start + k * step for k in range(int(steps) + 1)]


def trend(alphas: Sequence[float], values: Sequence[float | None], sign: int) -> dict[str, Any]:
    """Does the curve strictly rise (`sign` 1) or fall (-1) over the whole grid, how many of its steps go the other way
    (`against`; a plateau does not), how does it follow α in ranks, and how much does it change from end to end?

    Of a curve with a value that is not finite (None) nothing of this is known.
    """
    curve_n = np.array([np.nan if value is None else value for value in values], dtype=float)
    if np.isnan(curve_n).any():
        return {"monotone": False, "against": None, "spearman": None, "change": None}
    steps = sign * np.diff(curve_n)
    return {
        "monotone": bool((steps > 0).all()),
        "against": int((steps < 0).sum()),
        "spearman": spearman(np.array(alphas), curve_n),
        "change": float(curve_n[-1] - curve_n[0]),
    }


def steers(margin: Mapping[str, Any], sign: int, random_changes: Sequence[float | None]) -> bool:
    """Is the direction a compass needle, or could any other have done this?

    Its margin has to end on the expected side of where it began (`sign`), to follow α in ranks (`STEADY`), and to
    change `STRONGER` times as much as along any of the random directions of the same norms: for small V every curve is
    nearly a straight line, which half of all directions have with the right sign.
    """
    if margin["spearman"] is None or any(change is None for change in random_changes):
        return False
    largest = max((abs(change) for change in random_changes if change is not None), default=0.0)
    steady = sign * margin["spearman"] >= STEADY
    return bool(steady and sign * margin["change"] > STRONGER * largest)
