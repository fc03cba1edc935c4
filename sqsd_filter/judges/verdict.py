"""Where a guard says its verdict: the tokens that lead to it, and those that begin the words safe and unsafe.

Guards begin their answers in different ways ("safe", "\\n\\nsafe"), and tokenizers split the words in different ways.
Both are found from the guard itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LEADS = ("", "\n", "\n\n", " ")
ROOM = 4  # tokens, enough for each of them


@dataclass(frozen=True)
class Verdict:
    """What a guard says after its prompt: the tokens `lead`, then `safe` or `unsafe`, the first tokens in which the two
    words differ."""

    lead: tuple[int, ...]
    safe: int
    unsafe: int

    @classmethod
    def after(cls, prompt: str, lead: str, tokenizer: PreTrainedTokenizerBase) -> Verdict:
        """The verdict that begins with these characters."""

        def tokens(text: str) -> list[int]:
            ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
            return ids

        asked, said = tokens(prompt), [f"{lead}{word}" for word in ("safe", "unsafe")]
        safe, unsafe = (tokens(prompt + words) for words in said)
        if _shared(asked, safe) == _shared(asked, unsafe) == len(asked):
            safe, unsafe = safe[len(asked) :], unsafe[len(asked) :]
        else:  # the prompt's end merges with what follows, as no model would say it: its tokens are already there
            safe, unsafe = (tokens(words) for words in said)
        at = _shared(safe, unsafe)
        return cls(tuple(safe[:at]), safe[at], unsafe[at])

    def awaited(self, prompt_t: np.ndarray) -> np.ndarray:
        """The tokens of a prompt and of the lead-in, after which the guard says its verdict."""
        return np.append(prompt_t, np.array(self.lead, dtype=np.int64))


def _shared(a: Sequence[int], b: Sequence[int]) -> int:
    """The length of the longest common prefix."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))
