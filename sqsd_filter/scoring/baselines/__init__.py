"""Other published row scorers behind the interface of SQSD's: the same tokens, batches, statuses and stores.

A scorer's risk is higher where a row is to be dropped first. Each module cites its paper, with the formula and where
this form departs from it. Nothing heavy is imported before a scorer is made.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any

from sqsd_filter.errors import UsageError

if TYPE_CHECKING:
    from pathlib import Path

    from sqsd_filter.corpus.conversation import Message
    from sqsd_filter.scoring.pack import Pack
    from sqsd_filter.scoring.scorer import BatchedScorer

SCORERS = {
    "sqsd": "scorer.SQSDScorer",
    "danger": "baselines.ablations.DangerScorer",
    "safety": "baselines.ablations.SafetyScorer",
    "unnormalised": "baselines.ablations.UnnormalisedScorer",
    "random": "baselines.plain.RandomScorer",
    "length": "baselines.plain.LengthScorer",
    "loss": "baselines.loss.LossScorer",
    "self-inf-n": "baselines.self_inf_n.SelfInfNScorer",
    "bi-anchor": "baselines.bi_anchor.BiAnchorScorer",
    "larf": "baselines.larf.LARFScorer",
    "datashield": "baselines.datashield.DataShieldScorer",
}
ANCHORED = ("bi-anchor", "larf", "datashield")  # these compare rows with unsafe and safe ones
MEANT_FOR = {"unsafe_anchors": ANCHORED, "safe_anchors": ANCHORED, "seed": ("random",)}


def make_scorer(
    name: str,
    pack: str | Path | Pack,
    *,
    unsafe_anchors: Sequence[Sequence[Message]] | None = None,
    safe_anchors: Sequence[Sequence[Message]] | None = None,
    seed: int | None = None,
    **settings: Any,
) -> BatchedScorer:
    """The scorer of that name, for `filter_dataset(scorer=...)` and the like; `settings` are those of `SQSDScorer`.

    The anchors, conversations whose answers are unsafe and safe, are for bi-anchor, larf and datashield, which need
    both; the `seed` (0) is for random. Raises `UsageError` for an unknown name, for anchors that are missing, and for
    settings that such a scorer has no use for.
    """
    if name not in SCORERS:
        raise UsageError(f"There is no scorer '{name}': choose one of {', '.join(SCORERS)}.")
    if name in ANCHORED:
        settings |= {"unsafe_anchors": unsafe_anchors or (), "safe_anchors": safe_anchors or ()}
    elif unsafe_anchors is not None or safe_anchors is not None:
        raise UsageError(f"The scorer {name} has no use for anchors: leave them out, or choose {', '.join(ANCHORED)}.")
    if name == "random":
        settings["seed"] = seed or 0
    elif seed is not None:
        raise UsageError(f"The scorer {name} has no use for a seed: leave it out, or choose random.")
    if settings.pop("per_module", False):
        if name not in ("sqsd", "danger", "safety"):
            raise UsageError(f"The scorer {name} has no cosine at each module: leave out --per-module.")
        settings["per_module"] = True
    module, _, kind = SCORERS[name].rpartition(".")
    scorer: BatchedScorer = getattr(import_module(f"sqsd_filter.scoring.{module}"), kind)(pack, **settings)
    return scorer
