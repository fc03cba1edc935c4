"""How a run tells what it is doing. The default says nothing; the command line shows bars or lines."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Told of each phase, its size in rows (None if unknown), and of rows and tokens as they are done."""

    def start(self, phase: str, rows: int | None) -> None: ...

    def advance(self, rows: int, tokens: int = 0) -> None: ...

    def finish(self) -> None: ...

    def note(self, message: str) -> None:
        """Something the user should know."""


class Silent:
    """Says nothing."""

    def start(self, phase: str, rows: int | None) -> None:
        pass

    def advance(self, rows: int, tokens: int = 0) -> None:
        pass

    def finish(self) -> None:
        pass

    def note(self, message: str) -> None:
        pass
