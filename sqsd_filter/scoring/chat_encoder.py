"""Encodes a conversation as tokens and a mask of the supervised ones, or gives the reason why it can't be scored."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from sqsd_filter.corpus.conversation import (
    BAD_ROW,
    NO_ANSWER,
    PROMPT_TOO_LONG,
    TEMPLATE_ERROR,
    Message,
    RowError,
    split_settings,
)
from sqsd_filter.errors import ModelError
from sqsd_filter.scoring.chat_template import ChatTemplate, Span

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


CHARACTERS = 8  # for each token of the limit: a text is cut there for a first try
MARGIN = 4096  # characters: tokens that end so far before a cut don't depend on it
MOST_TEMPLATES = 64  # with rows' own settings that are kept


@dataclass(frozen=True)
class Encoded:
    """One conversation's tokens: `ids` (t,) int64 and `answer` (t,) bool, true where a token is supervised."""

    ids: np.ndarray
    answer: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)


def cut_answer(row: Encoded, answer_tokens: int | None) -> Encoded:
    """The row up to its first `answer_tokens` supervised tokens; the whole row for None."""
    positions = np.flatnonzero(row.answer)
    if answer_tokens is None or len(positions) <= answer_tokens:
        return row
    stop = int(positions[answer_tokens])
    return replace(row, ids=row.ids[:stop], answer=row.answer[:stop])


