"""Conversations to tokens: exactly which tokens are supervised."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from sqsd_filter.corpus.conversation import Message, RowError
from sqsd_filter.scoring.chat_encoder import ChatEncoder, Encoded
from tests.scoring.styles import (
    LLAMA2,
    STYLES,
    conversations,
    encode,
    status,
    supervised,
    text_of,
)
from tests.tiny import CHATML, chat, make_tokenizer

# ---------------------------------------------------------------------------------------------- tokens on the border


def trained(text: str, **parts: Any) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    for name, part in parts.items():
        setattr(tokenizer, name, part)
    alphabet = pre_tokenizers.ByteLevel.alphabet() if "pre_tokenizer" not in parts else []
    trainer = trainers.BpeTrainer(
        vocab_size=420, initial_alphabet=alphabet, special_tokens=["<s>", "</s>"], show_progress=False, min_frequency=2
    )
    tokenizer.train_from_iterator([text] * 8, trainer)
    return tokenizer


def fast(tokenizer: Tokenizer, template: str, *special: str) -> PreTrainedTokenizerFast:
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    wrapped.add_special_tokens({"additional_special_tokens": list(special)})
    wrapped.chat_template = template
    return wrapped


def test_whitespace_is_supervised_though_the_tokenizer_trims_it_from_its_offsets() -> None:
    tokenizer = fast(
        trained("a b\n\nc d\n\n  e", post_processor=processors.ByteLevel(trim_offsets=True)),
        CHATML,
        "<|im_start|>",
        "<|im_end|>",
    )
    assert supervised(ChatEncoder(tokenizer), chat("q", " a\n\n  c \n")) == [" a\n\n  c \n<|im_end|>"]


def test_a_sentencepiece_answer_begins_with_its_word_and_no_earlier() -> None:
    words = "the answer is blue and [INST] what [/INST] a ? . </s>"
    tokenizer = trained(
        words,
        pre_tokenizer=pre_tokenizers.Metaspace(prepend_scheme="first", split=True),
        decoder=decoders.Metaspace(prepend_scheme="first"),
    )
    encoder = ChatEncoder(fast(tokenizer, LLAMA2))
    turns = chat("what is a?", "the answer is blue.", "what is the answer?", "blue")
    row = encode(encoder, turns)
    pieces = encoder.tokenizer.convert_ids_to_tokens(row.ids[row.answer].tolist())
    assert "".join(pieces) == "▁the▁answer▁is▁blue.▁</s>▁blue▁</s>"
    assert (row.ids[row.answer] == encoder.tokenizer.eos_token_id).sum() == 2


def test_a_marker_that_swallows_the_space_after_it_is_never_supervised() -> None:
    """Phi-3's markers strip what follows them, an answer's leading newlines too."""
    from tokenizers import AddedToken

    template = (
        "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
    )
    tokenizer = make_tokenizer(template)
    marks = [AddedToken(t, rstrip=True, special=True) for t in ("<|user|>", "<|assistant|>", "<|end|>")]
    tokenizer.add_special_tokens({"additional_special_tokens": marks, "eos_token": "<|im_end|>"})
    encoder = ChatEncoder(tokenizer)
    row = encode(encoder, chat("q", "\n\nyes", "r", "\nno"))
    marker = encoder.tokenizer.convert_tokens_to_ids("<|assistant|>")
    assert marker in row.ids
    assert marker not in row.ids[row.answer]
    assert text_of(encoder, row.ids[row.answer]) == "yes<|end|>no<|end|>"


def test_a_token_that_holds_prompt_and_answer_counts_as_answer() -> None:
    tokenizer = fast(trained("assistant\n\nuser\n\n"), CHATML, "<|im_start|>", "<|im_end|>")
    found = supervised(ChatEncoder(tokenizer), chat("q", "\nyes"))
    assert found[-1].endswith("\nyes<|im_end|>")
    assert found[-1].strip("\n") == "yes<|im_end|>"


# ---------------------------------------------------------------------------------------------- length


@pytest.mark.parametrize("name", ["chatml", "llama3", "llama2"])
def test_a_long_answer_keeps_its_head(name: str) -> None:
    style = STYLES[name]
    turns = chat("Count.", " ".join(str(k) for k in range(200)))
    whole, cut = encode(style.encoder(), turns), encode(style.encoder(max_length=80), turns)
    assert len(whole) > 200
    assert len(cut) == 80
    assert np.array_equal(cut.ids, whole.ids[:80])
    assert np.array_equal(cut.answer, whole.answer[:80])
    assert cut.answer[-1]


def test_a_prompt_that_leaves_no_room_for_an_answer_is_prompt_too_long() -> None:
    turns = chat("word " * 50, "yes")
    whole = encode(STYLES["chatml"].encoder(), turns)
    prompt = int(np.flatnonzero(whole.answer)[0])
    assert status(STYLES["chatml"].encoder(max_length=prompt), turns) == "prompt_too_long"
    barely = encode(STYLES["chatml"].encoder(max_length=prompt + 1), turns)
    assert barely.answer.tolist() == [False] * prompt + [True]


def test_a_row_of_exactly_the_longest_length_is_whole() -> None:
    turns = chat("q", "yes")
    length = len(encode(STYLES["chatml"].encoder(), turns))
    assert len(encode(STYLES["chatml"].encoder(max_length=length), turns)) == length


def test_earlier_answers_still_count_when_the_last_one_is_cut_off() -> None:
    turns = chat("q", "yes", "word " * 100, "no")
    encoder = STYLES["chatml"].encoder(max_length=60)
    assert supervised(encoder, turns) == ["yes<|im_end|>"]


# ----------------------------------------------------------------------------- any conversation at all

ENCODERS = {name: STYLES[name].encoder() for name in ("chatml", "llama3", "generation-markers", "no-generation-prompt")}


@pytest.mark.parametrize("name", ENCODERS)
@settings(max_examples=120, deadline=None)
@given(turns=conversations)
def test_the_supervised_tokens_are_the_answers_and_their_ends(name: str, turns: list[Message]) -> None:
    encoder, style = ENCODERS[name], STYLES[name]
    answers = [t["content"] for t in turns if t["role"] == "assistant" and t["content"].strip()]
    (found,) = encoder.encode([turns])
    if not answers:
        assert isinstance(found, RowError)
        assert found.status == "no_answer"
        return
    assert isinstance(found, Encoded)
    expected = "".join((a.strip() if style.trims else a) + style.end for a in answers)
    assert text_of(encoder, found.ids[found.answer]) == expected


@pytest.mark.parametrize("name", ["chatml", "llama3"])
@settings(max_examples=80, deadline=None)
@given(turns=conversations, max_length=st.integers(2, 150))
def test_a_shorter_length_only_ever_cuts_the_tail(name: str, turns: list[Message], max_length: int) -> None:
    encoder = ENCODERS[name]
    (whole,) = encoder.encode([turns])
    encoder.max_length = max_length
    try:
        (cut,) = encoder.encode([turns])
    finally:
        encoder.max_length = 1024
    if isinstance(whole, RowError):
        assert isinstance(cut, RowError)
        assert cut.status == whole.status
    elif not whole.answer[:max_length].any():
        assert isinstance(cut, RowError)
        assert cut.status == "prompt_too_long"
    else:
        assert isinstance(cut, Encoded)
        assert np.array_equal(cut.ids, whole.ids[:max_length])
        assert np.array_equal(cut.answer, whole.answer[:max_length])


def test_conversations_are_encoded_the_same_together_and_alone() -> None:
    encoder = STYLES["chatml"].encoder()
    rows = [chat("q", "yes"), chat("no answer"), chat("2+2?", "4", "3+3?", "6"), chat("q", "word " * 50)]
    for alone, together in zip((encoder.encode([r])[0] for r in rows), encoder.encode(rows), strict=True):
        if isinstance(together, Encoded):
            assert isinstance(alone, Encoded)
            assert np.array_equal(alone.ids, together.ids)
            assert np.array_equal(alone.answer, together.answer)
        else:
            assert isinstance(alone, RowError)
            assert alone.status == together.status
