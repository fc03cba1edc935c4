"""What a conversation is, the forms that a row's turns may have, and the key that equal conversations share.

A turn is `{"role", "content"}`: the role is system, user, assistant or tool, the content is text. An assistant's turn
may also have `tool_calls` in OpenAI's form, their arguments as objects, and `"weight": 0` where it is not supervised; a
tool's turn may have `tool_call_id` and `name`. The tools that a model may call are the first turn of the conversation,
`{"role": "tools", "content": [...]}`; settings of the chat template are a turn before it, with the role
`chat_template_kwargs`. What an assistant thought before it spoke is its turn's `reasoning_content`. All of it is JSON.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from sqsd_filter.corpus.marks import is_learned
from sqsd_filter.corpus.statuses import (
    BAD_JSON,
    BAD_ROW,
    NO_ANSWER,
    NONFINITE,
    PROMPT_TOO_LONG,
    SCORED,
    TEMPLATE_ERROR,
    UNWANTED,
    RowError,
)
from sqsd_filter.corpus.tool_calls import TOOLS, read_calls, read_tools, split_thought
from sqsd_filter.corpus.values import MAX_DEPTH, as_json, is_missing, is_null, parse_if_json, parse_text

__all__ = [  # with what the other rooms need of its neighbours
    "BAD_JSON",
    "BAD_ROW",
    "MAX_DEPTH",
    "MEDIA",
    "NONFINITE",
    "NO_ANSWER",
    "PROMPT_TOO_LONG",
    "REASONING",
    "ROLES",
    "SCORED",
    "TEMPLATE_ERROR",
    "TEMPLATE_SETTINGS",
    "TOOLS",
    "UNWANTED",
    "Conversation",
    "Message",
    "RowError",
    "conversation_key",
    "is_supervised",
    "is_transcript",
    "is_turn",
    "parse_if_json",
    "read_content",
    "read_template_settings",
    "read_tools",
    "read_transcript",
    "read_turns",
    "split_settings",
    "unsupervised",
]

Message = dict[str, Any]
Conversation = list[Message]

TEMPLATE_SETTINGS = "chat_template_kwargs"  # the role of a turn at the beginning that holds settings of the template
REASONING = "reasoning_content"  # the key of an assistant's turn for what it thought before it spoke
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
# Keys of an object that holds a question and its answer, in place of two turns
_EXCHANGE = {
    "system": ("system",),
    "user": ("human", "user", "input", "question", "query", "instruction", "prompt"),
    "assistant": ("assistant", "gpt", "bot", "output", "answer", "response"),
}
_SAID = ("content", "value", "text", "parts")  # keys of a turn for its text
_CALLED = ("tool_calls", "function_call")  # keys of a turn for its tool calls
_REASONED = (REASONING, "reasoning", "thinking")  # keys of a turn for its reasoning
MEDIA = {"image", "images", "audio", "audios", "video", "videos"}  # keys of a turn, or columns, for what is no text
_TEXTS = (None, "text", "input_text", "output_text", "refusal")  # types of a part of the content that is text
_SPEAKER = re.compile(r"(?:^|\n\n)(Human|Assistant):")


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
    if len(_exchanged(value)) > 1:
        return True
    name = _named(value)
    return isinstance(name, str) and name.lower() in ROLES and not value.keys().isdisjoint((*_SAID, *_CALLED))


def read_turns(value: object, where: str) -> list[Message]:
    """The turns of a list (or of the JSON text of one); `where` names it in messages.

    A null counts as missing, since a parquet file gives every turn the keys of all; only the arguments of tool calls
    that were JSON text keep their nulls. Several leading system turns are joined with a blank line. Raises `RowError`
    with `bad_row`.
    """
    exact, value = isinstance(value, str), parse_text(value)
    if not isinstance(value, list | tuple):
        raise RowError(BAD_ROW, f"{where} holds {type(value).__name__}, not a list of turns")
    turns: list[Message] = []
    for number, given in enumerate(value, 1):
        for one in _exchanged(given):
            turn = _read_turn(one, f"turn {number} of {where}", exact)
            if turn is None:
                continue
            if turn["role"] == "system" and [t["role"] for t in turns] == ["system"]:
                turns[0]["content"] += f"\n\n{turn['content']}"
            else:
                turns.append(turn)
    return turns


def _exchanged(given: object) -> list[object]:
    """The turns of an object that holds a question and its answer; any other object is a turn itself."""
    if not isinstance(given, Mapping) or not given.keys().isdisjoint(("role", "from")):
        return [given]
    said = {role: [given[key] for key in keys if not is_null(given.get(key))] for role, keys in _EXCHANGE.items()}
    if not said["assistant"] or any(len(texts) > 1 for texts in said.values()):
        return [given]
    return [{"role": role, "content": text} for role, texts in said.items() for text in texts if text != ""]


def _read_turn(turn: object, where: str, exact: bool) -> Message | None:
    """One turn; None for a system turn without content. With `exact` its calls keep their nulls."""
    if not isinstance(turn, Mapping):
        raise RowError(BAD_ROW, f"{where} holds {type(turn).__name__}, not an object with role and content")
    name = _named(turn)
    role = ROLES.get(name.lower()) if isinstance(name, str) else None
    if role is None:
        raise RowError(BAD_ROW, f"{where} has the role {name!r}; known are {', '.join(ROLES)}")
    given = next((turn[key] for key in _SAID if not is_null(turn.get(key))), None)
    content = given if isinstance(given, str) else read_content(given, where)
    if not content and role == "assistant" and isinstance(turn.get("refusal"), str):
        content = turn["refusal"]
    for key in sorted(turn.keys() & MEDIA):
        if not is_missing(turn[key]):
            raise RowError(BAD_ROW, f"{where} has {key}, which is not text")
    if content is None and role in ("user", _CALL):
        raise RowError(BAD_ROW, f"{where} has no content")
    if content is None and role == "system":
        return None
    more: Message = {}
    answers = role in ("assistant", _CALL)
    learned = is_learned(turn, given, where, answers=answers)
    if answers:
        calls = next((turn[key] for key in _CALLED if not is_missing(turn.get(key))), None)
        if role == _CALL:
            role, (content, calls) = "assistant", split_thought(content or "")
        if calls and (calls := read_calls(calls, where, exact)):
            more["tool_calls"] = calls
        if reasoning := next((turn[key] for key in _REASONED if not is_missing(turn.get(key))), None):
            more[REASONING] = _reasoning(reasoning, where)
        more |= {} if learned else {"weight": 0}
    elif role == "tool":
        more = {key: turn[key] for key in ("tool_call_id", "name") if isinstance(turn.get(key), str)}
    return {"role": role, "content": content or "", **more}


def _named(turn: Mapping[str, Any]) -> object:
    """The name of a turn's role."""
    return next((turn[key] for key in ("role", "from") if not is_missing(turn.get(key))), None)


