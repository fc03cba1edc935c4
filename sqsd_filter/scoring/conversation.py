"""A row becomes a conversation, a conversation becomes tokens and a mask of the tokens that are supervised.

Two steps, so that the first needs no tokenizer: `RowFormat.messages` reads a row's columns, `ChatEncoder.encode`
renders the chat template. Either may find that the row can't be scored; it then says why with a status, never with a
silently empty mask.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import numpy as np

from sqsd_filter.errors import InputError, ModelError, UsageError

Message = dict[str, str]

SCORED = "scored"
NO_ANSWER = "no_answer"
PROMPT_TOO_LONG = "prompt_too_long"
NONFINITE = "nonfinite"
BAD_JSON = "bad_json"
BAD_ROW = "bad_row"  # the columns are there to be read, but hold something that is not a conversation
TEMPLATE_ERROR = "template_error"  # the model's chat template refuses this conversation

ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "tool": "tool",
}


class RowError(Exception):
    """This row can't be scored: `status` is one of the reasons above, `detail` says more to a person."""

    def __init__(self, status: str, detail: str) -> None:
        super().__init__(detail)
        self.status = status
        self.detail = detail


@dataclass(frozen=True)
class RowFormat:
    """Which columns of a row make its conversation.

    Either `messages` names one column that holds a list of turns, or `prompt` and `answer` (and perhaps `context`,
    which joins the prompt with one newline) name text columns.
    """

    name: str
    messages: str | None = None
    prompt: str | None = None
    context: str | None = None
    answer: str | None = None

    @property
    def columns(self) -> list[str]:
        return [c for c in (self.messages, self.prompt, self.context, self.answer) if c is not None]

    def __str__(self) -> str:
        return f"{self.name} ({', '.join(self.columns)})"

    def conversation(self, row: Mapping[str, Any]) -> list[Message]:
        """The row's turns as `{"role", "content"}`. Raises `RowError` with `no_answer` or `bad_row`."""
        if self.messages is not None:
            return _turns(row.get(self.messages), self.messages)
        assert self.prompt is not None and self.answer is not None
        prompt = _text(row.get(self.prompt), self.prompt)
        if prompt is None:
            raise RowError(BAD_ROW, f"column '{self.prompt}' is empty or missing")
        context = _text(row.get(self.context), self.context) if self.context is not None else None
        if context:
            prompt = f"{prompt}\n{context}"
        answer = _text(row.get(self.answer), self.answer)
        if answer is None or not answer.strip():
            raise RowError(NO_ANSWER, f"column '{self.answer}' is empty or missing")
        return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


def _text(value: Any, column: str) -> str | None:
    if value is None or isinstance(value, str):
        return value
    raise RowError(BAD_ROW, f"column '{column}' holds {type(value).__name__}, not text")


def _turns(value: Any, column: str) -> list[Message]:
    if value is None:
        raise RowError(NO_ANSWER, f"column '{column}' is empty or missing")
    if not isinstance(value, list | tuple):
        raise RowError(BAD_ROW, f"column '{column}' holds {type(value).__name__}, not a list of turns")
    turns: list[Message] = []
    for number, turn in enumerate(value, 1):
        where = f"turn {number} of column '{column}'"
        if not isinstance(turn, Mapping):
            raise RowError(BAD_ROW, f"{where} holds {type(turn).__name__}, not an object with role and content")
        name = turn.get("role") or turn.get("from")
        role = ROLES.get(name) if isinstance(name, str) else None
        if role is None:
            raise RowError(BAD_ROW, f"{where} has the role {name!r}; known are {', '.join(ROLES)}")
        content = turn.get("content") if turn.get("content") is not None else turn.get("value")
        if content is None and role != "assistant":
            raise RowError(BAD_ROW, f"{where} has no content")
        if content is not None and not isinstance(content, str):
            raise RowError(BAD_ROW, f"{where} holds {type(content).__name__}, not text")
        turns.append({"role": role, "content": content or ""})
    if not any(t["role"] == "assistant" and t["content"].strip() for t in turns):
        raise RowError(NO_ANSWER, f"column '{column}' has no assistant turn with text")
    return turns


# ---------------------------------------------------------------------------------------------- detection

