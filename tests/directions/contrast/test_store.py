"""The store of updates: a build that was killed anywhere goes on with what is whole."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from sqsd_filter.directions.contrast.store import UpdateStore
from sqsd_filter.errors import SQSDError

WIDTH = 5


def vectors(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, WIDTH)).astype(np.float16).astype(np.float32)


def opened(folder: Path, own: int = 0, **settings: object) -> UpdateStore:
    return UpdateStore(folder, {"state": "a", **settings}, WIDTH, own)


def read(store: UpdateStore, keys: list[str]) -> np.ndarray:
    return store.vectors(keys).columns(slice(0, WIDTH))


def test_vectors_come_back_in_the_order_of_the_keys(tmp_path: Path) -> None:
    store = opened(tmp_path)
    store.append(["a", "b"], vectors(2))
    store.append(["c"], vectors(1, seed=1))
    again = opened(tmp_path)
    assert np.array_equal(read(again, ["c", "a"]), np.stack([vectors(1, seed=1)[0], vectors(2)[0]]))
    assert np.array_equal(again.vectors(["b"]).columns(slice(1, 3)), vectors(2)[1:, 1:3])
    with pytest.raises(KeyError):
        again.vectors(["d"])


@pytest.mark.parametrize("lost", ["half a key", "a key", "half a vector", "a vector"])
def test_what_is_not_whole_is_made_again(tmp_path: Path, lost: str) -> None:
    store = opened(tmp_path)
    store.append(["aaaa", "bbbb"], vectors(2))
    file = tmp_path / ("updates-0.keys" if "key" in lost else "updates-0.f16")
    size = {"half a key": 3, "a key": 5, "half a vector": 4, "a vector": 2 * WIDTH}[lost]
    file.write_bytes(file.read_bytes()[:-size])
    again = opened(tmp_path)
    assert list(again.places()) == ["aaaa"]
    again.append(["cccc", "bbbb"], vectors(2, seed=1))
    expected = np.stack([vectors(2)[0], *vectors(2, seed=1)])
    assert np.array_equal(read(opened(tmp_path), ["aaaa", "cccc", "bbbb"]), expected)


def test_vectors_of_other_settings_are_dropped(tmp_path: Path) -> None:
    opened(tmp_path).append(["a"], vectors(1))
    other = opened(tmp_path, max_length=3)
    assert not other.places()
    other.append(["a"], vectors(1, seed=1))
    assert np.array_equal(read(other, ["a"]), vectors(1, seed=1))


def test_processes_keep_theirs_apart_and_read_all(tmp_path: Path) -> None:
    one, two = opened(tmp_path, 0), opened(tmp_path, 1)
    one.append(["a", "c"], vectors(2))
    two.append(["b"], vectors(1, seed=1))
    expected = np.stack([vectors(2)[0], vectors(1, seed=1)[0], vectors(2)[1]])
    assert np.array_equal(read(one, ["a", "b", "c"]), expected)


def test_a_disk_without_room_is_named_before_anything_is_measured(tmp_path: Path) -> None:
    store = opened(tmp_path)
    store.make_room(10)
    with pytest.raises(
        SQSDError, match=r"^The updates of .* rows take .* GB in .*: free some space, or take fewer rows"
    ):
        store.make_room(10**15)
