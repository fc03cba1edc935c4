"""Several packs' risks of the same rows, combined by ranks to one risk per row, since risks have no common scale."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from string import ascii_lowercase

import numpy as np

from sqsd_filter.corpus.conversation import SCORED
from sqsd_filter.errors import InputError, UsageError, option
from sqsd_filter.pipeline.publishing.target import run_id
from sqsd_filter.pipeline.report import ConsensusPack
from sqsd_filter.pipeline.rules import CONSENSUS
from sqsd_filter.pipeline.scores.scored import ScoreCounts, Scored
from sqsd_filter.pipeline.selecting.earlier import Earlier
from sqsd_filter.statistics import ranks


def check_rule(others: Sequence[object], rule: str | None) -> None:
    """Raise `UsageError` for an unknown rule, for a rule without further scores, or further scores without a rule."""
    if rule is not None and rule not in CONSENSUS:
        raise UsageError(f"{option('consensus')} must be one of {', '.join(CONSENSUS)}, not '{rule}'.")
    if others and rule is None:
        raise UsageError(f"Say how to combine the scores with {option('consensus')}: {' or '.join(CONSENSUS)}.")
    if rule is not None and not others:
        raise UsageError(
            f"{option('consensus')} combines several packs' scores: name the other ones with {option('scores')}."
        )
    if len(others) >= len(ascii_lowercase):
        raise UsageError(f"The scores of at most {len(ascii_lowercase)} packs can be combined.")


def agree(packs: Sequence[Earlier], rule: str) -> Earlier:
    """The rows of the first pack with the risk by the rule; each pack's own risk becomes `sqsd_risk_NAME`.

    Raises `InputError` where the packs did not score the same rows in the same order.
    """
    first, *others = packs
    for other in others:
        check_same(first, other)
    names = _names(packs)
    columns: list[ConsensusPack] = [
        {"column": f"sqsd_risk_{name}", "scores": pack.where, "pack": pack.pack, "scorer": pack.facts.get("scorer")}
        for name, pack in zip(names, packs, strict=True)
    ]
    identity = {**first.identity, "consensus": rule, "scores": [run_id(other.identity) for other in others]}
    scored = combine([pack.scored for pack in packs], names, rule)
    return replace(first, scored=scored, identity=identity, facts={"consensus": {"rule": rule, "packs": columns}})


def combine(packs: Sequence[Scored], names: Sequence[str], rule: str) -> Scored:
    """One risk in (0, 1] for each of n rows that all packs could score: the mean of its ranks, or the largest rank.

    A row that a pack could not score has no risk, and the status that the first such pack gave it.
    """
    first = packs[0]
    both = np.logical_and.reduce([pack.scored for pack in packs])
    statuses, codes = [SCORED], np.zeros(len(both), np.uint8)
    details: dict[int, str] = {}
    pending = ~both
    for pack in packs:
        failed = pending & ~pack.scored
        for code in np.unique(pack.codes[failed]).tolist():
            status = pack.statuses[code]
            if status not in statuses:
                statuses.append(status)
            codes[failed & (pack.codes == code)] = statuses.index(status)
        details |= {row: pack.details[row] for row in np.flatnonzero(failed).tolist() if row in pack.details}
        pending &= pack.scored
    risk = np.full(len(both), np.nan)
    risk[both] = 0.0
    for pack in packs:
        pack_ranks = ranks(pack.risk[both])
        risk[both] = risk[both] + pack_ranks if rule == "mean-rank" else np.maximum(risk[both], pack_ranks)
    scale = int(both.sum()) * (len(packs) if rule == "mean-rank" else 1)
    risk[both] /= scale
    own = {f"risk_{name}": np.where(pack.scored, pack.risk, np.nan) for name, pack in zip(names, packs, strict=True)}
    counts: ScoreCounts = {"scored": 0, "reused": int(both.sum()), "duplicates": 0}
    return replace(first, statuses=statuses, codes=codes, probes=own, risk=risk, counts=counts, details=details)


def check_same(first: Earlier, other: Earlier) -> None:
    """Raise `InputError` unless the two are scores of the same conversations in the same order."""
    here, there = first.keys, other.keys
    n = min(len(here), len(there))
    apart = np.flatnonzero(here[:n] != there[:n])
    if not len(apart) and len(here) == len(there):
        return
    row = int(apart[0]) if len(apart) else n
    difference = "another conversation" if len(apart) else "an additional row"
    raise InputError(
        f"{first.where} ({len(here):,} rows) and {other.where} ({len(there):,}) are not scores of the same rows: the "
        f"first difference is row {row + 1}, where one has {difference}. Score the same rows with each pack."
    )


def _names(packs: Sequence[Earlier]) -> Sequence[str]:
    """The packs' names; a, b, c, ... if one is not known or two are equal."""
    names = [pack.pack["name"] for pack in packs if pack.pack]
    return names if len(set(names)) == len(packs) else ascii_lowercase[: len(packs)]
