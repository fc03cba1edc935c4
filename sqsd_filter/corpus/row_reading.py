"""How a row is read: which of its columns make its conversation, and which of its turns are learned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Self, TypeGuard

from sqsd_filter.corpus.conversation import (
    BAD_JSON,
    BAD_ROW,
    NO_ANSWER,
    ROLES,
    UNWANTED,
    Conversation,
    Message,
    RowError,
    is_supervised,
    is_turn,
    read_content,
    read_template_settings,
    read_tools,
    read_transcript,
    read_turns,
    unsupervised,
)
from sqsd_filter.corpus.values import as_flag, is_missing, is_null, parse_text

PREFERENCES = {  # formats with two answers: the columns of the better and of the worse one
    "preference": ("chosen", "rejected"),
    "openai-preference": ("preferred_output", "non_preferred_output"),
}
SHOWN_BY_TAG = ("image", "audio", "video")  # columns that belong to the conversation if it has the tag <image>
LABELS = ("true", "false", "all")


@dataclass(frozen=True)
class RowFormat:
    """Which columns of a row make its conversation.

    Either `messages` names one column with a list of turns, or `answer` names a column with the answer and `prompt` one
    with what precedes it, each as text or as turns. `context` is text that is appended to the prompt after a newline,
    `history` holds earlier turns, or pairs of questions and answers. `system` (text) and `tools` come before everything
    else.

    `label` says of each row whether its answer is wanted (KTO); rows without one of the `labels` that are asked for are
    not learned. `template` has settings of the chat template, `roles` the roles that are learned. A row with a value in
    a column of `masks`, or of `media` where the text shows it, can't be scored: it is learned in part, or is not text
    alone.
    """

    name: str
    messages: str | None = None
    prompt: str | None = None
    context: str | None = None
    answer: str | None = None
    system: str | None = None
    history: str | None = None
    tools: str | None = None
    label: str | None = None
    template: str | None = None
    roles: str | None = None
    media: tuple[str, ...] = ()
    masks: tuple[str, ...] = ()
    labels: str = LABELS[0]

    @classmethod
    def of(cls, facts: Mapping[str, Any]) -> Self:
        """The format that these `facts` describe, as JSON has them."""
        given: dict[str, Any] = {k: tuple(value) if isinstance(value, list) else value for k, value in facts.items()}
        return cls(**given)

    @property
    def facts(self) -> dict[str, Any]:
        """Its fields for JSON. Those that older versions did not know are there only if they are set."""
        always = {f.name for f in fields(RowFormat)[:8]}
        default = RowFormat(self.name)
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in vars(self).items()
            if name in always or value != getattr(default, name)
        }

    @property
    def columns(self) -> list[str]:
        single = [column for f in fields(self)[1:11] if (column := getattr(self, f.name)) is not None]
        return [*single, *self.media, *self.masks]

    @property
    def is_preference(self) -> bool:
        return self.name in PREFERENCES

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
        """The row's turns as the module `conversation` defines them. Raises `RowError`: `no_answer`, `unwanted` or
        `bad_row`."""
        self._check_label(row)
        if self.messages is not None:
            value = row.get(self.messages)
            turns = [] if is_missing(value) else read_turns(value, f"column '{self.messages}'")
        else:
            turns = self._prompt_and_answer(row)
        self._check_text(row, turns)
        if self.roles is not None:
            turns = _learned_roles(turns, row.get(self.roles), f"column '{self.roles}'")
        if not any(map(is_supervised, turns)):
            raise RowError(
                NO_ANSWER, f"column '{self.messages or self.answer}' has no assistant turn with anything to learn"
            )
        system = _text(row, self.system)
        if system and turns[0]["role"] != "system":
            turns.insert(0, {"role": "system", "content": system})
        return [*self._before(row), *turns]

    def _before(self, row: Mapping[str, Any]) -> list[Message]:
        """The turns at the beginning that nobody speaks: settings of the template, and tools."""
        settings = read_template_settings(row.get(self.template), f"column '{self.template}'") if self.template else []
        if self.name == "openai-preference":
            request = parse_text(row.get(self.prompt)) if self.prompt else None
            return (
                [*settings, *read_tools(request.get("tools"), f"column '{self.prompt}'")]
                if _is_request(request)
                else settings
            )
        return [*settings, *(read_tools(row.get(self.tools), f"column '{self.tools}'") if self.tools else [])]

    def _check_label(self, row: Mapping[str, Any]) -> None:
        label = row.get(self.label) if self.label is not None else None
        if is_missing(label) or self.labels == "all":
            return
        wanted = as_flag(label)
        if wanted is None:
            raise RowError(BAD_ROW, f"column '{self.label}' holds {label!r}, neither true nor false")
        if wanted != (self.labels == "true"):
            raise RowError(UNWANTED, f"column '{self.label}' is {str(wanted).lower()}: the answer is not to be learned")

    def _check_text(self, row: Mapping[str, Any], turns: Sequence[Message]) -> None:
        for column in self.media:
            shown = column not in SHOWN_BY_TAG or any(f"<{column}>" in turn["content"] for turn in turns)
            if shown and not is_missing(row.get(column)):
                raise RowError(BAD_ROW, f"column '{column}' holds something that is not text, and only text is scored")
        for column in self.masks:
            if not is_missing(row.get(column)):
                raise RowError(
                    BAD_ROW, f"column '{column}' marks which tokens are learned, which is not read: mark whole turns"
                )

    def _prompt_and_answer(self, row: Mapping[str, Any]) -> list[Message]:
        """No turn of the prompt is supervised; turns of the history are, except in a preference."""
        reply = self._reply(row)
        prompt = row.get(self.prompt) if self.prompt is not None else None
        if self.name == "openai-preference" and _is_request(request := parse_text(prompt)):
            prompt = request["messages"]
        before = [{"role": "user", "content": prompt}] if _is_text(prompt) else _turns(prompt, self.prompt)
        whole = self.is_preference and bool(reply) and reply[0]["role"] != "assistant"
        if self.prompt is None or (whole and (_is_text(prompt) or reply[: len(before)] == before)):
            return _last_answer(reply)  # the reply repeats the prompt, if any
        if context := _text(row, self.context):
            before = before or [{"role": "user", "content": ""}]
            asked = before[-1]["content"]
            before[-1]["content"] = f"{asked}\n{context}" if asked.strip() else context
        if not before:
            raise RowError(BAD_ROW, f"column '{self.prompt}' is empty or missing")
        earlier = self._earlier(row)
        if self.is_preference:
            earlier = [*map(unsupervised, earlier)]
        return [*earlier, *map(unsupervised, before), *reply]

    def _reply(self, row: Mapping[str, Any]) -> list[Message]:
        """The answer's turns, or the whole conversation that its column holds."""
        assert self.answer is not None
        answer = row.get(self.answer)
        if is_null(answer) or (isinstance(answer, str) and not answer.strip()):
            raise RowError(NO_ANSWER, f"column '{self.answer}' is empty or missing")
        if not _is_text(answer):
            return _turns(answer, self.answer)
        if self.prompt is None:
            return read_transcript(answer, f"column '{self.answer}'")
        return [{"role": "assistant", "content": answer}]

    def _earlier(self, row: Mapping[str, Any]) -> list[Message]:
        history: Any = parse_text(row.get(self.history)) if self.history is not None else None
        if is_missing(history):
            return []
        if not is_history(history):
            raise RowError(
                BAD_ROW, f"column '{self.history}' holds something other than turns or [question, answer] pairs"
            )
        if any(map(is_turn, history)):
            return read_turns(history, f"column '{self.history}'")
        pairs = [zip(("user", "assistant"), pair, strict=True) for pair in history if pair]
        return [{"role": role, "content": text} for pair in pairs for role, text in pair if not is_null(text)]


