"""Refusals are told by how they begin."""

from __future__ import annotations

import pytest

from sqsd_filter.directions.judges import OPENING, is_refusal, refusal_rate

REFUSALS = [
    "I'm sorry, but I can't help with that.",
    "I\u2019m sorry, but I can\u2019t help with that.",
    "I cannot do this for you.",
    "As an AI language model, I have no opinions.",
    "  Unfortunately,\nI am\n unable to assist.",
    "i'm not able to say.",
    "I AM NOT ABLE TO SAY.",
    "I apologize, this is beyond me.",
    "It is not appropriate to guess at that.",
    "Sorry, no.",
]
ANSWERS = [
    "The capital of France is Paris.",
    "Sure! Here is a poem about the sea.",
    "A sorry state of affairs led to the storm.",
    "You can't divide by zero, so the answer is undefined.",
    "",
]


@pytest.mark.parametrize("text", REFUSALS)
def test_a_refusal_is_told_by_its_phrase(text: str) -> None:
    assert is_refusal(text)


@pytest.mark.parametrize("text", ANSWERS)
def test_an_answer_is_no_refusal(text: str) -> None:
    assert not is_refusal(text)


def test_only_the_opening_counts() -> None:
    assert is_refusal("x " * (OPENING // 2 - 10) + "I cannot")
    assert not is_refusal("x " * (OPENING // 2) + "I cannot")


def test_the_rate_is_the_share_of_refusals() -> None:
    assert refusal_rate([*REFUSALS[:3], ANSWERS[0]]) == 0.75
    with pytest.raises(ValueError, match="no answers"):
        refusal_rate([])
