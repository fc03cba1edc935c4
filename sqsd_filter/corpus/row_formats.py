"""Which columns of a row make its conversation: decided once, from a sample of rows, never guessed per row."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeGuard

from sqsd_filter.corpus.conversation import (
    BAD_JSON,
    BAD_ROW,
    NO_ANSWER,
    Conversation,
    Message,
    RowError,
    is_supervised,
    is_transcript,
    is_turn,
    parse_if_json,
    read_tools,
    read_transcript,
    read_turns,
    unsupervised,
)
from sqsd_filter.errors import InputError, UsageError


@dataclass(frozen=True)
class RowFormat:
    """Which columns of a row make its conversation.

    Either `messages` names one column with a list of turns, or `answer` names a column with the answer and `prompt` one
    with what precedes it, each as text or as turns. `context` is text that is appended to the prompt after a newline,
    `history` holds pairs of earlier questions and answers. `system` (text) and `tools` come before everything else.
    """

    name: str
    messages: str | None = None
    prompt: str | None = None
    context: str | None = None
    answer: str | None = None
    system: str | None = None
    history: str | None = None
    tools: str | None = None

    @property
    def columns(self) -> list[str]:
        return [column for f in fields(self)[1:] if (column := getattr(self, f.name)) is not None]

    def __str__(self) -> str:
        return f"{self.name} ({', '.join(self.columns)})"

    def parse(self, row: Mapping[str, Any] | None, problem: str = "") -> Conversation | RowError:
        """The row's conversation, or the error that says why it has none: for a row that could not be read (None) with
        `bad_json` and this `problem`."""
        if row is None:
            return RowError(BAD_JSON, problem)
        try:
            return self.conversation(row)
        except RowError as error:
            return error.with_traceback(None)

    def conversation(self, row: Mapping[str, Any]) -> Conversation:
        """The row's turns as the module `conversation` defines them. Raises `RowError`: `no_answer` or `bad_row`."""
        if self.messages is not None:
            value = row.get(self.messages)
            turns = [] if value is None else read_turns(value, f"column '{self.messages}'")
        else:
            turns = self._prompt_and_answer(row)
        if not any(map(is_supervised, turns)):
            raise RowError(
                NO_ANSWER, f"column '{self.messages or self.answer}' has no assistant turn with anything to learn"
            )
        system = _text(row, self.system)
        if system and turns[0]["role"] != "system":
            turns.insert(0, {"role": "system", "content": system})
        return [*read_tools(row.get(self.tools), f"column '{self.tools}'"), *turns] if self.tools else turns

    def _prompt_and_answer(self, row: Mapping[str, Any]) -> list[Message]:
        """No turn of the prompt is supervised; turns of the history are, except in a preference."""
        reply = self._reply(row)
        prompt = row.get(self.prompt) if self.prompt is not None else None
        before = [{"role": "user", "content": prompt}] if _is_text(prompt) else _turns(prompt or [], self.prompt)
        whole = self.name == "preference" and bool(reply) and reply[0]["role"] != "assistant"
        if self.prompt is None or (whole and (_is_text(prompt) or reply[: len(before)] == before)):
            return _last_answer(reply)  # the reply repeats the prompt, if any
        if not before:
            raise RowError(BAD_ROW, f"column '{self.prompt}' is empty or missing")
        if context := _text(row, self.context):
            before[-1]["content"] += f"\n{context}"
        earlier = self._earlier(row)
        if self.name == "preference":
            earlier = [*map(unsupervised, earlier)]
        return [*earlier, *map(unsupervised, before), *reply]

    def _reply(self, row: Mapping[str, Any]) -> list[Message]:
        """The answer's turns, or the whole conversation that its column holds."""
        assert self.answer is not None
        answer = row.get(self.answer)
        if answer is None or (isinstance(answer, str) and not answer.strip()):
            raise RowError(NO_ANSWER, f"column '{self.answer}' is empty or missing")
        if not _is_text(answer):
            return _turns(answer, self.answer)
        if self.prompt is None:
            return read_transcript(answer, f"column '{self.answer}'")
        return [{"role": "assistant", "content": answer}]

    def _earlier(self, row: Mapping[str, Any]) -> list[Message]:
        if self.history is None:
            return []
        pairs = parse_if_json(row.get(self.history) or [])
        if not _is_list_of(_is_pair, pairs):
            raise RowError(BAD_ROW, f"column '{self.history}' holds something other than [question, answer] pairs")
        roles = ("user", "assistant")
        return [{"role": role, "content": text} for pair in pairs for role, text in zip(roles, pair, strict=True)]


