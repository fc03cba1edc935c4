"""Rows to conversations: which columns are read, decided over a sample."""

from __future__ import annotations

import json
from typing import Any

import pytest

from sqsd_filter.corpus.conversation import conversation_key
from sqsd_filter.corpus.row_formats import FORMATS, Columns, RowFormat
from sqsd_filter.errors import InputError, UsageError
from tests.tiny import chat

TURNS = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
REJECTED = [TURNS[0], {"role": "assistant", "content": "b"}]
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
    "question-response": ({"question": "q", "response": "a"}, "question-answer", "q"),
    "messages-as-json-text": ({"messages": json.dumps(TURNS)}, "messages", "q"),
    "prompt-and-completion-turns": ({"prompt": TURNS[:1], "completion": TURNS[1:]}, "prompt-completion", "q"),
    "completion-turns": ({"prompt": "q", "completion": TURNS[1:]}, "prompt-completion", "q"),
    "preference": ({"prompt": "q", "chosen": "a", "rejected": "b"}, "preference", "q"),
    "preference-question": ({"question": "q", "chosen": "a", "rejected": "b"}, "preference", "q"),
    "preference-input": ({"instruction": "q", "input": "c", "chosen": "a", "rejected": "b"}, "preference", "q\nc"),
    "preference-turns": ({"prompt": TURNS[:1], "chosen": TURNS[1:], "rejected": REJECTED[1:]}, "preference", "q"),
    "preference-whole": ({"chosen": TURNS, "rejected": REJECTED}, "preference", "q"),
    "preference-prompt-twice": ({"prompt": "q", "chosen": TURNS, "rejected": REJECTED}, "preference", "q"),
    "preference-turns-twice": ({"prompt": TURNS[:1], "chosen": TURNS, "rejected": REJECTED}, "preference", "q"),
    "preference-transcript": (
        {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"},
        "preference",
        "q",
    ),
    "history-and-system-empty": (
        {"instruction": "q", "output": "a", "history": [], "system": ""},
        "alpaca",
        "q",
    ),
    "tools-empty": ({"messages": TURNS, "tools": "[]"}, "messages", "q"),
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
    "rejected": (
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        {"answer": "rejected"},
        RowFormat("preference", prompt="prompt", answer="rejected"),
    ),
    "rejected-whole": (
        {"chosen": TURNS, "rejected": REJECTED},
        {"answer": "rejected"},
        RowFormat("preference", answer="rejected"),
    ),
    "format-preference": (
        {"conversations": SHAREGPT[:1], "chosen": SHAREGPT[1], "rejected": SHAREGPT[1]},
        {"format": "preference"},
        RowFormat("preference", prompt="conversations", answer="chosen"),
    ),
    "system-history-and-tools": (
        {"q": "q", "a": "a", "before": [["q", "a"]], "persona": "s", "api": [], "system": "t"},
        {"prompt": "q", "answer": "a", "history": "before", "system": "persona", "tools": "api"},
        RowFormat("custom", prompt="q", answer="a", system="persona", history="before", tools="api"),
    ),
    "which-tools": (
        {"messages": TURNS, "tools": [{"name": "f"}], "functions": [{"name": "g"}]},
        {"tools": "functions"},
        RowFormat("messages", messages="messages", tools="functions"),
    ),
    "format-prompt-completion": (
        {"prompt": "q", "completion": "a", "messages": TURNS},
        {"format": "prompt-completion"},
        RowFormat("prompt-completion", prompt="prompt", answer="completion"),
    ),
}


@pytest.mark.parametrize(("row", "given_by_user", "expected"), OVERRIDES.values(), ids=OVERRIDES)
def test_what_the_user_names_decides(row: dict[str, Any], given_by_user: dict[str, Any], expected: RowFormat) -> None:
    assert Columns(**given_by_user).choose([row]) == expected


