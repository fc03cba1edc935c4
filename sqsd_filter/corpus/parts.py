"""One input of a corpus after its scan: any of its rows can be read again, as long as it is still what was scanned."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from sqsd_filter.corpus.files import unreadable
from sqsd_filter.corpus.formats import Reader
from sqsd_filter.corpus.text_formats import Record, TextFile
from sqsd_filter.errors import InputError

MARK_EVERY = 512  # rows between the offsets in a text file that `Part.records` can seek to


@dataclass(frozen=True)
class Part:
    """One input and its rows: start, start + 1, ... of the corpus."""

    source: Reader
    start: int
    rows: int
    size: int
    marks: list[tuple[int, int]]  # of every MARK_EVERY-th record
    split: str
    digest: str  # of what the scan read of it
    stamp: str  # of a table's files, before the scan
    whole: bool  # it was read to its end

    def records(self, start: int, stop: int) -> Iterator[Record]:
        """Records of a text file, counted within it."""
        assert isinstance(self.source, TextFile)
        self._check_size(self.source)
        skipped = start // MARK_EVERY if self.marks else 0
        records = self.source.records(self.marks[skipped] if self.marks else (0, 1))
        return islice(records, start - skipped * MARK_EVERY, stop - skipped * MARK_EVERY)

    def scanned_records(self) -> Iterator[Record]:
        """All records of a text file. Raises `InputError` after the last one if they are not those of the scan."""
        assert isinstance(self.source, TextFile)
        self._check_size(self.source)
        digest = hashlib.blake2b(digest_size=32)
        records = self.source.records(absorb=digest.update)
        yield from islice(records, self.rows)
        if (self.whole and next(records, None) is not None) or digest.hexdigest() != self.digest:
            raise self._changed()

    def check(self) -> None:
        """Raise `InputError` if the input is not what was scanned: by its content, or by the service's word for a
        table that would have to be fetched again."""
        if isinstance(self.source, TextFile):
            for _ in self.scanned_records():
                pass
        elif self.source.remote:
            if self.source.stamp() != self.stamp:
                raise self._changed()
        else:
            digest = hashlib.blake2b(digest_size=32)
            self.source.fingerprint(digest.update)
            if digest.hexdigest() != self.digest:
                raise self._changed()

    def _check_size(self, source: TextFile) -> None:
        try:
            same = source.file.size() == self.size
        except FileNotFoundError:
            same = False
        except OSError as problem:
            raise unreadable(source.file, problem) from problem
        if not same:
            raise self._changed()

    def _changed(self) -> InputError:
        return InputError(
            f"{self.source.name} has changed since it was scanned: nothing was written, and scores are kept. Start "
            "again with the file as it is now."
        )
