"""Known unsafe rows mixed into benign ones: precision, AUC, average precision and curves."""

from __future__ import annotations

import numpy as np
import pytest

from sqsd_filter.evaluation.poison import DRAWN_AT, POINTS, RATES, curves, draw_mix, mix_figures
from sqsd_filter.statistics import auc


def alone(unsafe: np.ndarray) -> np.ndarray:
    """A prompt of its own for each unsafe row."""
    return np.arange(len(unsafe))


def test_a_score_that_tells_them_apart_finds_all() -> None:
    unsafe = np.linspace(2, 3, 40)
    figures = mix_figures(np.linspace(0, 1, 300), unsafe, alone(unsafe) // 4, draws=20)
    assert list(figures) == ["0.01", "0.05", "0.1", "0.2"]
    assert [(each["benign"], each["unsafe"]) for each in figures.values()] == [
        (300, 3),
        (300, 16),
        (300, 33),
        (300, 75),
    ]
    for rate, each in zip(RATES, figures.values(), strict=True):
        assert each["unsafe"] / (300 + each["unsafe"]) == pytest.approx(rate, abs=0.002)
        assert each["prompts"] == 10
        for estimate in (each["precision"], each["recall"], each["auc"], each["average_precision"]):
            assert (estimate["mean"], *estimate["ci"]) == pytest.approx((1, 1, 1))


@pytest.mark.parametrize("constant", [False, True], ids=["noise", "all equal"])
def test_a_score_that_says_nothing_finds_what_chance_does(constant: bool) -> None:
    random = np.random.default_rng(0)
    benign, unsafe = (np.zeros(n) if constant else random.normal(size=n) for n in (2000, 500))
    for rate, each in zip(RATES, mix_figures(benign, unsafe, alone(unsafe), draws=100).values(), strict=True):
        assert each["precision"] == each["recall"]
        assert each["precision"]["mean"] == pytest.approx(rate, abs=0.001 if constant else 0.02)
        assert each["auc"]["mean"] == pytest.approx(0.5, abs=0.03)
        assert each["average_precision"]["mean"] == pytest.approx(rate, abs=0.05)
        for figures in (each["precision"], each["auc"], each["average_precision"]):
            low, high = figures["ci"]
            assert low - 1e-12 <= figures["mean"] <= high + 1e-12


@pytest.mark.parametrize("ties", [False, True])
def test_a_draw_is_what_others_make_of_the_rows_in_it(ties: bool) -> None:
    sklearn = pytest.importorskip("sklearn.metrics")
    random = np.random.default_rng(4)
    benign, unsafe = random.normal(size=200), random.normal(1, size=30)
    if ties:
        benign, unsafe = benign.round(), unsafe.round()
    values, at = np.unique(-np.concatenate([benign, unsafe]), return_inverse=True)
    drawn = draw_mix(at[:200], at[200:], alone(unsafe), len(values), 50, np.random.default_rng(5))
    again = np.random.default_rng(5)  # what is drawn, row by row
    taken = again.multinomial(30, np.full(30, 1 / 30))
    mix = np.repeat(unsafe, again.multinomial(50, taken / 30))
    risk = np.concatenate([mix, benign[again.integers(200, size=200)]])
    is_unsafe = np.arange(250) < 50
    assert drawn.auc == pytest.approx(sklearn.roc_auc_score(is_unsafe, risk))
    assert drawn.average_precision == pytest.approx(sklearn.average_precision_score(is_unsafe, risk))
    orders = [np.lexsort([np.random.default_rng(k).random(250), -risk]) for k in range(4000)]
    precision = np.mean([is_unsafe[order[:50]].mean() for order in orders])
    assert drawn.precision == pytest.approx(precision, abs=0.003 if ties else 1e-9)


def test_many_answers_to_few_prompts_say_no_more_than_the_prompts() -> None:
    random = np.random.default_rng(6)
    benign, prompts = random.normal(size=500), np.repeat(np.arange(8), 50)
    unsafe = random.normal(1, 1, size=8)[prompts] + 0.01 * random.normal(size=400)
    few, many = (
        mix_figures(benign, unsafe, those, draws=100)["0.1"]["auc"]["ci"] for those in (prompts, alone(unsafe))
    )
    assert few[1] - few[0] > 2 * (many[1] - many[0])


def test_the_same_seed_draws_the_same_and_another_does_not() -> None:
    benign, unsafe = np.random.default_rng(1).normal(size=(2, 200))
    one, same, other = (mix_figures(benign, unsafe + 1, alone(unsafe), seed, draws=10) for seed in (0, 0, 1))
    assert one == same != other


@pytest.mark.parametrize("ties", [False, True])
def test_curves_are_those_of_every_threshold(ties: bool) -> None:
    random = np.random.default_rng(2)
    benign, unsafe = random.normal(size=70), random.normal(0.7, size=30)
    if ties:
        benign, unsafe = benign.round(1), unsafe.round(1)
    shown = curves(benign, unsafe)
    thresholds = sorted({*benign, *unsafe}, reverse=True)
    points = [(np.mean(benign >= t), np.mean(unsafe >= t)) for t in thresholds]
    assert len(thresholds) < POINTS
    assert np.allclose(shown["roc"], [(0, 0), *points])
    assert np.trapezoid(*np.array(shown["roc"]).T[::-1]) == pytest.approx(auc(unsafe, benign))
    weights = np.array([(DRAWN_AT * true, (1 - DRAWN_AT) * false) for false, true in points])
    assert np.allclose(shown["pr"], np.column_stack([np.array(points)[:, 1], weights[:, 0] / weights.sum(1)]))


def test_curves_of_many_rows_have_few_points_where_they_matter() -> None:
    random = np.random.default_rng(3)
    benign, unsafe = random.normal(size=50_000), random.normal(2, size=900)
    roc = np.array(curves(benign, unsafe)["roc"])
    assert len(roc) <= POINTS + 1
    assert roc[-1].tolist() == [1, 1]
    assert np.trapezoid(roc[:, 1], roc[:, 0]) == pytest.approx(auc(unsafe, benign), abs=1e-3)
    assert np.abs(np.diff(roc, axis=0)).max() < 0.02
