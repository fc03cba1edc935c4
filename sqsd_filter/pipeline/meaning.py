"""What the risks of a run mean: the reference of the pack that gave them, if it has one that applies, and its figures.

The command's summary, the card and the page take their sentences from here.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import numpy as np

from sqsd_filter.errors import PackError, UsageError, option
from sqsd_filter.pipeline.planted import Above, estimate
from sqsd_filter.pipeline.report import (
    Excess,
    Interval,
    LengthFigures,
    PackFacts,
    PlantedFigures,
    PoolFigures,
    ReferenceFigures,
    RiskMeaning,
)
from sqsd_filter.pipeline.scores.scored import Scored
from sqsd_filter.pipeline.selecting.selection import ABOVE_REFERENCE, DROPPED, Cut, Selection
from sqsd_filter.scoring.pack import OWN_RISK, PACKS_DIR, Pack, embedded_packs, load_pack
from sqsd_filter.scoring.reference_rows import Pool, Reference, ReferenceSettings, settings_from, settings_of, share_of
from sqsd_filter.scoring.scorer import SQSD, BatchedScorer
from sqsd_filter.wording import many

RELATED = 0.3  # a rank correlation of risk and length from which card and page warn
EXCESS_LEVELS = ("99%", "95%")  # the first one that the benign reference shows is reported


@dataclass(frozen=True)
class Beside:
    """The reference of a risk beside that of the cut, and the weights of the values that it is the sum of."""

    reference: Reference
    weights: Mapping[str, float]


@dataclass(frozen=True)
class Meaning:
    """The reference for the rows of a run; without one, `why` is the sentence for those who ask for it. `mismatch` is
    that sentence where there is a reference that does not apply."""

    reference: Reference | None
    why: str = ""
    mismatch: str | None = None
    beside: Mapping[str, Beside] = field(default_factory=dict)  # by the name of a risk beside that of the cut

    @classmethod
    def of_scorer(cls, scorer: BatchedScorer) -> Meaning:
        """For rows that this scorer scores. Raises `PackError` where the pack's reference is damaged."""
        return cls._of(scorer.pack, settings_of(scorer), scorer.pack.beside if scorer.name == SQSD else ())

    @classmethod
    def of_pack(cls, pack: Pack) -> Meaning:
        """For scores by this pack in settings that are not known. Raises `PackError` for a damaged reference."""
        return cls._of(pack, None, ())

    @classmethod
    def _of(cls, pack: Pack, settings: ReferenceSettings | None, beside: Sequence[Pack]) -> Meaning:
        """For scores by the pack in these settings, if they are known."""
        others = {}
        for each in beside:
            other, own = Reference.of(each), settings
            if own is not None:
                own = {**own, "pack": each.fingerprint, "shared_state": None}
            if other is not None and (own is None or other.mismatch(own) is None):
                others[each.risk or OWN_RISK] = Beside(other, each.weights)
        reference = Reference.of(pack)
        if reference is None:
            return cls(None, _without(pack), beside=others)
        mismatch = reference.mismatch(settings) if settings is not None else None
        return cls(None if mismatch else reference, mismatch or "", mismatch, others)

    @classmethod
    def of_scores(
        cls, facts: PackFacts | None, scoring: Mapping[str, object] | None, pack: str | Path | None
    ) -> Meaning:
        """For rows with scores, of which these facts of the pack and these settings are known; `pack` names the pack
        where that is not known, or where it has been moved. Raises `PackError` for one that can't be read."""
        if pack is None and facts is None:
            return cls(None, f"It is not known which pack gave these scores: name it with {option('pack')}.")
        found = find_pack(facts) if pack is None and facts is not None else load_pack(pack or "")
        if found is None:
            name = facts["name"] if facts else ""
            return cls(None, f"The pack {name}, which gave these scores, is not here: name it with {option('pack')}.")
        known = facts.get("beside", {}) if facts is not None else {}
        others = {name: found.with_risk(name) for name in known if name in found.all_risks}
        beside = [each for name, each in others.items() if each.fingerprint == known[name]["fingerprint"]]
        if facts is not None and facts.get("risk") in found.risks:
            found = found.with_risk(facts["risk"])
        settings = settings_from(scoring, facts["shared_state"] if facts else None) if scoring else None
        return cls._of(found, settings, beside)

    def place(self, cut: Cut) -> Cut:
        """The cut with its threshold, if it takes it from the reference. Raises `UsageError`."""
        if cut.kind != ABOVE_REFERENCE:
            return cut
        return cut.at(self.needed().threshold(Fraction(cut.value)))

    def _marked(self, risk: float) -> RiskMeaning:
        return {"risk": risk, "percentile": float(self.percentiles(np.array([risk]))[0])}

    def wanted(self, percentile: bool) -> bool:
        """Whether percentiles are asked for. Raises `UsageError` where there is no reference for them."""
        if percentile:
            self.needed()
        return percentile

    def needed(self) -> Reference:
        """The reference. Raises `UsageError` where there is none, or none that applies."""
        if self.reference is None:
            raise UsageError(self.why)
        return self.reference

    def identity(self, cut: Cut | None, *, percentile: bool) -> dict[str, object]:
        """What makes it another run where the reference decides on rows, or on a column."""
        if not percentile and (cut is None or cut.kind != ABOVE_REFERENCE):
            return {}
        text = json.dumps(self.needed().identity())
        digest = hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
        return {"reference": digest, **({"percentile": True} if percentile else {})}

    def percentiles(self, risk: np.ndarray) -> np.ndarray:
        """The share of the benign reference rows below each risk (n,), from 0 to 100; NaN where there is none."""
        benign = self.needed().benign
        return np.where(np.isfinite(risk), 100 * benign.below(risk) / benign.rows, np.nan)

    def figures(self, scored: Scored, selection: Selection | None, cut: Cut | None) -> ReferenceFigures | None:
        """The figures for the report; None where the pack has no reference."""
        beside = self._beside(scored)
        figures: ReferenceFigures = {"beside": beside} if beside else {}
        if self.mismatch is not None:
            return {**figures, "mismatch": self.mismatch}
        if self.reference is None:
            return figures or None
        risk, benign, unsafe = scored.risk[scored.scored], self.reference.benign, self.reference.unsafe
        figures["benign"] = _pool(benign)
        if unsafe is not None:
            figures["unsafe"] = _pool(unsafe)
        if len(risk):
            figures["median"] = self._marked(float(np.median(risk)))
        if (threshold := _threshold(selection)) is not None:
            figures["cut"] = self._marked(threshold)
        if cut is not None and cut.level is not None:
            figures["threshold"] = cut.level
        if excess := _excess(benign, risk):
            figures["excess"] = excess
        if unsafe is not None and selection is not None and cut is not None and not cut.weights:
            level = selection.threshold if cut.limit is None else cut.limit
            if level is not None and len(risk):
                figures["planted"] = _planted(benign, unsafe, selection, level, including=cut.limit is None)
        return figures

    def _beside(self, scored: Scored) -> dict[str, Excess]:
        """The excess by each risk beside that of the cut."""
        excesses = {}
        for name, other in self.beside.items():
            if not other.weights.keys() <= scored.values.keys():
                continue
            terms = [weight * scored.values[value][scored.scored] for value, weight in other.weights.items()]
            risk = np.sum(terms, axis=0)
            excess = _excess(other.reference.benign, risk[np.isfinite(risk)])
            if excess is not None:
                excesses[name] = excess
        return excesses


