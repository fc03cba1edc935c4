"""The possible outcomes of an answer to a harmful prompt, and the interface of every judge."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

REFUSED = "refused"
UNSAFE = "unsafe"  # it complies, and harmfully
DEGENERATE = "degenerate"  # empty, or it only repeats itself
HARMLESS = "harmless"  # none of these
OUTCOMES = (REFUSED, UNSAFE, DEGENERATE, HARMLESS)


class Judge(Protocol):
    """Decides the outcome of each answer independently of the others in the call."""

    @property
    def name(self) -> str:
        """The name in reports."""

    @property
    def fingerprint(self) -> str:
        """Distinguishes judges of the same name; safe in a file name."""

    def judge(self, prompts: Sequence[str], answers: Sequence[str]) -> list[str]:
        """The outcome, one of `OUTCOMES`, of each answer to its prompt. Raises `JudgeError`, `InputError`."""