BAD_CHOICES: dict[str, tuple[dict[str, Any], dict[str, str], tuple[str, ...]]] = {  # the message names all of these
    "two-answers": (
        {"instruction": "q", "output": "a", "response": "b"},
        {},
        ("'output'", "'response'", "columns=Columns(answer=…) (--answer-column)"),
    ),
    "two-contexts": (
        {"instruction": "q", "input": "c", "context": "d", "output": "a"},
        {},
        ("'input'", "'context'", "--context-column"),
    ),
    "two-formats": (
        {"messages": TURNS, "question": "q", "answer": "a"},
        {},
        ("'messages'", "'question'", "messages or question-answer with columns=Columns(format=…) (--format)"),
    ),
    "two-systems": (
        {"question": "q", "answer": "a", "system": "s", "system_prompt": "t"},
        {},
        ("'system'", "'system_prompt'", "--system-column"),
    ),
    "two-tools": (
        {"messages": TURNS, "tools": [{"name": "f"}], "functions": [{"name": "g"}]},
        {},
        ("'tools'", "'functions'", "--tools-column"),
    ),
    "two-prompts": (
        {"prompt": "q", "question": "q", "chosen": "a", "rejected": "b"},
        {},
        ("'prompt'", "'question'", "--prompt-column"),
    ),
    "preference-beside-messages": (
        {"messages": TURNS, "prompt": "q", "chosen": TURNS, "rejected": REJECTED},
        {},
        ("'chosen'", "messages or preference with", "--format"),
    ),
    "preference-without-prompt": (
        {"input": "q", "chosen": "a", "rejected": "b"},
        {},
        ("'input'", "'chosen'", "--prompt-column"),
    ),
    "plain-text": ({"text": "Once upon a time", "url": "u"}, {}, ("'text'", "plain text", "not a conversation")),
    "no-format": (
        {"text": "q", "label": 1},
        {},
        ("'text'", "'label'", "Columns(prompt=…, answer=…) (--prompt-column, --answer-column)", "--messages-column"),
    ),
    "messages-that-are-text": ({"messages": "hello"}, {}, ("'messages'", "--prompt-column")),
    "no-column-at-all": ({}, {}, ("(none)",)),
    "named-format-misses": ({"text": "q"}, {"format": "alpaca"}, ("alpaca", "'text'", "--prompt-column")),
    "unknown-column": (
        {"text": "q"},
        {"prompt": "txt"},
        ("columns=Columns(prompt=…) (--prompt-column) names 'txt'", "'text'"),
    ),
    "unknown-messages": ({"text": "q"}, {"messages": "chat"}, ("--messages-column", "'chat'", "'text'")),
    "messages-and-answer": (
        {"chat": TURNS, "a": "b"},
        {"messages": "chat", "answer": "a"},
        ("Columns(messages=…) (--messages-column) can't", "Columns(answer=…) (--answer-column)"),
    ),
    "unknown-tools": ({"messages": TURNS}, {"tools": "api"}, ("--tools-column", "'api'")),
}


@pytest.mark.parametrize(("row", "given_by_user", "named"), BAD_CHOICES.values(), ids=BAD_CHOICES)
def test_a_choice_that_cannot_be_made_names_the_columns_and_the_flag(
    row: dict[str, Any], given_by_user: dict[str, Any], named: tuple[str, ...]
) -> None:
    with pytest.raises(InputError) as problem:
        Columns(**given_by_user).choose([row])
    for text in named:
        assert text in str(problem.value)


def test_an_input_without_rows_is_an_input_error() -> None:
    with pytest.raises(InputError, match="No readable row"):
        Columns().choose([])


def test_a_format_that_does_not_exist_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match=rf"'chat'.* {', '.join(FORMATS)} with columns=.*format=….*--format"):
        Columns(format="chat").choose([{"messages": TURNS}])


BESIDE: dict[str, tuple[list[Any], str | None]] = {  # values of a column `history`, which is taken or not
    "pairs": ([[["q", "a"]]], "history"),
    "pairs-in-some-rows": ([None, "", [], "[]", [["q", "a"]]], "history"),
    "pairs-and-text": ([[["q", "a"]], "broken"], "history"),
    "nothing-yet": ([None, None, [], "[]", ""], "history"),
    "nothing-and-turns": ([[], TURNS], "history"),
    "pairs-with-nothing": ([[["q", None], [], ["q", "a"]]], "history"),
    "pairs-as-json-text": (['[["q", "a"]]'], "history"),
    "text": (["of Rome"], None),
    "list-of-texts": ([["q", "a"]], None),
}


@pytest.mark.parametrize(("values", "taken"), BESIDE.values(), ids=BESIDE)
def test_a_column_beside_is_taken_for_what_it_looks_like_in_the_sample_and_named(
    values: list[Any], taken: str | None
) -> None:
    form = Columns().choose([{"prompt": "q", "response": "a", "history": value} for value in values])
    assert form.history == taken
    assert ("history" in str(form)) == (taken is not None)


def test_a_column_beside_that_the_user_names_is_taken_whatever_it_looks_like() -> None:
    row = {"prompt": "q", "response": "a", "before": ["o", "p"], "persona": 3}
    form = Columns(history="before", system="persona").choose([row])
    assert (form.history, form.system) == ("before", "persona")


@pytest.mark.parametrize("empty", [None, "", [], "[]"])
def test_a_sample_with_and_without_an_empty_value_decides_the_same(empty: Any) -> None:
    rows = [{"messages": TURNS, "tools": value, "history": value} for value in (empty, ["hammer"])]
    for sample in (rows, rows[::-1], rows[1:]):
        assert Columns().choose(sample) == RowFormat("messages", messages="messages")


@pytest.mark.parametrize("value", [["hammer"], "hammer", [["name", "f"]], 3], ids=["names", "text", "pairs", "number"])
def test_tools_that_are_not_descriptions_of_functions_are_another_column(value: Any) -> None:
    assert Columns().choose([{"messages": TURNS, "tools": value}]).tools is None


def test_whoever_names_the_main_columns_names_all_that_is_read() -> None:
    row = {"messages": TURNS, "instruction": "q", "output": "a", "input": "c", "system": "s", "tools": [{"name": "f"}]}
    assert Columns(messages="messages").choose([row]) == RowFormat("messages", messages="messages")
    named = Columns(prompt="instruction", answer="output").choose([row])
    assert named == RowFormat("custom", prompt="instruction", answer="output")


def test_equal_conversations_share_a_key_whatever_format_they_came_in() -> None:
    keys = {
        conversation_key(Columns().choose([row]).conversation(row)) for row, _, prompt in ROWS.values() if prompt == "q"
    }
    assert len(keys) == 1
    assert len(keys.pop()) == 16
