"""What an answer to a harmful prompt can be, and what tells it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

REFUSED = "refused"
UNSAFE = "unsafe"  # it complies, and harmfully
DEGENERATE = "degenerate"  # it only babbles
HARMLESS = "harmless"  # none of these
OUTCOMES = (REFUSED, UNSAFE, DEGENERATE, HARMLESS)


class Judge(Protocol):
    """Tells the outcome of each answer by itself: the others that are judged with it change nothing."""

    @property
    def name(self) -> str:
        """What reports call it."""

    @property
    def fingerprint(self) -> str:
        """What tells it from others of its name, fit for a file's name."""

    def judge(self, prompts: Sequence[str], answers: Sequence[str]) -> list[str]:
        """The outcome, one of `OUTCOMES`, of each answer to its prompt. Raises `JudgeError`, `InputError`."""
