"""A row's conversation as judges read it: texts of a user and an assistant in turn, up to the last answer.

Judges know no other roles. System turns and the results of tools are read as the user's, tool calls as JSON in the
assistant's text; the descriptions of tools, settings of the chat template and reasoning are left out. Neighbouring
texts of one role are joined by a blank line, so that a system prompt stands in front of the first question.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING, NamedTuple

from sqsd_filter.corpus.conversation import TOOLS, Message, is_supervised, split_settings
from sqsd_filter.scoring.chat_template import last_answer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

USER, ASSISTANT = "user", "assistant"


class Said(NamedTuple):
    """The text of one role."""

    role: str
    text: str


class Dialogue:
    """A row's texts with their tokens, to be cut at the end as rows are cut for training."""

    def __init__(self, turns: Sequence[Message], tokenizer: PreTrainedTokenizerBase) -> None:
        """Raises `RowError` as `last_answer` does. The tokenizer must map tokens to the text."""
        _, turns = split_settings(turns)
        read = [turn for turn in turns[: last_answer(turns) + 1] if turn["role"] != TOOLS]
        self._said = [Said(ASSISTANT if turn["role"] == ASSISTANT else USER, _text(turn)) for turn in read]
        self._supervised = [is_supervised(turn) for turn in read]
        batch = tokenizer([said.text for said in self._said], add_special_tokens=False, return_offsets_mapping=True)
        self._begins = [[begin for begin, _ in offsets] for offsets in batch["offset_mapping"]]

    def __len__(self) -> int:
        """The number of tokens of all texts."""
        return sum(map(len, self._begins))

    def first(self, tokens: int) -> list[Said]:
        """What the first `tokens` tokens say up to the last answer among them, empty where they have no answer."""
        kept: list[Said] = []
        answered = 0
        for said, supervised, begins in zip(self._said, self._supervised, self._begins, strict=True):
            text = said.text if len(begins) <= tokens else said.text[: begins[tokens]]
            tokens = max(0, tokens - len(begins))
            kept.append(said._replace(text=text))
            if supervised and text.strip():
                answered = len(kept)
        return [
            Said(role, "\n\n".join(said.text for said in group if said.text.strip()))
            for role, group in groupby(kept[:answered], key=lambda said: said.role)
        ]


def _text(turn: Message) -> str:
    """The turn's text, with each tool call on a line."""
    calls = [json.dumps(call["function"], ensure_ascii=False) for call in turn.get("tool_calls", ())]
    return "\n".join([turn["content"], *calls] if turn["content"].strip() else calls or [turn["content"]])
