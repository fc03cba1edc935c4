"""Questions whose answers are known, to measure what a model can still do: a sum's result, or a label.

An answer is right if its last number is that of the known answer. A known answer without a number, such as a label, has
to be the whole answer; case, punctuation and spacing don't count.
"""

from __future__ import annotations

import json
import re
from decimal import Decimal
from pathlib import Path
from typing import NamedTuple

from sqsd_filter.directions.refusals import read_prompts
from sqsd_filter.errors import InputError

_NUMBER = re.compile(r"(?<![\w.])-?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?")


class Question(NamedTuple):
    """A prompt with its right answer."""

    prompt: str
    answer: str


def read_questions(path: str | Path, limit: int | None = None) -> list[Question]:
    """The `prompt` and the `answer` of each of the first `limit` lines of a JSON Lines file. Raises `InputError`."""
    questions = []
    prompts = read_prompts(path, limit)
    with Path(path).open(encoding="utf-8") as lines:
        for number, (line, prompt) in enumerate(zip(lines, prompts, strict=False), 1):
            answer = json.loads(line).get("answer")
            if not isinstance(answer, str) or not _words(answer):
                raise InputError(f"Line {number} of {path} has no text under 'answer': fix or remove that line.")
            questions.append(Question(prompt, answer))
    return questions


def is_right(answer: str, known: str) -> bool:
    """Is this the known answer?"""
    expected = final_number(known)
    return _words(answer) == _words(known) if expected is None else final_number(answer) == expected


def final_number(text: str) -> Decimal | None:
    """The last number of a text; commas between thousands don't count."""
    numbers = _NUMBER.findall(text)
    return Decimal(numbers[-1].replace(",", "")) if numbers else None


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())
