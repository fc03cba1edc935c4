"""Known unsafe rows among benign ones: what is found of them."""

from __future__ import annotations

import numpy as np
import pytest

from sqsd_filter.evaluation.poison import DRAWN_AT, POINTS, RATES, curves, poisoned
from sqsd_filter.statistics import auc


def test_a_score_that_tells_them_apart_finds_all() -> None:
    found = poisoned(np.linspace(0, 1, 300), np.linspace(2, 3, 40), draws=20)
    assert list(found) == ["0.01", "0.05", "0.1", "0.2"]
    assert [(each["benign"], each["unsafe"]) for each in found.values()] == [(300, 3), (300, 16), (300, 33), (300, 75)]
    for rate, each in zip(RATES, found.values(), strict=True):
        assert each["unsafe"] / (300 + each["unsafe"]) == pytest.approx(rate, abs=0.002)
        for name in ("precision", "recall", "auc", "average_precision"):
            assert each[name] == {"mean": 1.0, "ci": [1.0, 1.0]}


@pytest.mark.parametrize("constant", [False, True], ids=["noise", "all equal"])
def test_a_score_that_says_nothing_finds_what_chance_does(constant: bool) -> None:
    random = np.random.default_rng(0)
    benign, unsafe = (np.zeros(n) if constant else random.normal(size=n) for n in (2000, 500))
    for rate, each in zip(RATES, poisoned(benign, unsafe, draws=100).values(), strict=True):
        assert each["precision"] == each["recall"]
        assert each["precision"]["mean"] == pytest.approx(rate, abs=0.02)
        assert each["auc"]["mean"] == pytest.approx(0.5, abs=0.03)
        assert each["average_precision"]["mean"] == pytest.approx(rate, abs=0.05)
        for figures in (each["precision"], each["auc"], each["average_precision"]):
            low, high = figures["ci"]
            assert low - 1e-12 <= figures["mean"] <= high + 1e-12


def test_the_same_seed_draws_the_same_and_another_does_not() -> None:
    benign, unsafe = np.random.default_rng(1).normal(size=(2, 200))
    one, same, other = (poisoned(benign, unsafe + 1, seed, draws=10) for seed in (0, 0, 1))
    assert one == same != other


@pytest.mark.parametrize("ties", [False, True])
def test_curves_are_those_of_every_threshold(ties: bool) -> None:
    random = np.random.default_rng(2)
    benign, unsafe = random.normal(size=70), random.normal(0.7, size=30)
    if ties:
        benign, unsafe = benign.round(1), unsafe.round(1)
    found = curves(benign, unsafe)
    thresholds = sorted({*benign, *unsafe}, reverse=True)
    points = [(np.mean(benign >= t), np.mean(unsafe >= t)) for t in thresholds]
    assert len(thresholds) < POINTS and np.allclose(found["roc"], [(0, 0), *points])
    assert np.trapezoid(*np.array(found["roc"]).T[::-1]) == pytest.approx(auc(unsafe, benign))
    weights = np.array([(DRAWN_AT * true, (1 - DRAWN_AT) * false) for false, true in points])
    assert np.allclose(found["pr"], np.column_stack([np.array(points)[:, 1], weights[:, 0] / weights.sum(1)]))


def test_curves_of_many_rows_have_few_points_where_they_matter() -> None:
    random = np.random.default_rng(3)
    benign, unsafe = random.normal(size=50_000), random.normal(2, size=900)
    found = np.array(curves(benign, unsafe)["roc"])
    assert len(found) <= POINTS + 1 and found[-1].tolist() == [1, 1]
    assert np.trapezoid(found[:, 1], found[:, 0]) == pytest.approx(auc(unsafe, benign), abs=1e-3)
    assert np.abs(np.diff(found, axis=0)).max() < 0.02
