"""The mean loss of the answer.

    risk(z) = -1/n Σ_t log p(a_t | prompt, a_<t)      over the answer's n tokens, in nats

Its exp, the perplexity, ranks rows in the same order. The model is the pack's base model with its base adapter, if it
has one; no state is added.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from sqsd_filter.scoring.baselines.base import Baseline, answer_tokens
from sqsd_filter.scoring.batching import next_tokens
from sqsd_filter.scoring.chat_encoder import Encoded
from sqsd_filter.scoring.loss_gradient import LossGradient
from sqsd_filter.scoring.scoring_model import ModelSettings, ScoringModel

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class LossModel(ScoringModel):
    """Forward passes only."""

    def __init__(self, model: PreTrainedModel, settings: ModelSettings) -> None:
        super().__init__(model, settings)
        self.gradient = LossGradient(model)

    def project(self, rows: Sequence[Encoded]) -> np.ndarray:
        """The mean cross entropy (b, 1)."""
        losses_b = self.gradient.losses(*next_tokens(rows, self.gradient.device)).cpu().numpy()
        values: np.ndarray = (losses_b / answer_tokens(rows))[:, None]
        return values


class LossScorer(Baseline):
    """Mean cross entropy of the answer's tokens."""

    name = "loss"
    plus = ("loss",)
    model_type = LossModel
