"""Reasoning beside the answer: it reaches templates that show it, and is supervised where they do."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from sqsd_filter.corpus.conversation import Message
from sqsd_filter.scoring.chat_encoder import ChatEncoder
from tests.scoring.styles import supervised
from tests.tiny import CHATML, chat, make_tokenizer

HEAD = "{{ '<|im_start|>' + m['role'] + '\\n' }}"
TAIL = (
    "{{ m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# As Qwen3: only after the last question, and an empty block where there is none
LAST = (
    "{% set ns = namespace(last=-1) %}{% for m in messages %}"
    "{% if m['role'] == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}{% for m in messages %}"
    + HEAD
    + "{% if m['role'] == 'assistant' and loop.index0 > ns.last %}"
    "{{ '<think>\\n' + (m['reasoning_content'] or '') | trim + '\\n</think>\\n\\n' }}{% endif %}" + TAIL
)
EVERY = (  # in every turn that has some, by the key of gpt-oss
    "{% for m in messages %}"
    + HEAD
    + "{% if m['thinking'] %}{{ '<think>' + m['thinking'] + '</think>' }}{% endif %}"
    + TAIL
)


def thinking(question: str, thought: str, answer: str, **more: Any) -> list[Message]:
    return [*chat(question), {"role": "assistant", "content": answer, "reasoning_content": thought, **more}]


def test_reasoning_is_supervised_with_the_answer_that_it_leads_to() -> None:
    for template, shown in ((LAST, "<think>\nr\n</think>\n\na<|im_end|>"), (EVERY, "<think>r</think>a<|im_end|>")):
        assert supervised(ChatEncoder(make_tokenizer(template)), thinking("q", "r", "a")) == [shown]


def test_reasoning_that_the_template_leaves_out_of_earlier_turns_is_not_supervised() -> None:
    turns = [*thinking("o", "s", "p"), *thinking("q", "r", "a")]
    found = supervised(ChatEncoder(make_tokenizer(LAST)), turns)
    assert found == ["p<|im_end|>", "<think>\nr\n</think>\n\na<|im_end|>"]


def test_reasoning_in_every_turn_is_supervised_in_every_turn() -> None:
    turns = [*thinking("o", " s ", "p"), *chat("x", "y"), *thinking("q", "r", "a"), *thinking("u", "v", "w", weight=0)]
    found = supervised(ChatEncoder(make_tokenizer(EVERY)), turns)
    assert found == ["<think> s </think>p<|im_end|>", "y<|im_end|>", "<think>r</think>a<|im_end|>"]


def test_reasoning_for_a_template_without_it_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    encoder = ChatEncoder(make_tokenizer(CHATML))
    with caplog.at_level(logging.WARNING):
        for question in ("q", "r"):
            assert supervised(encoder, thinking(question, "r", "a")) == ["a<|im_end|>"]
    assert [record.message for record in caplog.records] == ["the chat template shows no reasoning: it is not scored"]


def test_reasoning_before_a_tool_call_is_supervised_with_the_call() -> None:
    calls = "{% for c in m['tool_calls'] or [] %}{{ '<call>' + c['function'] | tojson + '</call>' }}{% endfor %}"
    function = {"name": "f", "arguments": {"a": 1}}
    called = {"tool_calls": [{"type": "function", "function": function}]}
    result = {"role": "tool", "content": "1"}
    turns = [*thinking("q", "r", "", **called), result, {**thinking("", "s", "x")[1], **called}, result]
    turns = [*turns, thinking("", "t", "y")[1]]
    shown = '<call>{"name": "f", "arguments": {"a": 1}}</call><|im_end|>'
    encoder = ChatEncoder(make_tokenizer(EVERY.replace("{{ m['content'] + ", "{{ m['content'] }}" + calls + "{{ ")))
    expected = [f"<think>r</think>{shown}", f"<think>s</think>x{shown}", "<think>t</think>y<|im_end|>"]
    assert supervised(encoder, turns) == expected
    assert supervised(encoder, turns[:4]) == expected[:2]
