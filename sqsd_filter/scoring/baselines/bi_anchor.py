"""Bidirectional anchoring by gradients, of "What is in Your Safe Data? Identifying Benign Data that Breaks Safety" (He,
Xia, Henderson; COLM 2024; arXiv 2404.01099).

    risk(z) = <g(z)/‖g(z)‖, u> - <g(z)/‖g(z)‖, s>,      u = mean of g(a)/‖g(a)‖ over the unsafe anchors a, s of the safe

An anchor's g is that of the loss on the first 10 tokens of its answer, which show whether it complies; a row's g is
that of its whole answer. The values are the two similarities, `unsafe` and `safe`.

Departures: g is the gradient of the LoRA matrices at the pack's state (see `gradients`), the paper's that of all
parameters of the aligned model. There is one set of safe anchors; the authors' scripts subtract the similarities to
two.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from sqsd_filter.scoring.baselines.base import AnchoredScorer, finite, over_anchors
from sqsd_filter.scoring.baselines.gradients import STATE, GradientModel, Pair
from sqsd_filter.scoring.chat_encoder import Encoded, cut_answer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FIRST = 10  # tokens of an anchor's answer


class BiAnchorModel(GradientModel):
    """Similarities of gradients to the anchors' mean gradients."""

    def __init__(self, model: PreTrainedModel, scorer: BiAnchorScorer) -> None:
        super().__init__(model, scorer)
        means = [self._mean(scorer, [cut_answer(row, FIRST) for row in rows]) for rows in scorer.encoded_anchors()]
        self.capture.towards(STATE, means)

    def _mean(self, scorer: BiAnchorScorer, rows: Sequence[Encoded]) -> dict[int, Pair]:
        """The mean of the anchors' unit gradients, in two passes: one for the norms, one for the weighted sum."""
        total: dict[int, Pair] = {}

        def run(members: list[int]) -> None:
            some = [rows[k] for k in members]
            weight_b = inverse_norms(finite(self.products(some)[1])) / len(rows)
            sums: dict[int, Pair] = {}
            for group, (A_ri, B_ro) in self.summed(some, weight_b).items():
                A0_ri, B0_ro = total.get(group, (0, 0))
                sums[group] = A_ri + A0_ri, B_ro + B0_ro
            total.update(sums)  # at once: if memory runs out before, the halves are added instead

        over_anchors(self, scorer, rows, run)
        return total

    def project(self, rows: Sequence[Encoded]) -> np.ndarray:
        """The similarities to the unsafe and the safe anchors: (b, 2)."""
        dots_bp, norms2_b = self.products(rows)
        return (dots_bp * inverse_norms(norms2_b)[:, None]).numpy()


def inverse_norms(norms2_b: torch.Tensor) -> torch.Tensor:
    """1/‖g‖, 0 where that is 0."""
    return torch.where(norms2_b == 0, 0, norms2_b.rsqrt())


class BiAnchorScorer(AnchoredScorer):
    """Gradient similarity to unsafe anchors minus that to safe ones."""

    name = "bi-anchor"
    plus, minus = ("unsafe",), ("safe",)
    model_type = BiAnchorModel
