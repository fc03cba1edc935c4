"""Ranks and intervals against their definitions."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sqsd_filter.statistics import auc, ranks, spearman, student, sureness, wilson


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


@pytest.mark.parametrize(
    ("freedom", "percentile"), [(1, 12.7062), (2, 4.3027), (2.5, 3.5747), (10, 2.2281), (100, 1.9840), (1e6, 1.9600)]
)
def test_the_percentile_is_student_s(freedom: float, percentile: float) -> None:
    assert student(freedom) == pytest.approx(percentile, abs=1e-4)


@pytest.mark.parametrize(
    ("rows", "prompts_vary"),
    [([[3, 1, 4, 1], [5, 2, 6, 3], [5, 3, 5, 4]], True), ([[3, 1, 4, 1], [5, 9, 2, 6], [5, 3, 5, 8]], False)],
    ids=["prompts vary", "prompts hardly vary"],
)
def test_the_mean_squares_are_those_of_the_two_way_analysis_of_variance(
    rows: list[list[int]], prompts_vary: bool
) -> None:
    y = np.array(rows, float)
    s, p = y.shape
    m = sum(y[i, k] for i in range(s) for k in range(p)) / (s * p)
    seeds, prompts = [sum(y[i]) / p for i in range(s)], [sum(y[:, k]) / s for k in range(p)]
    ms_s = p * sum((mean - m) ** 2 for mean in seeds) / (s - 1)
    ms_p = s * sum((mean - m) ** 2 for mean in prompts) / (p - 1)
    rest = sum((y[i, k] - seeds[i] - prompts[k] + m) ** 2 for i in range(s) for k in range(p))
    ms_r = rest / ((s - 1) * (p - 1))
    assert ms_s > ms_r
    assert bool(ms_p > ms_r) is prompts_vary
    total = ms_s + ms_p - ms_r if prompts_vary else ms_s
    sure = sureness(y)
    assert sure is not None
    assert sure.error == pytest.approx((total / (s * p)) ** 0.5)
    parts = ms_s**2 / (s - 1) + max(ms_p, ms_r) ** 2 / (p - 1) + ms_r**2 / ((s - 1) * (p - 1))
    assert bool(total**2 / parts > 2) is prompts_vary
    assert sure.freedom == pytest.approx(total**2 / parts if prompts_vary else 2)  # of three seeds


def test_a_difference_of_mean_squares_takes_no_degrees_of_freedom_away() -> None:
    sure = sureness(np.array([[1.0, 0.0], [0.0, 1.0]]))  # the rest only
    assert sure is not None
    assert sure.freedom == 1


def test_the_standard_error_is_that_of_means_over_new_seeds_and_new_prompts() -> None:
    rng = np.random.default_rng(0)
    s, p, n = 3, 40, 4000
    seed, prompt, rest = 0.5, 1.5, 1.0
    y = seed * rng.normal(size=(n, s, 1)) + prompt * rng.normal(size=(n, 1, p)) + rest * rng.normal(size=(n, s, p))
    squared = np.mean([found.error**2 for each in y if (found := sureness(each)) is not None])
    assert squared == pytest.approx(y.mean((1, 2)).var(), rel=0.06)
    assert squared == pytest.approx(seed**2 / s + prompt**2 / p + rest**2 / (s * p), rel=0.06)


def test_one_seed_leaves_the_prompts_to_vary_and_one_prompt_the_seeds() -> None:
    values = np.array([1.0, 2.0, 4.0])
    for shaped in (values[None], values[:, None]):
        sure = sureness(shaped)
        assert sure is not None
        assert sure.error == pytest.approx(values.std(ddof=1) / 3**0.5)
        assert sure.freedom == 2
        assert sure.reach == pytest.approx(4.3027 * sure.error, rel=1e-4)
    assert sureness(values[:1, None]) is None
    nothing = sureness(np.ones((2, 3)))
    assert nothing is not None
    assert nothing.reach == 0
