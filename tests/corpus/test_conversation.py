"""Turns in the forms that rows hold them, and the keys of conversations."""

from __future__ import annotations

import hashlib
import json
from datetime import date
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sqsd_filter.corpus.conversation import Message, RowError, conversation_key, read_tools, read_turns
from tests.tiny import chat

NAMES = {
    "system": ["system", "developer", "System"],
    "user": ["user", "human", "prompter", "Human", "USER"],
    "assistant": ["assistant", "gpt", "model", "bot", "chatbot", "ai", "chatgpt", "bing", "bard", "GPT"],
    "tool": ["tool", "observation", "function", "ipython", "tool_response", "function_response"],
}
KEYS = [("role", "content"), ("from", "value"), ("role", "text"), ("from", "content")]


@pytest.mark.parametrize(("said", "role"), [(name, role) for role, names in NAMES.items() for name in names])
@pytest.mark.parametrize("keys", KEYS, ids="-".join)
def test_roles_and_texts_go_by_several_names(said: str, role: str, keys: tuple[str, str]) -> None:
    name, text = keys
    other = {"from": None, "role": None, "content": None, "value": None, "text": None}  # as parquet has it
    assert read_turns([{**other, name: said, text: "x"}], "it") == [{"role": role, "content": "x"}]


# ---------------------------------------------------------------------------------------------- contents

CALL = {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
TURNS: dict[str, tuple[list[Any], list[Message]]] = {
    "null-answer": ([{"role": "assistant", "content": None}], [{"role": "assistant", "content": ""}]),
    "null-result": ([{"role": "tool", "content": None}], [{"role": "tool", "content": ""}]),
    "null-system": ([{"role": "system", "content": None}, *chat("q")], chat("q")),
    "empty-turns": (chat("", ""), chat("", "")),
    "system-turns-that-lead": (
        [{"role": "system", "content": "s"}, {"role": "developer", "content": "t"}, *chat("q")],
        chat("q", system="s\n\nt"),
    ),
    "system-turn-in-the-middle": (
        [*chat("q"), {"role": "system", "content": "s"}],
        [*chat("q"), {"role": "system", "content": "s"}],
    ),
    "users-in-a-row": ([*chat("q"), *chat("r")], [*chat("q"), *chat("r")]),
    "assistant-first": (chat("q", "a")[1:], chat("q", "a")[1:]),
    "one-part": ([{"role": "user", "content": [{"type": "text", "text": "q"}]}], chat("q")),
    "parts": (
        [{"role": "user", "content": [{"type": "text", "text": "q", "image_url": None}, {"text": "r"}, "s"]}],
        chat("qrs"),
    ),
    "no-parts": ([{"role": "assistant", "content": []}], [{"role": "assistant", "content": ""}]),
    "output-part": (
        [{"role": "assistant", "content": [{"type": "output_text", "text": "a"}]}],
        [{"role": "assistant", "content": "a"}],
    ),
    "json-text": ([*chat("q", "a")], chat("q", "a")),
    "weight": (
        [{"role": "assistant", "content": "a", "weight": 0}, {"role": "assistant", "content": "b", "weight": 1}],
        [{"role": "assistant", "content": "a", "weight": 0}, {"role": "assistant", "content": "b"}],
    ),
    "train": (
        [{"from": "gpt", "value": "a", "train": False}, {"from": "gpt", "value": "b", "train": True}],
        [{"role": "assistant", "content": "a", "weight": 0}, {"role": "assistant", "content": "b"}],
    ),
    "weight-of-a-question": ([{"role": "user", "content": "q", "weight": 0.5}], chat("q")),
    "tool-calls": (
        [{"role": "assistant", "content": None, "tool_calls": [{"id": "1", **CALL}]}],
        [{"role": "assistant", "content": "", "tool_calls": [{"id": "1", **CALL}]}],
    ),
    "arguments-as-text": (
        [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": '{"a": 1}'}}]}],
        [{"role": "assistant", "content": "", "tool_calls": [CALL]}],
    ),
    "no-arguments": (
        [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": ""}}]}],
        [
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {}}}],
            }
        ],
    ),
    "bare-calls-as-text": (
        [{"role": "assistant", "content": "x", "tool_calls": '[{"name": "f", "arguments": {"a": 1}}]'}],
        [{"role": "assistant", "content": "x", "tool_calls": [CALL]}],
    ),
    "function-call-of-a-turn": (
        [{"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": '{"a": 1}'}}],
        [{"role": "assistant", "content": "", "tool_calls": [CALL]}],
    ),
    "function-call-turn": (
        [
            {"from": "function_call", "value": '{"name": "f", "arguments": {"a": 1}}'},
            {"from": "observation", "value": "2"},
        ],
        [{"role": "assistant", "content": "", "tool_calls": [CALL]}, {"role": "tool", "content": "2"}],
    ),
    "calls-that-are-null": (
        [
            {
                "role": "assistant",
                "content": "a",
                "tool_calls": None,
                "function_call": {"name": None, "arguments": None},
            },
            {"role": "assistant", "content": "b", "tool_calls": []},
        ],
        [{"role": "assistant", "content": "a"}, {"role": "assistant", "content": "b"}],
    ),
    "results": (
        [
            {"role": "tool", "content": "2", "tool_call_id": "1", "name": None},
            {"role": "function", "name": "f", "content": "3"},
        ],
        [{"role": "tool", "content": "2", "tool_call_id": "1"}, {"role": "tool", "content": "3", "name": "f"}],
    ),
}


