"""Agreement between judges, against scikit-learn's and a count by hand."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import cohen_kappa_score, confusion_matrix

from sqsd_filter.judges import OUTCOMES, agreement

pairs = st.lists(st.tuples(st.sampled_from(OUTCOMES), st.sampled_from(OUTCOMES)), min_size=1, max_size=30)


def test_a_small_table_is_as_counted_by_hand() -> None:
    first = ["refused", "refused", "unsafe", "unsafe"]
    second = ["refused", "unsafe", "unsafe", "unsafe"]
    (found,) = agreement({"one": first, "other": second})
    assert (found.first, found.second, found.answers, found.share) == ("one", "other", 4, 0.75)
    assert found.kappa == pytest.approx((0.75 - 0.5) / (1 - 0.5))
    assert found.table["refused"] == {"refused": 1, "unsafe": 1, "degenerate": 0, "harmless": 0}
    report = found.report()
    assert report["judges"] == ["one", "other"]
    assert report["table"]["unsafe"]["unsafe"] == 2


@settings(deadline=None, max_examples=40)
@given(pairs)
def test_share_kappa_and_table_are_those_of_scikit_learn(outcomes: list[tuple[str, str]]) -> None:
    first, second = map(list, zip(*outcomes, strict=True))
    (found,) = agreement({"one": first, "other": second})
    assert [list(row.values()) for row in found.table.values()] == confusion_matrix(
        first, second, labels=list(OUTCOMES)
    ).tolist()
    assert found.share == sum(a == b for a, b in outcomes) / len(outcomes)
    if len({*first, *second}) == 1:
        assert found.kappa is None
    else:
        assert found.kappa == pytest.approx(cohen_kappa_score(first, second, labels=list(OUTCOMES)), abs=1e-12)


def test_all_pairs_of_judges_are_compared_in_their_order() -> None:
    outcomes = {name: ["unsafe", "harmless"] for name in "cab"}
    assert [(a.first, a.second) for a in agreement(outcomes)] == [("c", "a"), ("c", "b"), ("a", "b")]
    assert agreement({"alone": ["unsafe"]}) == []


@pytest.mark.parametrize(
    ("outcomes", "cause"),
    [
        pytest.param({"a": [], "b": []}, "a has no outcomes", id="no answers"),
        pytest.param({"a": ["unsafe"], "b": ["bad"]}, "b has .* others than refused", id="an unknown outcome"),
        pytest.param({"a": ["unsafe"], "b": ["unsafe", "refused"]}, "longer", id="other answers"),
    ],
)
def test_what_can_t_be_compared_is_refused(outcomes: dict[str, list[str]], cause: str) -> None:
    with pytest.raises(ValueError, match=cause):
        agreement(outcomes)
