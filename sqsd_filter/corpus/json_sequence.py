"""JSON objects one after another, on one line or over many, as some tools write them into a .json file."""

from __future__ import annotations

from collections.abc import Iterator

from sqsd_filter.corpus.text_formats import Absorb, Record, TextFile, Window


class JsonSequence(TextFile):
    """The objects, decoded one at a time, without anything between them but white space."""

    def records(self, mark: tuple[int, int] = (0, 1), absorb: Absorb | None = None) -> Iterator[Record]:
        offset, line = mark
        window = Window(self.name, self.blocks(offset, absorb), offset, line, self.longest)
        while window.next_char():
            yield window.record()
            window.row += 1


def is_sequence(file: TextFile) -> bool:
    """Does another object follow the first one? Raises `InputError` where the first one is broken."""
    window = Window(file.name, file.blocks(), 0, 1, file.longest)
    window.next_char()
    window.record()
    return window.next_char() == "{"
