"""The grid of α is exact, and a direction steers only where no other could have done it."""

from __future__ import annotations

from decimal import Decimal
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sqsd_filter.directions.steering.curves import parse_alphas, steers, trend
from sqsd_filter.errors import UsageError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("-1:1:0.25", "-1 -0.75 -0.5 -0.25 0 0.25 0.5 0.75 1"),
        ("0:0.3:0.1", "0 0.1 0.2 0.3"),
        ("0.5:1:0.25", "0 0.5 0.75 1"),
        ("-1,0.5,1", "-1 0 0.5 1"),
        ("1, -1, 1.0", "-1 0 1"),
        ("2", "0 2"),
        ("1:1:1", "0 1"),
        ("-1e-1:.1:.1", "-0.1 0 0.1"),
    ],
)
def test_a_range_has_both_its_ends_and_zero(text: str, expected: str) -> None:
    assert [float(a) for a in parse_alphas(text)] == [float(word) for word in expected.split()]


@given(st.integers(-50, 50), st.integers(1, 100), st.integers(1, 40))
def test_no_value_of_a_range_drifts(start: int, steps: int, step: int) -> None:
    text = f"{start / 100}:{(start + steps * step) / 100}:{step / 100}"
    exact = {Fraction(start + k * step, 100) for k in range(steps + 1)} | {Fraction(0)}
    assert [Fraction(a) for a in parse_alphas(text)] == sorted(exact)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "must be start:stop:step or a list"),
        ("a:b:c", "must be start:stop:step or a list"),
        ("-1:1", "must be start:stop:step, such as"),
        ("-1:1:0", "by a step above 0"),
        ("-1:1:-0.5", "by a step above 0"),
        ("1:-1:0.5", "must go up"),
        ("0:1:0.3", "does not end at 1"),
        ("0:1:1e-9", "more than 1000 steps"),
        ("0", "other than 0"),
        ("0,-0", "other than 0"),
        ("nan", "finite"),
        ("sNaN,1", "finite"),
        ("-inf:inf:1", "finite"),
        ("1e999", "finite"),
    ],
)
def test_a_senseless_range_is_refused(text: str, why: str) -> None:
    with pytest.raises(UsageError, match=why):
        parse_alphas(text)


def test_zero_is_one_point_however_it_is_written() -> None:
    assert parse_alphas("-0.0,0,0.00,1") == [Decimal(0), Decimal(1)]


def test_a_trend_tells_strict_courses_from_plateaus_and_returns() -> None:
    alphas = [-1.0, 0.0, 1.0, 2.0]
    assert trend(alphas, [1, 2, 3, 4], 1) == {
        "monotone": True,
        "against": 0,
        "spearman": pytest.approx(1),
        "change": 3.0,
    }
    assert trend(alphas, [4, 3, 3, 1], -1)["monotone"] is False
    assert trend(alphas, [4, 3, 3, 1], -1)["against"] == 0
    assert trend(alphas, [4, 3, 5, 1], -1)["against"] == 1
    assert trend(alphas, [1, 2, 3, 4], -1)["against"] == 3
    unknown = {"monotone": False, "against": None, "spearman": None, "change": None}
    assert trend(alphas, [1, None, 3, 4], 1) == unknown


ALPHAS = [-1.0, -0.5, 0.0, 0.5, 1.0]
RISING = [-2.0, -1.0, 0.0, 1.0, 2.0]


@pytest.mark.parametrize(
    ("values", "sign", "random", "expected"),
    [
        (RISING, 1, [0.1, -0.2, 0.0], True),
        (RISING[::-1], -1, [0.1, -0.2, 0.0], True),
        (RISING, -1, [0.1, -0.2, 0.0], False),  # the wrong way
        (RISING, 1, [0.1, -1.4, 0.0], False),  # any direction does that
        ([-2.0, 5.0, -5.0, 1.0, 2.0], 1, [0.0], False),  # not steadily
        ([0.0] * 5, 1, [0.0], False),  # nothing happens
        ([-2.0, None, 0.0, 1.0, 2.0], 1, [0.0], False),
        (RISING, 1, [0.1, None], False),
    ],
)
def test_a_direction_steers_if_the_margin_follows_it_as_no_random_one(
    values: list[float | None], sign: int, random: list[float | None], expected: bool
) -> None:
    assert steers(trend(ALPHAS, values, sign), sign, random) is expected
