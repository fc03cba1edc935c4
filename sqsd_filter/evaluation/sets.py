"""The rows that models are fine-tuned on: windows of equal size along the risk, and the two sides of a cut."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import get_args

import numpy as np

from sqsd_filter.errors import UsageError
from sqsd_filter.evaluation.results import Arm

CUT_ARMS: tuple[Arm, ...] = get_args(Arm)


@dataclass(frozen=True)
class TrainingSet:
    """Indices of the rows to learn from, ascending (n,), and how many answer tokens of each to learn from (n,)."""

    rows: np.ndarray
    tokens: np.ndarray

    @classmethod
    def of(cls, rows: np.ndarray, tokens: np.ndarray) -> TrainingSet:
        """These rows with their whole answers; `tokens` counts the answer tokens of every row of the corpus."""
        rows = np.sort(rows)
        return cls(rows, tokens[rows])

    @property
    def total(self) -> int:
        """Answer tokens of all rows."""
        return int(self.tokens.sum())

    def key(self, seed: int) -> str:
        """16 hex digits, equal for two sets and seeds exactly if training gives the same model."""
        digest = hashlib.blake2b(f"{seed} {len(self.rows)}".encode(), digest_size=8)
        for values in (self.rows, self.tokens):
            digest.update(values.astype("<i8").tobytes())
        return digest.hexdigest()


def by_risk(risk: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """The `rows` (ascending indices) sorted by `risk` (of all rows), highest first, equal risks in row order."""
    return rows[np.argsort(-risk[rows], kind="stable")]


def windows(ranked: np.ndarray, count: int, size: int) -> list[np.ndarray]:
    """`count` ≥ 2 windows of `size` ranked rows: the first rows, the last rows, and equally spaced windows between.

    Window k begins at k (n - size) / (count - 1), rounded down, so that the gaps differ by one row at most. Raises
    `UsageError` where they would overlap.
    """
    n = len(ranked)
    if count * size > n:
        raise UsageError(
            f"{count} windows of {size:,} rows are {count * size:,} rows, but only {n:,} can be learned from: choose "
            "smaller windows (--size) or fewer of them (--windows)."
        )
    starts = [k * (n - size) // (count - 1) for k in range(count)]
    return [ranked[start : start + size] for start in starts]


def match_tokens(sets: Sequence[TrainingSet]) -> list[TrainingSet]:
    """The sets cut to the number of answer tokens of the smallest one: answers get shorter, no row is lost.

    In each set all answers are cut at one length. The tokens still missing then go, one each, to the first rows that
    were cut.
    """
    target = min(each.total for each in sets)
    return [TrainingSet(each.rows, _cut(each.tokens, target)) for each in sets]


def _cut(tokens: np.ndarray, target: int) -> np.ndarray:
    """Token counts (n,) whose sum is `target`: min(tokens, c) for the largest c whose sum is at most `target`, and one
    more token for the first few rows cut."""
    low, high = 0, int(tokens.max())
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if np.minimum(tokens, middle).sum() <= target else (low, middle - 1)
    cut: np.ndarray = np.minimum(tokens, low)
    longer = np.flatnonzero(tokens > low)[: target - int(cut.sum())]
    cut[longer] += 1
    return cut


def cut_sets(ranked: np.ndarray, share: Fraction, seed: int) -> Mapping[Arm, np.ndarray]:
    """The arms of a cut that drops ceil(share · n) of the n ranked rows: `all` rows, the `kept` ones, as many `random`
    ones, and the `dropped` ones alone."""
    dropped, kept = np.split(ranked, [math.ceil(share * len(ranked))])
    chosen = np.random.default_rng(seed).choice(np.sort(ranked), len(kept), replace=False)
    return dict(zip(CUT_ARMS, (ranked, kept, chosen, dropped), strict=True))