def check_offsets(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Raise `ModelError` where a tokenizer can't say which characters a token stands for."""
    if not getattr(tokenizer, "is_fast", False):
        raise ModelError(f"The tokenizer of {name} can't map tokens to text: it needs a tokenizer.json.")


@dataclass
class ChatEncoder:
    """Renders conversations with a tokenizer's chat template and marks the answers, as `ChatTemplate` finds them.

    Nothing depends on `{% generation %}` markers. A conversation longer than `max_length` tokens is cut at its end;
    what follows is not tokenised. A conversation's own settings of the template come before `template_kwargs`;
    `folds_system` is that of `ChatTemplate`.

    Raises `ModelError` when the tokenizer has no chat template or can't map tokens back to the text.
    """

    tokenizer: PreTrainedTokenizerBase
    max_length: int = 1024
    template_kwargs: Mapping[str, object] = field(default_factory=dict)
    folds_system: bool = False

    def __post_init__(self) -> None:
        name = getattr(self.tokenizer, "name_or_path", "") or "the model"
        if not (self.template_kwargs.get("chat_template") or getattr(self.tokenizer, "chat_template", None)):
            raise ModelError(
                f"The tokenizer of {name} has no chat template: use an instruction-tuned model, or put one into the "
                "pack's chat_template_kwargs as 'chat_template'."
            )
        check_offsets(self.tokenizer, name)
        self.template = ChatTemplate(self.tokenizer, self.template_kwargs, self.folds_system)
        self._templates: dict[str, ChatTemplate | RowError] = {}  # by a conversation's own settings

    def encode(self, conversations: Sequence[Sequence[Message]]) -> list[Encoded | RowError]:
        """Tokens and answer mask of each conversation, or the reason why it can't be scored."""
        encoded: list[Encoded | RowError] = []
        rendered: list[tuple[int, str, list[Span]]] = []
        for number, turns in enumerate(conversations):
            try:
                rendered.append((number, *self.render(turns)))
                encoded.append(RowError(NO_ANSWER, ""))  # replaced below
            except RowError as problem:
                encoded.append(problem)
        tokens = self._tokens([text for _, text, _ in rendered])
        for (number, _, spans), (ids, offsets) in zip(rendered, tokens, strict=True):
            encoded[number] = self._mask(ids, offsets, spans)
        return encoded

    def render(self, turns: Sequence[Message]) -> tuple[str, list[Span]]:
        """As `ChatTemplate.render`, with the conversation's own settings of the template."""
        settings, turns = split_settings(turns)
        return self._template(settings).render(turns)

    def texts(self, turns: Sequence[Message]) -> list[str]:
        """The text of each token of a conversation. Where tokens share a character, the first one has it."""
        text, _ = self.render(turns)
        ((_, offsets),) = self._tokens([text])
        ends = np.maximum.accumulate([0, *(end for _, end in offsets)])
        return [text[start:end] for start, end in pairwise(ends)]

    def _template(self, settings: Mapping[str, Any]) -> ChatTemplate:
        """The template with these settings. Raises `RowError` where they are none of a template, or break it."""
        if not settings:
            return self.template
        if taken := sorted(_not_settings(self.tokenizer).intersection(settings)):
            raise RowError(BAD_ROW, f"chat_template_kwargs has {taken[0]!r}, which is not a row's to set")
        key = json.dumps(settings, sort_keys=True)
        if key not in self._templates:
            if len(self._templates) >= MOST_TEMPLATES:
                self._templates.clear()
            try:
                made: ChatTemplate | RowError = ChatTemplate(
                    self.tokenizer, {**self.template_kwargs, **settings}, self.folds_system, self.template.told
                )
            except ModelError as problem:
                made = RowError(TEMPLATE_ERROR, f"with the row's chat_template_kwargs: {problem}")
            self._templates[key] = made
        template = self._templates[key]
        if isinstance(template, RowError):
            raise template.with_traceback(None)
        return template

    def _tokens(self, texts: Sequence[str]) -> list[tuple[list[int], list[Span]]]:
        """The tokens of each text and their ranges of characters; of a long text, only those of its beginning."""
        short = iter(self._tokenise([text for text in texts if not self._is_long(text)]))
        return [self._beginning(text) if self._is_long(text) else next(short) for text in texts]

    def _is_long(self, text: str) -> bool:
        return len(text) > CHARACTERS * self.max_length + MARGIN

    def _beginning(self, text: str) -> tuple[list[int], list[Span]]:
        """More than `max_length` tokens from the beginning of a text, if it has so many.

        Where a text is cut, its last tokens may change. So it is cut in two places, ever later, until the tokens are
        the same.
        """
        size = CHARACTERS * self.max_length
        while size + MARGIN < len(text):
            (ids, offsets), (more, _) = self._tokenise([text[:size], text[: size + MARGIN]])
            wanted = self.max_length + 1
            if len(ids) > wanted and offsets[wanted - 1][1] <= size - MARGIN and ids[:wanted] == more[:wanted]:
                return ids[:wanted], offsets[:wanted]
            size *= 2
        return self._tokenise([text])[0]

    def _tokenise(self, texts: Sequence[str]) -> list[tuple[list[int], list[Span]]]:
        if not texts:
            return []
        batch = self.tokenizer(
            list(texts),
            add_special_tokens=False,  # the template writes its own
            return_offsets_mapping=True,
            return_attention_mask=False,
        )
        return list(zip(batch["input_ids"], batch["offset_mapping"], strict=True))

    def _mask(self, ids: list[int], offsets: list[tuple[int, int]], spans: list[Span]) -> Encoded | RowError:
        kept = ids[: self.max_length]
        offsets_t2 = np.asarray(offsets[: self.max_length], dtype=np.int64).reshape(-1, 2)
        begins, ends = offsets_t2[:, 0], offsets_t2[:, 1]
        # Some tokenizers trim whitespace from their offsets: an empty token starts where the previous one ends.
        fills = np.where(ends > begins, begins, np.concatenate(([0], ends[:-1]))[: len(ends)])
        special = np.fromiter((i in self.template.special for i in kept), dtype=bool, count=len(kept))
        answer = np.zeros(len(kept), dtype=bool)
        for start, stop in spans:
            # A token with any of the answer's characters is supervised, except a marker of the prompt: some markers
            # swallow the whitespace after them, even the answer's.
            answer |= (ends > start) & (fills < stop) & (ends > fills) & ~(special & (begins < start))
        answer[:1] = False  # no position predicts the first token
        if not answer.any():
            if len(ids) > self.max_length:
                return RowError(PROMPT_TOO_LONG, f"the prompt leaves no room for an answer in {self.max_length} tokens")
            return RowError(NO_ANSWER, "the answer has no token of its own")
        return Encoded(np.asarray(kept, dtype=np.int64), answer)


def _not_settings(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """The names that belong to the call of the template or to the tokenizer, and never to a row."""
    return {*inspect.signature(tokenizer.apply_chat_template).parameters, *tokenizer.special_tokens_map, "messages"}
