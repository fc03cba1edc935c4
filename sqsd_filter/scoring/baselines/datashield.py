"""DataShield, of "DataShield: Safety-degrading Data Filtering for LLM Benign Instruction Fine-Tuning" (Zhang, Zhou,
Deng, Jiang, Pan, Zhu; arXiv 2606.00160).

The compliance vector is the difference between the mean states of answers that comply with harmful prompts and of
answers that refuse, here the unsafe and the safe anchors:

    v = mean of h̄(a) over the unsafe anchors a - that over the safe ones,      h̄ the mean state of the answer's tokens
    risk(z) = < h̄(z) - h_p(z), v > / ‖v‖                                       h_p the state of the prompt's last token

at the layer with the highest compliance-aware score (see `hidden`). The value is `shift`.

Departures: the layer's score uses the same anchors and states h̄; the authors' scripts use other pairs of answers and
the states of their last tokens. The token that ends an answer counts as one of its tokens. In a conversation with
several answers, h̄ is the mean over all of them, and h_p is the state before the first.
"""

from __future__ import annotations

import numpy as np
import torch

from sqsd_filter.scoring.baselines.base import AnchoredScorer
from sqsd_filter.scoring.baselines.hidden import HiddenStateModel, unit
from sqsd_filter.scoring.hidden_states import answer_mean


class DataShieldModel(HiddenStateModel):
    """Shifts from the prompt to the answer along the compliance vector."""

    def read_anchor(self, hidden_bth: torch.Tensor, answer_bt: torch.Tensor) -> torch.Tensor:
        return answer_mean(hidden_bth, answer_bt)

    def read(self, hidden_bth: torch.Tensor, answer_bt: torch.Tensor) -> torch.Tensor:
        before_b = answer_bt.int().argmax(-1) - 1  # the first token of a row is never supervised
        prompt_bh = torch.stack([own[k] for own, k in zip(hidden_bth, before_b.tolist(), strict=True)])
        return answer_mean(hidden_bth, answer_bt) - prompt_bh

    def vectors(self, unsafe_nh: np.ndarray, safe_nh: np.ndarray) -> np.ndarray:
        return unit(unsafe_nh.mean(0) - safe_nh.mean(0))[None]


class DataShieldScorer(AnchoredScorer):
    """How far the answer's states lie from the prompt's along the compliance vector."""

    name = "datashield"
    plus = ("shift",)
    model_type = DataShieldModel
