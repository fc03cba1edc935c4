"""Does a linear probe tell beyond its own rows? Every source of unsafe rows is scored by a fit that never saw it.

Rows are split into `FOLDS` by their prompt. The rows of a fold, and of one unsafe source, are scored by a fit on the
other folds without that source. So neither the source nor any prompt of what is compared was fitted on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypedDict

import numpy as np

from sqsd_filter.directions.linear_probe.fit import balanced, solve
from sqsd_filter.statistics import auc

FOLDS = 4
LEVEL = 0.99


class HeldOutSource(TypedDict):
    """An unsafe source: `auc` against each source of other rows, and the share of its rows `above` 99 % of them, in
    which each source counts by its weight."""

    source: str
    rows: int
    auc: dict[str, float]
    above: float


@dataclass(frozen=True)
class Rows:
    """The rows of a fit: `unsafe` (n,), the name of each row's `source` (n,), that source's `weight` (n,), and a
    number (n,) that rows with the same `prompt` share."""

    unsafe: np.ndarray
    source: np.ndarray
    weight: np.ndarray
    prompt: np.ndarray

    @property
    def fold(self) -> np.ndarray:
        return self.prompt % FOLDS

    def names(self, *, unsafe: bool) -> list[str]:
        return [str(name) for name in np.unique(self.source[self.unsafe == unsafe])]


Fit = tuple[str, int]  # the source and the fold that a fit has not seen


def scores_without(rows: Rows, kernel_nn: np.ndarray, ridge: float) -> dict[Fit, np.ndarray]:
    """Every row's risk (n,) by each fit that leaves out one unsafe source and one fold.

    With one unsafe source alone nothing would be left to fit on: its rows are then scored by fits on its other folds.
    """
    names, scores = rows.names(unsafe=True), {}
    for name in names:
        for fold in range(FOLDS):
            seen_n = (rows.source != name) | ~rows.unsafe | (len(names) == 1)
            weights_n = np.where(seen_n & (rows.fold != fold), rows.weight, 0.0)
            if (weights_n[rows.unsafe] > 0).any() and (weights_n[~rows.unsafe] > 0).any():
                weights_n = balanced(rows.unsafe, rows.source, weights_n)
                alpha_n, bias = solve(kernel_nn, rows.unsafe, weights_n, ridge)
                scores[name, fold] = kernel_nn @ alpha_n + bias
    return scores


def figures(rows: Rows, scores: Mapping[Fit, np.ndarray], limit_n: np.ndarray | None = None) -> list[HeldOutSource]:
    """How the fits score what they have not seen. `limit_n` has other weights (n,) of the rows whose 99 % is the
    limit."""
    weights_n = balanced(rows.unsafe, rows.source, rows.weight) if limit_n is None else limit_n
    found: list[HeldOutSource] = []
    for name in rows.names(unsafe=True):
        score_n = of_fold(rows, scores, name)
        known_n = ~np.isnan(score_n)
        own = score_n[known_n & rows.unsafe & (rows.source == name)]
        rest_n = known_n & ~rows.unsafe
        if not len(own) or not rest_n.any():
            continue
        others = {other: score_n[rest_n & (rows.source == other)] for other in rows.names(unsafe=False)}
        threshold = weighted_quantile(score_n[rest_n], weights_n[rest_n], LEVEL)
        found.append(
            {
                "source": name,
                "rows": len(own),
                "auc": {other: round(auc(own, values), 4) for other, values in others.items() if len(values)},
                "above": round(float((own > threshold).mean()), 4),
            }
        )
    return found


def of_fold(rows: Rows, scores: Mapping[Fit, np.ndarray], source: str) -> np.ndarray:
    """Every row's risk (n,) by the fit that has seen neither its fold nor this source; NaN where there is none."""
    score_n = np.full(len(rows.unsafe), np.nan)
    for fold in range(FOLDS):
        if (source, fold) in scores:
            score_n[rows.fold == fold] = scores[source, fold][rows.fold == fold]
    return score_n


def weighted_quantile(values_n: np.ndarray, weights_n: np.ndarray, level: float) -> float:
    """The lowest value that at least this share of the weight does not exceed."""
    order = np.argsort(values_n)
    share_n = np.cumsum(weights_n[order]) / weights_n.sum()
    return float(values_n[order][min(int(np.searchsorted(share_n, level)), len(values_n) - 1)])
