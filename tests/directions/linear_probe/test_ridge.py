"""The regression: against its primal form, with weights that balance, and on updates with a known difference."""

from __future__ import annotations

import numpy as np
import pytest

from sqsd_filter.directions.contrast.held_out import Rows, figures, fits_without, weighted_quantile
from sqsd_filter.directions.contrast.ridge import apply, balanced, kernel, solve
from sqsd_filter.statistics import auc

MODULES = [slice(0, 8), slice(8, 20), slice(20, 30)]


class Array:
    """Vectors in memory, of length one in each module."""

    def __init__(self, values: np.ndarray) -> None:
        self.values = values.astype(np.float32)
        for where in MODULES:
            self.values[:, where] /= np.linalg.norm(self.values[:, where], axis=1, keepdims=True)
        self.rows = len(values)

    def columns(self, where: slice) -> np.ndarray:
        return self.values[:, where].copy()


def sample(n: int, seed: int = 0, shift: float = 0.0, unsafe: np.ndarray | None = None) -> tuple[Array, np.ndarray]:
    """Random vectors; those of unsafe rows are moved by `shift` along a few coordinates."""
    rng = np.random.default_rng(seed)
    unsafe_n = np.arange(n) % 3 == 0 if unsafe is None else unsafe
    values = rng.normal(size=(n, 30))
    values[unsafe_n, ::5] += shift
    return Array(values), unsafe_n


def test_the_kernel_is_the_mean_cosine() -> None:
    vectors, _ = sample(12)
    v = vectors.values.astype(float)
    assert np.allclose(kernel(vectors, MODULES), v @ v.T / len(MODULES), atol=1e-6)


def test_the_solution_is_that_of_the_primal_problem() -> None:
    vectors, unsafe_n = sample(40, shift=0.5)
    weights_n = np.random.default_rng(1).uniform(0.2, 3, size=40)
    alpha_n = solve(kernel(vectors, MODULES), unsafe_n, weights_n, ridge=0.3)
    # minimise Σ w (x v + b - y)² + λ M ‖v‖² by its normal equations, b without penalty
    x = np.c_[vectors.values.astype(float), np.ones(40)]
    y = np.where(unsafe_n, 1.0, -1.0)
    penalty = 0.3 * len(MODULES) * np.diag([1.0] * 30 + [0.0])
    v = np.linalg.solve((x.T * weights_n) @ x + penalty, (x.T * weights_n) @ y)[:30]
    direction, _ = apply(vectors, MODULES, alpha_n[:, None])
    assert np.allclose(direction / len(MODULES), v, atol=1e-5)
    assert alpha_n.sum() == pytest.approx(0, abs=1e-9)


def test_rows_without_weight_change_nothing() -> None:
    vectors, unsafe_n = sample(30, shift=0.5)
    weights_n = np.where(np.arange(30) < 20, 1.0, 0.0)
    alpha_n = solve(kernel(vectors, MODULES), unsafe_n, weights_n, 1.0)
    fewer = Array(vectors.values[:20])
    assert np.allclose(alpha_n[:20], solve(kernel(fewer, MODULES), unsafe_n[:20], np.ones(20), 1.0))
    assert not alpha_n[20:].any()


def test_a_score_is_the_sum_of_cosines_with_the_direction() -> None:
    vectors, unsafe_n = sample(25, shift=0.5)
    alpha_nf = np.random.default_rng(2).normal(size=(25, 2))
    first, found = apply(vectors, MODULES, alpha_nf)
    assert np.allclose(first, alpha_nf[:, 0] @ vectors.values, atol=1e-5)
    for fit in range(2):
        direction = alpha_nf[:, fit] @ vectors.values
        for row in range(25):
            cosines = [vectors.values[row, w] @ direction[w] / np.linalg.norm(direction[w]) for w in MODULES]
            assert found[row, fit] == pytest.approx(sum(cosines), abs=1e-5)
    assert not apply(vectors, MODULES, np.zeros((25, 1)))[1].any()
    assert unsafe_n.any()


