"""Long conversations: tokenising stops where the limit is surely reached, with the same tokens."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sqsd_filter.scoring import chat_encoder
from sqsd_filter.scoring.chat_encoder import ChatEncoder
from tests.scoring.styles import STYLES, Style, encode, status
from tests.tiny import chat, make_tokenizer

LIMIT = 40
words = st.lists(
    st.sampled_from(["the ", "quick", " brown", "\n\n", "é", "  ", "<|im_end|>", "0123", "👩"]), max_size=400
)


@given(words=words, where=st.sampled_from(["question", "answer"]))
@settings(deadline=None)
def test_tokens_are_those_of_the_whole_text(words: list[str], where: str) -> None:
    text = "".join(words)
    turns = chat(text, "short") if where == "question" else chat("short", text + "x")
    with pytest.MonkeyPatch.context() as patched:
        expected = ChatEncoder(make_tokenizer(), LIMIT).encode([turns])
        patched.setattr(chat_encoder, "CHARACTERS", 2)
        patched.setattr(chat_encoder, "MARGIN", 64)
        found = ChatEncoder(make_tokenizer(), LIMIT).encode([turns, chat("q", "a"), turns])
    for given_row in (found[0], found[2]):
        assert str(given_row) == str(expected[0])


@pytest.mark.parametrize("style", STYLES.values(), ids=STYLES)
def test_an_answer_of_millions_of_characters_takes_no_longer_than_its_beginning(style: Style) -> None:
    encoder, answer = style.encoder(512), "the lazy dog " * 250_000
    began = time.perf_counter()
    row = encode(encoder, chat("q", answer))
    assert time.perf_counter() - began < 5
    assert len(row) == 512
    short = encode(encoder, chat("q", answer[:20_000]))
    assert np.array_equal(row.ids, short.ids)
    assert np.array_equal(row.answer, short.answer)


def test_a_question_of_millions_of_characters_leaves_no_room() -> None:
    assert status(ChatEncoder(make_tokenizer(), 512), chat("the lazy dog " * 250_000, "a")) == "prompt_too_long"
