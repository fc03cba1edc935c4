"""A corpus cut into shards, and the work on one of them: the unit of scoring, of retry and of resume.

Shards are contiguous ranges of rows that depend on the number of rows alone. Equal conversations are scored once, by
the shard that holds the first of them. `score_shard` can run anywhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from sqsd_filter.corpus.conversation import SCORED, Conversation, RowError, conversation_key
from sqsd_filter.corpus.row_formats import RowFormat
from sqsd_filter.corpus.sources import Corpus, Row
from sqsd_filter.pipeline.scores.keys import KEYS, distinct
from sqsd_filter.scoring.results import Scores, ScoringCallbacks
from sqsd_filter.scoring.scorer import Scorer

SMALLEST, LARGEST, AIM = 128, 4096, 1000  # rows per shard, at least and at most; about how many shards per corpus


def shard_size(rows: int) -> int:
    """How many rows a shard of a corpus with this many rows has."""
    return min(LARGEST, max(SMALLEST, -(-rows // AIM // SMALLEST) * SMALLEST))


class Index:
    """The result of a scan for each row: its key, or the status that says why it has none."""

    def __init__(self, form: RowFormat) -> None:
        self.form = form
        self._keys = bytearray()
        self._codes = bytearray()
        self.statuses = [SCORED]  # by code; code 0: the row has a conversation

    def visit(self, row: Row) -> None:
        """Note a row of a scan by this form."""
        assert row.conversation is not None
        self.add(row.conversation)

    def add(self, conversation: Conversation | RowError) -> None:
        """Note the next row's conversation, or why it has none."""
        if isinstance(conversation, RowError):
            key, status = b"\0" * KEYS.itemsize, conversation.status
        else:
            key, status = conversation_key(conversation), SCORED
        self._keys += key
        if status not in self.statuses:
            self.statuses.append(status)
        self._codes.append(self.statuses.index(status))

    @property
    def keys(self) -> np.ndarray:
        """(n,) S16."""
        return np.frombuffer(self._keys, dtype=KEYS)

    @property
    def codes(self) -> np.ndarray:
        """(n,) uint8 into `statuses`."""
        return np.frombuffer(self._codes, dtype=np.uint8)

    @cached_property
    def conversations(self) -> Conversations:
        """The distinct conversations of the corpus. Only for use after the scan."""
        rows = np.flatnonzero(self.codes == 0)
        keys = self.keys[rows]
        once = distinct(keys)
        return Conversations(keys[once.first], rows[once.first], rows, once.inverse)


@dataclass(frozen=True)
class Conversations:
    """The u distinct conversations of a corpus: their keys (u,) S16 and the first row (u,) of each. `rows` (n,) are the
    rows with a conversation, and `which` (n,) gives the index of each row's conversation."""

    keys: np.ndarray
    first: np.ndarray
    rows: np.ndarray
    which: np.ndarray


@dataclass(frozen=True)
class Shard:
    """Rows start..stop of a corpus; `wanted` are the indices of those to be scored."""

    number: int
    start: int
    stop: int
    wanted: np.ndarray

    @property
    def name(self) -> str:
        return f"shard-{self.number:06d}"


def plan(rows: int, wanted: np.ndarray) -> Iterator[Shard]:
    """The shards that have any of the `wanted` rows (ascending indices)."""
    size = shard_size(rows)
    for number in range(-(-rows // size)):
        start, stop = number * size, min(rows, (number + 1) * size)
        inside = wanted[np.searchsorted(wanted, start) : np.searchsorted(wanted, stop)]
        if len(inside):
            yield Shard(number, start, stop, inside)


def conversations(corpus: Corpus, form: RowFormat, shard: Shard) -> list[Conversation]:
    """The conversations of a shard's wanted rows, in row order; without those of rows that have changed."""
    wanted = set(shard.wanted.tolist())
    rows = corpus.read(shard.start, shard.stop, form.columns)
    parsed = [form.parse(row.value, row.problem) for row in rows if row.index in wanted]
    return [turns for turns in parsed if not isinstance(turns, RowError)]


def score_shard(
    corpus: Corpus, form: RowFormat, scorer: Scorer, shard: Shard, callbacks: ScoringCallbacks | None = None
) -> tuple[list[bytes], Scores]:
    """Keys and scores of a shard's wanted rows, in row order."""
    turns = conversations(corpus, form, shard)
    return [conversation_key(t) for t in turns], scorer.score(turns, callbacks)