_PAIRS: dict[str, tuple[str, tuple[str, ...], tuple[str, ...]]] = {  # name -> prompt, contexts, answers
    "alpaca": ("instruction", ("input", "context"), ("output", "response")),
    "prompt-completion": ("prompt", (), ("completion", "response")),
    "question-answer": ("question", (), ("answer",)),
}
FORMATS = ("messages", "conversations", *_PAIRS)


def choose_format(
    sample: Iterable[Mapping[str, Any]],
    name: str | None = None,
    *,
    messages: str | None = None,
    prompt: str | None = None,
    context: str | None = None,
    answer: str | None = None,
) -> RowFormat:
    """Decide how rows are read, from the columns seen in a sample and from what the user fixed.

    `name` is one of `FORMATS`; the other arguments override single columns. Raises `InputError` where no format fits
    or more than one does, naming the columns seen and the flags that decide, `UsageError` for an unknown `name`.
    """
    if name is not None and name not in FORMATS:
        raise UsageError(f"There is no row format '{name}': choose one of {', '.join(FORMATS)}.")
    rows = [row for row in sample if row is not None]
    seen = list(dict.fromkeys(key for row in rows for key in row))
    if not rows:
        raise InputError("No readable row was found in the input: check that it is one of the supported file formats.")
    for flag, column in (("messages", messages), ("prompt", prompt), ("context", context), ("answer", answer)):
        if column is not None and column not in seen:
            raise InputError(f"--{flag}-column names '{column}', but the input has the columns {_names(seen)}.")
    if messages is not None:
        if prompt or context or answer:
            raise InputError("--messages-column can't be combined with --prompt-, --context- or --answer-column.")
        return RowFormat(name if name in ("messages", "conversations") else "messages", messages=messages)
    if prompt and answer:
        return RowFormat(name or "custom", prompt=prompt, context=context, answer=answer)

    fits = []
    for candidate in FORMATS if name is None else (name,):
        if candidate in ("messages", "conversations"):
            if candidate in seen and not (prompt or context or answer) and _has_lists(rows, candidate):
                fits.append(RowFormat(candidate, messages=candidate))
            continue
        ask, contexts, answers = _PAIRS[candidate]
        ask = prompt or ask
        found_answers = [answer] if answer else [c for c in answers if c in seen]
        found_contexts = [context] if context else [c for c in contexts if c in seen]
        if ask not in seen or not found_answers:
            continue
        if len(found_answers) > 1 or len(found_contexts) > 1:
            flag, twice = ("answer", found_answers) if len(found_answers) > 1 else ("context", found_contexts)
            raise InputError(
                f"The columns {_names(twice)} could both be the {flag} of a row: say which with --{flag}-column."
            )
        fits.append(RowFormat(candidate, prompt=ask, context=next(iter(found_contexts), None), answer=found_answers[0]))
    if len({tuple(f.columns) for f in fits}) == 1:  # by whichever name, the same columns are read
        return fits[0]
    if fits:
        raise InputError(
            f"More than one row format fits the columns {_names(seen)}: "
            f"choose with --format {' or '.join(f.name for f in fits)}."
        )
    if name is not None:
        raise InputError(
            f"The format {name} does not fit the columns {_names(seen)}: name the columns with --prompt-column and "
            "--answer-column, or with --messages-column."
        )
    raise InputError(
        f"No known row format fits the columns {_names(seen)}: name the columns with --prompt-column and "
        f"--answer-column, or with --messages-column (known formats: {', '.join(FORMATS)})."
    )


@dataclass(frozen=True)
class Columns:
    """What the user fixed about the row format; None leaves it to detection."""

    format: str | None = None
    messages: str | None = None
    prompt: str | None = None
    context: str | None = None
    answer: str | None = None

    def choose(self, sample: Iterable[Mapping[str, Any]]) -> RowFormat:
        """See `choose_format`."""
        return choose_format(
            sample,
            self.format,
            messages=self.messages,
            prompt=self.prompt,
            context=self.context,
            answer=self.answer,
        )


def _has_lists(rows: Sequence[Mapping[str, Any]], column: str) -> bool:
    values = [row.get(column) for row in rows]
    return any(isinstance(value, list | tuple) for value in values) or all(value is None for value in values)


def _names(columns: Sequence[str]) -> str:
    return ", ".join(f"'{c}'" for c in columns) or "(none)"


