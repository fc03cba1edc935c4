"""Encodes a conversation as tokens and a mask of the supervised ones, or gives the reason why it can't be scored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from sqsd_filter.corpus.conversation import NO_ANSWER, PROMPT_TOO_LONG, Message, RowError
from sqsd_filter.errors import ModelError
from sqsd_filter.scoring.chat_template import ChatTemplate, Span

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


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

    Nothing depends on `{% generation %}` markers. A conversation longer than `max_length` tokens is cut at its end.

    Raises `ModelError` when the tokenizer has no chat template or can't map tokens back to the text.
    """

    tokenizer: PreTrainedTokenizerBase
    max_length: int = 1024
    template_kwargs: Mapping[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        name = getattr(self.tokenizer, "name_or_path", "") or "the model"
        if not (self.template_kwargs.get("chat_template") or getattr(self.tokenizer, "chat_template", None)):
            raise ModelError(
                f"The tokenizer of {name} has no chat template: use an instruction-tuned model, or put one into the "
                "pack's chat_template_kwargs as 'chat_template'."
            )
        check_offsets(self.tokenizer, name)
        self.template = ChatTemplate(self.tokenizer, self.template_kwargs)

    def encode(self, conversations: Sequence[Sequence[Message]]) -> list[Encoded | RowError]:
        """Tokens and answer mask of each conversation, or the reason why it can't be scored."""
        encoded: list[Encoded | RowError] = []
        rendered: list[tuple[int, str, list[Span]]] = []
        for number, turns in enumerate(conversations):
            try:
                rendered.append((number, *self.template.render(turns)))
                encoded.append(RowError(NO_ANSWER, ""))  # replaced below
            except RowError as problem:
                encoded.append(problem)
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
                encoded[number] = self._mask(ids, offsets, spans)
        return encoded

    def texts(self, turns: Sequence[Message]) -> list[str]:
        """The text of each token of a whole conversation. Where tokens share a character, the first one has it."""
        text, _ = self.template.render(turns)
        batch = self.tokenizer([text], add_special_tokens=False, return_offsets_mapping=True)
        ends = np.maximum.accumulate([0, *(end for _, end in batch["offset_mapping"][0])])
        return [text[start:end] for start, end in pairwise(ends)]

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
