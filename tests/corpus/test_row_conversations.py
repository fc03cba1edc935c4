"""Rows to conversations: what is supervised of them, and why there is none."""

from __future__ import annotations

import json
from typing import Any

import pytest

from sqsd_filter.corpus.conversation import Message, RowError
from sqsd_filter.corpus.row_formats import Columns, RowFormat
from tests.corpus.test_row_formats import REJECTED, SHAREGPT, TURNS
from tests.tiny import chat


def unsupervised(text: str) -> Message:
    return {"role": "assistant", "content": text, "weight": 0}


LONGER = [*chat("o", "p"), *TURNS]
SUPERVISED: dict[str, tuple[dict[str, Any], list[Message]]] = {  # row, its conversation
    "prompt-turns": (
        {"prompt": LONGER[:3], "completion": TURNS[1:]},
        [*chat("o"), unsupervised("p"), *TURNS],
    ),
    "completion-turns": (
        {"prompt": TURNS[:1], "completion": [TURNS[1], *chat("r", "b")]},
        chat("q", "a", "r", "b"),
    ),
    "whole-completion-after-text": (
        {"prompt": "Be terse.", "completion": chat("q", "a", "r", "b")},
        chat("Be terse.") + chat("q", "a", "r", "b"),
    ),
    "whole-completion-after-its-prompt": (
        {"prompt": chat("q"), "completion": chat("q", "a", "r", "b")},
        [*chat("q"), *chat("q", "a", "r", "b")],
    ),
    "turns-as-json-text": (
        {"prompt": json.dumps(LONGER[:3]), "completion": json.dumps([TURNS[1], *chat("r", "b")])},
        [*chat("o"), unsupervised("p"), *chat("q", "a", "r", "b")],
    ),
    "chosen-as-json-text": (
        {"prompt": "q", "chosen": json.dumps(LONGER), "rejected": json.dumps(REJECTED)},
        [*chat("o"), unsupervised("p"), *TURNS],
    ),
    "chosen-whole-as-json-text": (
        {"chosen": json.dumps(LONGER), "rejected": json.dumps(REJECTED)},
        [*chat("o"), unsupervised("p"), *TURNS],
    ),
    "whole-completion-after-other-turns": ({"prompt": chat("x"), "completion": TURNS}, [*chat("x"), *TURNS]),
    "chosen-whole": ({"chosen": LONGER, "rejected": REJECTED}, [*chat("o"), unsupervised("p"), *TURNS]),
    "chosen-ends-with-a-question": (
        {"chosen": [*LONGER, *chat("r")], "rejected": REJECTED},
        [*chat("o"), unsupervised("p"), *TURNS, *chat("r")],
    ),
    "chosen-transcript": (
        {"chosen": "\n\nHuman: o\n\nAssistant: p\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: b"},
        [*chat("o"), unsupervised("p"), *TURNS],
    ),
    "chosen-turn": (
        {"prompt": LONGER[:3], "chosen": TURNS[1], "rejected": REJECTED[1]},
        [*chat("o"), unsupervised("p"), *TURNS],
    ),
    "history": ({"instruction": "q", "output": "a", "history": [["o", "p"]]}, LONGER),
    "history-as-json-text": ({"instruction": "q", "output": "a", "history": '[["o", "p"]]'}, LONGER),
    "history-of-a-preference": (
        {"prompt": "q", "chosen": "a", "rejected": "b", "history": [["o", "p"]]},
        [*chat("o"), unsupervised("p"), *TURNS],
    ),
    "system": ({"instruction": "q", "output": "a", "system": "s"}, chat("q", "a", system="s")),
    "system-prompt": ({"system_prompt": "s", "question": "q", "response": "a"}, chat("q", "a", system="s")),
    "system-before-history": (
        {"prompt": "q", "response": "a", "history": [["o", "p"]], "system": "s"},
        [{"role": "system", "content": "s"}, *LONGER],
    ),
    "system-of-turns": ({"conversations": SHAREGPT, "system": "s"}, chat("q", "a", system="s")),
    "a-system-turn-of-its-own-wins": (
        {"messages": chat("q", "a", system="own"), "system": "s"},
        chat("q", "a", system="own"),
    ),
    "tools": (
        {"conversations": SHAREGPT, "system": "s", "tools": '[{"name": "f", "parameters": {}}]'},
        [
            {"role": "tools", "content": [{"type": "function", "function": {"name": "f", "parameters": {}}}]},
            *chat("q", "a", system="s"),
        ],
    ),
}


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "[1, 2]",
        "[[1], {}]",
        '[{"role": "admin", "content": "x"}]',
        '[{"from": "user", "to": "model"}]',
        json.dumps(json.dumps(TURNS)),
    ],
)
def test_json_text_that_holds_no_turns_is_text(text: str) -> None:
    row = {"prompt": text, "completion": text}
    assert Columns().choose([row]).conversation(row) == chat(text, text)


