"""The rows that models are fine-tuned on: windows of equal size along the risk, and the two sides of a cut."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from sqsd_filter.errors import UsageError

CUT_ARMS = ALL, KEPT, RANDOM, DROPPED = "all", "kept", "random", "dropped"


@dataclass(frozen=True)
class TrainingSet:
    """Rows of the corpus to learn from, ascending, and how many answer tokens of each (n,)."""

    rows: np.ndarray
    tokens: np.ndarray

    @classmethod
    def of(cls, rows: np.ndarray, tokens: np.ndarray) -> TrainingSet:
        """These rows, with all of their answers; `tokens` are those of every row of the corpus."""
        rows = np.sort(rows)
        return cls(rows, tokens[rows])

    @property
    def total(self) -> int:
        """Answer tokens of all rows."""
        return int(self.tokens.sum())

    def key(self, seed: int) -> str:
        """16 hex digits, equal where training gives the same."""
        digest = hashlib.blake2b(f"{seed} {len(self.rows)}".encode(), digest_size=8)
        for values in (self.rows, self.tokens):
            digest.update(values.astype("<i8").tobytes())
        return digest.hexdigest()


def by_risk(risk: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """The `rows` (ascending) by the `risk` of all, highest first, equal risks in row order."""
    return rows[np.argsort(-risk[rows], kind="stable")]


def windows(ranked: np.ndarray, count: int, size: int) -> list[np.ndarray]:
    """`count` ≥ 2 runs of `size` ranked rows: the first ones, the last ones and equally spaced ones between them.

    Window k begins at k (n - size) / (count - 1), rounded down, so that the gaps differ by one row at most. Raises
    `UsageError` where they would overlap.
    """
    n = len(ranked)
    if count * size > n:
        raise UsageError(
            f"{count} windows of {size:,} rows are {count * size:,} rows, but only {n:,} can be learned from: ask for "
            "smaller windows (--size) or fewer (--windows)."
        )
    starts = [k * (n - size) // (count - 1) for k in range(count)]
    return [ranked[start : start + size] for start in starts]


def match_tokens(sets: Sequence[TrainingSet]) -> list[TrainingSet]:
    """The sets with as many answer tokens in each as in the one that has fewest: answers are cut, no row goes.

    In each set all answers are cut at one length, and the tokens that are still missing go one each to the first of the
    rows that were cut.
    """
    aim = min(each.total for each in sets)
    return [TrainingSet(each.rows, _cut(each.tokens, aim)) for each in sets]


def _cut(tokens: np.ndarray, aim: int) -> np.ndarray:
    """min(tokens, c) (n,) for the largest c whose sum is within `aim`, with one more for the first few it cuts."""
    low, high = 0, int(tokens.max())
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if np.minimum(tokens, middle).sum() <= aim else (low, middle - 1)
    cut = np.minimum(tokens, low)
    longer = np.flatnonzero(tokens > low)[: aim - int(cut.sum())]
    cut[longer] += 1
    return cut


def cut_sets(ranked: np.ndarray, share: Fraction, seed: int) -> Mapping[str, np.ndarray]:
    """The arms of a cut that drops ceil(share · n) of the n ranked rows: all of them, the rest (`kept`), a random
    choice of as many as the rest, and the dropped rows alone."""
    dropped, kept = np.split(ranked, [math.ceil(share * len(ranked))])
    chosen = np.random.default_rng(seed).choice(np.sort(ranked), len(kept), replace=False)
    return dict(zip(CUT_ARMS, (ranked, kept, chosen, dropped), strict=True))
