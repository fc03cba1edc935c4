"""Ground truth without fine-tuning: known unsafe rows are mixed into benign ones; does the risk find them?

A draw at the rate p takes all n benign rows' number again, with replacement, and round(p n / (1 - p)) unsafe ones, with
replacement, so that p of the mix is unsafe: it is a bootstrap over both kinds of rows. As many rows are dropped as were
mixed in, at equal risks in a random order, which makes precision and recall one number.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from sqsd_filter.evaluation.results import interval
from sqsd_filter.pipeline.selection import DROPPED, Cut, cut_rows
from sqsd_filter.statistics import auc, average_precision

RATES = (0.01, 0.05, 0.1, 0.2)
DRAWS = 200
DRAWN_AT = 0.05  # the share of unsafe rows for which precision is drawn
POINTS = 201  # of a curve, at most


def poisoned(benign: np.ndarray, unsafe: np.ndarray, seed: int = 0, draws: int = DRAWS) -> dict[str, Any]:
    """By rate: mean and 95 % interval over the draws of precision, recall, ROC-AUC and average precision, of benign
    risks (n,) and unsafe ones (m,), both finite."""
    found: dict[str, Any] = {}
    for rate in RATES:
        mixed_in = max(1, round(rate * len(benign) / (1 - rate)))
        figures = [_draw(benign, unsafe, mixed_in, np.random.default_rng([seed, k])) for k in range(draws)]
        found[str(rate)] = {"benign": len(benign), "unsafe": mixed_in} | {
            name: {"mean": float(values.mean()), "ci": interval(values)}
            for name, values in ((name, np.array([each[name] for each in figures])) for name in figures[0])
        }
    return found


def curves(benign: np.ndarray, unsafe: np.ndarray) -> dict[str, list[list[float]]]:
    """`roc` and `pr`, points [x, y] of thresholds from high to low, for benign risks (n,) and unsafe ones (m,).

    ROC is the share of unsafe rows at or above the threshold over that of benign rows, from [0, 0] on. PR is the
    precision over the former, if `DRAWN_AT` of all rows are unsafe: it needs no draw, as both shares say what it is.
    """
    values = np.unique(np.concatenate([benign, unsafe]))[::-1]
    false, true = (1 - np.searchsorted(np.sort(side), values, side="left") / len(side) for side in (benign, unsafe))
    shown = np.unique(np.searchsorted(false + true, np.linspace(0, 2, POINTS)).clip(max=len(values) - 1))
    false, true = false[shown], true[shown]
    precision = DRAWN_AT * true / (DRAWN_AT * true + (1 - DRAWN_AT) * false)
    return {
        "roc": [[0.0, 0.0], *np.column_stack([false, true]).tolist()],
        "pr": np.column_stack([true, precision]).tolist(),
    }


def _draw(benign: np.ndarray, unsafe: np.ndarray, mixed_in: int, random: np.random.Generator) -> dict[str, float]:
    negative, positive = random.choice(benign, len(benign)), random.choice(unsafe, mixed_in)
    order = random.permutation(len(negative) + mixed_in)
    risk = np.concatenate([negative, positive])[order]
    is_unsafe = order >= len(negative)
    dropped = cut_rows(risk, np.ones(len(risk), bool), Cut.of(drop_count=mixed_in)).place == DROPPED
    hits = int((dropped & is_unsafe).sum())
    return {
        "precision": hits / int(dropped.sum()),
        "recall": hits / mixed_in,
        "auc": auc(positive, negative),
        "average_precision": average_precision(positive, negative),
    }
