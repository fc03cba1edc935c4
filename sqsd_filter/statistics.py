"""Statistics that several rooms use: ranks, rank correlation, AUC, the interval of a share, and how sure a mean over
seeds and prompts is."""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import NamedTuple

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


class Sureness(NamedTuple):
    """The standard error of a mean, and the degrees of freedom of Student's t that go with it."""

    error: float
    freedom: float

    @property
    def reach(self) -> float:
        """Half the width of the 95 % interval by Student's t."""
        return student(self.freedom) * self.error


def sureness(values_sp: np.ndarray) -> Sureness | None:
    """How sure the mean of values (s, p) is, of s seeds that each met the same p prompts; None for one value.

    Both are samples: a value is the mean + an effect of the seed + one of the prompt + a rest. With the mean squares of
    seeds, prompts and rest, the variance of the mean is (MS_s + MS_p - MS_r) / (s p), where neither of the first two is
    taken to be below MS_r, because no component of variance is negative. Its degrees of freedom are Satterthwaite's
    (Biometrics Bulletin 2, 1946; Hillis, Statistics in Medicine 26, 2007, does this for readers and cases), and never
    fewer than those of the seeds or prompts alone, whichever are fewer. With one seed only prompts vary, with one
    prompt only seeds.
    """
    seeds, prompts = values_sp.shape
    if min(seeds, prompts) == 1:
        count = max(seeds, prompts)
        return Sureness(math.sqrt(float(values_sp.var(ddof=1)) / count), count - 1) if count > 1 else None
    of_seeds_s1, of_prompts_1p = values_sp.mean(1, keepdims=True), values_sp.mean(0, keepdims=True)
    rest_sp = values_sp - of_seeds_s1 - of_prompts_1p + values_sp.mean()
    ms_r = float((rest_sp**2).sum()) / ((seeds - 1) * (prompts - 1))
    ms_s = max(ms_r, prompts * float(of_seeds_s1.var(ddof=1)))
    ms_p = max(ms_r, seeds * float(of_prompts_1p.var(ddof=1)))
    total = ms_s + ms_p - ms_r
    if total <= 0:
        return Sureness(0.0, seeds * prompts - 1)
    parts = ms_s**2 / (seeds - 1) + ms_p**2 / (prompts - 1) + ms_r**2 / ((seeds - 1) * (prompts - 1))
    return Sureness(math.sqrt(total / (seeds * prompts)), max(total**2 / parts, min(seeds, prompts) - 1))


def student(freedom: float) -> float:
    """The 97.5th percentile of Student's t with `freedom` >= 1 degrees of freedom, which need not be whole.

    With t = sqrt(freedom) tan(angle) its density is proportional to cos(angle)^(freedom - 1).
    """
    angles = np.linspace(0, math.atan(13 / math.sqrt(freedom)), 20_001)  # with one degree it is at 12.7
    density = np.exp((freedom - 1) * np.log(np.cos(angles)))
    density *= math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(math.pi)
    above_median = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2) * angles[1]])
    return math.sqrt(freedom) * math.tan(float(np.interp(0.475, above_median, angles)))
