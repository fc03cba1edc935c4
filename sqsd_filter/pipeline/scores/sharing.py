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
    """Takes what the shared store knows, and hands on what this run scores: the first shard at once, so that a store
    which takes no files is known early, then every few minutes, and in the end however the run ends.

    Later on such a store ends no run: all scores are the run's own first, and what could not be handed on is handed on
    by the run's next attempt or its next start. Without a shared store nothing is done.
    """

    def __init__(self, own: ScoreStore, shared: ScoreStore | None) -> None:
        self._own, self._shared = own, shared
        self._pending: list[np.ndarray] = []  # keys; their scores are in the own store
        self._next = 0.0
        self._takes_files = self._refuses_now = False

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

    def add(self, keys: np.ndarray) -> None:
        """Tell of `keys` (n,) S16 that the own store has just got. Raises `SQSDError` where the shared one takes no
        files from the start."""
        if self._shared is None:
            return
        self._pending.append(keys)
        if time.monotonic() >= self._next:
            self._flush(self._shared)

    def _flush(self, shared: ScoreStore) -> None:
        self._next = time.monotonic() + SHARE_EVERY
        keys = np.concatenate([np.zeros(0, KEYS), *self._pending])
        found = self._own.lookup(keys)
        try:
            shared.take(keys, found, found.settled)
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
        # Who interrupts a run does not want to wait for a store that has just refused.
        if self._shared is not None and self._takes_files and not (kind and self._refuses_now):
            self._flush(self._shared)
