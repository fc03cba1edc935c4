"""Hidden states of the pack's base model (with its base adapter, if it has one) at one layer, compared with vectors
computed from the anchors.

The layer is the one that separates the two kinds of anchors best, by DataShield's compliance-aware score. Each
dimension of all anchors' readings is standardised, and they are projected on the difference v between the two kinds'
means. The score is the share of the variance that lies between the kinds,

    CAS = vᵀ S_b v / vᵀ S_t v.

Layers are numbered like the hidden states of transformers: layer l is the output of block l, the last one normalised.
"""

from __future__ import annotations

from collections.abc import Sequence
from threading import Lock
from typing import TYPE_CHECKING

import numpy as np
import torch

from sqsd_filter.scoring.baselines.base import AnchoredScorer, finite, over_anchors
from sqsd_filter.scoring.chat_encoder import Encoded
from sqsd_filter.scoring.models import input_device
from sqsd_filter.scoring.scoring_model import ScoringModel

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class HiddenStateModel(ScoringModel):
    """Forward passes only. A subclass reads a vector from a row's hidden states (b, t, h), and computes the vectors to
    compare it with from the anchors' readings."""

    def __init__(self, model: PreTrainedModel, scorer: AnchoredScorer) -> None:
        super().__init__(model, scorer)
        self.model = model
        self._lock = Lock()
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
        hidden, answer_bt = self._hidden(rows)
        reading_bh = self.read(exact(hidden[self.layer]), answer_bt.to(hidden[self.layer].device))
        products: np.ndarray = (reading_bh.cpu().double() @ self.vectors_vh.T).numpy()
        return products

    def _read_anchors(self, scorer: AnchoredScorer, rows: Sequence[Encoded]) -> np.ndarray:
        """(l, n, h) float64: the anchors' readings at every layer but the embedding."""
        readings: dict[int, np.ndarray] = {}

        def run(members: list[int]) -> None:
            hidden, answer_bt = self._hidden([rows[k] for k in members])
            read = [self.read_anchor(exact(h), answer_bt.to(h.device)).cpu().double() for h in hidden[1:]]
            readings.update(zip(members, finite(torch.stack(read, dim=1)).numpy(), strict=True))

        over_anchors(self, scorer, rows, run)
        return np.stack([readings[k] for k in range(len(rows))], axis=1)

    def _hidden(self, rows: Sequence[Encoded]) -> tuple[Sequence[torch.Tensor], torch.Tensor]:
        """The hidden states (b, t, h) of every layer and the answer mask (b, t), up to the last answer token."""
        ids_bt, answer_bt = whole(rows, input_device(self.model))
        with self._lock, torch.no_grad():  # some versions of transformers record the states in the model's own methods
            output = self.model.base_model(input_ids=ids_bt, use_cache=False, output_hidden_states=True)
        hidden_states: Sequence[torch.Tensor] = output.hidden_states
        return hidden_states, answer_bt


def whole(rows: Sequence[Encoded], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Right-padded inputs and answer masks (b, t) of all tokens up to the last one of the answer."""
    ends = [int(np.flatnonzero(row.answer)[-1]) + 1 for row in rows]

    def padded(sides: Sequence[np.ndarray]) -> torch.Tensor:
        cut = [torch.from_numpy(side[:end]) for side, end in zip(sides, ends, strict=True)]
        return torch.nn.utils.rnn.pad_sequence(cut, batch_first=True).to(device)

    return padded([row.ids for row in rows]), padded([row.answer for row in rows])


def exact(hidden_bth: torch.Tensor) -> torch.Tensor:
    """In float32 at least."""
    return hidden_bth.to(torch.promote_types(hidden_bth.dtype, torch.float32))


def answer_mean(hidden_bth: torch.Tensor, answer_bt: torch.Tensor) -> torch.Tensor:
    """(b, h): the mean over the answer's tokens. Pads never enter, whatever they hold."""
    return torch.stack([own[mask].mean(0) for own, mask in zip(hidden_bth, answer_bt, strict=True)])


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
