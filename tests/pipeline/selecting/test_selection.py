"""Where to cut: exact shares, exact ties, one cut at a time."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sqsd_filter.errors import UsageError
from sqsd_filter.pipeline.selecting.groups import Groups
from sqsd_filter.pipeline.selecting.selection import DROPPED, ERROR, KEPT, Cut, cut_rows, parse_share

RISK = np.array([0.5, 0.1, 0.9, 0.5, np.nan, 0.5, -0.2])
SCORED = np.isfinite(RISK)


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("5%", Fraction(1, 20)),
        (" 5 PCT ", Fraction(1, 20)),
        ("0.05", Fraction(1, 20)),
        (0.05, Fraction(1, 20)),
        ("0.1%", Fraction(1, 1000)),
        ("1e-3", Fraction(1, 1000)),
        ("0", Fraction(0)),
        ("100%", Fraction(1)),
        (1.0, Fraction(1)),
        (Fraction(1, 3), Fraction(1, 3)),
    ],
    ids=str,
)
def test_a_share_is_read_exactly(text: Any, share: Fraction) -> None:
    assert parse_share(text) == share


@pytest.mark.parametrize("text", ["5", 5, 1, "1", "50.5", 2.0], ids=repr)
def test_a_bare_number_names_both_of_its_readings(text: Any) -> None:
    fix = rf"write drop_top \(--drop-top\) {text}% or drop_count \(--drop-count\) {text}\."
    with pytest.raises(UsageError, match=rf"{text}% or {text} rows: {fix}"):
        parse_share(text)


@pytest.mark.parametrize("text", ["", "%", "five", "nan", "inf", "1/0", "0,05", "-5%", "-0.1", "101%", "5%%", True])
def test_what_is_no_share_is_a_usage_error(text: Any) -> None:
    with pytest.raises(UsageError, match="is not a share"):
        parse_share(text)


@given(
    risks=st.lists(st.integers(-3, 3).map(lambda k: k / 7) | st.just(math.nan), max_size=40),
    thousandths=st.integers(0, 1000),
)
def test_a_share_drops_the_ceiling_of_it_as_sorting_by_risk_and_row_would(risks: list[float], thousandths: int) -> None:
    risk = np.array(risks, dtype=np.float64)
    scored = np.isfinite(risk)
    share = Fraction(thousandths, 1000)
    selection = cut_rows(risk, scored, Cut.of(drop_top=f"{thousandths / 10}%"))

    order = sorted(np.flatnonzero(scored).tolist(), key=lambda row: (-risk[row], row))
    k = -(-share.numerator * len(order) // share.denominator)
    assert np.flatnonzero(selection.fate == DROPPED).tolist() == sorted(order[:k])
    assert np.flatnonzero(selection.fate == KEPT).tolist() == sorted(order[k:])
    assert np.array_equal(selection.fate == ERROR, ~scored)
    assert selection.threshold == (risk[order[k - 1]] if k else None)
    assert selection.ties == sum(risk[row] == selection.threshold for row in order[k:])


@pytest.mark.parametrize(
    ("cut", "dropped", "threshold", "ties"),
    [
        ({"drop_top": "50%"}, [0, 2, 3], 0.5, 1),
        ({"drop_top": "1%"}, [2], 0.9, 0),
        ({"drop_top": "100%"}, [0, 1, 2, 3, 5, 6], -0.2, 0),
        ({"drop_top": "0%"}, [], None, 0),
        ({"drop_count": 2}, [0, 2], 0.5, 2),
        ({"drop_count": 99}, [0, 1, 2, 3, 5, 6], -0.2, 0),
        ({"keep_lowest": 3}, [0, 2, 3], 0.5, 1),
        ({"keep_lowest": 99}, [], None, 0),
        ({"max_risk": 0.5}, [2], 0.9, 0),
        ({"max_risk": 0.49}, [0, 2, 3, 5], 0.5, 0),
        ({"max_risk": 7}, [], None, 0),
    ],
    ids=str,
)
def test_each_cut_drops_the_riskiest_and_of_equals_the_earlier(
    cut: dict[str, Any], dropped: list[int], threshold: float | None, ties: int
) -> None:
    selection = cut_rows(RISK, SCORED, Cut.of(**cut))
    assert np.flatnonzero(selection.fate == DROPPED).tolist() == dropped
    assert np.flatnonzero(selection.fate == ERROR).tolist() == [4]
    assert (selection.threshold, selection.ties) == (threshold, ties)


@pytest.mark.parametrize("apart", [{}, {"per_group": "g"}, {"per_split": True}, {"weights": True}], ids=str)
def test_where_no_row_has_a_score_nothing_is_cut(apart: dict[str, Any]) -> None:
    groups = Groups(np.zeros(3, dtype=np.int32), ["a"])
    selection = cut_rows(
        np.full(3, np.nan),
        np.zeros(3, dtype=bool),
        Cut.of(drop_top="50%", **apart),
        groups if "per_split" in apart else None,
        groups if "per_group" in apart else None,
    )
    assert selection.fate.tolist() == [ERROR] * 3
    assert (selection.threshold, selection.ties, selection.spared) == (None, 0, 0)


@pytest.mark.parametrize(
    ("cut", "named"),
    [
        ({}, ["drop_top", "drop_count", "max_risk", "keep_lowest", "above_reference"]),
        ({"drop_top": "5%", "drop_count": 3}, ["drop_top", "drop_count"]),
        ({"max_risk": 1, "above_reference": "99%"}, ["max_risk", "above_reference"]),
        *(({"max_risk": risk}, ["max_risk"]) for risk in (math.nan, -math.inf, "x", [1], 10**400)),
        *(({"drop_count": count}, ["drop_count"]) for count in (-1, 2.7, "x", "1/0", math.nan, math.inf, [1])),
        ({"keep_lowest": -1}, ["keep_lowest"]),
    ],
    ids=lambda value: str(value)[:40],
)
def test_no_cut_two_cuts_and_senseless_ones_are_usage_errors(cut: dict[str, Any], named: list[str]) -> None:
    with pytest.raises(UsageError) as error:
        Cut.of(**cut)
    assert all(f"{name} (--{name.replace('_', '-')})" in str(error.value) for name in named)


def test_whole_numbers_of_any_kind_count_rows() -> None:
    assert [Cut.of(drop_count=count).value for count in (3, np.int64(3), 3.0, "3")] == [3] * 4  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("cut", "text"),
    [
        ({"drop_top": 0.05}, "drop-top 5%"),
        ({"drop_top": "5.0000001%"}, "drop-top 5.0000001%"),
        ({"drop_count": 1234567}, "drop-count 1234567"),
        ({"keep_lowest": 0}, "keep-lowest 0"),
        ({"max_risk": 0.12345678}, "max-risk 0.12345678"),
        ({"above_reference": "99.5%", "per_split": True}, "above-reference 99.5%, per-split"),
        ({"drop_count": 3, "per_split": True, "weights": True}, "drop-count 3, per-split, weights"),
        ({"drop_count": 3, "per_group": "per-split"}, 'drop-count 3, per-group "per-split"'),
        ({"drop_count": 3, "per_group": 'a", weights "é'}, 'drop-count 3, per-group "a\\", weights \\"é"'),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_cut_is_named_so_that_no_two_share_a_name(cut: dict[str, Any], text: str) -> None:
    assert str(Cut.of(**cut)) == text
