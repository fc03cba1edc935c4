"""The two that every score has to beat, which ask no model: chance, and the length of the answer."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from sqsd_filter.scoring.baselines.base import Baseline
from sqsd_filter.scoring.chat_encoder import Encoded


class NoModel:
    """Stands where an engine would, and asks a row's tokens alone."""

    workers = 0
    default_budget = 1 << 20  # tokens; nothing is padded

    def __init__(self, value: Callable[[Encoded], float]) -> None:
        self._value = value

    def project(self, rows: Sequence[Encoded]) -> np.ndarray:
        """(b, 1)."""
        return np.array([[self._value(row)] for row in rows])


class PlainScorer(Baseline):
    """A baseline that loads no model, but the tokenizer."""

    @property
    def passes(self) -> int:
        return 0

    def _load(self) -> NoModel:
        return NoModel(self.value)

    def value(self, row: Encoded) -> float:
        """The risk of one row."""
        raise NotImplementedError


class RandomScorer(PlainScorer):
    """A number in [0, 1) from a hash of the seed and the row's tokens: equal rows get the same, wherever they stand."""

    name = "random"
    plus = ("random",)

    def __init__(self, *args: Any, seed: int = 0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.seed = seed

    def settings(self) -> dict[str, Any]:
        return super().settings() | {"seed": self.seed}

    def value(self, row: Encoded) -> float:
        digest = hashlib.blake2b(b"%d " % self.seed, digest_size=8)
        digest.update(row.ids.astype("<i8").tobytes() + row.answer.tobytes())
        return (int.from_bytes(digest.digest(), "little") >> 11) / (1 << 53)


class LengthScorer(PlainScorer):
    """The number of the answer's tokens, those that end its turns among them."""

    name = "length"
    plus = ("length",)

    def value(self, row: Encoded) -> float:
        return float(row.answer.sum())
