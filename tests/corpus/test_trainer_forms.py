"""Rows as trainers and providers write them: what each is read as."""

from __future__ import annotations

import json
from typing import Any

import pytest

from sqsd_filter.corpus.conversation import Message, RowError, read_turns
from sqsd_filter.corpus.row_formats import Columns
from sqsd_filter.errors import InputError
from tests.tiny import chat

TURNS = chat("q", "a")
FUNCTION = {"name": "f", "description": "F", "parameters": {"type": "object", "properties": {}}}
TOOL = {"type": "function", "function": FUNCTION}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
NAN = float("nan")


def unlearned(text: str) -> Message:
    return {"role": "assistant", "content": text, "weight": 0}


FORMS: dict[str, tuple[dict[str, Any], str, list[Message]]] = {  # row, format, conversation
    "aws-system": ({"system": [{"text": "S"}], "messages": TURNS}, "messages", chat("q", "a", system="S")),
    "anthropic-system": (
        {"system": [{"type": "text", "text": "S"}, {"type": "text", "text": "T"}], "messages": TURNS},
        "messages",
        chat("q", "a", system="S\nT"),
    ),
    "history-of-turns": (
        {"prompt": "q", "response": "a", "history": chat("o", "p")},
        "prompt-completion",
        chat("o", "p", "q", "a"),
    ),
    "history-of-turns-as-text": (
        {"prompt": "q", "response": "a", "history": json.dumps(chat("o", "p"))},
        "prompt-completion",
        chat("o", "p", "q", "a"),
    ),
    "history-half-a-pair": (
        {"prompt": "q", "response": "a", "history": [["o", None]]},
        "prompt-completion",
        [*chat("o"), *TURNS],
    ),
    "history-empty-pair": ({"prompt": "q", "response": "a", "history": [[]]}, "prompt-completion", TURNS),
    "history-nan": ({"prompt": "q", "response": "a", "history": NAN}, "prompt-completion", TURNS),
    "rag": ({"context": "c", "question": "q", "answer": "a"}, "question-answer", chat("q\nc", "a")),
    "rag-query": ({"context": "c", "query": "q", "response": "a"}, "query-response", chat("q\nc", "a")),
    "swift": (
        {"system": "S", "query": "q", "response": "a", "history": [["o", "p"]]},
        "query-response",
        chat("o", "p", "q", "a", system="S"),
    ),
    "input-nan": ({"instruction": "q", "input": NAN, "output": "a"}, "alpaca", TURNS),
    "input-null-text": ({"instruction": "q", "input": "null", "output": "a"}, "alpaca", TURNS),
    "input-blank": ({"instruction": "q", "input": " \n", "output": "a"}, "alpaca", TURNS),
    "input-alone": ({"instruction": "", "input": "q", "output": "a"}, "alpaca", TURNS),
    "input-alone-beside-null": ({"instruction": None, "input": "q", "output": "a"}, "alpaca", TURNS),
    "printed-python": ({"messages": repr(TURNS)}, "messages", TURNS),
    "printed-python-over-lines": ({"messages": repr(TURNS).replace("}, {", "},\n {")}, "messages", TURNS),
    "llamafactory-preference": (
        {
            "conversations": [{"from": "human", "value": "q"}],
            "chosen": {"from": "gpt", "value": "a"},
            "rejected": {"from": "gpt", "value": "b"},
        },
        "preference",
        TURNS,
    ),
    "openai-format-preference": (
        {"messages": chat("o", "p", "q"), "chosen": TURNS[1], "rejected": TURNS[1]},
        "preference",
        [*chat("o"), unlearned("p"), *TURNS],
    ),
    "gemini": (
        {
            "systemInstruction": {"role": "system", "parts": [{"text": "S"}]},
            "contents": [{"role": "user", "parts": [{"text": "q"}]}, {"role": "model", "parts": [{"text": "a"}]}],
        },
        "gemini",
        chat("q", "a", system="S"),
    ),
    "openai-preference": (
        {
            "input": {"messages": chat("q"), "tools": [TOOL]},
            "preferred_output": TURNS[1:],
            "non_preferred_output": chat("", "b")[1:],
        },
        "openai-preference",
        [{"role": "tools", "content": [TOOL]}, *TURNS],
    ),
    "wildchat": (
        {"conversation": [{**t, "toxic": False} for t in TURNS], "language": "English"},
        "conversation",
        TURNS,
    ),
    "nemotron": ({"input": chat("q"), "output": "a", "system_prompt": "S"}, "input-output", chat("q", "a", system="S")),
    "input-output-text": ({"input": "q", "output": "a"}, "input-output", TURNS),
    "swift-exchanges": (
        {"system": "S", "conversation": [{"human": "o", "assistant": "p"}, {"human": "q", "assistant": "a"}]},
        "conversation",
        chat("o", "p", "q", "a", system="S"),
    ),
    "xtuner-exchanges": (
        {"conversation": [{"output": "a", "input": "q", "system": "S"}]},
        "conversation",
        chat("q", "a", system="S"),
    ),
    "refusal": ({"messages": [TURNS[0], {"role": "assistant", "content": None, "refusal": "a"}]}, "messages", TURNS),
    "refusal-part": (
        {"messages": [TURNS[0], {"role": "assistant", "content": [{"type": "refusal", "refusal": "a"}]}]},
        "messages",
        TURNS,
    ),
    "null-content-of-a-table": (
        {"messages": [{**turn, "value": NAN, "refusal": None} for turn in TURNS]},
        "messages",
        TURNS,
    ),
    "thought-and-call": (
        {
            "conversations": [
                {"from": "human", "value": "q"},
                {"from": "function_call", "value": '<think>\nuse f\n</think>\n\n{"name": "f", "arguments": {"a": 1}}'},
            ]
        },
        "conversations",
        [*chat("q"), {"role": "assistant", "content": "<think>\nuse f\n</think>", "tool_calls": [CALL]}],
    ),
    "call-with-parameters": (
        {
            "messages": [
                *chat("q"),
                {"role": "assistant", "tool_calls": [{"function": {"name": "f", "parameters": {"a": 1}}}]},
            ]
        },
        "messages",
        [*chat("q"), {"role": "assistant", "content": "", "tool_calls": [CALL]}],
    ),
    "settings-of-the-template": (
        {"messages": TURNS, "chat_template_kwargs": {"enable_thinking": False, "more": None}},
        "messages",
        [{"role": "chat_template_kwargs", "content": {"enable_thinking": False}}, *TURNS],
    ),
    "settings-of-the-template-as-text": (
        {"messages": TURNS, "chat_template_kwargs": '{"enable_thinking": false}'},
        "messages",
        [{"role": "chat_template_kwargs", "content": {"enable_thinking": False}}, *TURNS],
    ),
    "reasoning": (
        {"messages": [TURNS[0], {**TURNS[1], "reasoning_content": "r"}]},
        "messages",
        [TURNS[0], {**TURNS[1], "reasoning_content": "r"}],
    ),
    "thinking": (
        {"messages": [TURNS[0], {**TURNS[1], "thinking": "r"}]},
        "messages",
        [TURNS[0], {**TURNS[1], "reasoning_content": "r"}],
    ),
    "gemini-tools": (
        {"messages": TURNS, "tools": [{"functionDeclarations": [FUNCTION]}]},
        "messages",
        [{"role": "tools", "content": [TOOL]}, *TURNS],
    ),
    "tools-as-a-list-of-text": (
        {"messages": TURNS, "tools": [json.dumps(TOOL)]},
        "messages",
        [{"role": "tools", "content": [TOOL]}, *TURNS],
    ),
}


