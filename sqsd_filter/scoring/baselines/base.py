"""The common part of the baselines: values of their own, and anchors, conversations that rows are compared with."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import ClassVar, Unpack

import numpy as np
import torch

from sqsd_filter.corpus.conversation import Message, RowError, conversation_key
from sqsd_filter.errors import InputError, UsageError, option
from sqsd_filter.scoring.batching import micro_batches, retry_in_halves, run_parallel
from sqsd_filter.scoring.chat_encoder import Encoded
from sqsd_filter.scoring.pack import Pack
from sqsd_filter.scoring.scorer import BatchedScorer, RowModel
from sqsd_filter.scoring.scorer_settings import BatchedSettings
from sqsd_filter.scoring.scoring_model import ScoringModel

KINDS = ("unsafe_anchors", "safe_anchors")


class Baseline(BatchedScorer):
    """A scorer with values of its own. Its class names the values of its risk and the type of its model."""

    plus: ClassVar[tuple[str, ...]]  # values that are added to the risk
    minus: ClassVar[tuple[str, ...]] = ()  # and those that are subtracted
    model_type: ClassVar[type[ScoringModel]]

    @property
    def weights(self) -> dict[str, float]:
        return {**dict.fromkeys(self.plus, 1.0), **dict.fromkeys(self.minus, -1.0)}

    def _load(self) -> RowModel:
        return self.model_type.load(self)


class AnchoredScorer(Baseline):
    """A baseline that compares rows with anchors: conversations with unsafe answers, and with safe ones.

    The papers' anchors are harmful prompts with answers that comply, and the same prompts with answers that refuse.
    They are kept in memory; each process that scores evaluates them when it loads its model.
    """

    def __init__(
        self,
        pack: str | Path | Pack,
        model: str | None = None,
        *,
        unsafe_anchors: Sequence[Sequence[Message]],
        safe_anchors: Sequence[Sequence[Message]],
        **settings: Unpack[BatchedSettings],
    ) -> None:
        """As `BatchedScorer`. Raises `UsageError` where either kind has fewer than two anchors, too few to choose a
        layer, or where both kinds are the same."""
        super().__init__(pack, model, **settings)
        self.anchors = dict(zip(KINDS, (list(unsafe_anchors), list(safe_anchors)), strict=True))
        if missing := [kind for kind, turns in self.anchors.items() if len(turns) < 2]:
            raise UsageError(
                f"The scorer {self.name} compares rows with unsafe and safe ones: give it two conversations or more by "
                f"{' and '.join(map(option, missing))}."
            )
        if len(set(self.fingerprints.values())) == 1:
            raise UsageError("The unsafe and the safe anchors are the same conversations: give different ones.")

    @property
    def fingerprints(self) -> dict[str, str]:
        """16 hex digits over the conversations of each kind, in their order."""
        keys = {kind: b"".join(map(conversation_key, turns)) for kind, turns in self.anchors.items()}
        return {kind: hashlib.blake2b(key, digest_size=8).hexdigest() for kind, key in keys.items()}

    def settings(self) -> dict[str, object]:
        """As `BatchedScorer`, with the anchors' fingerprints: other anchors give other scores."""
        return super().settings() | self.fingerprints

    def encoded_anchors(self) -> list[list[Encoded]]:
        """The tokens of the unsafe and of the safe anchors. Raises `InputError` for one that can't be scored."""
        encoded = []
        for kind, turns in self.anchors.items():
            rows = []
            for k, row in enumerate(self.encoder.encode(turns)):
                if isinstance(row, RowError):
                    raise InputError(
                        f"{option(kind)}: conversation {k + 1} can't be used ({row.status}): leave it out."
                    )
                rows.append(row)
            encoded.append(rows)
        return encoded


def over_anchors(
    model: ScoringModel, scorer: AnchoredScorer, rows: Sequence[Encoded], run: Callable[[list[int]], None]
) -> None:
    """Call `run` with the numbers of the anchors of each micro-batch, one after the other in a fixed order.

    Raises `InputError` where an anchor fails even alone.
    """

    def give_up(k: int, error: str) -> None:
        why = error or f"its {len(rows[k])} tokens don't fit into the device's memory"
        raise InputError(f"An anchor of the scorer {scorer.name} can't be used ({why}): leave it out.")

    work = micro_batches([len(row) for row in rows], scorer.token_budget or model.default_budget)
    run_parallel(partial(retry_in_halves, run, give_up=give_up), work, min(1, model.workers))


def finite(values: torch.Tensor) -> torch.Tensor:
    """The values unchanged. Raises `FloatingPointError` where one is not finite, as then no score would be finite."""
    if not torch.isfinite(values).all():
        raise FloatingPointError("its values are not finite")
    return values


def answer_tokens(rows: Sequence[Encoded]) -> np.ndarray:
    """(b,) float64: the number of supervised tokens of each row, including the one that ends a turn."""
    return np.array([row.answer.sum() for row in rows], dtype=np.float64)
