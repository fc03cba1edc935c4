"""The exchange of a run's own scores with a store that several runs share."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress

import numpy as np

from sqsd_filter.errors import SQSDError
from sqsd_filter.pipeline.store import ScoreStore
from sqsd_filter.scoring.scorer import Scores

SHARE_EVERY = 600.0  # seconds between two segments in the shared store


class Sharing:
    """Takes what the shared store knows, and hands on what this run scores: the first shard at once, so that a store
    which takes no files is known early, then every few minutes, and in the end however the run ends.

    Without a shared store it does nothing.
    """

    def __init__(self, own: ScoreStore, shared: ScoreStore | None) -> None:
        self._own, self._shared = own, shared
        self._pending: list[tuple[Sequence[bytes], Scores]] = []
        self._next = 0.0

    def exchange(self, keys: np.ndarray) -> np.ndarray:
        """Let both stores know what either knows of `keys` (n,) S16. Returns which are settled (n,) bool.

        What a run that was killed could not hand on is handed on here. Raises `SQSDError` when a disk refuses.
        """
        mine = self._own.lookup(keys)
        if self._shared is None:
            return mine.settled
        theirs = self._shared.lookup(keys)
        self._shared.take(keys, mine, mine.settled & ~theirs.settled)
        self._own.take(keys, theirs, theirs.settled & ~mine.settled)
        return mine.settled | theirs.settled

    def add(self, keys: Sequence[bytes], scores: Scores) -> None:
        if self._shared is None:
            return
        self._pending.append((keys, scores))
        if time.monotonic() >= self._next:
            self.flush()

    def flush(self) -> None:
        if self._shared is not None and self._pending:
            self._shared.publish(self._pending)
        self._pending, self._next = [], time.monotonic() + SHARE_EVERY

    def __enter__(self) -> Sharing:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.flush()
            return
        with suppress(SQSDError):  # what ended the run is told, and the next run hands these on
            self.flush()
