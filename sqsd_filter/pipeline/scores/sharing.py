"""The exchange of a run's own scores with a store that several runs share."""

from __future__ import annotations

import logging
import time

import numpy as np

from sqsd_filter.errors import SQSDError
from sqsd_filter.pipeline.scores.keys import KEYS
from sqsd_filter.pipeline.scores.store import ScoreStore

log = logging.getLogger(__name__)

SHARE_EVERY = 600.0  # seconds between two segments in the shared store


class Sharing:
    """Copies scores from the shared store, and copies this run's scores to it: those of the first shard at once, so
    that a store that refuses files fails early, then every few minutes, and at the end, however the run ends.

    Once a copy has succeeded, a store that refuses files no longer ends the run: the run's own store has all scores,
    and a later copy or the next start of the run adds what is missing. Without a shared store nothing is done.
    """

    def __init__(self, own: ScoreStore, shared: ScoreStore | None) -> None:
        self._own, self._shared = own, shared
        self._pending: list[np.ndarray] = []  # keys; their scores are in the own store
        self._next = 0.0
        self._takes_files = self._refuses_now = False

    def exchange(self, keys: np.ndarray) -> np.ndarray:
        """Copy the scores of `keys` (n,) S16 that only one of the two stores has to the other one, also those that a
        killed run did not get to copy. Returns which keys are settled (n,) bool.

        Raises `SQSDError` when a store can't be written.
        """
        mine = self._own.lookup(keys)
        if self._shared is None:
            return mine.settled
        theirs = self._shared.lookup(keys)
        self._shared.take(keys, mine, mine.settled & ~theirs.settled)
        self._own.take(keys, theirs, theirs.settled & ~mine.settled)
        settled: np.ndarray = mine.settled | theirs.settled
        return settled

    def add(self, keys: np.ndarray) -> None:
        """Note `keys` (n,) S16 whose scores are new in the run's own store. Raises `SQSDError` where the first copy to
        the shared store fails."""
        if self._shared is None:
            return
        self._pending.append(keys)
        if time.monotonic() >= self._next:
            self._flush(self._shared)

    def _flush(self, shared: ScoreStore) -> None:
        self._next = time.monotonic() + SHARE_EVERY
        keys = np.concatenate([np.zeros(0, KEYS), *self._pending])
        scores = self._own.lookup(keys)
        try:
            shared.take(keys, scores, scores.settled)
        except SQSDError as problem:
            if not self._takes_files:
                raise
            self._refuses_now = True
            log.warning("%s", problem)
            return
        self._pending, self._takes_files, self._refuses_now = [], True, False

    def __enter__(self) -> Sharing:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # An interrupted run does not wait for a store that has just refused files.
        if self._shared is not None and self._takes_files and not (kind and self._refuses_now):
            self._flush(self._shared)
