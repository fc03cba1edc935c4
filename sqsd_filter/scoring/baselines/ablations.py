"""SQSD (arXiv 2605.04572) without one of its parts, as in the paper's ablations.

- `danger`: only the pack's danger probes, risk = Σ weight · Σ_m cos_m over probes of positive weight.
- `safety`: only its safety probes, of negative weight: the risk is minus the safety projection.
- `unnormalised`: risk = Σ weight · Σ_m <ΔW_m, V_m>, not divided by either norm. ΔW is the update by the *mean* loss of
  the answer's tokens, the loss of one training step on the row; with the sum, every value would grow with the answer's
  length. V keeps its own norm: a longer direction counts more, as do modules where updates are large.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Unpack

import numpy as np

from sqsd_filter.errors import UsageError
from sqsd_filter.scoring.baselines.base import Baseline
from sqsd_filter.scoring.chat_encoder import Encoded
from sqsd_filter.scoring.pack import Pack
from sqsd_filter.scoring.scorer import SQSDScorer
from sqsd_filter.scoring.scorer_settings import BatchedSettings, SQSDSettings
from sqsd_filter.scoring.scoring_model import SQSDModel


class DangerScorer(SQSDScorer):
    """SQSD with the danger projections alone."""

    name = "danger"

    def __init__(self, pack: str | Path | Pack, model: str | None = None, **settings: Unpack[SQSDSettings]) -> None:
        """As `SQSDScorer`. Raises `UsageError` where the pack has no such probe."""
        super().__init__(pack, model, **settings)
        self.pack = self.pack.of_sign(1)


class SafetyScorer(SQSDScorer):
    """SQSD with the safety projections alone."""

    name = "safety"

    def __init__(self, pack: str | Path | Pack, model: str | None = None, **settings: Unpack[SQSDSettings]) -> None:
        """As `SQSDScorer`. Raises `UsageError` where the pack has no such probe."""
        super().__init__(pack, model, **settings)
        self.pack = self.pack.of_sign(-1)


class UnnormalisedModel(SQSDModel):
    """Inner products instead of cosines."""

    def project(self, rows: Sequence[Encoded]) -> np.ndarray:
        """Σ_m <ΔW_m, V_m> of the mean loss, for each row and probe: (b, probes)."""
        sums_bp = np.empty((len(rows), len(self.probes)))
        for at in self.run_passes(rows):
            sums_bp[:, self.members[at]] = self.capture.products()[0].double().sum(-1).cpu().numpy()
        values: np.ndarray = sums_bp / np.array([[row.answer.sum()] for row in rows])
        return values


class UnnormalisedScorer(Baseline):
    """SQSD's inner products without the per-module normalisation."""

    name = "unnormalised"
    model_type = UnnormalisedModel

    def __init__(self, pack: str | Path | Pack, model: str | None = None, **settings: Unpack[BatchedSettings]) -> None:
        """As `BatchedScorer`. Raises `UsageError` for a risk without projections."""
        super().__init__(pack, model, **settings)
        if self.pack.linear is not None:
            raise UsageError(f"The risk '{self.pack.risk}' has no projections to leave unnormalised: leave out --risk.")

    @property
    def weights(self) -> dict[str, float]:
        return {p.name: p.weight for p in self.pack.probes}

    @property
    def passes(self) -> int:
        return len({p.at for p in self.pack.probes})
