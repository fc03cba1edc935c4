"""Self-Inf-N, of "Benign Samples Matter! Fine-tuning On Outlier Benign Samples Severely Breaks Safety" (Guan, Hu, Zhu,
Li, Vullikanti; ICML 2025; arXiv 2505.06843).

A row's self-influence is the squared norm of its own gradient. Short answers have larger ones, which the logarithm of
the answer's length balances:

    risk(z) = log(‖g(z)‖² + 1) + log(len(a) + 1)

with g the gradient of the mean loss of the answer's tokens. The values are the two terms.

Departures: g is the gradient of the LoRA matrices at the pack's state (see `gradients`), the paper's that of all
parameters of the aligned model, so the balance of the two terms differs. The token that ends an answer counts as one of
its tokens, since it is supervised.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sqsd_filter.scoring.baselines.base import Baseline, answer_tokens
from sqsd_filter.scoring.baselines.gradients import GradientModel
from sqsd_filter.scoring.chat_encoder import Encoded


class SelfInfNModel(GradientModel):
    """Squared gradient norms."""

    def project(self, rows: Sequence[Encoded]) -> np.ndarray:
        """The terms of self-influence and of length: (b, 2)."""
        tokens_b = answer_tokens(rows)
        influence_b = self.products(rows)[1].numpy() / tokens_b**2
        values: np.ndarray = np.log1p(np.stack([influence_b, tokens_b], axis=1))
        return values


class SelfInfNScorer(Baseline):
    """Self-influence, normalised by length."""

    name = "self-inf-n"
    plus = ("log_self_influence", "log_length")
    model_type = SelfInfNModel