@pytest.mark.parametrize(("given_turns", "turns"), TURNS.values(), ids=TURNS)
@pytest.mark.parametrize("as_text", [False, True], ids=["list", "json-text"])
def test_turns_are_read_in_every_form(given_turns: list[Any], turns: list[Message], as_text: bool) -> None:
    assert read_turns(json.dumps(given_turns) if as_text else given_turns, "it") == turns


def assistant(**more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": "a", **more}


DEEP = "[" * 900 + "]" * 900
BAD_TURNS: dict[str, tuple[Any, str]] = {  # what the detail says of turn 2
    "image": ({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "u"}}]}, "'image_url'"),
    "image-with-text": ({"role": "user", "content": [{"type": "input_image", "text": "t"}]}, "'input_image'"),
    "audio": ({"role": "user", "content": [{"type": "text", "text": "x"}, {"type": "input_audio"}]}, "'input_audio'"),
    "part-without-text": ({"role": "user", "content": [{"type": "text", "text": None}]}, "'text'"),
    "number-among-parts": ({"role": "user", "content": [3]}, "not text"),
    "object": ({"role": "tool", "content": {"a": 1}}, "dict"),
    "null-question": ({"role": "user", "content": None}, "no content"),
    "null-call": ({"from": "function_call", "value": None}, "no content"),
    "unknown-role": ({"role": "narrator", "content": "x"}, "'narrator'"),
    "half-weight": (assistant(weight=0.5), "weight 0.5"),
    "weight-text": (assistant(train="no"), "train 'no'"),
    "call-without-name": (assistant(tool_calls=[{"function": {"arguments": "{}"}}]), "tool call"),
    "call-with-list": (assistant(tool_calls=[{"name": "f", "arguments": "[1]"}]), "tool call"),
    "call-cut-off": (assistant(tool_calls=[{"name": "f", "arguments": '{"a": '}]), "tool call"),
    "call-of-text": (assistant(tool_calls="f(1)"), "tool call"),
    "calls-of-text": (assistant(tool_calls=["f(1)"]), "tool call"),
    "function-as-text": (assistant(tool_calls=[{"function": "f"}]), "tool call"),
    "function-call-that-is-no-json": ({"from": "function_call", "value": "f(1)"}, "tool call"),
    "date-in-a-call": (assistant(tool_calls=[{"name": "f", "arguments": {"on": date(2024, 1, 1)}}]), "date"),
    "deep-call": (assistant(tool_calls=[{"name": "f", "arguments": f'{{"a": {DEEP}}}'}]), "nested too deeply"),
}


@pytest.mark.parametrize(("turn", "said"), BAD_TURNS.values(), ids=BAD_TURNS)
def test_a_turn_that_no_text_model_could_read_says_why(turn: Any, said: str) -> None:
    with pytest.raises(RowError) as problem:
        read_turns([*chat("q"), turn], "column 'messages'")
    assert problem.value.status == "bad_row"
    assert "turn 2 of column 'messages'" in problem.value.detail
    assert said in problem.value.detail


def test_nulls_that_a_table_puts_into_turns_calls_and_tools_are_as_good_as_missing() -> None:
    def call(**arguments: Any) -> dict[str, Any]:
        return {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}

    turns = [
        *chat("q"),
        {"role": "assistant", "tool_calls": [call(city="Rome"), call(days=2, of=[{"a": 1}, {"b": 2}])]},
        {"role": "tool", "content": "3", "tool_call_id": "1"},
        {"role": "assistant", "content": "a"},
    ]
    tools = [
        {"type": "function", "function": {"name": "f", "parameters": {"city": {"type": "string"}}}},
        {"type": "function", "function": {"name": "g", "description": "G", "parameters": {"days": {"enum": [1, 2]}}}},
    ]
    (row,) = pa.table({"messages": [turns], "tools": [tools]}).to_pylist()
    assert row["messages"] != turns
    assert row["tools"] != tools
    assert read_turns(row["messages"], "it") == read_turns(turns, "it")
    assert read_tools(row["tools"], "it") == read_tools(tools, "it") == [{"role": "tools", "content": tools}]


