"""Which row format a dataset has: decided once, from the columns of a sample of its rows, never guessed per row."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqsd_filter.corpus.conversation import MEDIA, is_transcript
from sqsd_filter.corpus.row_reading import LABELS, PREFERENCES, RowFormat, is_history, is_system
from sqsd_filter.corpus.tool_calls import are_tools
from sqsd_filter.corpus.values import as_flag, is_missing, looks_printed, parse_text
from sqsd_filter.errors import InputError, UsageError

__all__ = ["FORMATS", "Columns", "RowFormat"]

_LISTS = {  # name -> the column with the turns
    "messages": "messages",
    "conversations": "conversations",
    "conversation": "conversation",
    "gemini": "contents",
}
_PAIRS: dict[str, tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]] = {  # name -> prompts, contexts, answers
    "preference": (("prompt", "instruction", "question", "query", "conversations"), ("input", "context"), ("chosen",)),
    "openai-preference": (("input",), (), ("preferred_output",)),
    "alpaca": (("instruction",), ("input", "context"), ("output", "response")),
    "prompt-completion": (("prompt",), (), ("completion", "response")),
    "question-answer": (("question",), ("context", "passage", "document"), ("answer", "response")),
    "query-response": (("query",), ("context", "passage", "document"), ("response", "answer")),
    "input-output": (("input",), (), ("output",)),
}
_ASKING = ("question-answer", "query-response")
_ASKED = ("prompt", "instruction", "question", "query", "conversations", "messages")  # beside these, `input` is none
FORMATS = (*_LISTS, *_PAIRS)


def _is_settings(value: object) -> bool:
    return isinstance(parse_text(value), Mapping)


def _are_names(value: object) -> bool:
    names = parse_text(value)
    return isinstance(names, str) or (isinstance(names, list | tuple) and all(isinstance(n, str) for n in names))


def _is_label(value: object) -> bool:
    return as_flag(value) is not None


# Further columns of a conversation, with a check of their values
_BESIDE: dict[str, tuple[tuple[str, ...], Callable[[object], bool]]] = {
    "system": (("system", "system_prompt", "systemInstruction", "system_instruction"), is_system),
    "history": (("history",), lambda value: is_history(parse_text(value))),
    "tools": (("tools", "functions"), are_tools),
    "template": (("chat_template_kwargs",), _is_settings),
    "roles": (("roles_to_train",), _are_names),
    "label": (("label", "kto_tag"), _is_label),
}
_OF_LISTS = ("system", "tools", "template", "roles", "label")
_NAMEABLE = ("messages", "prompt", "context", "answer", "system", "history", "tools", "label")
_MASKS = ("loss_mask", "loss_scale", "completion_mask", "assistant_masks", "train_detail")


@dataclass(frozen=True)
class Columns:
    """What the user fixed about the row format: one of `FORMATS` and single columns; None leaves it to detection.

    `labels` says which rows of a KTO dataset are scored: those whose label is "true" or "false", or "all". `strict`
    makes it an error if a column or key that looks as if it changed what is learned is not read.
    """

    format: str | None = None
    messages: str | None = None
    prompt: str | None = None
    context: str | None = None
    answer: str | None = None
    system: str | None = None
    history: str | None = None
    tools: str | None = None
    label: str | None = None
    labels: str = LABELS[0]
    strict: bool = False

    @property
    def _named(self) -> dict[str, Any]:
        """The columns that the user named, by their roles."""
        return {name: column for name in _NAMEABLE if (column := getattr(self, name)) is not None}

    def choose(self, sample: Iterable[Mapping[str, Any]], *, of_batch: bool = False) -> RowFormat:
        """Decide how rows are read, from the columns seen in a sample.

        If the user names the messages, or both prompt and answer, no other columns are detected. A column that no value
        of the sample fits is another column of that name. With `of_batch` the sample is an arbitrary part of a dataset:
        then names decide alone, so that every part decides the same.

        Raises `InputError`, which names the columns seen and the flags that decide, if no format fits or several do;
        `UsageError` for an unknown format or unknown labels.
        """
        if self.format is not None and self.format not in FORMATS:
            raise UsageError(
                f"There is no row format '{self.format}': choose one of {', '.join(FORMATS)} with {_flags('format')}."
            )
        if self.labels not in LABELS:
            raise UsageError(f"labels (--labels) must be one of {', '.join(LABELS)}, not '{self.labels}'.")
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
            return RowFormat(self.format if self.format in _LISTS else "messages", **self._named, labels=self.labels)
        if self.prompt and self.answer:
            return RowFormat(self.format or "custom", **self._named, labels=self.labels)

        table = _Sample(rows, seen, of_batch)
        fits = [
            fit
            for candidate in ([self.format] if self.format else FORMATS)
            if (fit := self._fit(candidate, table)) is not None
        ]
        prompts = {fit.prompt for fit in fits if fit.is_preference}
        fits = [fit for fit in fits if fit.messages is None or fit.messages not in prompts]
        if len({tuple(f.columns) for f in fits}) == 1:  # all of them read the same columns
            return fits[0]
        raise InputError(self._unfit(fits, table))

    def _fit(self, candidate: str, table: _Sample) -> RowFormat | None:
        """The format of this name with its columns among those seen; None if it lacks some."""
        if candidate in _LISTS:
            column = _LISTS[candidate]
            single = self.prompt or self.context or self.answer or self.history
            if column not in table.seen or single or not table.looks(column, _is_list):
                return None
            return RowFormat(candidate, messages=column, **self._beside(table, _OF_LISTS))
        prompts, contexts, answers = _PAIRS[candidate]
        prompt, answer = self._candidates("prompt", prompts, table), self._candidates("answer", answers, table)
        if candidate in PREFERENCES:
            sides = PREFERENCES[candidate]
            if not set(sides) <= set(table.seen) or self.answer not in (None, *sides):
                return None
            if candidate == "preference" and not prompt:
                if "messages" in table.seen and not any(map(_is_whole, table.values("chosen"))):
                    prompt = ["messages"]
                elif not any(table.looks("chosen", looks) for looks in (_is_list, is_transcript)):
                    return None
        if candidate == "input-output" and not self.prompt and not set(_ASKED).isdisjoint(table.seen):
            return None
        if candidate != "preference" and (not prompt or not answer):
            return None
        context = self._candidates("context", contexts, table)
        if candidate in _ASKING and not self.context:  # structured contexts are other things
            context = [column for column in context if table.looks(column, lambda value: isinstance(value, str))]
        columns: dict[str, Any] = {"prompt": prompt, "context": context, "answer": answer}
        columns = {name: _only(name, candidates) for name, candidates in columns.items()}
        beside = [name for name in _BESIDE if name != "label" or candidate not in PREFERENCES]
        return RowFormat(candidate, **columns, **self._beside(table, beside))

    def _beside(self, table: _Sample, names: Sequence[str]) -> dict[str, Any]:
        """The further columns of these names that exist and hold a fitting value, or none at all."""
        columns: dict[str, Any] = {"labels": self.labels}
        for name in names:
            usual, fits = _BESIDE[name]
            candidates = self._candidates(name, usual, table)
            if name not in self._named:
                every = name == "label"  # other labels are classes
                candidates = [c for c in candidates if (table.all(c, fits) if every else table.looks(c, fits))]
                if not table.of_batch:
                    candidates = [c for c in candidates if table.values(c)] or candidates[:1]
            columns[name] = _only(name, candidates)
        columns["media"] = tuple(column for column in table.seen if column in MEDIA)
        columns["masks"] = tuple(column for column in table.seen if column in _MASKS)
        return columns

    def _candidates(self, name: str, usual: Sequence[str], table: _Sample) -> list[str]:
        """The columns that may be the `name` of a row: the one that the user names, or those with usual names."""
        given = self._named.get(name)
        return [given] if given else [column for column in usual if column in table.seen]

    def _unfit(self, fits: Sequence[RowFormat], table: _Sample) -> str:
        """Why there is no format, and which flags decide."""
        names = _names(table.seen)
        if fits:
            both = " or ".join(f.name for f in fits)
            return f"More than one row format fits the columns {names}: choose {both} with {_flags('format')}."
        for column in _LISTS.values():
            if any(map(looks_printed, table.values(column))):
                return (
                    f"Column '{column}' holds lists as Python prints them, not JSON: write the column with json.dumps, "
                    "or save the rows as JSON Lines or parquet."
                )
        flags = f"name the columns with {_flags('prompt', 'answer')} or {_flags('messages')}"
        beside = {
            name: c for name, (usual, _) in _BESIDE.items() if name in _NAMEABLE for c in usual if c in table.seen
        }
        if beside:
            flags += f", and those beside them with {_flags(*beside)}"
        if self.format is not None:
            return f"The format {self.format} does not fit the columns {names}: {flags}."
        if "text" in table.seen:
            return (
                f"No known row format fits the columns {names}. A 'text' column is plain text without an answer, "
                f"not a conversation. If other columns hold prompts and answers, {flags}."
            )
        return f"No known row format fits the columns {names}: {flags} (known formats: {', '.join(FORMATS)})."


@dataclass(frozen=True)
class _Sample:
    """Rows of a dataset and the columns `seen` in them; `of_batch` as in `Columns.choose`."""

    rows: Sequence[Mapping[str, Any]]
    seen: Sequence[str]
    of_batch: bool

    def values(self, column: str) -> list[Any]:
        """The column's values that are not missing."""
        return [value for row in self.rows if not is_missing(value := row.get(column)) and value != "[]"]

    def looks(self, column: str, looks: Callable[[object], bool]) -> bool:
        """Does the column hold such a value, or no values at all? In a batch every column does."""
        return self.of_batch or any(map(looks, values := self.values(column))) or not values

    def all(self, column: str, looks: Callable[[object], bool]) -> bool:
        """Are all the column's values such values?"""
        return all(map(looks, self.values(column)))


def _only(name: str, candidates: Sequence[str]) -> str | None:
    if len(candidates) > 1:
        raise InputError(
            f"The columns {_names(candidates)} could both be the {name} of a row: choose one with {_flags(name)}."
        )
    return candidates[0] if candidates else None


def _flags(*names: str) -> str:
    """The options for these, as in Python and as on the command line."""
    flags = ", ".join(f"--{name}" if name == "format" else f"--{name}-column" for name in names)
    return f"columns=Columns({', '.join(f'{name}=…' for name in names)}) ({flags})"


def _is_list(value: object) -> bool:
    return isinstance(parse_text(value), list | tuple)


def _is_whole(value: object) -> bool:
    """Does it look like a conversation from its beginning, not like an answer alone?"""
    turns = parse_text(value)
    first = turns[0] if isinstance(turns, list | tuple) and turns else None
    return isinstance(first, Mapping) and (first.get("role") or first.get("from")) not in ("assistant", "gpt", "model")


def _names(columns: Sequence[str]) -> str:
    return ", ".join(f"'{c}'" for c in columns) or "(none)"
