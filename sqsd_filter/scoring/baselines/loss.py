"""How unexpected the answer is to the model.

    risk(z) = -1/n Σ_t log p(a_t | prompt, a_<t)      over the answer's n tokens, in nats

The perplexity is its exp, and ranks rows alike. The model is the pack's base model with its base adapter, if it has
one; no state is added.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from sqsd_filter.scoring.baselines.base import Baseline, answer_tokens
from sqsd_filter.scoring.batching import next_tokens
from sqsd_filter.scoring.chat_encoder import Encoded
from sqsd_filter.scoring.engine import LossGradient, ModelEngine


class LossEngine(ModelEngine):
    """Forward passes only."""

    def __init__(self, model: Any, scorer: LossScorer) -> None:
        super().__init__(model, scorer)
        self.gradient = LossGradient(model)

    def project(self, rows: Sequence[Encoded]) -> np.ndarray:
        """The mean cross entropy (b, 1)."""
        losses_b = self.gradient.losses(*next_tokens(rows, self.gradient.device)).cpu().numpy()
        return (losses_b / answer_tokens(rows))[:, None]


class LossScorer(Baseline):
    """Mean cross entropy of the answer's tokens."""

    name = "loss"
    plus = ("loss",)
    engine_type = LossEngine
