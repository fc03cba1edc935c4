"""How long a row of a text file may be: memory must not grow with the longest line of a stranger's file."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator

from sqsd_filter.errors import UsageError

LONGEST_ROW = 1 << 24  # bytes; as Python values a row can take twenty times as much memory
CUT_TO = 1 << 10  # bytes that are kept of a longer one
SETTING = "SQSD_FILTER_LONGEST_ROW"


def longest_row() -> int:
    """The most bytes that one row of a text file may have. Raises `UsageError`."""
    given = os.environ.get(SETTING, str(LONGEST_ROW))
    if not given.isdecimal() or int(given) < CUT_TO:
        raise UsageError(f"{SETTING} is '{given}': give a number of bytes, {CUT_TO:,} or more.")
    return int(given)


def too_long(longest: int) -> str:
    """The problem of a row with more bytes."""
    return f"longer than {longest:,} bytes ({SETTING}), its first {CUT_TO:,} are kept"


def split_lines(blocks: Iterable[bytes], longest: int) -> Iterator[tuple[bytes, int]]:
    """Each line and its size, split at b"\\n" only. No line follows a final newline. Of a line with more than
    `longest` bytes only the first `CUT_TO` are given."""
    start, size = b"", 0  # of a line that may go on in the next block
    pieces: list[bytes] = []

    def whole() -> tuple[bytes, int]:
        line = b"".join([start, *pieces])
        return (line, size) if size <= longest else (line[:CUT_TO], size)

    for block in blocks:
        head, *lines = block.split(b"\n")
        pieces.append(head)
        size += len(head)
        if size > longest:
            start, pieces = whole()[0], []
        if lines:
            yield whole()
            last = lines.pop()
            yield from ((line, len(line)) if len(line) <= longest else (line[:CUT_TO], len(line)) for line in lines)
            start, pieces, size = b"", [last], len(last)
    if size:
        yield whole()
