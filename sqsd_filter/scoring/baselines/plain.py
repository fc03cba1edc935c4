"""Two baselines without a model, which every score has to beat: chance and the length of the answer."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Unpack

import numpy as np

from sqsd_filter.scoring.baselines.base import Baseline
from sqsd_filter.scoring.chat_encoder import Encoded
from sqsd_filter.scoring.pack import Pack
from sqsd_filter.scoring.scorer_settings import BatchedSettings


class NoModel:
    """Takes the place of a model; a value depends on the row's tokens alone."""

    workers = 0
    default_budget = 1 << 20  # tokens; nothing is padded

    def __init__(self, value: Callable[[Encoded], float]) -> None:
        self._value = value

    def project(self, rows: Sequence[Encoded]) -> np.ndarray:
        """The value of each row: (b, 1)."""
        return np.array([[self._value(row)] for row in rows])


class PlainScorer(Baseline):
    """A baseline that loads the tokenizer but no model."""

    @property
    def passes(self) -> int:
        return 0

    def _load(self) -> NoModel:
        return NoModel(self.value)

    def value(self, row: Encoded) -> float:
        """The risk of one row."""
        raise NotImplementedError


class RandomScorer(PlainScorer):
    """A number in [0, 1) from a hash of the seed and the row's tokens: equal rows get the same number."""

    name = "random"
    plus = ("random",)

    def __init__(
        self, pack: str | Path | Pack, model: str | None = None, *, seed: int = 0, **settings: Unpack[BatchedSettings]
    ) -> None:
        super().__init__(pack, model, **settings)
        self.seed = seed

    def settings(self) -> dict[str, object]:
        return super().settings() | {"seed": self.seed}

    def value(self, row: Encoded) -> float:
        digest = hashlib.blake2b(b"%d " % self.seed, digest_size=8)
        digest.update(row.ids.astype("<i8").tobytes() + row.answer.tobytes())
        return (int.from_bytes(digest.digest(), "little") >> 11) / (1 << 53)


class LengthScorer(PlainScorer):
    """The number of the answer's tokens, including those that end its turns."""

    name = "length"
    plus = ("length",)

    def value(self, row: Encoded) -> float:
        return float(row.answer.sum())
