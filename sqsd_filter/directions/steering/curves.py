"""Curves over α: their grid, their trend, and the verdict whether a direction steers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from decimal import Decimal, InvalidOperation
from typing import Any

import numpy as np

from sqsd_filter.errors import UsageError
from sqsd_filter.statistics import spearman

MOST_ALPHAS = 1000
STEADY = 0.9  # the margin follows α if their Spearman correlation is at least this
RANDOM = 3  # random directions to compare each direction with, at the ends of the range
STRONGER = 3.0  # a direction's change must exceed the largest one along random directions by this factor


def parse_alphas(text: str) -> list[Decimal]:
    """The values of α in `start:stop:step` or a list with commas, ascending. 0, the model itself, is always included.

    Decimals are exact: the last value of -1:1:0.1 is 1. Raises `UsageError`.
    """
    try:
        parts = [Decimal(part.strip()) for part in text.split(":" if ":" in text else ",")]
    except InvalidOperation as problem:
        raise UsageError(
            f"alpha (--alpha) must be start:stop:step or a list such as -1,0,1, not '{text}'."
        ) from problem
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
        raise UsageError(f"alpha (--alpha) must be start:stop:step, such as -1:1:0.25, not '{text}'.")
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
    """The trend of a curve that is expected to rise (`sign` 1) or fall (-1).

    `monotone`: it strictly does so over the whole grid; `against`: the number of steps in the other direction;
    `spearman`: its rank correlation with α; `change`: from end to end. All unknown if a value is not finite (None).
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
    """Does the direction steer, beyond what a random direction would do?

    Its margin must end on the expected side of its start (`sign`), follow α in ranks (`STEADY`), and change `STRONGER`
    times as much as along any random direction of the same norms. The last condition matters because for small V every
    curve is nearly a straight line, and half of all directions have the right sign.
    """
    if margin["spearman"] is None or any(change is None for change in random_changes):
        return False
    largest = max((abs(change) for change in random_changes if change is not None), default=0.0)
    steady = sign * margin["spearman"] >= STEADY
    return bool(steady and sign * margin["change"] > STRONGER * largest)
