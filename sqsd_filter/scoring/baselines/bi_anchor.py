"""Bidirectional anchoring by gradients, of "What is in Your Safe Data? Identifying Benign Data that Breaks Safety" (He,
Xia, Henderson; COLM 2024; arXiv 2404.01099).

    risk(z) = <g(z)/‖g(z)‖, u> - <g(z)/‖g(z)‖, s>,      u = mean of g(a)/‖g(a)‖ over the unsafe anchors a, s of the safe

An anchor's g is that of the loss on the first 10 tokens of its answer, which tell whether it complies; a row's is that
of its whole answer. The values are the two similarities, `unsafe` and `safe`.

Departures: g is that of the LoRA matrices at the pack's state (see `gradients`), the paper's that of all weights of the
aligned model; there is one set of safe anchors, where the authors' scripts subtract the similarities to two.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from sqsd_filter.scoring.baselines.base import AnchoredScorer, finite, over_anchors
from sqsd_filter.scoring.baselines.gradients import STATE, GradientEngine
from sqsd_filter.scoring.chat_encoder import Encoded

FIRST = 10  # tokens of an anchor's answer


class BiAnchorEngine(GradientEngine):
    """Gradients held to the mean ones of the anchors."""

    def __init__(self, model: Any, scorer: BiAnchorScorer) -> None:
        super().__init__(model, scorer)
        means = [self._mean(scorer, [first_tokens(row) for row in rows]) for rows in scorer.encoded_anchors()]
        self.capture.towards(STATE, means)

    def _mean(self, scorer: BiAnchorScorer, rows: Sequence[Encoded]) -> list[Any]:
        """The mean of the anchors' unit gradients, by two passes: one for their norms, one for the weighted sum."""
        total: list[Any] = []

        def run(members: list[int]) -> None:
            some = [rows[k] for k in members]
            weight_b = inverse_b(finite(self.products(some)[1])) / len(rows)
            found = self.summed(some, weight_b)
            sums = [f if t is None else (t[0] + f[0], t[1] + f[1]) for t, f in zip(total or found, found, strict=True)]
            total[:] = sums if total else found

        over_anchors(self, scorer, rows, run)
        return total

    def project(self, rows: Sequence[Encoded]) -> np.ndarray:
        """The similarities to the unsafe and the safe anchors: (b, 2)."""
        dots_bp, norms2_b = self.products(rows)
        return (dots_bp * inverse_b(norms2_b)[:, None]).numpy()


def inverse_b(norms2_b: torch.Tensor) -> torch.Tensor:
    """1/‖g‖, 0 where that is 0."""
    return torch.where(norms2_b == 0, 0, norms2_b.rsqrt())


def first_tokens(row: Encoded) -> Encoded:
    """The row with no more than the first tokens of its answer supervised."""
    return replace(row, answer=row.answer & (row.answer.cumsum() <= FIRST))


class BiAnchorScorer(AnchoredScorer):
    """Gradient similarity to unsafe anchors minus that to safe ones."""

    name = "bi-anchor"
    plus, minus = ("unsafe",), ("safe",)
    engine_type = BiAnchorEngine
