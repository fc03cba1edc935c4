"""Rows to conversations: which columns are read, decided over a sample, and what is supervised of them."""

from __future__ import annotations

from typing import Any

import pytest

from sqsd_filter.errors import InputError
from sqsd_filter.scoring.conversation import RowError, conversation_key
from sqsd_filter.scoring.row_formats import Columns, RowFormat
from tests.tiny import chat

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
    form = Columns().choose([row])
    assert form.name == name
    assert form.conversation(row) == chat(prompt, "a")


def test_columns_that_only_some_rows_have_are_seen_too() -> None:
    rows = [{"instruction": "q", "output": "a"}, {"instruction": "q", "input": "c", "output": "a"}]
    assert Columns().choose(rows).context == "input"


def test_unreadable_lines_of_the_sample_are_passed_over() -> None:
    assert Columns().choose([None, {"question": "q", "answer": "a"}]).name == "question-answer"  # type: ignore[list-item]


def test_the_context_joins_the_instruction_with_one_newline_and_nothing_is_trimmed() -> None:
    row = {"instruction": "sum up \n", "input": "\n a text", "output": " short "}
    assert Columns().choose([row]).conversation(row) == chat("sum up \n\n\n a text", " short ")


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
        {"format": "conversations"},
        RowFormat("conversations", messages="conversations"),
    ),
    "format-prompt-completion": (
        {"prompt": "q", "completion": "a", "messages": TURNS},
        {"format": "prompt-completion"},
        RowFormat("prompt-completion", prompt="prompt", answer="completion"),
    ),
}


@pytest.mark.parametrize(("row", "given_by_user", "expected"), OVERRIDES.values(), ids=OVERRIDES)
def test_what_the_user_names_decides(row: dict[str, Any], given_by_user: dict[str, str], expected: RowFormat) -> None:
    assert Columns(**given_by_user).choose([row]) == expected


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
    "named-format-misses": ({"text": "q"}, {"format": "alpaca"}, ("alpaca", "'text'", "--prompt-column")),
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
        Columns(**given_by_user).choose([row])
    for text in named:
        assert text in str(problem.value)


def test_an_input_without_rows_is_an_input_error() -> None:
    with pytest.raises(InputError, match="No readable row"):
        Columns().choose([])


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
        conversation_key(Columns().choose([row]).conversation(row)) for row, _, prompt in ROWS.values() if prompt == "q"
    }
    assert len(keys) == 1
    assert len(keys.pop()) == 16
