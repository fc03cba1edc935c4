"""Conversation keys in bulk: 16-byte hashes, compared as pairs of 64-bit words, which sort and search fast.

Keys are hashes, so two different ones nearly always differ in their first word; where they don't, the second decides.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

KEY_BYTES = 16
KEYS = np.dtype(f"S{KEY_BYTES}")


def words(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The first and the second word (n,) uint64 of keys (n,) S16."""
    pairs = np.ascontiguousarray(keys).view(np.uint64).reshape(-1, 2)
    return np.ascontiguousarray(pairs[:, 0]), pairs[:, 1]


def order(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """(n,) int64: a stable order in which equal keys are next to each other."""
    by_first = np.argsort(first, kind="stable")
    level = first[by_first[1:]] == first[by_first[:-1]]
    if (second[by_first[1:]][level] != second[by_first[:-1]][level]).any():
        return np.lexsort((second, first))
    return by_first


@dataclass(frozen=True)
class Distinct:
    """The u different keys among n: the first position (u,) of each, and which of the u each of the n is (n,)."""

    first: np.ndarray
    inverse: np.ndarray


def distinct(keys: np.ndarray) -> Distinct:
    """The different keys among `keys` (n,) S16, in the order of `order`."""
    n = len(keys)
    first, second = words(keys)
    by_key = order(first, second)
    new = np.ones(n, dtype=bool)
    new[1:] = (first[by_key[1:]] != first[by_key[:-1]]) | (second[by_key[1:]] != second[by_key[:-1]])
    inverse = np.empty(n, dtype=np.int64)
    inverse[by_key] = np.cumsum(new) - 1
    return Distinct(by_key[new], inverse)


class Lookup:
    """Finds batches of keys among n known ones."""

    def __init__(self, keys: np.ndarray) -> None:
        """`keys` (n,) S16, all different, in any order."""
        first, second = words(keys)
        in_order = bool((first[1:] > first[:-1]).all())
        self._order = None if in_order else order(first, second)
        self._first = first if self._order is None else first[self._order]
        self._second = second if self._order is None else second[self._order]

    def find(self, batch: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The positions (h,) int64, in the batch (b,) S16 and among the known keys, of those that are known."""
        first, second = words(batch)
        pending = np.argsort(first)  # searches for neighbours hit the cache
        at = np.searchsorted(self._first, first[pending])
        in_batch, in_known = [], []
        while len(pending):  # loops again only for keys that share their first word
            inside = at < len(self._first)
            pending, at = pending[inside], at[inside]
            level = self._first[at] == first[pending]
            pending, at = pending[level], at[level]
            same = self._second[at] == second[pending]
            in_batch.append(pending[same])
            in_known.append(at[same])
            pending, at = pending[~same], at[~same] + 1
        where = np.concatenate(in_known) if in_known else np.zeros(0, np.int64)
        members = np.concatenate(in_batch) if in_batch else np.zeros(0, np.int64)
        return members, where if self._order is None else self._order[where]
