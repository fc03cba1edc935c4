"""Which rows of a corpus have no conversation, and why, in a few bytes per row."""

from __future__ import annotations

from array import array
from bisect import bisect_left

MOST_TEXT = 1 << 20  # characters of all different reasons together
_NOT_KEPT = -1


class RowErrors:
    """The rows without a conversation, in row order, with the reason for each.

    Takes 12 bytes per such row: few reasons differ, so each text is kept once. When the texts exceed `MOST_TEXT`
    characters, further ones are not kept.
    """

    def __init__(self) -> None:
        self._rows = array("q")
        self._codes = array("i")
        self._reasons: dict[str, int] = {}
        self._texts: list[str] = []
        self._room = MOST_TEXT

    def add(self, row: int, reason: str) -> None:
        """Note a row after all those noted before."""
        code = self._reasons.get(reason, _NOT_KEPT)
        if code == _NOT_KEPT and len(reason) <= self._room:
            self._room -= len(reason)
            code = self._reasons[reason] = len(self._texts)
            self._texts.append(reason)
        self._rows.append(row)
        self._codes.append(code)

    def reason(self, row: int) -> str | None:
        """Why this row has no conversation; None if it has one, or if the text was not kept."""
        at = bisect_left(self._rows, row)
        if at == len(self._rows) or self._rows[at] != row or self._codes[at] == _NOT_KEPT:
            return None
        return self._texts[self._codes[at]]

    def within(self, start: int, stop: int) -> set[int]:
        """Those among rows start..stop."""
        return set(self._rows[bisect_left(self._rows, start) : bisect_left(self._rows, stop)])
