"""Ground truth without fine-tuning: known unsafe rows are mixed into benign ones; does the risk find them?

A draw is a bootstrap: it takes the n benign rows' number of them, with replacement, and as many prompts of the unsafe
rows as there are, with replacement, from whose rows it then mixes in round(p n / (1 - p)), with replacement, so that p
of the mix is unsafe. As many rows are dropped as were mixed in, which makes precision and recall one number; of equal
risks at the cut each is as likely to go, and the number is what is to be expected of that.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from sqsd_filter.evaluation.results import interval

RATES = (0.01, 0.05, 0.1, 0.2)
DRAWS = 200
DRAWN_AT = 0.05  # the share of unsafe rows for which precision is drawn
POINTS = 201  # of a curve, at most


def poisoned(
    benign: np.ndarray, unsafe: np.ndarray, prompts: np.ndarray, seed: int = 0, draws: int = DRAWS
) -> dict[str, Any]:
    """By rate: mean and 95 % interval over the draws of precision, recall, ROC-AUC and average precision, of benign
    risks (n,) and unsafe ones (m,), all finite, and the number (m,) of each unsafe row's prompt, from 0 on."""
    values, at = np.unique(-np.concatenate([benign, unsafe]), return_inverse=True)  # the riskiest first
    places = at[: len(benign)], at[len(benign) :]
    found: dict[str, Any] = {}
    for rate in RATES:
        mixed_in = max(1, round(rate * len(benign) / (1 - rate)))
        figures = [
            _draw(*places, prompts, len(values), mixed_in, np.random.default_rng([seed, k])) for k in range(draws)
        ]
        counts = {"benign": len(benign), "unsafe": mixed_in, "prompts": int(prompts.max()) + 1}
        found[str(rate)] = counts | {
            name: {"mean": float(each.mean()), "ci": interval(each)}
            for name, each in ((name, np.array([draw[name] for draw in figures])) for name in figures[0])
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


def _draw(
    benign: np.ndarray, unsafe: np.ndarray, prompts: np.ndarray, values: int, mixed_in: int, random: np.random.Generator
) -> dict[str, float]:
    """The figures of one draw, of the places of benign (n,) and unsafe rows (m,) among so many different risks."""
    n, count = len(benign), int(prompts.max()) + 1
    taken = random.multinomial(count, np.full(count, 1 / count))[prompts]
    mix = random.multinomial(mixed_in, taken / taken.sum())
    true_v = np.bincount(unsafe, mix, values)
    false_v = np.bincount(benign[random.integers(n, size=n)], minlength=values)
    true, false = np.cumsum(true_v), np.cumsum(false_v)
    edge = int(np.searchsorted(true + false, mixed_in))  # the risk at which the cut is
    above, tied = true + false - true_v - false_v, true_v + false_v
    hits = true[edge] - true_v[edge] * (1 - (mixed_in - above[edge]) / tied[edge])
    return {
        "precision": float(hits / mixed_in),
        "recall": float(hits / mixed_in),
        "auc": float(true_v @ (n - false + false_v / 2) / (n * mixed_in)),
        "average_precision": float(true_v @ (true / np.maximum(true + false, 1)) / mixed_in),
    }
