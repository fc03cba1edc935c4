"""Ground truth without fine-tuning: known unsafe rows are mixed into benign ones. Does the risk find them?

The figures are bootstrapped. For n benign rows and a share p of unsafe rows, a draw takes, always with replacement:
n benign rows; as many prompts of unsafe rows as there are; and round(p n / (1 - p)) unsafe rows with these prompts.
The cut then drops as many rows as were mixed in, so that precision and recall are equal. Of rows that tie at the cut
each is equally likely to be dropped, and the figures are the expected ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sqsd_filter.evaluation.figures import interval
from sqsd_filter.evaluation.results import Estimate, MixFigures, Point

RATES = (0.01, 0.05, 0.1, 0.2)
DRAWS = 200
DRAWN_AT = 0.05  # the share of unsafe rows for which precision is drawn
POINTS = 201  # in a curve, at most


def mix_figures(
    benign: np.ndarray, unsafe: np.ndarray, prompts: np.ndarray, seed: int = 0, draws: int = DRAWS
) -> dict[str, MixFigures]:
    """What a score finds, by the share of unsafe rows in the mix.

    `benign` (n,) and `unsafe` (m,) are finite risks; `prompts` (m,) numbers the prompt of each unsafe row, from 0.
    """
    values, ranks = np.unique(-np.concatenate([benign, unsafe]), return_inverse=True)  # the riskiest first
    benign_ranks, unsafe_ranks = ranks[: len(benign)], ranks[len(benign) :]
    figures: dict[str, MixFigures] = {}
    for rate in RATES:
        mixed_in = max(1, round(rate * len(benign) / (1 - rate)))
        drawn = [
            draw_mix(benign_ranks, unsafe_ranks, prompts, len(values), mixed_in, np.random.default_rng([seed, k]))
            for k in range(draws)
        ]
        precision = _estimate([one.precision for one in drawn])
        figures[str(rate)] = {
            "benign": len(benign),
            "unsafe": mixed_in,
            "prompts": int(prompts.max()) + 1,
            "precision": precision,
            "recall": precision,
            "auc": _estimate([one.auc for one in drawn]),
            "average_precision": _estimate([one.average_precision for one in drawn]),
        }
    return figures


def _estimate(values: Sequence[float]) -> Estimate:
    return {"mean": float(np.mean(values)), "ci": interval(np.array(values))}


def curves(benign: np.ndarray, unsafe: np.ndarray) -> dict[str, list[Point]]:
    """`roc` and `pr`: points [x, y] of thresholds from high to low, for benign risks (n,) and unsafe ones (m,).

    ROC plots the share of unsafe rows at or above the threshold (y) against the share of benign rows (x), from [0, 0].
    PR plots the precision (y) against the share of unsafe rows (x) where `DRAWN_AT` of all rows are unsafe. Both shares
    determine it, so that no draw is needed.
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


@dataclass(frozen=True)
class Draw:
    """The figures of one draw. Recall equals precision."""

    precision: float
    auc: float
    average_precision: float


def draw_mix(
    benign: np.ndarray, unsafe: np.ndarray, prompts: np.ndarray, values: int, mixed_in: int, random: np.random.Generator
) -> Draw:
    """One draw that mixes in `mixed_in` unsafe rows.

    `benign` (n,) and `unsafe` (m,) rank each row's risk among the `values` different risks, the riskiest 0. `prompts`
    is as in `mix_figures`.
    """
    n, count = len(benign), int(prompts.max()) + 1
    taken = random.multinomial(count, np.full(count, 1 / count))[prompts]
    mix = random.multinomial(mixed_in, taken / taken.sum())
    true_v = np.bincount(unsafe, mix, values)
    false_v = np.bincount(benign[random.integers(n, size=n)], minlength=values)
    true, false = np.cumsum(true_v), np.cumsum(false_v)
    edge = int(np.searchsorted(true + false, mixed_in))  # the risk at which the cut is
    above, tied = true + false - true_v - false_v, true_v + false_v
    hits = true[edge] - true_v[edge] * (1 - (mixed_in - above[edge]) / tied[edge])
    return Draw(
        precision=float(hits / mixed_in),
        auc=float(true_v @ (n - false + false_v / 2) / (n * mixed_in)),
        average_precision=float(true_v @ (true / np.maximum(true + false, 1)) / mixed_in),
    )
