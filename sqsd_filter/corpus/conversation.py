"""What a conversation is, the forms that a row's turns may have, and the key that equal conversations share.

A turn is `{"role", "content"}`: the role is system, user, assistant or tool, the content is text. An assistant's turn
may also have `tool_calls` in OpenAI's form, their arguments as objects, and `"weight": 0` where it is not supervised; a
tool's turn may have `tool_call_id` and `name`. The tools that a model may call are the first turn of the conversation,
`{"role": "tools", "content": [...]}`. All of it is JSON.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

Message = dict[str, Any]
Conversation = list[Message]

MAX_DEPTH = 200  # levels in a row; far below Python's recursion limit, whose reach depends on version and caller

SCORED = "scored"
NO_ANSWER = "no_answer"
PROMPT_TOO_LONG = "prompt_too_long"
NONFINITE = "nonfinite"
BAD_JSON = "bad_json"
BAD_ROW = "bad_row"  # the columns exist but hold no conversation
TEMPLATE_ERROR = "template_error"  # the model's chat template refuses this conversation

TOOLS = "tools"  # the role of the first turn where the model may call tools
_CALL = "function_call"  # an assistant's turn whose text is a tool call
ROLES = {
    name: role
    for role, names in {
        "system": "system developer",
        "user": "user human prompter",
        "assistant": "assistant gpt model bot chatbot ai chatgpt bing bard",
        "tool": "tool observation function ipython tool_response function_response",
        _CALL: "function_call tool_call",
    }.items()
    for name in names.split()
}
_SAID = ("content", "value", "text")  # keys of a turn for its text
_CALLED = ("tool_calls", "function_call")  # keys of a turn for its tool calls
_TEXTS = (None, "text", "input_text", "output_text")  # types of a part of the content that is text
_SPEAKER = re.compile(r"(?:^|\n\n)(Human|Assistant):")


class RowError(Exception):
    """This row can't be scored: `status` is one of the constants above, `detail` explains it to the user."""

    def __init__(self, status: str, detail: str) -> None:
        super().__init__(detail)
        self.status = status
        self.detail = detail


def is_supervised(turn: Message) -> bool:
    """Is this turn trained on: an assistant's, with content or calls and without weight 0?"""
    if turn["role"] != "assistant" or turn.get("weight") == 0:
        return False
    return bool(turn["content"].strip() or turn.get("tool_calls"))


def unsupervised(turn: Message) -> Message:
    """The same turn as part of the prompt."""
    return {**turn, "weight": 0} if turn["role"] == "assistant" else turn


_COMPACT = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))


def conversation_key(turns: Sequence[Message]) -> bytes:
    """The 16-byte BLAKE2b hash of everything in the turns: equal conversations share it."""
    items = [[turn["role"], turn["content"], *_more(turn)] for turn in turns]
    text = _COMPACT.encode(items)
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def _more(turn: Message) -> list[Message]:
    """What a turn holds beside role and content. A plain turn holds nothing: keys made by older versions stay valid."""
    return [{name: turn[name] for name in sorted(turn.keys() - {"role", "content"})}] if len(turn) > 2 else []


# ---------------------------------------------------------------------------------------------- turns


def is_turn(value: object) -> bool:
    """Does it look like a turn: an object with a known role and a key for text or calls?"""
    if not isinstance(value, Mapping):
        return False
    name = value.get("role") or value.get("from")
    return isinstance(name, str) and name.lower() in ROLES and not value.keys().isdisjoint((*_SAID, *_CALLED))


def read_turns(value: object, where: str) -> list[Message]:
    """The turns of a list (or of the JSON text of one); `where` names it in messages.

    A null counts as missing, since a parquet file gives every turn the keys of all; only the arguments of tool calls
    that were JSON text keep their nulls. Several leading system turns are joined with a blank line. Raises `RowError`
    with `bad_row`.
    """
    exact, value = isinstance(value, str), parse_if_json(value)
    if not isinstance(value, list | tuple):
        raise RowError(BAD_ROW, f"{where} holds {type(value).__name__}, not a list of turns")
    turns: list[Message] = []
    for number, given in enumerate(value, 1):
        turn = _read_turn(given, f"turn {number} of {where}", exact)
        if turn is None:
            continue
        if turn["role"] == "system" and [t["role"] for t in turns] == ["system"]:
            turns[0]["content"] += f"\n\n{turn['content']}"
        else:
            turns.append(turn)
    return turns


def _read_turn(turn: object, where: str, exact: bool) -> Message | None:
    """One turn; None for a system turn without content. With `exact` its calls keep their nulls."""
    if not isinstance(turn, Mapping):
        raise RowError(BAD_ROW, f"{where} holds {type(turn).__name__}, not an object with role and content")
    name = turn.get("role") or turn.get("from")
    role = ROLES.get(name.lower()) if isinstance(name, str) else None
    if role is None:
        raise RowError(BAD_ROW, f"{where} has the role {name!r}; known are {', '.join(ROLES)}")
    for key in _SAID:
        if (content := turn.get(key)) is not None:
            break
    if not isinstance(content, str):
        content = _read_content(content, where)
    if content is None and role in ("user", _CALL):
        raise RowError(BAD_ROW, f"{where} has no content")
    if content is None and role == "system":
        return None
    more: Message = {}
    if role in ("assistant", _CALL):
        calls = content if role == _CALL else turn.get("tool_calls") or turn.get("function_call")
        if calls and (calls := _read_calls(calls, where, exact)):
            more["tool_calls"] = calls
        more |= _weight(turn, where)
    elif role == "tool":
        more = {key: turn[key] for key in ("tool_call_id", "name") if isinstance(turn.get(key), str)}
    if role == _CALL:
        role, content = "assistant", ""
    return {"role": role, "content": content or "", **more}


