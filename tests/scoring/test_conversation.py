"""Rows to conversations to tokens: which formats are read, and exactly which tokens are supervised."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from sqsd_filter.errors import InputError, ModelError
from sqsd_filter.scoring.conversation import (
    ChatEncoder,
    Encoded,
    Message,
    RowError,
    RowFormat,
    choose_format,
    conversation_key,
)
from tests.tiny import CHATML, chat, make_tokenizer

# ---------------------------------------------------------------------------------------------- rows


TURNS = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
SHAREGPT = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]

ROWS: dict[str, tuple[dict[str, Any], str, str]] = {  # row, the format's name, the prompt it makes
    "messages": ({"messages": TURNS, "id": 1}, "messages", "q"),
    "conversations": ({"conversations": SHAREGPT}, "conversations", "q"),
    "conversations-with-roles": ({"conversations": TURNS}, "conversations", "q"),
    "alpaca": ({"instruction": "q", "output": "a"}, "alpaca", "q"),
    "alpaca-with-input": ({"instruction": "q", "input": "c", "output": "a"}, "alpaca", "q\nc"),
    "dolly": ({"instruction": "q", "context": "c", "response": "a", "category": "x"}, "alpaca", "q\nc"),
    "alpaca-with-empty-input": ({"instruction": "q", "input": "", "output": "a"}, "alpaca", "q"),
    "alpaca-with-null-input": ({"instruction": "q", "input": None, "output": "a"}, "alpaca", "q"),
    "prompt-completion": ({"prompt": "q", "completion": "a"}, "prompt-completion", "q"),
    "prompt-response": ({"prompt": "q", "response": "a"}, "prompt-completion", "q"),
    "question-answer": ({"question": "q", "answer": "a"}, "question-answer", "q"),
}


@pytest.mark.parametrize(("row", "name", "prompt"), ROWS.values(), ids=ROWS)
def test_each_row_format_is_recognised_by_its_columns(row: dict[str, Any], name: str, prompt: str) -> None:
    form = choose_format([row])
    assert form.name == name
    assert form.conversation(row) == chat(prompt, "a")


def test_columns_that_only_some_rows_have_are_seen_too() -> None:
    rows = [{"instruction": "q", "output": "a"}, {"instruction": "q", "input": "c", "output": "a"}]
    assert choose_format(rows).context == "input"


def test_unreadable_lines_of_the_sample_are_passed_over() -> None:
    assert choose_format([None, {"question": "q", "answer": "a"}]).name == "question-answer"  # type: ignore[list-item]


def test_the_context_joins_the_instruction_with_one_newline_and_nothing_is_trimmed() -> None:
    row = {"instruction": "sum up \n", "input": "\n a text", "output": " short "}
    assert choose_format([row]).conversation(row) == chat("sum up \n\n\n a text", " short ")


OVERRIDES: dict[str, tuple[dict[str, Any], dict[str, str], RowFormat]] = {
    "prompt-and-answer": (
        {"ask": "q", "reply": "a"},
        {"prompt": "ask", "answer": "reply"},
        RowFormat("custom", prompt="ask", answer="reply"),
    ),
    "with-context": (
        {"ask": "q", "about": "c", "reply": "a"},
        {"prompt": "ask", "context": "about", "answer": "reply"},
        RowFormat("custom", prompt="ask", context="about", answer="reply"),
    ),
    "only-the-answer": (
        {"instruction": "q", "output": "a", "better": "b"},
        {"answer": "better"},
        RowFormat("alpaca", prompt="instruction", answer="better"),
    ),
    "only-the-context": (
        {"instruction": "q", "input": "c", "context": "d", "output": "a"},
        {"context": "context"},
        RowFormat("alpaca", prompt="instruction", context="context", answer="output"),
    ),
    "only-the-prompt": (
        {"ask": "q", "response": "a"},
        {"prompt": "ask"},
        RowFormat("alpaca", prompt="ask", answer="response"),
    ),
    "messages": ({"dialogue": TURNS}, {"messages": "dialogue"}, RowFormat("messages", messages="dialogue")),
    "format-conversations": (
        {"messages": TURNS, "conversations": SHAREGPT},
        {"name": "conversations"},
        RowFormat("conversations", messages="conversations"),
    ),
    "format-prompt-completion": (
        {"prompt": "q", "completion": "a", "messages": TURNS},
        {"name": "prompt-completion"},
        RowFormat("prompt-completion", prompt="prompt", answer="completion"),
    ),
}


@pytest.mark.parametrize(("row", "given_by_user", "expected"), OVERRIDES.values(), ids=OVERRIDES)
def test_what_the_user_names_decides(row: dict[str, Any], given_by_user: dict[str, str], expected: RowFormat) -> None:
    assert choose_format([row], **given_by_user) == expected


BAD_CHOICES: dict[str, tuple[dict[str, Any], dict[str, str], tuple[str, ...]]] = {  # the message names all of these
    "two-answers": (
        {"instruction": "q", "output": "a", "response": "b"},
        {},
        ("'output'", "'response'", "--answer-column"),
    ),
    "two-contexts": (
        {"instruction": "q", "input": "c", "context": "d", "output": "a"},
        {},
        ("'input'", "'context'", "--context-column"),
    ),
    "two-formats": (
        {"messages": TURNS, "question": "q", "answer": "a"},
        {},
        ("'messages'", "'question'", "--format messages or question-answer"),
    ),
    "no-format": ({"text": "q", "label": 1}, {}, ("'text'", "'label'", "--prompt-column", "--messages-column")),
    "messages-that-are-text": ({"messages": "hello"}, {}, ("'messages'", "--prompt-column")),
    "no-column-at-all": ({}, {}, ("(none)",)),
    "named-format-misses": ({"text": "q"}, {"name": "alpaca"}, ("alpaca", "'text'", "--prompt-column")),
    "unknown-column": ({"text": "q"}, {"prompt": "txt"}, ("--prompt-column", "'txt'", "'text'")),
    "unknown-messages": ({"text": "q"}, {"messages": "chat"}, ("--messages-column", "'chat'", "'text'")),
    "messages-and-answer": (
        {"chat": TURNS, "a": "b"},
        {"messages": "chat", "answer": "a"},
        ("--messages-column", "--answer-column"),
    ),
}


@pytest.mark.parametrize(("row", "given_by_user", "named"), BAD_CHOICES.values(), ids=BAD_CHOICES)
def test_a_choice_that_cannot_be_made_names_the_columns_and_the_flag(
    row: dict[str, Any], given_by_user: dict[str, str], named: tuple[str, ...]
) -> None:
    with pytest.raises(InputError) as problem:
        choose_format([row], **given_by_user)
    for text in named:
        assert text in str(problem.value)


def test_an_input_without_rows_is_an_input_error() -> None:
    with pytest.raises(InputError, match="No readable row"):
        choose_format([])


@pytest.mark.parametrize(
    ("said", "role"),
    [
        ("system", "system"),
        ("user", "user"),
        ("human", "user"),
        ("assistant", "assistant"),
        ("gpt", "assistant"),
        ("model", "assistant"),
        ("bot", "assistant"),
        ("tool", "tool"),
    ],
)
@pytest.mark.parametrize("keys", [("role", "content"), ("from", "value")], ids=["role-content", "from-value"])
def test_roles_go_by_several_names(said: str, role: str, keys: tuple[str, str]) -> None:
    name, text = keys
    row = {"messages": [{name: said, text: "x"}, {name: "assistant", text: "a"}]}
    assert RowFormat("messages", messages="messages").conversation(row)[0] == {"role": role, "content": "x"}


MESSAGES = RowFormat("messages", messages="messages")
ALPACA = RowFormat("alpaca", prompt="instruction", context="input", answer="output")
UNREADABLE: dict[str, tuple[RowFormat, dict[str, Any], str, str]] = {  # format, row, status, what its detail names
    "no-answer-null": (ALPACA, {"instruction": "q", "output": None}, "no_answer", "'output'"),
    "no-answer-missing": (ALPACA, {"instruction": "q"}, "no_answer", "'output'"),
    "no-answer-blank": (ALPACA, {"instruction": "q", "output": " \n"}, "no_answer", "'output'"),
    "no-answer-turns-null": (MESSAGES, {"messages": None}, "no_answer", "'messages'"),
    "no-answer-turns-empty": (MESSAGES, {"messages": []}, "no_answer", "'messages'"),
    "no-answer-user-only": (MESSAGES, {"messages": TURNS[:1]}, "no_answer", "'messages'"),
    "no-answer-assistant-null": (
        MESSAGES,
        {"messages": [TURNS[0], {"role": "assistant", "content": None}]},
        "no_answer",
        "'messages'",
    ),
    "prompt-missing": (ALPACA, {"output": "a"}, "bad_row", "'instruction'"),
    "answer-number": (ALPACA, {"instruction": "q", "output": 4}, "bad_row", "int"),
    "context-list": (ALPACA, {"instruction": "q", "input": ["c"], "output": "a"}, "bad_row", "'input'"),
    "turns-text": (MESSAGES, {"messages": "hello"}, "bad_row", "str"),
    "turn-text": (MESSAGES, {"messages": ["hello"]}, "bad_row", "turn 1"),
    "unknown-role": (MESSAGES, {"messages": [TURNS[0], {"role": "narrator", "content": "x"}]}, "bad_row", "'narrator'"),
    "no-role": (MESSAGES, {"messages": [{"content": "x"}]}, "bad_row", "None"),
    "role-not-text": (MESSAGES, {"messages": [{"role": ["user"], "content": "x"}]}, "bad_row", "role"),
    "user-without-content": (MESSAGES, {"messages": [{"role": "user"}, TURNS[1]]}, "bad_row", "turn 1"),
    "content-parts": (MESSAGES, {"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "bad_row", "list"),
}


@pytest.mark.parametrize(("form", "row", "status", "named"), UNREADABLE.values(), ids=UNREADABLE)
def test_a_row_that_holds_no_conversation_says_why(form: RowFormat, row: dict, status: str, named: str) -> None:
    with pytest.raises(RowError) as problem:
        form.conversation(row)
    assert problem.value.status == status
    assert named in problem.value.detail


def test_a_conversation_is_read_whatever_else_the_turns_hold() -> None:
    turns = [{**TURNS[0], "id": 7, "weight": None}, {"role": "assistant", "content": "a", "value": "ignored"}]
    assert MESSAGES.conversation({"messages": turns}) == TURNS


def test_equal_conversations_share_a_key_whatever_format_they_came_in() -> None:
    keys = {
        conversation_key(choose_format([row]).conversation(row)) for row, _, prompt in ROWS.values() if prompt == "q"
    }
    assert len(keys) == 1
    assert len(keys.pop()) == 16


@pytest.mark.parametrize(
    "other",
    [chat("q", "a "), chat("q", "b"), chat("a", "q"), chat("q", "a", system="s"), chat("q", "a", "q"), chat("qa", "")],
    ids=["space", "answer", "swapped", "system", "longer", "moved-boundary"],
)
def test_different_conversations_have_different_keys(other: list[Message]) -> None:
    assert conversation_key(other) != conversation_key(chat("q", "a"))


# ---------------------------------------------------------------------------------------------- templates


@dataclass(frozen=True)
class Style:
    """A chat template as found in the wild, and what it is to make of an answer."""

    template: str
    special: tuple[str, ...] = ()
    bos: str | None = None
    eos: str = "<|im_end|>"
    end: str = "<|im_end|>"  # what is supervised after an answer
    trims: bool = False
    system: bool = True
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    def encoder(self, max_length: int = 1024) -> ChatEncoder:
        tokenizer = make_tokenizer(self.template)
        named = {"eos_token": self.eos} | ({"bos_token": self.bos} if self.bos else {})
        tokenizer.add_special_tokens({**named, "additional_special_tokens": ["<|im_start|>", *self.special]})
        if self.bos:  # as Llama's and Gemma's tokenizers do: they write a BOS unless told not to
            tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
                single=f"{self.bos} $A", special_tokens=[(self.bos, tokenizer.bos_token_id)]
            )
        return ChatEncoder(tokenizer, max_length, self.kwargs)


LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + "
    "m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set system = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}"
    "{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}{% for m in messages %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + (system if loop.first else '') + m['content'] | trim + "
    "' [/INST]' }}{% else %}{{ ' ' + m['content'] | trim + ' ' + eos_token }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for m in messages %}{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
# Reasoning is shown in the last turn only, and an empty block is put there where the answer has none.
QWEN3 = (
    "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m['role'] == 'user' %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{% set content = m['content'] %}{% if m['role'] != 'assistant' %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + content + '<|im_end|>\n' }}{% else %}{% set thought = '' %}"
    "{% if '</think>' in content %}"
    "{% set thought = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{% if loop.index0 > ns.last and (loop.last or thought) %}"
    "{{ '<|im_start|>assistant\n<think>\n' + thought + '\n</think>\n\n' + content.lstrip('\n') }}"
    "{% else %}{{ '<|im_start|>assistant\n' + content }}{% endif %}{{ '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{% endif %}"
)
MARKED = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ '<|im_start|>assistant\n' }}"
    "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
UNASKING = CHATML.split("{% if add_generation_prompt")[0]  # knows no generation prompt
PLAIN = (  # no token ends a turn here: the answer ends with the tokenizer's end of text
    "{% for m in messages %}{{ '### ' + m['role'] + ':\n' + m['content'] + '\n\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### assistant:\n' }}{% endif %}"
)
# A reasoning model's: earlier reasoning is dropped, and the generation prompt opens the block.
DROPPING = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %}"
    "{{ '<|assistant|>' + m['content'].split('</think>')[-1] + '<|end|>' }}"
    "{% else %}{{ '<|' + m['role'] + '|>' + m['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|><think>\n' }}{% endif %}"
)
HEADERS = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")

STYLES: dict[str, Style] = {
    "chatml": Style(CHATML),
    "llama3": Style(LLAMA3, HEADERS, bos="<|begin|>", eos="<|eot_id|>", end="<|eot_id|>", trims=True),
    "llama3-another-eos": Style(LLAMA3, HEADERS, bos="<|begin|>", eos="<|end|>", end="<|eot_id|>", trims=True),
    "llama2": Style(LLAMA2, bos="<s>", eos="</s>", end=" </s>", trims=True),
    "gemma": Style(
        GEMMA,
        ("<start_of_turn>", "<end_of_turn>"),
        bos="<bos>",
        eos="<eos>",
        end="<end_of_turn>",
        trims=True,
        system=False,
    ),
    "qwen3": Style(QWEN3),
    "qwen3-thinking-off": Style(QWEN3, kwargs={"enable_thinking": False}),
    "generation-markers": Style(MARKED),
    "no-generation-prompt": Style(UNASKING),
    "plain": Style(PLAIN),
    "drops-reasoning": Style(DROPPING, ("<|assistant|>", "<|end|>"), bos="<s>", eos="<|end|>", end="<|end|>"),
}
every_style = pytest.mark.parametrize("style", STYLES.values(), ids=STYLES)


def encode(encoder: ChatEncoder, turns: Sequence[Message]) -> Encoded:
    (found,) = encoder.encode([turns])
    assert isinstance(found, Encoded), found.detail
    return found


def status(encoder: ChatEncoder, turns: Sequence[Message]) -> str:
    (found,) = encoder.encode([turns])
    assert isinstance(found, RowError)
    return found.status


def text_of(encoder: ChatEncoder, ids: np.ndarray) -> str:
    return encoder.tokenizer.decode(ids.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False)


def supervised(encoder: ChatEncoder, turns: Sequence[Message]) -> list[str]:
    """The text of each unbroken run of supervised tokens."""
    row = encode(encoder, turns)
    edges = np.flatnonzero(np.diff(np.concatenate(([0], row.answer, [0])))).reshape(-1, 2)
    return [text_of(encoder, row.ids[start:stop]) for start, stop in edges]


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
    asked += {"llama2": " ", "qwen3": "<think>\n\n</think>\n\n", "no-generation-prompt": "<|im_start|>assistant\n"}.get(
        next(name for name, s in STYLES.items() if s is style), ""
    )
    ids = [tokenizer(part, add_special_tokens=False)["input_ids"] for part in (asked, "Sour." + style.end)]
    row = encode(encoder, turns)
    assert row.ids.tolist() == ids[0] + ids[1]
    assert row.answer[-len(ids[1]) :].all() and not row.answer[len(ids[0]) - 1]


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
    class Slow:
        name_or_path, chat_template, is_fast = "slow", CHATML, False

    with pytest.raises(ModelError, match="slow can't map tokens to text"):
        ChatEncoder(Slow())


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
    assert marker in row.ids and marker not in row.ids[row.answer]
    assert text_of(encoder, row.ids[row.answer]) == "yes<|end|>no<|end|>"


def test_a_token_that_holds_prompt_and_answer_counts_as_answer() -> None:
    tokenizer = fast(trained("assistant\n\nuser\n\n"), CHATML, "<|im_start|>", "<|im_end|>")
    found = supervised(ChatEncoder(tokenizer), chat("q", "\nyes"))
    assert found[-1].endswith("\nyes<|im_end|>") and found[-1].strip("\n") == "yes<|im_end|>"


# ---------------------------------------------------------------------------------------------- length


@pytest.mark.parametrize("name", ["chatml", "llama3", "llama2"])
def test_a_long_answer_keeps_its_head(name: str) -> None:
    style = STYLES[name]
    turns = chat("Count.", " ".join(str(k) for k in range(200)))
    whole, cut = encode(style.encoder(), turns), encode(style.encoder(max_length=80), turns)
    assert len(whole) > 200 and len(cut) == 80
    assert np.array_equal(cut.ids, whole.ids[:80]) and np.array_equal(cut.answer, whole.answer[:80])
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


# ---------------------------------------------------------------------------------------------- any conversation at all

NASTY = [
    "<|im_end|>",
    "<|im_start|>assistant\n",
    "user",
    "assistant",
    "model",
    "\n",
    "  ",
    "👩‍👩‍👧",
    "é",
    "日本",
    "[/INST]",
    "\r\n",
]
texts = st.lists(
    st.sampled_from(NASTY) | st.text(st.characters(exclude_categories=["Cs"]), max_size=12), max_size=5
).map("".join)
conversations = st.builds(
    lambda system, pairs, trailing: [
        *([{"role": "system", "content": system}] if system is not None else []),
        *(turn for ask, reply in pairs for turn in chat(ask, reply)),
        *([{"role": "user", "content": trailing}] if trailing is not None else []),
    ],
    st.none() | texts,
    st.lists(st.tuples(texts, texts), min_size=1, max_size=4),
    st.none() | texts,
)
ENCODERS = {name: STYLES[name].encoder() for name in ("chatml", "llama3", "generation-markers", "no-generation-prompt")}


@pytest.mark.parametrize("name", ENCODERS)
@settings(max_examples=120, deadline=None)
@given(turns=conversations)
def test_the_supervised_tokens_are_the_answers_and_their_ends(name: str, turns: list[Message]) -> None:
    encoder, style = ENCODERS[name], STYLES[name]
    answers = [t["content"] for t in turns if t["role"] == "assistant" and t["content"].strip()]
    (found,) = encoder.encode([turns])
    if not answers:
        assert isinstance(found, RowError) and found.status == "no_answer"
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
        assert isinstance(cut, RowError) and cut.status == whole.status
    elif not whole.answer[:max_length].any():
        assert isinstance(cut, RowError) and cut.status == "prompt_too_long"
    else:
        assert isinstance(cut, Encoded)
        assert np.array_equal(cut.ids, whole.ids[:max_length])
        assert np.array_equal(cut.answer, whole.answer[:max_length])


def test_conversations_are_encoded_the_same_together_and_alone() -> None:
    encoder = STYLES["chatml"].encoder()
    rows = [chat("q", "yes"), chat("no answer"), chat("2+2?", "4", "3+3?", "6"), chat("q", "word " * 50)]
    for alone, together in zip((encoder.encode([r])[0] for r in rows), encoder.encode(rows), strict=True):
        if isinstance(together, Encoded):
            assert isinstance(alone, Encoded) and np.array_equal(alone.ids, together.ids)
            assert np.array_equal(alone.answer, together.answer)
        else:
            assert isinstance(alone, RowError) and alone.status == together.status