def conversation_key(turns: Sequence[Message]) -> bytes:
    """16 bytes that equal conversations share: BLAKE2b over their roles and contents."""
    text = json.dumps([[t["role"], t["content"]] for t in turns], ensure_ascii=False, separators=(",", ":"))
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


# ---------------------------------------------------------------------------------------------- tokens


@dataclass(frozen=True)
class Encoded:
    """One conversation as the model sees it: `ids` (t,) int64, `answer` (t,) bool, true where a token is supervised."""

    ids: np.ndarray
    answer: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)


@dataclass
class ChatEncoder:
    """Renders conversations with a tokenizer's chat template and marks the answers.

    Every assistant turn's text and the token that ends the turn are supervised; what the template adds after that is
    not. The last turn follows the template's generation prompt, exactly as the model would be asked. Nothing depends
    on `{% generation %}` markers: the answers are located by rendering the history once more with placeholders for
    the answers, so a template without markers works too. The head of a conversation longer than `max_length` tokens
    is kept.

    Raises `ModelError` when the tokenizer has no chat template or can't map tokens back to the text.
    """

    tokenizer: Any
    max_length: int = 1024
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        name = getattr(self.tokenizer, "name_or_path", "") or "the model"
        if not (self.template_kwargs.get("chat_template") or getattr(self.tokenizer, "chat_template", None)):
            raise ModelError(
                f"The tokenizer of {name} has no chat template: use an instruction-tuned model, or put one into the "
                "pack's chat_template_kwargs as 'chat_template'."
            )
        if not getattr(self.tokenizer, "is_fast", False):
            raise ModelError(f"The tokenizer of {name} can't map tokens to text: it needs a tokenizer.json.")
        self._special = set(self.tokenizer.all_special_ids) | {
            i for i, token in self.tokenizer.added_tokens_decoder.items() if token.special
        }
        self._lead, self._end, self._trims = self._learn_turn()

    def encode(self, conversations: Sequence[Sequence[Message]]) -> list[Encoded | RowError]:
        """Tokens and answer mask of each conversation, or the reason why it has none."""
        out: list[Encoded | RowError] = []
        rendered: list[tuple[int, str, list[tuple[int, int]]]] = []
        for number, turns in enumerate(conversations):
            try:
                rendered.append((number, *self._render_with_spans(turns)))
                out.append(RowError(NO_ANSWER, ""))  # its place; filled below
            except RowError as problem:
                out.append(problem)
        if rendered:
            batch = self.tokenizer(
                [text for _, text, _ in rendered],
                add_special_tokens=False,  # the template writes its own
                return_offsets_mapping=True,
                return_attention_mask=False,
            )
            for (number, _, spans), ids, offsets in zip(
                rendered, batch["input_ids"], batch["offset_mapping"], strict=True
            ):
                out[number] = self._mask(ids, offsets, spans)
        return out

    def _mask(self, ids: list[int], offsets: list[tuple[int, int]], spans: list[tuple[int, int]]) -> Encoded | RowError:
        kept = ids[: self.max_length]
        where = np.asarray(offsets[: self.max_length], dtype=np.int64).reshape(-1, 2)
        begins, ends = where[:, 0], where[:, 1]
        # Some tokenizers trim whitespace from their offsets: a token left with none stands right after the one before.
        fills = np.where(ends > begins, begins, np.concatenate(([0], ends[:-1]))[: len(ends)])
        special = np.fromiter((i in self._special for i in kept), dtype=bool, count=len(kept))
        answer = np.zeros(len(kept), dtype=bool)
        for start, stop in spans:
            # A token counts when it holds any of the answer's characters, but never a marker of the prompt (some
            # markers swallow the whitespace after them, the answer's too).
            answer |= (ends > start) & (fills < stop) & (ends > fills) & ~(special & (begins < start))
        answer[:1] = False  # nothing predicts the first token
        if not answer.any():
            if len(ids) > self.max_length:
                return RowError(PROMPT_TOO_LONG, f"the prompt leaves no room for an answer in {self.max_length} tokens")
            return RowError(NO_ANSWER, "the answer has no token of its own")
        return Encoded(np.asarray(kept, dtype=np.int64), answer)

    def _render_with_spans(self, turns: Sequence[Message]) -> tuple[str, list[tuple[int, int]]]:
        """The text up to the end of the last answer, and the character span of every answer in it."""
        answers = (k for k, t in enumerate(turns) if t["role"] == "assistant" and (t["content"] or "").strip())
        last = max(answers, default=None)
        if last is None:
            raise RowError(NO_ANSWER, "no assistant turn has text")
        if last == 0:
            raise RowError(BAD_ROW, "no turn stands before the answer")
        if any(not isinstance(t["content"], str) for t in turns):
            raise RowError(BAD_ROW, "a turn's content is not text")
        try:
            "".join(t["content"] for t in turns).encode()
        except UnicodeEncodeError as problem:
            raise RowError(BAD_ROW, "a turn holds half of a surrogate pair, which is not text") from problem
        history = turns[:last]
        text = self._template(history, add_generation_prompt=True)
        spans = self._history_spans(history, text)
        answer = turns[last]["content"].strip() if self._trims else turns[last]["content"]
        text += self._lead
        spans.append((len(text), len(text) + len(answer) + len(self._end)))
        return text + answer + self._end, spans

    def _history_spans(self, history: Sequence[Message], text: str) -> list[tuple[int, int]]:
        """Where the answers of earlier turns stand in `text`, the rendered history."""
        answers = [t["content"] for t in history if t["role"] == "assistant"]
        if not answers:
            return []
        salt = next(n for n in count() if _placeholder(0, n)[-9:] not in text)
        marks = iter(_placeholder(k, salt) for k in range(len(answers)))
        marked = [{**t, "content": next(marks)} if t["role"] == "assistant" else t for t in history]
        rest = self._template(marked, add_generation_prompt=True)
        pieces = []  # the template's own text between the answers
        for k in range(len(answers)):
            before, found, rest = rest.partition(_placeholder(k, salt))
            if not found:
                raise RowError(TEMPLATE_ERROR, "the chat template leaves out an earlier assistant turn")
            pieces.append(before)
        pieces.append(rest)

        spans, at = [], 0
        for k, answer in enumerate(answers):
            at += len(pieces[k])
            following = pieces[k + 1]
            for shown in (answer, answer.strip()):
                if text.startswith(shown + following, at):
                    break
            else:  # the template rewrites earlier answers (drops their reasoning, say): take what it shows
                stop = text.find(following, at)
                if stop < 0 or not text.startswith(pieces[k], at - len(pieces[k])):
                    raise RowError(TEMPLATE_ERROR, "the chat template rewrites an earlier assistant turn")
                shown = text[at:stop]
            end = len(self._end) if following.startswith(self._end) else 0
            if shown.strip():
                spans.append((at, at + len(shown) + end))
            at += len(shown)
        return spans

    def _template(self, turns: Sequence[Message], *, add_generation_prompt: bool) -> str:
        try:
            return self.tokenizer.apply_chat_template(
                list(turns), tokenize=False, add_generation_prompt=add_generation_prompt, **self.template_kwargs
            )
        except Exception as problem:  # Jinja templates raise what they like
            raise RowError(TEMPLATE_ERROR, f"the chat template refuses it: {problem}") from problem

    def _learn_turn(self) -> tuple[str, str, bool]:
        """What the template writes between its generation prompt and an answer (mostly nothing), what it writes from
        the answer's end through the token that ends the turn, and whether it trims the answer."""
        mark = _placeholder(0)
        ask = [{"role": "user", "content": "x"}]
        try:
            prompt = self._template(ask, add_generation_prompt=True)
            plain = self._template([*ask, {"role": "assistant", "content": mark}], add_generation_prompt=False)
            spaced = self._template([*ask, {"role": "assistant", "content": f" {mark} "}], add_generation_prompt=False)
        except RowError as problem:
            raise ModelError(f"The chat template fails on a plain question and answer: {problem.detail}") from problem
        before, found, tail = plain.partition(mark)
        if not found:
            raise ModelError("The chat template leaves out the assistant's turn: give another one in the pack.")
        lead = before[len(prompt) :] if before.startswith(prompt) else ""
        encoded = self.tokenizer(tail, add_special_tokens=False, return_offsets_mapping=True)
        for token, (_, stop) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
            if token in self._special:
                return lead, tail[:stop], spaced == plain
        return lead, self.tokenizer.eos_token or "", spaced == plain


def _placeholder(k: int, salt: int = 0) -> str:
    return f"[[answer-{k}-{salt:06x}]]"
