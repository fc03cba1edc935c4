"""The comparison of scores that two ways of computing gave the same rows."""

from __future__ import annotations

from typing import TypedDict

import numpy as np

from sqsd_filter.pipeline.selecting.selection import DROPPED, Cut, cut_rows
from sqsd_filter.scoring.results import Scores
from sqsd_filter.statistics import spearman

FEWEST = 8  # rows from which on ranks mean something
EXACT = 1e-4  # the largest difference of a risk or a probe's value between two ways in float32
RANK = 0.99  # the least rank correlation of the risk where one way is in bfloat16
SIDES = 0.1  # there, the share of the dropped rows (at least one row) that may change places with kept ones


class ScoreDifference(TypedDict):
    """`difference` has the largest |Δ| of the risk and of each probe among the `rows` with both scores, `rank`
    Spearman's correlation of their risks, and `sides` the number of rows that only one of the two drops. Below
    `FEWEST` rows both are None. `why` says what is wrong where it is not `ok`."""

    rows: int
    difference: dict[str, float]
    rank: float | None
    sides: int | None
    ok: bool
    why: str


def compare(tested: Scores, plainer: Scores, cut: Cut, exact: bool) -> ScoreDifference:
    """Compare scores of the same rows: by their differences if `exact`, else by their ranks and the dropped rows."""
    fine, plain = np.isfinite(tested.risk), np.isfinite(plainer.risk)
    both = fine & plain
    pairs = {"risk": (tested.risk, plainer.risk)}
    pairs |= {name: (values, plainer.probes[name]) for name, values in tested.probes.items()}
    difference = {name: float(np.abs(a - b)[both].max(initial=0.0)) for name, (a, b) in pairs.items()}
    lone, n = int((fine != plain).sum()), int(both.sum())
    rank: float | None = None
    sides: int | None = None
    if n >= FEWEST:
        rank = _agreement(tested.risk[both], plainer.risk[both])
        sides = int((_dropped(tested, both, cut) != _dropped(plainer, both, cut)).sum())
    why, worst = "", max(difference.values())
    if lone:
        why = f"{lone} of {len(both)} rows have a score in one way only"
    elif exact and worst > EXACT:
        why = f"values differ by up to {worst:.2g}, more than {EXACT:g}"
    elif not exact and rank is not None and rank < RANK:
        why = f"the rank correlation is {rank:.4f}, less than {RANK:g}"
    elif not exact and sides is not None and sides > 2 * max(1, int(SIDES * cut.count(tested.risk[both]))):
        why = f"{sides} of {n} rows change sides"
    return {"rows": n, "difference": difference, "rank": rank, "sides": sides, "ok": not why, "why": why}


def _agreement(a_n: np.ndarray, b_n: np.ndarray) -> float:
    """The rank correlation. If one side does not vary: 1 where the other does not vary either, else 0."""
    correlation = spearman(a_n, b_n)
    return float(np.ptp(a_n) == np.ptp(b_n)) if correlation is None else correlation


def _dropped(scores: Scores, rows: np.ndarray, cut: Cut) -> np.ndarray:
    """Which of all rows are dropped when these (n,) bool are cut: (n,) bool."""
    dropped: np.ndarray = cut_rows(scores.risk, rows, cut).fate == DROPPED
    return dropped
