"""Other published row scorers with the interface of SQSD's: the same tokens, micro-batches, statuses and stores.

The rows with the highest risk are dropped first, whatever the scorer. Each module cites its paper, with the formula and
where this implementation departs from it. Scorers that are judges of answers are in the room above, `judges`. Nothing
heavy is imported before a scorer is made.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any, Unpack

from sqsd_filter.errors import UsageError

if TYPE_CHECKING:
    from pathlib import Path

    from sqsd_filter.corpus.conversation import Message
    from sqsd_filter.scoring.pack import Pack
    from sqsd_filter.scoring.scorer import BatchedScorer
    from sqsd_filter.scoring.scorer_settings import SQSDSettings

SCORERS = {
    "sqsd": "scoring.scorer.SQSDScorer",
    "danger": "scoring.baselines.ablations.DangerScorer",
    "safety": "scoring.baselines.ablations.SafetyScorer",
    "unnormalised": "scoring.baselines.ablations.UnnormalisedScorer",
    "random": "scoring.baselines.plain.RandomScorer",
    "length": "scoring.baselines.plain.LengthScorer",
    "loss": "scoring.baselines.loss.LossScorer",
    "self-inf-n": "scoring.baselines.self_inf_n.SelfInfNScorer",
    "bi-anchor": "scoring.baselines.bi_anchor.BiAnchorScorer",
    "larf": "scoring.baselines.larf.LARFScorer",
    "datashield": "scoring.baselines.datashield.DataShieldScorer",
}
JUDGED = {  # with the judge that the user names after the colon
    "guard:MODEL": "judges.guard_scorer.GuardScorer",
    "judge:FOLDER": "judges.judge_scorer.JudgeScorer",
}
NAMES = (*SCORERS, *JUDGED)
ANCHORED = ("bi-anchor", "larf", "datashield")  # these compare rows with unsafe and safe ones
MEANT_FOR = {"unsafe_anchors": ANCHORED, "safe_anchors": ANCHORED, "seed": ("random",)}


def find_scorer(name: str) -> tuple[str, str]:
    """The class of the scorer with this name, and the judge that is named after the colon, or "".

    Raises `UsageError` where there is no such scorer, or no judge is named.
    """
    if name in SCORERS:
        return SCORERS[name], ""
    kind, _, judge = name.partition(":")
    form = next((form for form in JUDGED if form.startswith(f"{kind}:")), None)
    if form is None:
        raise UsageError(f"There is no scorer '{name}': choose one of {', '.join(NAMES)}.")
    if not judge:
        raise UsageError(f"The scorer {kind} needs the name of a {form.partition(':')[2].lower()}: write {form}.")
    return JUDGED[form], judge


def make_scorer(
    name: str,
    pack: str | Path | Pack,
    model: str | None = None,
    *,
    unsafe_anchors: Sequence[Sequence[Message]] | None = None,
    safe_anchors: Sequence[Sequence[Message]] | None = None,
    seed: int | None = None,
    **settings: Unpack[SQSDSettings],
) -> BatchedScorer:
    """The scorer with this name, for `filter_dataset(scorer=...)`; `model` and `settings` are those of `SQSDScorer`.

    The name is one of `SCORERS`, `guard:MODEL` for a chat guard by its folder or its name on the Hub, or `judge:FOLDER`
    for a judge that recipes/judge/train.py trained. The anchors are conversations with unsafe and with safe answers;
    bi-anchor, larf and datashield need both. `seed` (default 0) is for random. Raises `UsageError` for an unknown name,
    for missing anchors, and for settings that the scorer does not have, `JudgeError` where the folder holds no judge.
    """
    where, judge = find_scorer(name)
    own: dict[str, Any] = {"source": judge} if judge else {}
    if name in ANCHORED:
        own = {"unsafe_anchors": unsafe_anchors or (), "safe_anchors": safe_anchors or ()}
    elif unsafe_anchors is not None or safe_anchors is not None:
        raise UsageError(f"The scorer {name} has no use for anchors: leave them out, or choose {', '.join(ANCHORED)}.")
    if name == "random":
        own = {"seed": seed or 0}
    elif seed is not None:
        raise UsageError(f"The scorer {name} has no use for a seed: leave it out, or choose random.")
    if not settings.get("per_module"):
        settings.pop("per_module", None)  # most scorers don't have it
    elif name not in ("sqsd", "danger", "safety"):
        raise UsageError(f"The scorer {name} has no cosine at each module: leave out --per-module.")
    module, _, kind = where.rpartition(".")
    scorer: BatchedScorer = getattr(import_module(f"sqsd_filter.{module}"), kind)(pack, model, **settings, **own)
    return scorer
