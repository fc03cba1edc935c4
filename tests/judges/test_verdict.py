"""The tokens of a guard's verdict, by the tokenizer alone."""

from __future__ import annotations

import numpy as np
import pytest

from sqsd_filter.judges.verdict import LEADS, ROOM, Verdict
from tests.tiny import make_tokenizer

TOKENIZER = make_tokenizer()


def tokens(text: str) -> list[int]:
    ids: list[int] = TOKENIZER(text)["input_ids"]
    return ids


@pytest.mark.parametrize("lead", LEADS, ids=repr)
@pytest.mark.parametrize("prompt", ["Is it safe?<|im_start|>", "Is it safe? It j"], ids=["apart", "merging"])
def test_the_words_follow_the_prompt_and_the_lead_in(prompt: str, lead: str) -> None:
    verdict = Verdict.after(prompt, lead, TOKENIZER)
    awaited = verdict.awaited(np.array(tokens(prompt)))
    assert TOKENIZER.decode(awaited) == prompt + lead
    assert awaited[: len(tokens(prompt))].tolist() == tokens(prompt)
    assert len(verdict.lead) <= ROOM
    assert [TOKENIZER.decode([token]) for token in (verdict.safe, verdict.unsafe)] == ["s", "u"]


def test_the_end_of_a_prompt_may_merge_with_a_word() -> None:
    assert tokens("It j") != tokens("It junsafe")[: len(tokens("It j"))]