def _reasoning(value: object, where: str) -> str:
    text = value if isinstance(value, str) else read_content(value, f"the reasoning of {where}")
    return text or ""


def read_content(content: object, where: str, between: str = "") -> str | None:
    """The text parts of a list, joined as axolotl, ms-swift and most templates do, or with the text `between` them."""
    if is_null(content):
        return None
    if not isinstance(content, list | tuple):
        raise RowError(BAD_ROW, f"{where} holds {type(content).__name__}, not text")
    texts = []
    for part in content:
        text, kind = part, None
        if isinstance(part, Mapping):
            kind = part.get("type")
            text = part.get("refusal") if kind == "refusal" else part.get("text")
        if kind not in _TEXTS or not isinstance(text, str):
            raise RowError(BAD_ROW, f"{where} holds a list with a part of type {kind!r} that is not text")
        texts.append(text)
    return between.join(texts) if texts else None


def read_template_settings(value: object, where: str) -> list[Message]:
    """The turn with a row's settings of the chat template, which an object or its JSON text gives; no turn if there are
    none. Nulls, which a table puts into every row, are no settings. Raises `RowError` with `bad_row`."""
    value = parse_text(value)
    if is_missing(value):
        return []
    if not isinstance(value, Mapping):
        raise RowError(BAD_ROW, f"{where} holds {type(value).__name__}, not an object with settings of the template")
    try:
        settings = as_json(value, nulls=False)
    except TypeError as problem:
        raise RowError(BAD_ROW, f"{where} holds {problem}, which JSON can't hold") from problem
    return [{"role": TEMPLATE_SETTINGS, "content": settings}] if settings else []


def split_settings(turns: Sequence[Message]) -> tuple[dict[str, Any], list[Message]]:
    """A conversation's settings of the chat template, and its other turns."""
    settings: dict[str, Any] = next((turn["content"] for turn in turns if turn["role"] == TEMPLATE_SETTINGS), {})
    return settings, [turn for turn in turns if turn["role"] != TEMPLATE_SETTINGS]


def read_transcript(text: str, where: str) -> list[Message]:
    """The turns of one text whose paragraphs begin with "Human:" and "Assistant:"."""
    if not is_transcript(text):
        raise RowError(BAD_ROW, f"{where} holds text that does not begin with 'Human:', and there is no prompt column")
    _, *parts = _SPEAKER.split(text)
    pairs = zip(parts[::2], parts[1::2], strict=True)
    return [{"role": ROLES[who.lower()], "content": said.removeprefix(" ")} for who, said in pairs]


def is_transcript(value: object) -> bool:
    return isinstance(value, str) and _SPEAKER.match(value) is not None
