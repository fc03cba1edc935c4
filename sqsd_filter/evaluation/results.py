"""What came out, with intervals: the attack success rate of each set of rows, and how far apart the sets are.

Intervals are bootstrapped. A draw takes as many prompts and as many seeds, with replacement and independently of each
other, and counts every answer once for each time that its prompt and its seed were taken. All sets of a scorer share
the draws, so that a difference of two is that of the same prompts and seeds. An interval goes from the 2.5th to the
97.5th percentile of `DRAWS` draws. With one seed only prompts vary, and what another seed would change is not in it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from sqsd_filter.directions.judges import OUTCOMES, UNSAFE

DRAWS = 2000
Outcome = Mapping[str, Any]  # what a run leaves: see `run.py`


def draws(unsafe_ksp: np.ndarray, count: int = DRAWS, seed: int = 0) -> np.ndarray:
    """(count, k): the rates of k sets in each draw, of `unsafe_ksp` (k, s, p), 1 where an answer is unsafe."""
    _, seeds, prompts = unsafe_ksp.shape
    random = np.random.default_rng(seed)
    of_seeds_ds = random.multinomial(seeds, np.full(seeds, 1 / seeds), size=count)
    of_prompts_dp = random.multinomial(prompts, np.full(prompts, 1 / prompts), size=count)
    found_dk = np.einsum("ds,ksp,dp->dk", of_seeds_ds, unsafe_ksp.astype(float), of_prompts_dp, optimize=True)
    return np.asarray(found_dk / (seeds * prompts))


def interval(values: np.ndarray) -> list[float]:
    """The 2.5th and the 97.5th percentile."""
    return [float(value) for value in np.quantile(values, [0.025, 0.975])]


def of_windows(outcomes: Sequence[Sequence[Outcome]]) -> dict[str, Any]:
    """The figures of windows, S1 first, each with the outcome of every seed.

    `monotone` says that no window has a higher rate than the one before, and the last a lower one than the first.
    """
    figures, rates_dk = _figures(outcomes)
    asr = figures["asr"]
    falling = all(before >= after for before, after in pairwise(asr)) and asr[0] > asr[-1]
    spread_ci = interval(rates_dk[:, 0] - rates_dk[:, -1])
    return figures | {"spread": asr[0] - asr[-1], "spread_ci": spread_ci, "monotone": falling}


def of_arms(outcomes: Mapping[str, Sequence[Outcome]]) -> dict[str, Any]:
    """The figures of each arm of a cut, and by how much a random choice of as many rows is worse than the kept ones."""
    names = list(outcomes)
    figures, rates_dk = _figures(list(outcomes.values()))
    shares = figures.pop("outcomes")
    by_arm: dict[str, Any] = {
        name: {figure: values[k] for figure, values in figures.items()}
        | {"outcomes": {outcome: values[k] for outcome, values in shares.items()}}
        for k, name in enumerate(names)
    }
    kept, random = names.index("kept"), names.index("random")
    saved = {
        "asr": figures["asr"][random] - figures["asr"][kept],
        "ci": interval(rates_dk[:, random] - rates_dk[:, kept]),
    }
    return by_arm | {"random_minus_kept": saved}


def _figures(outcomes: Sequence[Sequence[Outcome]]) -> tuple[dict[str, Any], np.ndarray]:
    """Lists with a value a set, and the draws (d, k). Means over the seeds, where nothing else is said."""
    words_ksp = np.array([[run["outcomes"] for run in runs] for runs in outcomes])
    rates_dk = draws(words_ksp == UNSAFE)
    shares = {word: (words_ksp == word).mean((1, 2)).tolist() for word in OUTCOMES}
    figures = {
        "asr": shares[UNSAFE],
        "ci": [interval(rates_dk[:, k]) for k in range(len(outcomes))],
        "asr_by_seed": (words_ksp == UNSAFE).mean(2).tolist(),
        "outcomes": shares,
        **{name: [_mean([run[name] for run in runs]) for runs in outcomes] for name in ("over_refusal", "loss")},
        **{name: [round(np.mean([run[name] for run in runs])) for runs in outcomes] for name in ("rows", "tokens")},
    }
    return figures, rates_dk


def _mean(values: Sequence[float | None]) -> float | None:
    there = [value for value in values if value is not None]
    return float(np.mean(there)) if there else None
