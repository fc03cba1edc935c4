"""A corpus in which some rows were planted, and which rows are learned with a filter and without one.

The arms: `all` rows; those that a cut `above-reference` keeps; those that a `cut` at the true share of planted rows
keeps; the rows left when the same number of `random` rows is dropped; and the `clean` corpus, which an oracle would
keep. Each cut is made at the risk at which `select` makes it of the same scores: above the reference at the pack's risk
for that, if the scores have it beside their own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import get_args

import numpy as np

from sqsd_filter.errors import InputError, option
from sqsd_filter.evaluation.results import ContaminatedArm
from sqsd_filter.evaluation.scores import NamedScores
from sqsd_filter.pipeline.meaning import Meaning, risk_for_reference
from sqsd_filter.pipeline.selecting.earlier import Earlier
from sqsd_filter.pipeline.selecting.selection import KEPT, Cut, cut_rows
from sqsd_filter.progress import Progress

CONTAMINATED_ARMS: tuple[ContaminatedArm, ...] = get_args(ContaminatedArm)
BENIGN, PLANTED = "benign", "planted"


def read_kinds(earlier: Earlier, column: str) -> np.ndarray:
    """The kind of each row (n,): "benign", "planted" where the column says true, or the text in the column, which names
    one of several kinds. False, null and "" mean benign. Raises `InputError`."""
    corpus = earlier.scored.corpus
    kinds = np.full(corpus.n_rows, BENIGN, dtype=object)
    known = column in corpus.schema.names
    for row in corpus.read(0, corpus.n_rows, [column]) if known else ():
        value = (row.value or {}).get(column)
        if not isinstance(value, bool | str | None):
            raise InputError(
                f"{row.file} has {value!r} under '{column}' (line {row.line}): {option('planted')} needs a column with "
                "true and false, or with the kind of each planted row."
            )
        if value:
            kinds[row.index] = PLANTED if value is True else value
    if not known or (kinds == BENIGN).all():
        names = ", ".join(name for name in corpus.schema.names if not name.startswith("sqsd_"))
        raise InputError(
            f"No row of {earlier.where} is marked under '{column}': name the column that marks planted rows with "
            f"{option('planted')}. The columns are {names}."
        )
    return kinds


@dataclass(frozen=True)
class ReferenceCut:
    """A cut by the reference of a pack, and the risk of all rows (n,) at which it is made."""

    cut: Cut
    risk: np.ndarray


def reference_cuts(
    scorers: Sequence[NamedScores], share: Fraction, progress: Progress
) -> dict[str, ReferenceCut | None]:
    """By scorer: the cut above this share of the benign reference rows of the pack that gave its scores. It is made at
    the same risk as by `select`; another risk than the scores' own is noted. None where the risk has no reference,
    which is noted, too. Raises `UsageError` for a share that the reference can't show, `InputError` where the column of
    that risk is missing."""
    cuts: dict[str, ReferenceCut | None] = {}
    for each in scorers:
        earlier, name = each.earlier, risk_for_reference(each.earlier.pack, None)
        if name is not None:
            earlier = earlier.by_risk(name)
            progress.note(f"{each.name}: the arm above-reference is cut at the risk {name}, as by select")
        meaning = Meaning.of_scores(earlier.pack, earlier.scoring, None)
        why = meaning.why if earlier.pack is not None else "No report beside its scores names their pack."
        if meaning.reference is None:
            progress.note(f"{each.name} has no arm above-reference. {why}")
            cuts[each.name] = None
        else:
            cut = meaning.place(Cut.of(above_reference=str(share)))
            cuts[each.name] = ReferenceCut(cut, earlier.scored.risk)
    return cuts


@dataclass(frozen=True)
class ContaminatedCorpus:
    """The `kinds` of all rows (n,); the indices of those to learn from, ascending (k,); and by scorer the risk of all
    rows (n,) and the cut by the reference, if there is one."""

    kinds: np.ndarray
    learned: np.ndarray
    risks: Mapping[str, np.ndarray]
    cuts: Mapping[str, ReferenceCut | None]

    def __post_init__(self) -> None:
        if not 0 < self.planted < len(self.learned):
            which = "none" if not self.planted else "each"
            raise InputError(
                f"Of the {len(self.learned):,} rows that can be learned from, {which} was planted: score a corpus with "
                "rows of both kinds."
            )

    @property
    def planted(self) -> int:
        """The number of planted rows among those to learn from."""
        return int((self.kinds[self.learned] != BENIGN).sum())

    def sets(self, scorer: str, seed: int) -> dict[ContaminatedArm, np.ndarray]:
        """The rows of each arm, ascending. Raises `InputError` where the cut by the reference keeps none."""
        learned, planted = self.learned, self.planted
        sets: dict[ContaminatedArm, np.ndarray] = {"all": learned}
        if (cut := self.cuts[scorer]) is not None:
            sets["above-reference"] = kept = self._kept(cut.risk, cut.cut)
            if not len(kept):
                raise InputError(
                    f"By {scorer} all {len(learned):,} rows are above the reference, so that none is kept: name a "
                    f"larger share with {option('above_reference')}."
                )
        sets["cut"] = self._kept(self.risks[scorer], Cut.of(drop_top=str(Fraction(planted, len(learned)))))
        random = np.random.default_rng(seed).choice(learned, len(learned) - planted, replace=False)
        return sets | {"random": np.sort(random), "clean": learned[self.kinds[learned] == BENIGN]}

    def _kept(self, risk: np.ndarray, cut: Cut) -> np.ndarray:
        taking_part = np.zeros(len(self.kinds), bool)
        taking_part[self.learned] = True
        return np.flatnonzero(cut_rows(risk, taking_part, cut).fate == KEPT)

    def dropped(self, kept: np.ndarray) -> dict[str, int]:
        """How many rows of each kind are not among the `kept` ones, planted ones first."""
        names = sorted(set(self.kinds[self.learned].tolist()), key=lambda name: (name == BENIGN, name))
        missing = Counter(self.kinds[np.setdiff1d(self.learned, kept)].tolist())
        return {name: missing[name] for name in names}
