"""Why a row is risky, in words: runs of layers, phrases, and what each probe adds."""

from __future__ import annotations

from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sqsd_filter.pipeline.reasons import layers_in_words, probes_in_words, riskiest_phrases, words_of
from sqsd_filter.scoring.explain import Explanation


def part(risk: float) -> dict[str, Any]:
    return {"risk": risk, "probes": {"danger": risk / 4, "safety": 3 * risk / 4}}


def explanation(tokens: list[tuple[str, float]] = [], layers: list[float] = [], **more: Any) -> Explanation:  # noqa: B006
    return cast(
        "Explanation",
        {
            "tokens": [{"text": text, **part(risk)} for text, risk in tokens],
            "layers": [{"layer": layer, **part(risk)} for layer, risk in enumerate(layers)],
            **more,
        },
    )


@given(st.lists(st.tuples(st.text(max_size=4), st.floats(-1, 1)), max_size=30))
def test_words_have_all_of_the_text_and_all_of_the_risk(tokens: list[tuple[str, float]]) -> None:
    words = words_of(explanation(tokens))
    assert "".join(word for word, _ in words) == "".join(text for text, _ in tokens)
    assert sum(risk for _, risk in words) == pytest.approx(sum(risk for _, risk in tokens), abs=1e-9)


def test_tokens_become_words_where_white_space_begins() -> None:
    tokens = [("I", 1.0), (" ob", 2.0), ("ey", 3.0), (".", 0.5), ("\n", 0.0), ("Now", 1.0), ("<|im_end|>", 9.0)]
    assert words_of(explanation(tokens)) == [
        ("I", 1.0),
        (" obey.", 5.5),
        ("\n", 0.0),
        ("Now", 1.0),
        ("<|im_end|>", 9.0),
    ]


def test_phrases_stop_at_punctuation_and_share_no_word() -> None:
    tokens = [("Sure", 3.0), (".", 0.0), (" I", 1.0), (" obey", 2.0), (",", 0.0), (" never", 0.1), (" mind", -5.0)]
    assert riskiest_phrases(explanation([*tokens, ("<|im_end|>", 9.0)]), 5) == [("Sure", 3.0), ("I obey", 3.0)]


def test_phrases_that_carry_little_are_not_named() -> None:
    tokens = [("Sure", 10.0), (",", 0.0), (" I", 1.9), (",", 0.0), (" can", 2.1)]
    assert riskiest_phrases(explanation(tokens), 5) == [("Sure", 10.0), ("can", 2.1)]


@pytest.mark.parametrize(
    ("layers", "said"),
    [
        ([0, 1, 4, 4, 1], "80 % of its risk arises in layers 2 to 3 (safety +6.00, danger +2.00)"),
        ([0, 8, 1, 1], "80 % of its risk arises in layer 1 (safety +6.00, danger +2.00)"),
        ([3, -9, 3, 4], "most of its risk arises in layer 3 (safety +3.00, danger +1.00)"),
        ([-1, -2], ""),
        ([], ""),
    ],
    ids=["run", "one", "none", "low", "without"],
)
def test_the_shortest_run_of_layers_with_half_of_the_risk_is_named(layers: list[float], said: str) -> None:
    assert layers_in_words(explanation(layers=layers)) == (said if sum(layers) > 0 else "")


def test_a_linear_probe_adds_to_what_every_row_has() -> None:
    own = explanation(layers=[0.2], bias=-1.0, prompt=part(0.75), answer=part(0.5))
    own["layers"][0]["layer"] = 20
    assert layers_in_words(own) == (
        "the prompt adds +0.75 and the answer +0.50 to the -1.00 of every row, most of it read at layer 20"
    )


def test_probes_are_named_by_what_they_add() -> None:
    said = probes_in_words({"danger": 7.0, "safety": -34.7}, {"danger": 1.0, "safety": -1.0})
    assert said == "its risk adds up from safety +34.70, danger +7.00"
    assert probes_in_words({"unsafe": 1.0}, {"unsafe": 1.0}) == ""
    assert probes_in_words({"danger": 7.0, "safety": 1.0}, {}) == ""