def _read_content(content: object, where: str) -> str | None:
    """The text parts of a list, joined with newlines."""
    if content is None:
        return None
    if not isinstance(content, list | tuple):
        raise RowError(BAD_ROW, f"{where} holds {type(content).__name__}, not text")
    texts = []
    for part in content:
        text, kind = (part.get("text"), part.get("type")) if isinstance(part, Mapping) else (part, None)
        if kind not in _TEXTS or not isinstance(text, str):
            raise RowError(BAD_ROW, f"{where} holds a list with a part of type {kind!r} that is not text")
        texts.append(text)
    return "\n".join(texts) if texts else None


def _read_calls(value: object, where: str, exact: bool) -> list[dict[str, Any]]:
    """Tool calls in one form; none if all is null. Arguments keep their nulls if they were JSON text."""
    exact = exact or isinstance(value, str)
    value = _plain(parse_if_json(value), where, nulls=exact)
    if isinstance(value, dict):
        value = [] if all(part is None for part in value.values()) else [value]
    calls = []
    given_calls: list[Any] = value if isinstance(value, list) else [value] if value else []
    for call in given_calls:
        function: Any = (call.get("function") or call) if isinstance(call, dict) else None
        name = function.get("name") if isinstance(function, dict) else None
        given = function.get("arguments") or {} if name else None
        arguments = parse_if_json(given)
        if not isinstance(name, str) or not isinstance(arguments, dict):
            raise RowError(BAD_ROW, f"{where} has a tool call that is not a name and an object of arguments")
        tagged = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
        nulls = exact or isinstance(given, str)
        function = {"name": name, "arguments": _plain(arguments, where, nulls=nulls)}
        calls.append({**tagged, "type": "function", "function": function})
    return calls


def _weight(turn: Mapping[str, Any], where: str) -> Message:
    """`{"weight": 0}` for a turn that is excluded from training by its `weight` or `train`."""
    for key in ("weight", "train"):
        value = turn.get(key)
        if value not in (None, 0, 1):
            raise RowError(BAD_ROW, f"{where} has the {key} {value!r}; only 0 and 1 have a meaning")
        if value == 0:
            return {"weight": 0}
    return {}


def read_tools(value: object, where: str) -> list[Message]:
    """The turn with the tools that a list, or the JSON text of one, describes; no turn if there are none."""
    value = parse_if_json(value or [])
    tools = []
    for tool in value if isinstance(value, list | tuple) else [None]:
        whole: Any = (
            tool if isinstance(tool, Mapping) and tool.get("function") else {"type": "function", "function": tool}
        )
        function = whole["function"]
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise RowError(BAD_ROW, f"{where} holds something other than a list of tools with names")
        tools.append(_plain(whole, where))
    return [{"role": TOOLS, "content": tools}] if tools else []


def read_transcript(text: str, where: str) -> list[Message]:
    """The turns of one text whose paragraphs begin with "Human:" and "Assistant:"."""
    if not is_transcript(text):
        raise RowError(BAD_ROW, f"{where} holds text that does not begin with 'Human:', and there is no prompt column")
    _, *parts = _SPEAKER.split(text)
    pairs = zip(parts[::2], parts[1::2], strict=True)
    return [{"role": ROLES[who.lower()], "content": said.removeprefix(" ")} for who, said in pairs]


def is_transcript(value: object) -> bool:
    return isinstance(value, str) and _SPEAKER.match(value) is not None


def parse_if_json(value: object) -> Any:  # noqa: ANN401  # JSON: callers check what they need
    """The value of JSON text; any other value, and text that is not JSON, stays the same."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def _plain(value: object, where: str, *, nulls: bool = False) -> Any:  # noqa: ANN401  # JSON: callers check what they need
    """The value in JSON's types, without keys that are null unless `nulls` are kept."""
    try:
        return _as_json(value, nulls)
    except TypeError as problem:
        raise RowError(
            BAD_ROW, f"{where} describes a tool or a call with {problem}, which JSON can't hold"
        ) from problem


def _as_json(value: object, nulls: bool, depth: int = 0) -> object:
    if depth > MAX_DEPTH:
        raise TypeError("something nested too deeply")
    if isinstance(value, Mapping):
        return {str(key): _as_json(item, nulls, depth + 1) for key, item in value.items() if nulls or item is not None}
    if isinstance(value, list | tuple):
        return [_as_json(item, nulls, depth + 1) for item in value]
    if value is None or isinstance(value, str | int | float):
        return value
    raise TypeError(type(value).__name__)