@pytest.mark.parametrize(("row", "name", "turns"), FORMS.values(), ids=FORMS)
def test_a_row_is_read_as_its_trainer_reads_it(row: dict[str, Any], name: str, turns: list[Message]) -> None:
    form = Columns().choose([row])
    assert form.name == name
    assert form.conversation(row) == turns


def test_the_worse_output_of_openai_can_be_asked_for() -> None:
    row = {"input": {"messages": chat("q")}, "preferred_output": TURNS[1:], "non_preferred_output": chat("", "b")[1:]}
    form = Columns(answer="non_preferred_output").choose([row])
    assert form.conversation(row) == chat("q", "b")


@pytest.mark.parametrize("nothing", [None, "", " ", "null", "NaN", NAN, [], "[]"])
@pytest.mark.parametrize("at_first", [True, False])
def test_one_row_without_a_value_leaves_the_column_to_the_others(nothing: Any, at_first: bool) -> None:
    full = {"messages": TURNS, "tools": json.dumps([TOOL]), "system": "S"}
    bare = {"messages": TURNS, "tools": nothing, "system": None if nothing in ([], "[]") else nothing}
    form = Columns().choose([bare, full] if at_first else [full, bare])
    assert form.conversation(full) == [{"role": "tools", "content": [TOOL]}, *chat("q", "a", system="S")]
    assert form.conversation(bare) == TURNS