def _threshold(selection: Selection | None) -> float | None:
    """The lowest risk that was dropped, or the threshold of weights; None where rows were cut apart."""
    pieces = selection.pieces if selection is not None else []
    return pieces[0].threshold if [piece.key for piece in pieces] == [{}] else None


def _without(pack: Pack) -> str:
    which = f"risk {pack.risk} of the pack {pack.name}" if pack.risk else f"pack {pack.name}"
    others = [name for name, risk in pack.risks.items() if risk.reference is not None and name != pack.risk]
    other = f"choose its risk {others[0]} (--risk {others[0]}), which has some, or " if others else ""
    return (
        f"The {which} has no reference rows to compare with: {other}run 'sqsd-filter pack calibrate' on its folder, or "
        "on a copy of it."
    )


def find_pack(facts: PackFacts) -> Pack | None:
    """The pack that the facts name, if it is on this machine."""
    where = facts.get("where") or facts["name"]
    if where not in embedded_packs() and not Path(where).is_dir():
        return None
    try:
        return load_pack(where)
    except PackError:
        return None


def risk_for_reference(facts: PackFacts | None, pack: str | Path | None) -> str | None:
    """The risk at which a cut by the reference of these scores' pack is made, if it is beside that of the scores."""
    found = load_pack(pack) if pack is not None else find_pack(facts) if facts is not None else None
    name = found.for_reference.risk if found is not None else None
    return name if facts is not None and name in facts.get("beside", {}) else None


def place_of(pack: Pack) -> str:
    """What `load_pack` finds a pack by on this machine, also in another folder."""
    return pack.path.name if pack.path.parent == PACKS_DIR else str(pack.path.resolve())


def _pool(pool: Pool) -> PoolFigures:
    return {"rows": pool.rows, "corpora": dict(pool.corpora), "quantiles": pool.quantiles()}


def _planted(
    benign: Pool, unsafe: Pool, selection: Selection, threshold: float, *, including: bool
) -> PlantedFigures | None:
    """What the dropped and the kept rows are, by the reference rows above the threshold, or `including` those at it."""
    corpus = Above(selection.count(DROPPED), sum(piece.scored for piece in selection.pieces))
    b, u = (Above(pool.above(threshold, including=including), pool.rows) for pool in (benign, unsafe))
    return estimate(corpus, b, u)


def _excess(benign: Pool, risk: np.ndarray) -> Excess | None:
    level = next((level for level in EXCESS_LEVELS if benign.shows(share_of(level))), None)
    if level is None or not len(risk):
        return None
    at = benign.quantile(share_of(level))
    rows = int((risk > at).sum())
    expected = benign.above(at, including=False) / benign.rows
    return {"quantile": level, "risk": at, "rows": rows, "share": rows / len(risk), "expected": expected}


