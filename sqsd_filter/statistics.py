"""Statistics that several rooms use: ranks, rank correlation, AUC and the interval of a share."""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np

_Z = NormalDist().inv_cdf(0.975)


def ranks(values_n: np.ndarray) -> np.ndarray:
    """The rank (n,) of each value (n,), from 1 for the lowest; equal values share the mean of their ranks."""
    _, which, counts = np.unique(values_n, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[which]


def spearman(a_n: np.ndarray, b_n: np.ndarray) -> float | None:
    """Spearman's rank correlation of two samples (n,); None if all values of either are equal."""
    a, b = (ranks(values) - (len(values) + 1) / 2 for values in (a_n, b_n))
    scale = np.sqrt((a @ a) * (b @ b))
    return float(a @ b / scale) if scale > 0 else None


def auc(positive: np.ndarray, negative: np.ndarray) -> float:
    """The probability that a positive value (n,) is above a negative one (m,), the area under the ROC curve; ties count
    half."""
    n, m = len(positive), len(negative)
    among = ranks(np.concatenate([positive, negative]))[:n]
    return float((among.sum() - n * (n + 1) / 2) / (n * m))


def wilson(hits: int, of: int) -> tuple[float, float]:
    """Wilson's 95 % score interval of the share `hits / of`, for `of` ≥ 1 independent trials."""
    share, z2 = hits / of, _Z * _Z / of
    middle = (share + z2 / 2) / (1 + z2)
    half = _Z * math.sqrt(share * (1 - share) / of + z2 / (4 * of)) / (1 + z2)
    return max(0.0, middle - half), min(1.0, middle + half)
