"""Which rows models are trained on: windows along the risk, and the arms of a cut."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sqsd_filter.errors import UsageError
from sqsd_filter.evaluation.sets import TrainingSet, by_risk, cut_sets, match_tokens, windows


@given(st.integers(2, 7), st.integers(1, 20), st.integers(0, 200))
def test_windows_are_apart_and_equally_spaced_from_the_riskiest_row_to_the_safest(
    count: int, size: int, more: int
) -> None:
    ranked = np.random.default_rng(0).permutation(count * size + more)
    sets = windows(ranked, count, size)
    assert len(sets) == count
    assert {len(window) for window in sets} == {size}
    assert sets[0].tolist() == ranked[:size].tolist()
    assert sets[-1].tolist() == ranked[-size:].tolist()
    assert len(np.unique(np.concatenate(sets))) == count * size
    starts = [ranked.tolist().index(window[0]) for window in sets]
    least = size + more // (count - 1)
    assert {b - a for a, b in pairwise(starts)} <= {least, least + 1}


def test_windows_that_would_overlap_are_refused() -> None:
    with pytest.raises(UsageError, match="5 windows of 3 rows are 15 rows, but only 14"):
        windows(np.arange(14), 5, 3)


def test_rows_are_ranked_by_risk_and_equal_risks_stay_in_row_order() -> None:
    risk = np.array([0.5, np.nan, 0.9, 0.5, 0.1, 0.9])
    assert by_risk(risk, np.array([0, 2, 3, 4, 5])).tolist() == [2, 5, 0, 3, 4]


@given(st.lists(st.lists(st.integers(1, 30), min_size=6, max_size=6), min_size=2, max_size=5))
def test_matched_sets_have_the_same_tokens_and_all_their_rows(lengths: list[list[int]]) -> None:
    sets = [TrainingSet(np.arange(6), np.array(own)) for own in lengths]
    matched = match_tokens(sets)
    assert {each.total for each in matched} == {min(map(sum, lengths))}
    for before, after in zip(sets, matched, strict=True):
        assert after.rows is before.rows
        assert (after.tokens >= 1).all()
        assert (after.tokens <= before.tokens).all()
        cut = after.tokens[after.tokens < before.tokens]
        assert len(cut) == 0 or after.tokens.max() <= cut.min() + 1  # one length, and one token more for some


def test_the_arms_of_a_cut_share_out_the_rows() -> None:
    ranked = np.random.default_rng(1).permutation(41)
    arms = {name: rows.tolist() for name, rows in cut_sets(ranked, Fraction(1, 10), 3).items()}
    assert arms["dropped"] == ranked[: math.ceil(4.1)].tolist()
    assert arms["dropped"] + arms["kept"] == arms["all"] == ranked.tolist()
    assert len(set(arms["random"])) == len(arms["random"]) == len(arms["kept"]) == 36
    assert set(arms["random"]) < set(arms["all"])
    assert set(arms["random"]) != set(arms["kept"])
    assert arms["random"] != cut_sets(ranked, Fraction(1, 10), 4)["random"].tolist()


def test_a_set_is_known_by_its_rows_tokens_and_seed_whatever_the_order() -> None:
    tokens = np.arange(10, 20)
    one, same = (TrainingSet.of(np.array(rows), tokens) for rows in ([3, 1, 2], [1, 2, 3]))
    assert one.key(0) == same.key(0)
    assert one.total == 11 + 12 + 13
    assert len({one.key(0), one.key(1), TrainingSet(one.rows, one.tokens - 1).key(0), one.key(2)}) == 4
