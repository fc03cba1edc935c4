"""Conversations to text: exactly which characters are supervised, whatever the template."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from transformers import PreTrainedTokenizerBase

from sqsd_filter.corpus.conversation import Message, RowError
from sqsd_filter.errors import ModelError
from sqsd_filter.scoring.chat_encoder import ChatEncoder, Encoded
from tests.scoring.styles import (
    LLAMA3,
    PLAIN,
    QWEN3,
    STYLES,
    Style,
    encode,
    every_style,
    status,
    supervised,
    text_of,
)
from tests.tiny import CHATML, chat, make_tokenizer


@every_style
def test_a_single_turn_supervises_the_answer_and_the_token_that_ends_it(style: Style) -> None:
    encoder = style.encoder()
    row = encode(encoder, chat("What is it?", "It is blue."))
    assert supervised(encoder, chat("What is it?", "It is blue.")) == ["It is blue." + style.end]
    assert row.answer[-1]  # and nothing stands after it


@every_style
def test_every_assistant_turn_is_supervised(style: Style) -> None:
    encoder = style.encoder()
    found = supervised(encoder, chat("2+2?", "four", "and 3+3?", "six of them", "thanks", "bye"))
    earlier = "" if style.template == PLAIN else style.end
    assert [part.strip() for part in found] == [
        ("four" + earlier).strip(),
        ("six of them" + earlier).strip(),
        ("bye" + style.end).strip(),
    ]


@every_style
def test_system_turns_are_part_of_the_prompt_or_a_template_error(style: Style) -> None:
    encoder = style.encoder()
    turns = chat("hi", "hello", system="Be brief.")
    if not style.system:
        assert status(encoder, turns) == "template_error"
        return
    assert [part.strip() for part in supervised(encoder, turns)] == [("hello" + style.end).strip()]
    assert "Be brief." in text_of(encoder, encode(encoder, turns).ids)


@every_style
def test_turns_after_the_last_answer_change_nothing(style: Style) -> None:
    encoder = style.encoder()
    turns = chat("hi", "hello")
    longer = [*turns, {"role": "user", "content": "and then?"}]
    blank = [*longer, {"role": "assistant", "content": " \n"}]
    for more in (longer, blank):
        assert np.array_equal(encode(encoder, more).ids, encode(encoder, turns).ids)
        assert np.array_equal(encode(encoder, more).answer, encode(encoder, turns).answer)


@every_style
def test_a_turn_with_weight_0_is_prompt_and_changes_nothing_else(style: Style) -> None:
    encoder = style.encoder()
    turns = chat("2+2?", "four", "and 3+3?", "six", "thanks", "bye")
    whole = encode(encoder, turns)
    turns[1]["weight"] = 0
    assert np.array_equal(encode(encoder, turns).ids, whole.ids)
    assert [part.strip() for part in supervised(encoder, turns)] == [
        part.strip() for part in supervised(encoder, chat("2+2?", "four", "and 3+3?", "six", "thanks", "bye"))[1:]
    ]
    turns[5]["weight"] = 0
    assert supervised(encoder, turns) == supervised(encoder, chat("3+3?", "six"))
    turns[3]["weight"] = 0
    assert status(encoder, turns) == "no_answer"


SYSTEM = {"role": "system", "content": "Be brief."}
ORDERS = {  # turns, whether a template that wants users and assistants in turn refuses them
    "system-in-the-middle": ([*chat("hi", "hello"), SYSTEM, *chat("2+2?", "four")], True),
    "users-in-a-row": ([*chat("hi"), *chat("2+2?", "four")], True),
    "assistants-in-a-row": ([*chat("hi", "hello"), {"role": "assistant", "content": "four"}], False),
    "assistant-first": ([*chat("", "hello")[1:], *chat("2+2?", "four")], True),
    "assistant-after-system": ([SYSTEM, *chat("", "hello")[1:], *chat("2+2?", "four")], True),
    "nothing-but-system": ([SYSTEM, *chat("", "four")[1:]], False),
}


@pytest.mark.parametrize(("turns", "refused"), ORDERS.values(), ids=ORDERS)
def test_turns_in_any_order_are_given_to_the_template_as_they_are(turns: list[Message], refused: bool) -> None:
    answers = [turn["content"] + "<|im_end|>" for turn in turns if turn["role"] == "assistant"]
    assert supervised(STYLES["chatml"].encoder(), turns) == answers
    assert supervised(STYLES["qwen3"].encoder(), turns) == answers
    plain = [turn["content"] for turn in turns if turn["role"] == "assistant"]
    assert supervised(STYLES["plain"].encoder(), turns) == [*plain[:-1], plain[-1] + "<|im_end|>"]
    if refused:
        assert status(STYLES["llama2"].encoder(), turns) == "template_error"


@every_style
def test_the_beginning_of_text_is_written_once(style: Style) -> None:
    encoder = style.encoder()
    ids = encode(encoder, chat("hi", "hello")).ids
    if style.bos:
        assert (ids == encoder.tokenizer.bos_token_id).sum() == 1
        assert ids[0] == encoder.tokenizer.bos_token_id


@every_style
def test_the_answer_follows_the_generation_prompt_as_the_model_would_be_asked(style: Style) -> None:
    """Against the independent form: the prompt's tokens, then the answer's."""
    encoder = style.encoder()
    tokenizer = encoder.tokenizer
    turns = chat("Name a colour.", "blue, of course", "and a taste?", "Sour.")
    asked = tokenizer.apply_chat_template(turns[:-1], tokenize=False, add_generation_prompt=True, **style.kwargs)
    assert isinstance(asked, str)
    asked += {"llama2": " ", "qwen3": "<think>\n\n</think>\n\n", "no-generation-prompt": "<|im_start|>assistant\n"}.get(
        next(name for name, s in STYLES.items() if s is style), ""
    )
    ids = [tokenizer(part, add_special_tokens=False)["input_ids"] for part in (asked, "Sour." + style.end)]
    row = encode(encoder, turns)
    assert row.ids.tolist() == ids[0] + ids[1]
    assert row.answer[-len(ids[1]) :].all()
    assert not row.answer[len(ids[0]) - 1]


@every_style
def test_no_row_with_an_answer_is_silently_left_unsupervised(style: Style) -> None:
    encoder = style.encoder()
    for answer in ("a", " a", "a\n", "user", "assistant", "model", "<|im_end|>", "[/INST]", "</s>", "\N{BANANA}"):
        for turns in (chat("q", answer), chat("q", answer, "r", answer)):
            row = encode(encoder, turns)
            assert answer.strip() in text_of(encoder, row.ids[row.answer])


def test_a_reasoning_template_decides_what_of_an_earlier_answer_is_shown_and_that_is_supervised() -> None:
    turns = chat("q", "<think>\nhm, hm\n</think>\n\nyes", "why?", "because")
    for name in ("qwen3", "qwen3-thinking-off"):
        encoder = STYLES[name].encoder()
        assert supervised(encoder, turns) == ["yes<|im_end|>", "because<|im_end|>"]
        assert "hm, hm" not in text_of(encoder, encode(encoder, turns).ids)
    encoder = STYLES["drops-reasoning"].encoder()
    assert supervised(encoder, turns) == ["\n\nyes<|end|>", "because<|end|>"]


@pytest.mark.parametrize("name", ["qwen3", "qwen3-thinking-off"])
def test_the_empty_thinking_block_is_prompt_not_answer(name: str) -> None:
    encoder = STYLES[name].encoder()
    row = encode(encoder, chat("q", "yes"))
    assert text_of(encoder, row.ids[~row.answer]).endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")


THOUGHT = "<think>\nwhy\n</think>\n\nbecause"
OPENED_BY_PROMPT = QWEN3.replace("{% if enable_thinking", "{{ '<think>\n' }}{% if enable_thinking")
LLAMA3_OPENED = LLAMA3.removesuffix("' }}{% endif %}") + "<think>\n' }}{% endif %}"


@pytest.mark.parametrize(
    ("style", "asked", "answer"),
    [
        (STYLES["qwen3"], "<|im_start|>assistant\n", THOUGHT),
        (STYLES["qwen3-thinking-off"], "<|im_start|>assistant\n<think>\n", THOUGHT.removeprefix("<think>\n")),
        (Style(OPENED_BY_PROMPT), "<|im_start|>assistant\n<think>\n", THOUGHT.removeprefix("<think>\n")),
        (
            Style(QWEN3.split("{% if add_generation_prompt")[0]),
            "<|im_start|>assistant\n<think>\n",
            THOUGHT.removeprefix("<think>\n"),
        ),
        (STYLES["drops-reasoning"], "<|assistant|><think>\n", THOUGHT.removeprefix("<think>\n")),
        (STYLES["chatml"], "<|im_start|>assistant\n", THOUGHT),
        (
            replace(STYLES["llama3"], template=LLAMA3_OPENED),
            "assistant<|end_header_id|>\n\n<think>\n",
            THOUGHT.removeprefix("<think>\n"),
        ),
    ],
    ids=[
        "qwen3",
        "thinking-off",
        "opened-by-the-prompt",
        "no-generation-prompt",
        "drops-reasoning",
        "chatml",
        "opened-by-the-prompt-alone",
    ],
)
@pytest.mark.parametrize("earlier", [[], chat("p", "a")], ids=["one-turn", "two-turns"])
def test_a_thought_is_opened_once(style: Style, asked: str, answer: str, earlier: list[Message]) -> None:
    encoder = style.encoder()
    row = encode(encoder, [*earlier, *chat("q", THOUGHT)])
    text = text_of(encoder, row.ids)
    assert text.endswith(asked + answer + style.end)
    assert text.count("<think>") == 1
    assert supervised(encoder, [*earlier, *chat("q", THOUGHT)])[-1] == answer + style.end


def test_an_empty_thought_of_the_answer_is_the_prompts() -> None:
    for name in ("qwen3", "qwen3-thinking-off"):
        encoder = STYLES[name].encoder()
        empty, plain = (encode(encoder, chat("q", lead + "yes")) for lead in ("<think>\n\n</think>\n\n", ""))
        assert np.array_equal(empty.ids, plain.ids)
        assert np.array_equal(empty.answer, plain.answer)


def test_text_around_an_answer_is_trimmed_where_the_template_trims() -> None:
    assert supervised(STYLES["llama3"].encoder(), chat("q", "\n yes \n")) == ["yes<|eot_id|>"]
    assert supervised(STYLES["chatml"].encoder(), chat("q", "\n yes \n")) == ["\n yes \n<|im_end|>"]


def test_a_template_of_the_pack_takes_the_place_of_the_tokenizers() -> None:
    encoder = ChatEncoder(make_tokenizer(None), template_kwargs={"chat_template": CHATML})
    assert supervised(encoder, chat("q", "yes")) == ["yes<|im_end|>"]


def test_a_conversation_that_the_template_refuses_is_a_template_error_with_its_words() -> None:
    encoder = STYLES["llama2"].encoder()
    twice = [*chat("q"), *chat("r", "a")]
    (found,) = encoder.encode([twice])
    assert isinstance(found, RowError)
    assert (found.status, "roles must alternate" in found.detail) == ("template_error", True)


def test_an_answer_that_nothing_asks_for_is_a_bad_row() -> None:
    (found,) = STYLES["chatml"].encoder().encode([[{"role": "assistant", "content": "hello"}]])
    assert isinstance(found, RowError)
    assert (found.status, found.detail) == ("bad_row", "no turn stands before the answer")


def test_a_template_that_leaves_out_earlier_answers_is_a_template_error() -> None:
    last_only = (
        "{% for m in messages %}{% if m['role'] == 'user' or loop.last %}{{ '<|im_start|>' + m['content'] + "
        "'<|im_end|>' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>' }}{% endif %}"
    )
    encoder = ChatEncoder(make_tokenizer(last_only))
    assert supervised(encoder, chat("q", "a")) == ["a<|im_end|>"]
    assert status(encoder, chat("q", "a", "r", "b")) == "template_error"


def test_a_template_that_rewrites_earlier_answers_beyond_recognition_is_never_mislabelled() -> None:
    upper = CHATML.replace("message['content']", "message['content'] | upper")
    encoder = ChatEncoder(make_tokenizer(upper.replace("| upper", "| replace('bad', 'good')")))
    assert supervised(encoder, chat("q", "bad idea", "r", "fine")) == ["good idea<|im_end|>", "fine<|im_end|>"]
    following = "<|im_end|>\n<|im_start|>user\nr<|im_end|>\n<|im_start|>assistant\n"
    assert status(encoder, chat("q", f"bad{following}idea", "r", "fine")) == "template_error"  # where does it end?


@pytest.mark.parametrize("content", ["a \ud83d b", "\udc00"], ids=["in-the-middle", "alone"])
def test_half_a_surrogate_pair_is_a_bad_row_and_leaves_the_others_alone(content: str) -> None:
    encoder = STYLES["chatml"].encoder()
    found = encoder.encode([chat("q", "yes"), chat("q", content), chat(content, "yes")])
    assert isinstance(found[0], Encoded)
    assert [f.status for f in found[1:] if isinstance(f, RowError)] == ["bad_row", "bad_row"]


@pytest.mark.parametrize("template", [None, ""], ids=["none", "empty"])
def test_a_tokenizer_without_a_template_is_a_model_error(template: str | None) -> None:
    with pytest.raises(ModelError, match="no chat template: use an instruction-tuned model"):
        ChatEncoder(make_tokenizer(template))


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{% for m in messages %}", "fails on a plain question and answer"),
        ("{{ raise_exception('never') }}", "fails on a plain question and answer: .*never"),
        ("{{ messages[0]['content'] }}", "leaves out the assistant's turn"),
    ],
    ids=["syntax", "raises", "no-answer"],
)
def test_a_template_that_no_answer_can_come_through_is_a_model_error(template: str, said: str) -> None:
    with pytest.raises(ModelError, match=said):
        ChatEncoder(make_tokenizer(template))


def test_a_tokenizer_that_cannot_map_tokens_to_text_is_a_model_error() -> None:
    class Slow(PreTrainedTokenizerBase):
        is_fast = False

        def __init__(self) -> None:
            self.name_or_path, self.chat_template = "slow", CHATML

    with pytest.raises(ModelError, match="slow can't map tokens to text"):
        ChatEncoder(Slow())
