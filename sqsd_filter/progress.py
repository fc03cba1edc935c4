"""How a run reports its progress. The default is silent; the command line shows bars or lines."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import NotRequired, Protocol, TypedDict


class Progress(Protocol):
    """Gets each phase with its size in rows (None if unknown), and the rows and tokens as they are done."""

    def start(self, phase: str, rows: int | None) -> None: ...

    def advance(self, rows: int, tokens: int = 0) -> None: ...

    def replicas(self, alive: int, retried: int) -> None:
        """The number of models at work, and of shards that were started again."""

    def finish(self) -> None: ...

    def note(self, message: str) -> None:
        """Something the user should know."""


class Silent:
    """Reports nothing."""

    def start(self, phase: str, rows: int | None) -> None:
        pass

    def advance(self, rows: int, tokens: int = 0) -> None:
        pass

    def replicas(self, alive: int, retried: int) -> None:
        pass

    def finish(self) -> None:
        pass

    def note(self, message: str) -> None:
        pass


class PhaseFigures(TypedDict):
    """What was done in a phase; tokens only where there were any."""

    rows: int
    expected: int | None
    seconds: float
    rows_per_second: float
    tokens: NotRequired[int]
    tokens_per_second: NotRequired[float]


@dataclass
class Phase:
    """Rows and tokens done, of `expected` rows if that is known; start and end in seconds of the monotonic clock."""

    expected: int | None
    began: float = field(default_factory=time.monotonic)
    ended: float | None = None
    rows: int = 0
    tokens: int = 0

    def figures(self) -> PhaseFigures:
        seconds = max((self.ended or time.monotonic()) - self.began, 1e-9)
        figures: PhaseFigures = {
            "rows": self.rows,
            "expected": self.expected,
            "seconds": round(seconds, 6),
            "rows_per_second": round(self.rows / seconds, 3),
        }
        if self.tokens:
            figures |= {"tokens": self.tokens, "tokens_per_second": round(self.tokens / seconds, 3)}
        return figures


class Meter:
    """Passes everything on to another `Progress` and counts. `alive` is None until replicas are reported."""

    def __init__(self, inner: Progress) -> None:
        self._inner = inner
        self.phases: dict[str, Phase] = {}
        self.alive: int | None = None
        self.retried = 0

    def start(self, phase: str, rows: int | None) -> None:
        self._end()
        self.phases[phase] = Phase(rows)
        self._inner.start(phase, rows)

    def advance(self, rows: int, tokens: int = 0) -> None:
        phase = next(reversed(self.phases.values()))
        phase.rows += rows
        phase.tokens += tokens
        self._inner.advance(rows, tokens)

    def replicas(self, alive: int, retried: int) -> None:
        self.alive, self.retried = alive, retried
        self._inner.replicas(alive, retried)

    def finish(self) -> None:
        self._end()
        self._inner.finish()

    def note(self, message: str) -> None:
        self._inner.note(message)

    def figures(self) -> dict[str, PhaseFigures]:
        """Every phase so far: rows, seconds, rows and tokens per second."""
        return {name: phase.figures() for name, phase in list(self.phases.items())}

    def _end(self) -> None:
        if self.phases:
            phase = next(reversed(self.phases.values()))
            phase.ended = phase.ended or time.monotonic()
