"""Ranks and intervals against their definitions."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sqsd_filter.statistics import auc, ranks, spearman, wilson


@given(st.lists(st.tuples(st.integers(-3, 3), st.integers(-3, 3)), min_size=2, max_size=12))
def test_ranks_and_their_correlation_are_the_textbooks(pairs: list[tuple[int, int]]) -> None:
    def textbook(values: list[int]) -> list[float]:
        return [sum(w < v for w in values) + (sum(w == v for w in values) + 1) / 2 for v in values]

    a, b = (list(column) for column in zip(*pairs, strict=True))
    assert ranks(np.array(a)).tolist() == textbook(a)
    found = spearman(np.array(a), np.array(b))
    if len(set(a)) > 1 and len(set(b)) > 1:
        assert found == pytest.approx(np.corrcoef(textbook(a), textbook(b))[0, 1])
    else:
        assert found is None


def test_auc_counts_the_pairs_in_order() -> None:
    positive, negative = np.array([3, 1, 2]), np.array([0, 2, 2, 5])
    pairs = [(p > n) + (p == n) / 2 for p in positive for n in negative]
    assert auc(positive, negative) == pytest.approx(np.mean(pairs))


@pytest.mark.parametrize(
    ("hits", "of", "low", "high"),
    [(0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (5, 10, 0.2366, 0.7634), (1, 100, 0.0018, 0.0545)],
)
def test_the_interval_is_wilson_s(hits: int, of: int, low: float, high: float) -> None:
    assert wilson(hits, of) == pytest.approx((low, high), abs=1e-4)


@given(st.integers(1, 200).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_the_interval_s_ends_solve_wilson_s_equation(case: tuple[int, int]) -> None:
    hits, of = case
    for p in wilson(hits, of):
        assert abs(hits / of - p) == pytest.approx(1.959963984540054 * (p * (1 - p) / of) ** 0.5, abs=1e-7)
