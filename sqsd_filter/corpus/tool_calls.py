"""Tools and tool calls in the forms that rows hold them, read into OpenAI's form."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from sqsd_filter.corpus.statuses import BAD_ROW, RowError
from sqsd_filter.corpus.values import as_json, is_missing, parse_if_json, parse_text

TOOLS = "tools"  # the role of a turn at the beginning that holds the tools that the model may call
_ARGUMENTS = ("arguments", "parameters", "args", "input")  # keys of a call's arguments
_DECLARED = ("functionDeclarations", "function_declarations")  # Gemini: a tool with a list of functions
_THOUGHT = re.compile(r"\s*<think>.*?</think>", re.DOTALL)


def split_thought(text: str) -> tuple[str, str]:
    """The block of thought at the beginning of a call's text, and the call."""
    thought = _THOUGHT.match(text)
    return (thought.group().strip(), text[thought.end() :].strip()) if thought else ("", text)


def read_calls(value: object, where: str, exact: bool) -> list[dict[str, Any]]:
    """Tool calls in one form; none if all is null. Arguments keep their nulls if they were JSON text, or with `exact`.

    Raises `RowError` with `bad_row`, also for a call without arguments.
    """
    exact = exact or isinstance(value, str)
    value = _plain(parse_if_json(value), where, nulls=exact)
    if isinstance(value, dict):
        value = [] if all(part is None for part in value.values()) else [value]
    calls = []
    given_calls: list[Any] = value if isinstance(value, list) else [value] if value else []
    for call in given_calls:
        function: Any = (call.get("function") or call) if isinstance(call, dict) else None
        name = function.get("name") if isinstance(function, dict) else None
        given = next((function[key] for key in _ARGUMENTS if function.get(key) is not None), None) if name else None
        arguments = parse_if_json({} if given == "" else given)
        if not isinstance(name, str) or not isinstance(arguments, dict):
            raise RowError(BAD_ROW, f"{where} has a tool call that is not a name and an object of arguments")
        tagged = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
        nulls = exact or isinstance(given, str)
        function = {"name": name, "arguments": _plain(arguments, where, nulls=nulls)}
        calls.append({**tagged, "type": "function", "function": function})
    return calls


def read_tools(value: object, where: str) -> list[dict[str, Any]]:
    """The turn with the tools that a list, or the text of one, describes; no turn if there are none."""
    value = [] if is_missing(value) else parse_text(value)
    tools = []
    for tool in _listed(value) if isinstance(value, list | tuple | Mapping) else [None]:
        whole: Any = (
            tool if isinstance(tool, Mapping) and tool.get("function") else {"type": "function", "function": tool}
        )
        function = whole["function"]
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise RowError(BAD_ROW, f"{where} holds something other than a list of tools with names")
        tools.append(_plain(whole, where))
    return [{"role": TOOLS, "content": tools}] if tools else []


def are_tools(value: object) -> bool:
    """Does it look like a list of tools, the text of one, or a single tool?"""
    value = parse_text(value)
    return isinstance(value, list | tuple | Mapping) and all(isinstance(tool, Mapping) for tool in _listed(value))


def _listed(value: list[Any] | tuple[Any, ...] | Mapping[str, Any]) -> list[Any]:
    """The tools one by one; text that is the JSON of a tool is a tool."""
    tools: list[Any] = []
    for given in [value] if isinstance(value, Mapping) else value:
        tool = parse_if_json(given)
        declared = next((tool[key] for key in _DECLARED if tool.get(key)), None) if isinstance(tool, Mapping) else None
        tools += [tool] if declared is None else declared
    return tools


def _plain(value: object, where: str, *, nulls: bool = False) -> Any:  # noqa: ANN401  # JSON: callers check what they need
    """The value in JSON's types, without keys that are null unless `nulls` are kept."""
    try:
        return as_json(value, nulls)
    except TypeError as problem:
        raise RowError(
            BAD_ROW, f"{where} describes a tool or a call with {problem}, which JSON can't hold"
        ) from problem