def _text(row: Mapping[str, Any], column: str | None) -> str | None:
    value = row.get(column) if column is not None else None
    if value is None or isinstance(value, str):
        return value
    raise RowError(BAD_ROW, f"column '{column}' holds {type(value).__name__}, not text")


def _turns(value: object, column: str | None) -> list[Message]:
    """The turns of a list, or of its JSON text, or a single one."""
    if not isinstance(value, list | tuple | Mapping | str):
        raise RowError(BAD_ROW, f"column '{column}' holds {type(value).__name__}, not text")
    return read_turns([value] if isinstance(value, Mapping) else value, f"column '{column}'")


def _last_answer(turns: list[Message]) -> list[Message]:
    """The same turns; only those that answer the last question are supervised."""
    last = max((k for k, turn in enumerate(turns) if is_supervised(turn)), default=0)
    asked = max((k for k, turn in enumerate(turns[:last]) if turn["role"] == "user"), default=0)
    return [*map(unsupervised, turns[:asked]), *turns[asked:]]


def _is_text(value: object) -> TypeGuard[str]:
    """Is it text, other than the JSON text of a list of turns?"""
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return isinstance(value, str)
    turns = parse_if_json(value)
    return not (isinstance(turns, list) and turns and all(map(is_turn, turns)))


def _is_pair(value: object) -> bool:
    return isinstance(value, list | tuple) and [type(text) for text in value] == [str, str]


# ---------------------------------------------------------------------------------------------- detection

_LISTS = ("messages", "conversations")
_PAIRS: dict[str, tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]] = {  # name -> prompts, contexts, answers
    "preference": (("prompt", "instruction", "question", "conversations"), ("input", "context"), ("chosen",)),
    "alpaca": (("instruction",), ("input", "context"), ("output", "response")),
    "prompt-completion": (("prompt",), (), ("completion", "response")),
    "question-answer": (("question",), (), ("answer", "response")),
}
FORMATS = (*_LISTS, *_PAIRS)
# Further columns of a conversation, with a check of their values
_BESIDE: dict[str, tuple[tuple[str, ...], Callable[[object], bool]]] = {
    "system": (("system", "system_prompt"), lambda value: isinstance(value, str)),
    "history": (("history",), lambda value: _is_list_of(_is_pair, value)),
    "tools": (("tools", "functions"), lambda value: _is_list_of(_is_tool, value)),
}


