"""Does a contrast point beyond its own rows? Every source of unsafe rows is scored by a fit that never saw it.

Rows are split into `FOLDS` by their prompt. The rows of a fold, and of one unsafe source, are scored by a fit on the
other folds without that source. So neither the source nor any prompt of what is compared was fitted on.
"""

from __future__ import annotations

from typing import TypedDict

import numpy as np

from sqsd_filter.directions.contrast.ridge import Vectors, balanced, scores, solve
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


def held_out(
    vectors: Vectors,
    modules: list[slice],
    kernel_nn: np.ndarray,
    unsafe_n: np.ndarray,
    source_n: np.ndarray,
    weight_n: np.ndarray,
    prompt_n: np.ndarray,
    ridge: float,
) -> list[HeldOutSource]:
    """The figures of each unsafe source; `prompt_n` has a number (n,) that equal prompts share.

    With one unsafe source alone nothing is left to fit on, and its rows are scored by fits on its other folds.
    """
    fold_n = prompt_n % FOLDS
    names = [str(name) for name in np.unique(source_n[unsafe_n])]
    fits, alphas = [], []
    for name in names:
        for fold in range(FOLDS):
            used_n = (fold_n != fold) & ((source_n != name) | ~unsafe_n | (len(names) == 1))
            weights_n = balanced(unsafe_n, source_n, np.where(used_n, weight_n, 0.0))
            if (weights_n[unsafe_n] > 0).any() and (weights_n[~unsafe_n] > 0).any():
                fits.append((name, fold))
                alphas.append(solve(kernel_nn, unsafe_n, weights_n, ridge))
    if not fits:
        return []
    scores_nf = scores(vectors, modules, np.stack(alphas, axis=1))
    weights_n = balanced(unsafe_n, source_n, weight_n)
    result: list[HeldOutSource] = []
    for name in names:
        score_n = np.full(len(unsafe_n), np.nan)
        for k, (of, fold) in enumerate(fits):
            if of == name:
                score_n[fold_n == fold] = scores_nf[fold_n == fold, k]
        known_n = ~np.isnan(score_n)
        own = score_n[known_n & unsafe_n & (source_n == name)]
        if not len(own):
            continue
        others = {str(n): score_n[known_n & ~unsafe_n & (source_n == n)] for n in np.unique(source_n[~unsafe_n])}
        rest_n = known_n & ~unsafe_n
        threshold = weighted_quantile(score_n[rest_n], weights_n[rest_n], LEVEL)
        result.append(
            {
                "source": name,
                "rows": len(own),
                "auc": {other: round(auc(own, values), 4) for other, values in others.items() if len(values)},
                "above": round(float((own > threshold).mean()), 4),
            }
        )
    return result


def weighted_quantile(values_n: np.ndarray, weights_n: np.ndarray, level: float) -> float:
    """The lowest value that at least this share of the weight does not exceed."""
    order = np.argsort(values_n)
    share_n = np.cumsum(weights_n[order]) / weights_n.sum()
    return float(values_n[order][min(int(np.searchsorted(share_n, level)), len(values_n) - 1)])
