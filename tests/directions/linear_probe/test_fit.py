"""The regression: against its primal form, with weights that balance, and on values with a known difference."""

from __future__ import annotations

import numpy as np
import pytest

from sqsd_filter.directions.linear_probe.fit import Standardised, balanced, solve
from sqsd_filter.directions.linear_probe.held_out import Rows, figures, scores_without, weighted_quantile
from sqsd_filter.statistics import auc


def sample(n: int, seed: int = 0, shift: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Random values (n, 30) of different sizes; those of unsafe rows (n,) are moved by `shift` along a few of them."""
    rng = np.random.default_rng(seed)
    unsafe_n = np.arange(n) % 3 == 0
    values = rng.normal(size=(n, 30))
    values[unsafe_n, ::5] += shift
    return (values * np.geomspace(0.1, 10, 30) + 5).astype(np.float32), unsafe_n


def test_values_are_standardised_and_a_constant_one_is_zero() -> None:
    values, _ = sample(40)
    values[:, 3] = 7.0
    standard = Standardised.of(values).values_nd.astype(float)
    assert np.allclose(standard.mean(0), 0, atol=1e-5)
    assert np.allclose(standard.std(0), np.arange(30) != 3, atol=1e-5)
    weight_d, _ = Standardised.of(values).weights(np.ones(40), 0.0)
    assert weight_d[3] == 0


def test_the_solution_is_that_of_the_primal_problem() -> None:
    values, unsafe_n = sample(40, shift=0.5)
    weights_n = np.random.default_rng(1).uniform(0.2, 3, size=40)
    standard = Standardised.of(values)
    alpha_n, bias = solve(standard.kernel(), unsafe_n, weights_n, ridge=0.3)
    # minimise Σ w (z v + b - y)² + λ d ‖v‖² by its normal equations, b without penalty
    z = np.c_[standard.values_nd.astype(float), np.ones(40)]
    y = np.where(unsafe_n, 1.0, -1.0)
    penalty = 0.3 * 30 * np.diag([1.0] * 30 + [0.0])
    solution = np.linalg.solve((z.T * weights_n) @ z + penalty, (z.T * weights_n) @ y)
    weight_d, offset = standard.weights(alpha_n, bias)
    assert np.allclose(values @ weight_d + offset, z @ solution, atol=1e-4)
    assert np.allclose(standard.kernel() @ alpha_n + bias, z @ solution, atol=1e-4)
    assert alpha_n.sum() == pytest.approx(0, abs=1e-9)


def test_rows_without_weight_change_nothing() -> None:
    values, unsafe_n = sample(30, shift=0.5)
    kernel_nn = Standardised.of(values).kernel()
    alpha_n, bias = solve(kernel_nn, unsafe_n, np.where(np.arange(30) < 20, 1.0, 0.0), 1.0)
    fewer_n, same = solve(kernel_nn[:20, :20], unsafe_n[:20], np.ones(20), 1.0)
    assert np.allclose(alpha_n[:20], fewer_n)
    assert bias == pytest.approx(same)
    assert not alpha_n[20:].any()


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
        (train, unsafe_n), (test, test_unsafe_n) = sample(300, 1, shift), sample(300, 2, shift)
        standard = Standardised.of(train)
        weight_d, bias = standard.weights(*solve(standard.kernel(), unsafe_n, np.ones(300), 1.0))
        score_n = test @ weight_d + bias
        assert low <= auc(score_n[test_unsafe_n], score_n[~test_unsafe_n]) <= high


def held_out_of(values: np.ndarray, rows: Rows, ridge: float = 1.0) -> dict[str, float]:
    scores = scores_without(rows, Standardised.of(values).kernel(), ridge)
    return {each["source"]: each["auc"]["benign"] for each in figures(rows, scores)}


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
    assert all(value > 0.9 for value in held_out_of(alike, rows).values())
    found = held_out_of(apart, rows)
    assert set(found) == {"one", "two"}
    assert all(0.2 < value < 0.75 for value in found.values())


def test_no_row_is_scored_by_a_fit_that_saw_its_prompt() -> None:
    # as many coordinates as rows: a fit knows by heart what it saw, and nothing else
    rng = np.random.default_rng(3)
    unsafe_n, prompts = rng.random(60) < 0.5, np.arange(60) // 2
    unsafe_n = unsafe_n[prompts]  # the rows of a prompt are of one kind
    values = rng.normal(size=(30, 30))[prompts] + 0.01 * rng.normal(size=(60, 30))
    source_n = np.where(unsafe_n, "one", "benign")

    def measured(prompt_n: np.ndarray) -> float:
        return held_out_of(values, Rows(unsafe_n, source_n, np.ones(60), prompt_n), 0.01)["one"]

    assert measured(np.arange(60)) > 0.9  # equal prompts on both sides: they are recognised
    assert measured(prompts) < 0.8


def test_weighted_quantiles() -> None:
    values, weights = np.array([3.0, 1.0, 2.0]), np.array([1.0, 1.0, 8.0])
    assert weighted_quantile(values, weights, 0.1) == 1
    assert weighted_quantile(values, weights, 0.5) == 2
    assert weighted_quantile(values, weights, 0.95) == 3
    assert weighted_quantile(values, np.ones(3), 1.0) == 3
