"""LARF, of "Layer-Aware Representation Filtering: Purifying Finetuning Data to Preserve LLM Safety Alignment" (Li, Li,
Lu, Wei, Li, Shao, Sha; EMNLP 2025; arXiv 2507.18631).

With h(z) the hidden state of the last token at a safety-sensitive layer,

    risk(z) = mean of cos(h(z), h(a)) over the unsafe anchors a - that over the safe ones.

A mean of cosines is the inner product with the mean of the unit vectors, so only that mean is kept. The values are the
two means, `unsafe` and `safe`.

Departures: the authors find the layer by scaling the tensors of each in turn and counting how many borderline prompts
the model then refuses. Here it is the layer that separates the anchors best (see `hidden`), which needs no generation.
The last token is the one that ends the answer, even where a template adds more.
"""

from __future__ import annotations

import numpy as np
import torch

from sqsd_filter.scoring.baselines.base import AnchoredScorer
from sqsd_filter.scoring.baselines.hidden import HiddenStateModel


class LARFModel(HiddenStateModel):
    """Unit vectors of the last token's state."""

    def read(self, hidden_bth: torch.Tensor, answer_bt: torch.Tensor) -> torch.Tensor:
        last_bh = torch.stack([own[mask.nonzero()[-1, 0]] for own, mask in zip(hidden_bth, answer_bt, strict=True)])
        return torch.nn.functional.normalize(last_bh, dim=-1)

    read_anchor = read

    def vectors(self, unsafe_nh: np.ndarray, safe_nh: np.ndarray) -> np.ndarray:
        return np.stack([unsafe_nh.mean(0), safe_nh.mean(0)])


class LARFScorer(AnchoredScorer):
    """Similarity of the last token's state to unsafe anchors minus that to safe ones."""

    name = "larf"
    plus, minus = ("unsafe",), ("safe",)
    model_type = LARFModel