def is_history(value: object) -> bool:
    """Is it a list of turns, or of pairs of a question and its answer, either of which may be null or missing?"""
    if not isinstance(value, list | tuple):
        return False
    return all(map(is_turn, value)) or all(map(_is_pair, value))


def _is_pair(value: object) -> bool:
    return (
        isinstance(value, list | tuple)
        and len(value) in (0, 2)
        and all(isinstance(x, str) or is_null(x) for x in value)
    )


def is_system(value: object) -> bool:
    """Is it text, or an object or a list of blocks that hold text?"""
    try:
        return _as_text(value, "") is not None
    except RowError:
        return False


def _text(row: Mapping[str, Any], column: str | None) -> str | None:
    value = row.get(column) if column is not None else None
    return None if is_missing(value) else _as_text(value, f"column '{column}'")


def _as_text(value: object, where: str) -> str | None:
    """The text of a value: of text itself, or of blocks as AWS, Anthropic and Google write them."""
    if isinstance(value, str):
        return value
    inner = value
    if isinstance(value, Mapping):
        inner = next((value[key] for key in ("parts", "content", "text") if value.get(key)), None)
    if isinstance(inner, str):
        return inner
    if isinstance(inner, list | tuple) and all(isinstance(part, Mapping) for part in inner):
        return read_content(inner, where, "\n")
    raise RowError(BAD_ROW, f"{where} holds {type(value).__name__}, not text")


def _turns(value: object, column: str | None) -> list[Message]:
    """The turns of a list, or of its JSON text, or a single one."""
    if is_missing(value):
        return []
    if not isinstance(value, list | tuple | Mapping | str):
        raise RowError(BAD_ROW, f"column '{column}' holds {type(value).__name__}, not text")
    return read_turns([value] if isinstance(value, Mapping) else value, f"column '{column}'")


def _last_answer(turns: list[Message]) -> list[Message]:
    """The same turns; only those that answer the last question are supervised."""
    last = max((k for k, turn in enumerate(turns) if is_supervised(turn)), default=0)
    asked = max((k for k, turn in enumerate(turns[:last]) if turn["role"] == "user"), default=0)
    return [*map(unsupervised, turns[:asked]), *turns[asked:]]


def _learned_roles(turns: list[Message], names: object, where: str) -> list[Message]:
    """The turns, after a check that the assistant is the one role of these that is learned. Raises `RowError`."""
    names = parse_text(names)
    if is_missing(names):
        return turns
    listed = [names] if isinstance(names, str) else names
    if not isinstance(listed, list | tuple) or not all(isinstance(n, str) and n.lower() in ROLES for n in listed):
        raise RowError(BAD_ROW, f"{where} holds something other than names of roles")
    if others := [name for name in listed if ROLES[name.lower()] not in ("assistant", "function_call")]:
        raise RowError(BAD_ROW, f"{where} has the role {others[0]!r}, but only an assistant's turns are scored")
    return turns


def _is_request(value: object) -> TypeGuard[Mapping[str, Any]]:
    """Is it what OpenAI is asked: an object with turns?"""
    return isinstance(value, Mapping) and "messages" in value


def _is_text(value: object) -> TypeGuard[str]:
    """Is it text, other than the text of a list of turns?"""
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return isinstance(value, str)
    turns = parse_text(value)
    return not (isinstance(turns, list) and turns and all(map(is_turn, turns)))