def test_both_kinds_weigh_the_same_and_sources_as_they_say() -> None:
    unsafe_n = np.array([True] * 5 + [False] * 10)
    source_n = np.array(["a"] * 4 + ["b"] + ["a"] * 2 + ["c"] * 8)
    weight_n = np.array([1.0] * 4 + [3.0] + [1.0] * 2 + [0.5] * 8)
    weights_n = balanced(unsafe_n, source_n, weight_n)
    assert weights_n.mean() == pytest.approx(1)
    assert weights_n[unsafe_n].sum() == pytest.approx(weights_n[~unsafe_n].sum())
    assert weights_n[4] == pytest.approx(3 * weights_n[:4].sum())
    assert weights_n[5:7].sum() == pytest.approx(2 * weights_n[7:].sum())  # "a" of the other kind is another source
    assert len(set(weights_n[7:].round(12))) == 1


def test_a_difference_between_the_kinds_is_found_and_noise_is_not() -> None:
    for shift, low, high in ((1.5, 0.95, 1.0), (0.0, 0.3, 0.7)):
        train, unsafe_n = sample(300, seed=1, shift=shift)
        test, test_unsafe_n = sample(300, seed=2, shift=shift)
        alpha_n = solve(kernel(train, MODULES), unsafe_n, np.ones(300), 1.0)
        direction, _ = apply(train, MODULES, alpha_n[:, None])
        score_n = test.values @ direction
        assert low <= auc(score_n[test_unsafe_n], score_n[~test_unsafe_n]) <= high


def held_out_of(vectors: Array, rows: Rows, ridge: float = 1.0) -> dict[str, float]:
    fits, alpha_nf = fits_without(rows, kernel(vectors, MODULES), ridge)
    _, scores_nf = apply(vectors, MODULES, alpha_nf)
    return {each["source"]: each["auc"]["benign"] for each in figures(rows, fits, scores_nf)}


def test_a_source_is_scored_by_fits_that_never_saw_it() -> None:
    rng = np.random.default_rng(0)
    unsafe_n = np.arange(400) % 2 == 0
    source_n = np.where(unsafe_n, np.where(np.arange(400) % 4 == 0, "one", "two"), "benign")
    values = rng.normal(size=(400, 30))
    values[source_n == "one", ::3] += 2
    alike, apart = values.copy(), values.copy()
    alike[source_n == "two", ::3] += 2
    apart[source_n == "two", 1::3] += 2  # what the other source has nothing of
    rows = Rows(unsafe_n, source_n, np.ones(400), rng.permutation(400))
    assert all(value > 0.9 for value in held_out_of(Array(alike), rows).values())
    found = held_out_of(Array(apart), rows)
    assert set(found) == {"one", "two"}
    assert all(0.2 < value < 0.75 for value in found.values())


def test_no_row_is_scored_by_a_fit_that_saw_its_prompt() -> None:
    # as many coordinates as rows: a fit knows by heart what it saw, and nothing else
    rng = np.random.default_rng(3)
    unsafe_n, prompts = rng.random(60) < 0.5, np.arange(60) // 2
    unsafe_n = unsafe_n[prompts]  # the rows of a prompt are of one kind
    values = rng.normal(size=(30, 30))[prompts] + 0.01 * rng.normal(size=(60, 30))
    vectors, source_n = Array(values), np.where(unsafe_n, "one", "benign")

    def measured(prompt_n: np.ndarray) -> float:
        return held_out_of(vectors, Rows(unsafe_n, source_n, np.ones(60), prompt_n), 0.01)["one"]

    assert measured(np.arange(60)) > 0.9  # equal prompts on both sides: they are recognised
    assert measured(prompts) < 0.8


def test_weighted_quantiles() -> None:
    values, weights = np.array([3.0, 1.0, 2.0]), np.array([1.0, 1.0, 8.0])
    assert weighted_quantile(values, weights, 0.1) == 1
    assert weighted_quantile(values, weights, 0.5) == 2
    assert weighted_quantile(values, weights, 0.95) == 3
    assert weighted_quantile(values, np.ones(3), 1.0) == 3