# ---------------------------------------------------------------------------------------------- in words


def percent(share: float) -> str:
    """A share in percent with two digits: 0.95 %, 2.1 %, 34 %."""
    value = 100 * share
    return f"{value:.2g} %" if value < 9.95 else f"{value:.0f} %"


def rank(percentile: float, figures: ReferenceFigures) -> str:
    """A risk's position in the benign reference: "above 97 % of the benign reference rows". It is rounded down."""
    rows = figures["benign"]["rows"]
    if percentile >= 100:
        return f"above all of the {rows:,} benign reference rows"
    if percentile <= 0:
        return f"above none of the {rows:,} benign reference rows"
    digits = 0 if 1 <= percentile < 99 else 1 if 0.1 <= percentile < 99.9 else 2
    down = math.floor(percentile * 10**digits + 1e-9) / 10**digits
    return f"above {down:g} % of the benign reference rows" if down else "above less than 0.01 % of the benign rows"


def marks(figures: ReferenceFigures) -> dict[str, str]:
    """Risks of a run in words, by what they are: the cut's, if all rows were cut at one risk, and the median. The first
    one says more: "36.6: above 97 % of the benign reference rows; half of the known unsafe answers score above 50.3".
    """
    known = {"cut": figures.get("cut"), "median": figures.get("median")}
    words = {name: f"{mark['risk']:.3g}: {rank(mark['percentile'], figures)}" for name, mark in known.items() if mark}
    if words and "unsafe" in figures:
        words[next(iter(words))] += f"; {half(figures['unsafe'])}"
    return words


def half(unsafe: PoolFigures) -> str:
    return f"half of the known unsafe answers score above {unsafe['quantiles']['50%']:.3g}"


def sentences(figures: ReferenceFigures) -> list[str]:
    """What the risks of a run mean, and the reference that says so; none without a reference."""
    if "benign" not in figures:
        return []
    names = {"cut": "The cut is at the risk", "median": "The median risk is"}
    return [*(f"{names[name]} {words}." for name, words in marks(figures).items()), origin(figures)]


def origin(figures: ReferenceFigures) -> str:
    """The corpora of the reference, as a sentence."""
    kinds = {"benign rows": figures.get("benign"), "known unsafe answers": figures.get("unsafe")}
    named = [
        f"{pool['rows']:,} {kind} ({', '.join(f'{name} {rows:,}' for name, rows in pool['corpora'].items())})"
        for kind, pool in kinds.items()
        if pool is not None
    ]
    return f"The pack's reference has {' and '.join(named)}."


def advice(figures: ReferenceFigures) -> str:
    """How many rows are riskier than nearly all benign reference rows, beside a clean corpus; or why nobody knows."""
    words = [figures["mismatch"]] if "mismatch" in figures else []
    if excess := figures.get("excess"):
        words.append(_above("", excess))
    words += [_above(f" of the risk {name}", excess) for name, excess in figures.get("beside", {}).items()]
    return " ".join(words)


def _above(which: str, excess: Excess) -> str:
    level = excess["quantile"].removesuffix("%")
    return (
        f"{percent(excess['share'])} of your rows lie above the benign {level} %{which}; a clean corpus would have "
        f"{percent(excess['expected'])}."
    )


def by_length(length: LengthFigures | None) -> str:
    """How risk and the length of answers are related, as a sentence."""
    if length is None:
        return "No answer could be measured, so nobody can say whether risk is related to their length."
    if (rho := length["spearman"]) is None:
        return "All rows have the same risk or the same length, so neither depends on the other."
    measured = f"(Spearman's rank correlation {rho:.2f}, {many(length['rows'], 'row')})"
    if not depends_on_length(length):
        return f"Risk is hardly related to the length of answers {measured}."
    return f"Risk depends on length: {'longer' if rho > 0 else 'shorter'} answers tend to be riskier {measured}."


def depends_on_length(length: LengthFigures) -> bool:
    """Is risk related to length so much that one has to warn of it?"""
    return length["spearman"] is not None and abs(length["spearman"]) > RELATED


def false_alarms(figures: ReferenceFigures, dropped: int) -> str:
    """The estimate of what the cut found and what it left, or nothing where there is none."""
    if "planted" not in figures:
        return ""
    if (planted := figures["planted"]) is None:
        return (
            "The reference can't tell false alarms at this cut: the known unsafe answers do not lie above it more "
            "often than the benign rows."
        )
    found = f"Of the {many(dropped, 'dropped row')}, about {_counted(planted['false_alarms'])} are false alarms, and"
    return (
        f"{found if dropped else 'No row is dropped;'} about {_counted(planted['remaining'])} rows of the known unsafe "
        "kind remain, if the others are like the reference."
    )


def _counted(interval: Interval) -> str:
    return f"{interval['estimate']:,.0f} ({interval['low']:,.0f} to {interval['high']:,.0f})"