@pytest.mark.parametrize(
    ("column", "good", "bad", "said"),
    [
        ("tools", [TOOL], "hammer", "'tools' holds something other than a list of tools"),
        ("system", "S", 3, "'system' holds int, not text"),
        ("history", [["o", "p"]], "of Rome", "'history' holds something other than turns"),
        ("chat_template_kwargs", {"a": 1}, "yes", "'chat_template_kwargs' holds str"),
    ],
)
def test_a_value_that_does_not_fit_is_the_error_of_its_row_alone(column: str, good: Any, bad: Any, said: str) -> None:
    rows = [{"prompt": "q", "completion": "a", column: value} for value in (good, bad)]
    for sample in (rows, rows[::-1]):
        form = Columns().choose(sample)
        assert column in form.columns
        form.conversation(rows[0])
        with pytest.raises(RowError, match=said) as problem:
            form.conversation(rows[1])
        assert problem.value.status == "bad_row"


def test_images_beside_the_text_are_as_images_within_it() -> None:
    row = {"messages": TURNS, "images": ["/x/0.jpg"]}
    form = Columns().choose([row])
    with pytest.raises(RowError, match="'images' holds something that is not text"):
        form.conversation(row)
    assert form.conversation({"messages": TURNS, "images": []}) == TURNS
    tagged = {"conversations": chat("<image>\nq", "a"), "image": "0.jpg"}
    with pytest.raises(RowError, match="'image'"):
        Columns().choose([tagged]).conversation(tagged)
    untagged = {"conversations": TURNS, "image": "0.jpg"}
    assert Columns().choose([untagged]).conversation(untagged) == TURNS
    with pytest.raises(RowError, match="turn 1 of it has images"):
        read_turns([{**TURNS[0], "images": ["x"]}], "it")


def test_a_call_without_arguments_is_an_error() -> None:
    with pytest.raises(RowError, match="name and an object of arguments"):
        read_turns([{"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]}], "it")


def test_printed_lists_that_are_no_python_say_what_they_are() -> None:
    printed = "[{'role': 'user', 'content': 'q'}\n {'role': 'assistant', 'content': 'a'}]"  # as numpy prints objects
    with pytest.raises(InputError, match="'messages' holds lists as Python prints them, not JSON"):
        Columns().choose([{"messages": printed}])


def test_printed_python_runs_nothing() -> None:
    form = Columns().choose([{"messages": TURNS}])
    with pytest.raises(RowError, match="not a list of turns"):
        form.conversation({"messages": "[{'role': __import__('os').getcwd()}]"})


def test_the_advice_on_unknown_columns_names_those_beside_them() -> None:
    with pytest.raises(InputError, match=r"and those beside them with .*--system-column, --history-column"):
        Columns().choose([{"ask": "q", "reply": "a", "system": "S", "history": [["o", "p"]]}])


def test_a_structured_context_beside_a_question_is_not_its_text() -> None:
    row = {"question": "q", "answer": "a", "context": {"title": ["t"], "sentences": [["s"]]}}
    form = Columns().choose([row])
    assert form.context is None
    assert form.conversation(row) == TURNS