def test_nulls_in_the_arguments_of_a_call_stay_where_the_arguments_or_more_are_json_text() -> None:
    arguments = {"a": None, "b": 1, "of": [{"c": None}, None]}
    function = {"name": "f", "arguments": arguments}
    wrapped = {"id": None, "type": "function", "function": function}
    given_turns: list[Any] = [
        [assistant(tool_calls=[{"name": "f", "arguments": json.dumps(arguments)}])],
        [assistant(function_call=json.dumps(function))],
        [assistant(tool_calls=json.dumps([wrapped]))],
        json.dumps([assistant(tool_calls=[wrapped], function_call=None)]),
        json.dumps([assistant(tool_calls=[{**function, "function": None}])]),
    ]
    calls = [{"type": "function", "function": function}]
    for form in given_turns:
        assert read_turns(form, "it") == [assistant(tool_calls=calls)]
    (turn,) = read_turns([assistant(tool_calls=[wrapped])], "it")
    assert turn["tool_calls"][0]["function"]["arguments"] == {"b": 1, "of": [{}, None]}


def test_tools_are_functions_in_one_form() -> None:
    function = {"name": "f", "description": "F", "parameters": {"type": "object", "properties": {}}}
    wrapped = {"type": "function", "function": function}
    nothing: list[object] = [None, "", [], "[]"]
    forms: list[object] = [
        [wrapped],
        [function],
        json.dumps([function]),
        json.dumps([wrapped]),
        [{**function, "strict": None}],
    ]
    assert [read_tools(form, "it") for form in forms] == [[{"role": "tools", "content": [wrapped]}]] * len(forms)
    assert [read_tools(form, "it") for form in nothing] == [[], [], [], []]


# ---------------------------------------------------------------------------------------------- keys


def test_the_key_of_a_plain_conversation_never_changes() -> None:
    """Score stores are kept by it."""
    text = '[["system","s"],["user","h\N{LATIN SMALL LETTER E WITH ACUTE}"],["assistant","a"]]'
    key = hashlib.blake2b(text.encode(), digest_size=16).digest()
    assert conversation_key(chat("h\N{LATIN SMALL LETTER E WITH ACUTE}", "a", system="s")) == key
    assert conversation_key(chat("q", "a")).hex() == "3b907f307d03887765e6f457d0950187"


@pytest.mark.parametrize(
    "other",
    [chat("q", "a "), chat("q", "b"), chat("a", "q"), chat("q", "a", system="s"), chat("q", "a", "q"), chat("qa", "")],
    ids=["space", "answer", "swapped", "system", "longer", "moved-boundary"],
)
def test_different_conversations_have_different_keys(other: list[Message]) -> None:
    assert conversation_key(other) != conversation_key(chat("q", "a"))


def test_whatever_a_score_depends_on_is_in_the_key() -> None:
    def calling(**arguments: Any) -> Message:
        return assistant(tool_calls=[{"type": "function", "function": {"name": "f", "arguments": arguments}}])

    tools = [{"type": "function", "function": {"name": "f"}}]
    variants: list[list[Message]] = [
        chat("q", "a"),
        [*chat("q"), assistant(weight=0)],
        [*chat("q"), calling()],
        [*chat("q"), calling(x=1)],
        [*chat("q"), calling(x="1")],
        [*chat("q"), calling(x=1, y=2)],
        [*chat("q"), calling(y=2, x=1)],
        [{"role": "tools", "content": tools}, *chat("q", "a")],
        [{"role": "tools", "content": tools * 2}, *chat("q", "a")],
        [*chat("q", "a"), {"role": "tool", "content": "r"}],
        [*chat("q", "a"), {"role": "tool", "content": "r", "name": "f"}],
        [*chat("q", "a"), {"role": "tool", "content": "r", "tool_call_id": "f"}],
    ]
    assert len({conversation_key(turns) for turns in variants}) == len(variants)


json_values = st.recursive(
    st.text() | st.integers() | st.floats(allow_nan=False) | st.booleans() | st.none(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
calls = st.lists(
    st.fixed_dictionaries({"name": st.text(min_size=1), "arguments": st.dictionaries(st.text(), json_values)})
)


@given(text=st.text() | st.none(), given_calls=calls, weight=st.sampled_from([None, 0, 1]))
def test_a_conversation_travels_as_json(text: str | None, given_calls: list[Any], weight: int | None) -> None:
    """Replicas get conversations as JSON, and answer with their keys; reading a read turn again changes nothing."""
    turns = read_turns([{"role": "assistant", "content": text, "tool_calls": given_calls, "weight": weight}], "it")
    there = json.loads(json.dumps(turns))
    assert there == turns
    assert conversation_key(there) == conversation_key(turns)
    assert read_turns(turns, "it") == read_turns(json.dumps(turns), "it") == turns