@dataclass(frozen=True)
class Columns:
    """What the user fixed about the row format: one of `FORMATS` and single columns; None leaves it to detection."""

    format: str | None = None
    messages: str | None = None
    prompt: str | None = None
    context: str | None = None
    answer: str | None = None
    system: str | None = None
    history: str | None = None
    tools: str | None = None

    @property
    def _named(self) -> dict[str, str]:
        """The columns that the user named, by their roles."""
        return {f.name: column for f in fields(self)[1:] if (column := getattr(self, f.name)) is not None}

    def choose(self, sample: Iterable[Mapping[str, Any]]) -> RowFormat:
        """Decide how rows are read, from the columns seen in a sample.

        If the user names the messages, or both prompt and answer, no other columns are detected. Raises `InputError`,
        which names the columns seen and the flags that decide, if no format fits or several do; `UsageError` for an
        unknown format.
        """
        if self.format is not None and self.format not in FORMATS:
            raise UsageError(
                f"There is no row format '{self.format}': choose one of {', '.join(FORMATS)} with {_flags('format')}."
            )
        rows = [row for row in sample if row is not None]
        seen = list(dict.fromkeys(key for row in rows for key in row))
        if not rows:
            raise InputError(
                "No readable row was found in the input: check that it is one of the supported file formats."
            )
        for name, column in self._named.items():
            if column not in seen:
                raise InputError(f"{_flags(name)} names '{column}', but the input has the columns {_names(seen)}.")
        if self.messages is not None:
            if others := [name for name in ("prompt", "context", "answer", "history") if getattr(self, name)]:
                raise InputError(f"{_flags('messages')} can't be combined with {_flags(*others)}.")
            return RowFormat(self.format if self.format in _LISTS else "messages", **self._named)
        if self.prompt and self.answer:
            return RowFormat(self.format or "custom", **self._named)

        fits = [
            fit
            for candidate in ([self.format] if self.format else FORMATS)
            if (fit := self._fit(candidate, rows, seen)) is not None
        ]
        if len({tuple(f.columns) for f in fits}) == 1:  # all of them read the same columns
            return fits[0]
        raise InputError(_unfit(fits, self.format, seen))

    def _fit(self, candidate: str, rows: Sequence[Mapping[str, Any]], seen: Sequence[str]) -> RowFormat | None:
        """The format of this name with its columns among those seen; None if it lacks some."""
        if candidate in _LISTS:
            single = self.prompt or self.context or self.answer or self.history
            if candidate not in seen or single or not _looks(rows, candidate, _is_list):
                return None
            return RowFormat(candidate, messages=candidate, **self._beside(rows, seen, ("system", "tools")))
        prompts, contexts, answers = _PAIRS[candidate]
        prompt, answer = self._candidates("prompt", prompts, seen), self._candidates("answer", answers, seen)
        if candidate == "preference":
            sides = ("chosen", "rejected")
            if not set(sides) <= set(seen) or self.answer not in (None, *sides):
                return None
            if not prompt and not any(_looks(rows, "chosen", looks) for looks in (_is_list, is_transcript)):
                return None
        elif not prompt or not answer:
            return None
        context = self._candidates("context", contexts, seen)
        columns = {"prompt": prompt, "context": context, "answer": answer}
        return RowFormat(
            candidate,
            **{name: _only(name, candidates) for name, candidates in columns.items()},
            **self._beside(rows, seen, tuple(_BESIDE)),
        )

    def _beside(
        self, rows: Sequence[Mapping[str, Any]], seen: Sequence[str], names: Sequence[str]
    ) -> dict[str, str | None]:
        """The further columns of these names that exist and hold fitting values."""
        columns = {}
        for name in names:
            usual, fits = _BESIDE[name]
            candidates = self._candidates(name, usual, seen)
            if name not in self._named:
                candidates = [column for column in candidates if all(map(fits, _values(rows, column)))]
            columns[name] = _only(name, candidates)
        return columns

    def _candidates(self, name: str, usual: Sequence[str], seen: Sequence[str]) -> list[str]:
        """The columns that may be the `name` of a row: the one that the user names, or those with usual names."""
        given = self._named.get(name)
        return [given] if given else [column for column in usual if column in seen]


def _only(name: str, candidates: Sequence[str]) -> str | None:
    if len(candidates) > 1:
        raise InputError(
            f"The columns {_names(candidates)} could both be the {name} of a row: choose one with {_flags(name)}."
        )
    return candidates[0] if candidates else None


def _unfit(fits: Sequence[RowFormat], name: str | None, seen: Sequence[str]) -> str:
    """Why there is no format, and which flags decide."""
    if fits:
        names = " or ".join(f.name for f in fits)
        return f"More than one row format fits the columns {_names(seen)}: choose {names} with {_flags('format')}."
    flags = f"name the columns with {_flags('prompt', 'answer')} or {_flags('messages')}"
    if name is not None:
        return f"The format {name} does not fit the columns {_names(seen)}: {flags}."
    if "text" in seen:
        return (
            f"No known row format fits the columns {_names(seen)}. A 'text' column is plain text without an answer, "
            f"not a conversation. If other columns hold prompts and answers, {flags}."
        )
    return f"No known row format fits the columns {_names(seen)}: {flags} (known formats: {', '.join(FORMATS)})."


def _flags(*names: str) -> str:
    """The options for these, as in Python and as on the command line."""
    flags = ", ".join(f"--{name}" if name == "format" else f"--{name}-column" for name in names)
    return f"columns=Columns({', '.join(f'{name}=…' for name in names)}) ({flags})"


def _looks(rows: Sequence[Mapping[str, Any]], column: str, looks: Callable[[object], bool]) -> bool:
    """Does the column hold such values, or no values at all?"""
    values = _values(rows, column)
    return any(map(looks, values)) or not values


def _values(rows: Sequence[Mapping[str, Any]], column: str) -> list[Any]:
    """The column's values that are not empty."""
    return [value for row in rows if (value := row.get(column)) not in (None, "", [], "[]")]


def _is_list(value: object) -> bool:
    return isinstance(parse_if_json(value), list | tuple)


def _is_list_of(kind: Callable[[object], bool], value: object) -> bool:
    items = parse_if_json(value)
    return isinstance(items, list | tuple) and all(map(kind, items))


def _is_tool(value: object) -> bool:
    return isinstance(value, Mapping)


def _names(columns: Sequence[str]) -> str:
    return ", ".join(f"'{c}'" for c in columns) or "(none)"
