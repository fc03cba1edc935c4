"""SQSD (arXiv 2605.04572) with a part of it left out, as in the paper's ablations.

- `danger`: the pack's probes of danger alone, risk = Σ weight · Σ_m cos_m over probes of positive weight.
- `safety`: those of safety alone, of negative weight: the risk is minus the safety projection.
- `unnormalised`: risk = Σ weight · Σ_m <ΔW_m, V_m>, neither norm divided out. ΔW is the update by the *mean* loss of
  the answer's tokens, the loss of one training step on the row; with the sum in its place every value would grow with
  the answer's length. V keeps its own norm: a longer direction counts more, as do modules where updates are large.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from sqsd_filter.scoring.baselines.base import Baseline
from sqsd_filter.scoring.chat_encoder import Encoded
from sqsd_filter.scoring.engine import SQSDModel
from sqsd_filter.scoring.scorer import SQSDScorer


class DangerScorer(SQSDScorer):
    """SQSD with the danger projections alone."""

    name = "danger"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Raises `UsageError` where the pack has no such probe."""
        super().__init__(*args, **kwargs)
        self.pack = self.pack.of_sign(1)


class SafetyScorer(SQSDScorer):
    """SQSD with the safety projections alone."""

    name = "safety"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Raises `UsageError` where the pack has no such probe."""
        super().__init__(*args, **kwargs)
        self.pack = self.pack.of_sign(-1)


class UnnormalisedEngine(SQSDModel):
    """The inner products in the place of the cosines."""

    def project(self, rows: Sequence[Encoded]) -> np.ndarray:
        """Σ_m <ΔW_m, V_m> of the mean loss, for each row and probe: (b, probes)."""
        out = np.empty((len(rows), len(self.probes)))
        for at in self._passes(rows):
            out[:, self.members[at]] = self.capture.products()[0].double().sum(-1).cpu().numpy()
        return out / np.array([[row.answer.sum()] for row in rows])


class UnnormalisedScorer(Baseline):
    """SQSD's inner products without the per-module normalisation."""

    name = "unnormalised"
    engine_type = UnnormalisedEngine

    @property
    def weights(self) -> dict[str, float]:
        return {p.name: p.weight for p in self.pack.probes}

    @property
    def passes(self) -> int:
        return len({p.at for p in self.pack.probes})
