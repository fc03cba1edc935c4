"""What the baselines share: values that are no probes of the pack, and anchors: conversations that rows are held to."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch

from sqsd_filter.corpus.conversation import Message, RowError, conversation_key
from sqsd_filter.errors import InputError, UsageError, option
from sqsd_filter.scoring.batching import micro_batches, retry_in_halves
from sqsd_filter.scoring.chat_encoder import Encoded
from sqsd_filter.scoring.engine import ModelEngine, run_parallel
from sqsd_filter.scoring.scorer import BatchedScorer

KINDS = ("unsafe_anchors", "safe_anchors")


class Baseline(BatchedScorer):
    """A scorer with values of its own. Its class says what engine it runs on and which values make its risk."""

    plus: ClassVar[tuple[str, ...]]  # its values that add to the risk
    minus: ClassVar[tuple[str, ...]] = ()  # and those that are taken off it
    engine_type: ClassVar[type[ModelEngine]]

    @property
    def weights(self) -> dict[str, float]:
        return {**dict.fromkeys(self.plus, 1.0), **dict.fromkeys(self.minus, -1.0)}

    def _load(self) -> Any:
        return self.engine_type.load(self)


class AnchoredScorer(Baseline):
    """A baseline that compares rows with anchors: conversations with unsafe answers, and with safe ones.

    The papers' anchors are harmful prompts with answers that comply, and the same prompts with answers that refuse.
    They are held in memory, and each process that scores works them out for itself when its model is loaded.
    """

    def __init__(
        self,
        *args: Any,
        unsafe_anchors: Sequence[Sequence[Message]],
        safe_anchors: Sequence[Sequence[Message]],
        **kwargs: Any,
    ) -> None:
        """Raises `UsageError` where there are fewer than two of a kind, which tell no layer from another, or the same
        of both."""
        super().__init__(*args, **kwargs)
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

    def settings(self) -> dict[str, Any]:
        """As `BatchedScorer`, with what the anchors hold: with others, no score is the same."""
        return super().settings() | self.fingerprints

    def encoded_anchors(self) -> list[list[Encoded]]:
        """The unsafe and the safe anchors as the model sees them. Raises `InputError` for one that has no answer."""
        found = []
        for kind, turns in self.anchors.items():
            rows = []
            for k, row in enumerate(self.encoder.encode(turns)):
                if isinstance(row, RowError):
                    raise InputError(f"{option(kind)}: conversation {k + 1} is of no use ({row.status}). Leave it out.")
                rows.append(row)
            found.append(rows)
        return found


def over_anchors(
    engine: ModelEngine, scorer: AnchoredScorer, rows: Sequence[Encoded], run: Callable[[list[int]], None]
) -> None:
    """`run` the anchors of these numbers, a bin at a time and always in the same order.

    Raises `InputError` where one fails even alone.
    """

    def give_up(k: int, error: str) -> None:
        why = error or f"its {len(rows[k])} tokens don't fit into the device's memory"
        raise InputError(f"An anchor of the scorer {scorer.name} can't be used ({why}): leave it out.")

    work = micro_batches([len(row) for row in rows], scorer.token_budget or engine.default_budget)
    run_parallel(partial(retry_in_halves, run, give_up=give_up), work, min(1, engine.workers))


def finite(values: torch.Tensor) -> torch.Tensor:
    """The same. Raises `FloatingPointError` where they would make every score not finite."""
    if not torch.isfinite(values).all():
        raise FloatingPointError("what is read of it is not finite")
    return values


def answer_tokens(rows: Sequence[Encoded]) -> np.ndarray:
    """(b,) float64: how many tokens of each row are supervised, the one that ends a turn among them."""
    return np.array([row.answer.sum() for row in rows], dtype=np.float64)
