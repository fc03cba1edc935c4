"""Words that sentences for people share."""

from __future__ import annotations


def many(count: int, what: str) -> str:
    """So many of these: 1 row, 2,000 rows."""
    return f"{count:,} {what}{'' if count == 1 else 's'}"