@pytest.mark.parametrize(("row", "turns"), SUPERVISED.values(), ids=SUPERVISED)
def test_only_what_a_model_is_trained_to_write_is_supervised(row: dict[str, Any], turns: list[Message]) -> None:
    assert Columns().choose([row]).conversation(row) == turns


MESSAGES = RowFormat("messages", messages="messages")
ALPACA = RowFormat("alpaca", prompt="instruction", context="input", answer="output")
HISTORY = RowFormat("prompt-completion", prompt="prompt", answer="response", history="history")
SYSTEM = RowFormat("messages", messages="messages", system="persona")
TOOLS = RowFormat("messages", messages="messages", tools="tools")
PAIRED = RowFormat("preference", answer="chosen")
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
    "answer-turns-empty": (ALPACA, {"instruction": "q", "output": []}, "no_answer", "'output'"),
    "answer-turns-blank": (
        ALPACA,
        {"instruction": "q", "output": [{"role": "assistant", "content": " "}]},
        "no_answer",
        "'output'",
    ),
    "prompt-number": (ALPACA, {"instruction": 4, "output": "a"}, "bad_row", "int"),
    "prompt-no-turns": (ALPACA, {"instruction": [], "output": "a"}, "bad_row", "'instruction'"),
    "history-broken": (HISTORY, {"prompt": "q", "response": "a", "history": [["q"]]}, "bad_row", "'history'"),
    "history-number": (HISTORY, {"prompt": "q", "response": "a", "history": 3}, "bad_row", "'history'"),
    "system-number": (SYSTEM, {"messages": TURNS, "persona": 3}, "bad_row", "'persona'"),
    "tools-number": (TOOLS, {"messages": TURNS, "tools": 3}, "bad_row", "'tools'"),
    "tools-nameless": (TOOLS, {"messages": TURNS, "tools": [{"type": "function"}]}, "bad_row", "'tools'"),
    "transcript-without-speaker": (PAIRED, {"chosen": "hello"}, "bad_row", "'Human:'"),
    "transcript-of-a-human": (PAIRED, {"chosen": "\n\nHuman: hello"}, "no_answer", "'chosen'"),
    "weight-0-throughout": (
        MESSAGES,
        {"messages": [TURNS[0], {**TURNS[1], "weight": 0}]},
        "no_answer",
        "'messages'",
    ),
    "content-parts": (MESSAGES, {"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "bad_row", "list"),
}


@pytest.mark.parametrize(("form", "row", "status", "named"), UNREADABLE.values(), ids=UNREADABLE)
def test_a_row_that_holds_no_conversation_says_why(
    form: RowFormat, row: dict[str, Any], status: str, named: str
) -> None:
    with pytest.raises(RowError) as problem:
        form.conversation(row)
    assert problem.value.status == status
    assert named in problem.value.detail


def test_a_conversation_is_read_whatever_else_the_turns_hold() -> None:
    turns = [{**TURNS[0], "id": 7, "weight": None}, {"role": "assistant", "content": "a", "value": "ignored"}]
    assert MESSAGES.conversation({"messages": turns}) == TURNS
