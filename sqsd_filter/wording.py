"""Words that sentences for people share."""

from __future__ import annotations


def printable(text: str, keep: str = "") -> str:
    """The text with escapes in place of what can't be printed, but for the characters in `keep`: names from data may
    hold anything, also what clears a terminal or adds a line."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text)


def many(count: int, noun: str) -> str:
    """A count with its noun: 1 row, 2,000 rows."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"
