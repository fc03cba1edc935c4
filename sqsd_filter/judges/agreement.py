"""How far judges agree on the same answers, two at a time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TypedDict

from sqsd_filter.judges.outcomes import OUTCOMES


class AgreementReport(TypedDict):
    """An `Agreement` as JSON; `judges` are the first and the second."""

    judges: list[str]
    answers: int
    share: float
    kappa: float | None
    table: Mapping[str, Mapping[str, int]]


@dataclass(frozen=True)
class Agreement:
    """Two judges' outcomes for the same n answers.

    `table[a][b]` counts the answers that the first judge calls a and the second one b.
    """

    first: str
    second: str
    table: Mapping[str, Mapping[str, int]]

    @property
    def answers(self) -> int:
        return sum(sum(row.values()) for row in self.table.values())

    @property
    def share(self) -> float:
        """The share of answers with the same outcome."""
        return sum(self.table[outcome][outcome] for outcome in OUTCOMES) / self.answers

    @property
    def kappa(self) -> float | None:
        """Cohen's kappa (1960): the agreement beyond chance, as a share of the most there could be. Chance is what two
        independent judges with these frequencies would agree on. None if both give every answer the same outcome."""
        products = (sum(self.table[o].values()) * sum(row[o] for row in self.table.values()) for o in OUTCOMES)
        expected = sum(products) / self.answers**2
        return (self.share - expected) / (1 - expected) if expected < 1 else None

    def report(self) -> AgreementReport:
        return {
            "judges": [self.first, self.second],
            "answers": self.answers,
            "share": self.share,
            "kappa": self.kappa,
            "table": self.table,
        }


def agreement(outcomes_by_judge: Mapping[str, Sequence[str]]) -> list[Agreement]:
    """The agreement of each two judges, in their order.

    Raises `ValueError` if there are no answers, for an unknown outcome, or if the judges judged different numbers of
    answers."""
    for name, outcomes in outcomes_by_judge.items():
        if not outcomes or not set(outcomes) <= set(OUTCOMES):
            raise ValueError(f"{name} has no outcomes, or others than {', '.join(OUTCOMES)}")
    return [
        Agreement(one, other, _table(outcomes_by_judge[one], outcomes_by_judge[other]))
        for one, other in combinations(outcomes_by_judge, 2)
    ]


def _table(first: Sequence[str], second: Sequence[str]) -> dict[str, dict[str, int]]:
    counts = Counter(zip(first, second, strict=True))
    return {a: {b: counts[a, b] for b in OUTCOMES} for a in OUTCOMES}
