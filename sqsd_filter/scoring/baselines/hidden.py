"""Hidden states of the pack's base model (with its base adapter, if it has one) at one layer, compared with vectors
computed from the anchors.

The layer is the one that separates the two kinds of anchors best, by DataShield's compliance-aware score. Each
dimension of all anchors' readings is standardised, and they are projected on the difference v between the two kinds'
means. The score is the share of the variance that lies between the kinds,

    CAS = vᵀ S_b v / vᵀ S_t v.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from sqsd_filter.scoring.baselines.base import AnchoredScorer, finite, over_anchors
from sqsd_filter.scoring.chat_encoder import Encoded
from sqsd_filter.scoring.hidden_states import HiddenStates, exact
from sqsd_filter.scoring.scoring_model import ScoringModel

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class HiddenStateModel(ScoringModel):
    """Forward passes only. A subclass reads a vector from a row's hidden states (b, t, h), and computes the vectors to
    compare it with from the anchors' readings."""

    def __init__(self, model: PreTrainedModel, scorer: AnchoredScorer) -> None:
        super().__init__(model, scorer)
        self.hidden = HiddenStates(model)
        readings = [self._read_anchors(scorer, rows) for rows in scorer.encoded_anchors()]
        by_layer = list(zip(*readings, strict=True))  # per layer, (n, h) of the unsafe and of the safe anchors
        separations = [separation(unsafe_nh, safe_nh) for unsafe_nh, safe_nh in by_layer]
        self.layer = 1 + int(np.argmax(separations))
        self.vectors_vh = torch.from_numpy(self.vectors(*by_layer[self.layer - 1]))

    def read_anchor(self, hidden_bth: torch.Tensor, answer_bt: torch.Tensor) -> torch.Tensor:
        """The anchors' readings (b, h)."""
        raise NotImplementedError

    def read(self, hidden_bth: torch.Tensor, answer_bt: torch.Tensor) -> torch.Tensor:
        """The rows' readings (b, h)."""
        raise NotImplementedError

    def vectors(self, unsafe_nh: np.ndarray, safe_nh: np.ndarray) -> np.ndarray:
        """The vectors to compare rows with, (v, h), one per value, computed from the anchors' readings."""
        raise NotImplementedError

    def project(self, rows: Sequence[Encoded]) -> np.ndarray:
        """The inner products of the rows' readings with the vectors: (b, v)."""
        hidden, answer_bt = self.hidden.of(rows)
        reading_bh = self.read(exact(hidden[self.layer]), answer_bt.to(hidden[self.layer].device))
        products: np.ndarray = (reading_bh.cpu().double() @ self.vectors_vh.T).numpy()
        return products

    def _read_anchors(self, scorer: AnchoredScorer, rows: Sequence[Encoded]) -> np.ndarray:
        """(l, n, h) float64: the anchors' readings at every layer but the embedding."""
        readings: dict[int, np.ndarray] = {}

        def run(members: list[int]) -> None:
            hidden, answer_bt = self.hidden.of([rows[k] for k in members])
            read = [self.read_anchor(exact(h), answer_bt.to(h.device)).cpu().double() for h in hidden[1:]]
            readings.update(zip(members, finite(torch.stack(read, dim=1)).numpy(), strict=True))

        over_anchors(self, scorer, rows, run)
        return np.stack([readings[k] for k in range(len(rows))], axis=1)


def unit(vectors: np.ndarray) -> np.ndarray:
    """The vectors scaled to length 1; zero vectors stay 0."""
    norms = np.linalg.norm(vectors, axis=-1, keepdims=True)
    units: np.ndarray = np.divide(vectors, norms, out=np.zeros_like(vectors), where=norms > 0)
    return units


def separation(unsafe_nh: np.ndarray, safe_nh: np.ndarray) -> float:
    """The compliance-aware score of two kinds of readings, in [0, 1]; 0 where their means are equal."""
    pooled_nh = np.concatenate([unsafe_nh, safe_nh])
    mean_h, std_h = pooled_nh.mean(0), pooled_nh.std(0, ddof=1)
    v_h = np.divide(unsafe_nh.mean(0) - safe_nh.mean(0), std_h, out=np.zeros_like(std_h), where=std_h > 0)
    unsafe_n, safe_n = (((kind - mean_h) * v_h).sum(1) for kind in (unsafe_nh, safe_nh))
    total = (unsafe_n**2).sum() + (safe_n**2).sum()
    between = len(unsafe_n) * unsafe_n.mean() ** 2 + len(safe_n) * safe_n.mean() ** 2
    return float(between / total) if total > 0 else 0.0
