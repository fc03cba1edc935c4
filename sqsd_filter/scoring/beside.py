"""A model at the pack's states which reads linear probes as well, in further forward passes at none of these states."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from sqsd_filter.scoring.chat_encoder import Encoded
from sqsd_filter.scoring.linear_probe import LinearModel
from sqsd_filter.scoring.scoring_model import ModelSettings, SQSDModel

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class BesideModel(SQSDModel):
    """A loaded model at the pack's states, with the weights of the linear probes beside the pack's risk."""

    def __init__(self, model: PreTrainedModel, settings: ModelSettings) -> None:
        """Raises `PackError` where the weights of a linear probe can't be read or are those of another model."""
        super().__init__(model, settings)
        self.linear = [LinearModel(model, settings.with_pack(pack)) for pack in settings.pack.beside]

    def project(self, rows: Sequence[Encoded]) -> np.ndarray:
        """As `SQSDModel`, with the linear probes' values after those of the probes: (b, probes + linear + modules)."""
        values_bv = super().project(rows)
        self.capture.rest()
        read = [linear.project(rows) for linear in self.linear]
        return np.concatenate([values_bv[:, : len(self.probes)], *read, values_bv[:, len(self.probes) :]], axis=1)
