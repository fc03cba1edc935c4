"""The estimate of false alarms and of unsafe rows that remain: right on average, and its intervals hold the truth."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sqsd_filter.pipeline.planted import Above, estimate
from sqsd_filter.pipeline.report import Interval

TIMES = 400


def holds(interval: Interval, truth: float) -> bool:
    return interval["low"] <= truth <= interval["high"]


SIZES = {"many": (2000, 600, 200), "few": (300, 300, 100)}  # rows of the corpus and of the references
GRID = list(product((0.0, 0.005, 0.03, 0.3), ((0.01, 0.3), (0.05, 0.7)), SIZES))
FAST = GRID[::3]


@pytest.mark.parametrize(
    ("planted", "shares", "size"), [pytest.param(*at, marks=[pytest.mark.slow] * (at not in FAST)) for at in GRID]
)
def test_the_intervals_hold_the_truth_in_95_of_100_simulated_corpora(
    planted: float, shares: tuple[float, float], size: str
) -> None:
    (rows, benign_rows, unsafe_rows), (b, u) = SIZES[size], shares
    rng = np.random.default_rng(7)
    held = np.zeros(3)
    errors, truths = np.zeros(2), np.zeros(2)
    for _ in range(TIMES):
        unsafe = rng.binomial(rows, planted)
        alarms, found = rng.binomial(rows - unsafe, b), rng.binomial(unsafe, u)
        benign, bad = (Above(int(rng.binomial(n, share)), n) for n, share in ((benign_rows, b), (unsafe_rows, u)))
        figures = estimate(Above(alarms + found, rows), benign, bad, draws=1000)
        assert figures is not None
        left = unsafe - found
        held += [
            holds(figures["false_alarms"], alarms),
            holds(figures["remaining"], left),
            holds(figures["share"], planted),
        ]
        errors += [figures["false_alarms"]["estimate"] - alarms, figures["remaining"]["estimate"] - left]
        truths += [alarms, left]
    tolerance = 3 * (0.95 * 0.05 / TIMES) ** 0.5
    assert (held / TIMES > 0.95 - tolerance).all()
    if planted >= 0.03 and rows == 2000:  # near the ends of their range, intervals are wider and estimates biased
        assert (held / TIMES < 0.95 + tolerance).all()
        assert (np.abs(errors) < 0.15 * truths).all()


def test_wrong_intervals_would_be_caught() -> None:
    """Without the reference's own sampling error, the intervals hold the truth far too rarely."""
    rng, held = np.random.default_rng(0), 0
    for _ in range(TIMES):
        alarms, found = rng.binomial(19_000, 0.01), rng.binomial(1000, 0.7)
        b, u = rng.binomial(300, 0.01) / 300, rng.binomial(100, 0.7) / 100
        exact = Above(round(b * 10**7), 10**7), Above(round(u * 10**7), 10**7)
        figures = estimate(Above(alarms + found, 20_000), *exact, draws=500)
        held += figures is not None and holds(figures["false_alarms"], alarms)
    assert held / TIMES < 0.6


def test_a_known_mixture_by_hand() -> None:
    figures = estimate(Above(200, 10_000), Above(10, 1000), Above(510, 1000))
    assert figures is not None
    assert (figures["benign_above"], figures["unsafe_above"]) == (0.01, 0.51)
    assert figures["share"]["estimate"] == pytest.approx(0.02)  # 0.02 = 0.98 · 0.01 + 0.02 · 0.51
    assert figures["false_alarms"]["estimate"] == pytest.approx(98)
    assert figures["remaining"]["estimate"] == pytest.approx(98)  # 200 unsafe rows, of which 102 were found
    assert figures == estimate(Above(200, 10_000), Above(10, 1000), Above(510, 1000))


def test_a_cleaner_corpus_than_the_reference_has_no_unsafe_rows() -> None:
    figures = estimate(Above(2, 10_000), Above(10, 1000), Above(500, 1000))
    assert figures is not None
    assert figures["share"] == {"estimate": 0.0, "low": 0.0, "high": pytest.approx(0.0, abs=1e-3)}
    assert figures["false_alarms"]["estimate"] == 2
    assert figures["remaining"]["estimate"] == 0


def test_a_threshold_that_tells_nothing_gives_no_estimate() -> None:
    assert estimate(Above(50, 100), Above(5, 10), Above(5, 10)) is None
    assert estimate(Above(0, 100), Above(0, 10), Above(0, 10)) is None


@settings(deadline=None, max_examples=60)
@given(
    counts=st.tuples(*(st.integers(1, 300).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))) for _ in "abc"))
)
def test_estimates_are_possible_counts_within_their_intervals(counts: tuple[tuple[int, int], ...]) -> None:
    corpus, benign, unsafe = (Above(*each) for each in counts)
    figures = estimate(corpus, benign, unsafe, draws=200)
    if figures is None:
        assert unsafe.share <= benign.share
        return
    most = {"share": 1.0, "false_alarms": corpus.above, "remaining": corpus.rows - corpus.above}
    for name, limit in most.items():
        interval: Interval = figures[name]  # type: ignore[literal-required]  # the keys are PlantedFigures'
        assert 0 <= interval["low"] <= interval["estimate"] <= interval["high"] <= limit + 1e-9
