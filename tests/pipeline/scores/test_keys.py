"""Keys in bulk give what dictionaries give, also where keys share one of their words."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from sqsd_filter.pipeline.scores.keys import KEYS, Lookup, distinct

# few different words, so that keys often share the first or the second one, and may end in NUL
word = st.sampled_from([b"\0" * 8, b"a" * 8, b"b" * 7 + b"\0", b"\xff" * 8])
some_keys = st.lists(st.tuples(word, word).map(b"".join), max_size=30)


def packed(keys: list[bytes]) -> np.ndarray:
    return np.frombuffer(b"".join(keys), dtype=KEYS)


def whole(keys: np.ndarray) -> list[bytes]:
    return [keys.tobytes()[k : k + 16] for k in range(0, 16 * len(keys), 16)]


@given(some_keys)
def test_distinct_names_the_first_of_each_key(keys: list[bytes]) -> None:
    unique = distinct(packed(keys))
    assert sorted(unique.first.tolist()) == sorted({keys.index(key) for key in keys})
    assert [keys[unique.first[k]] for k in unique.inverse] == keys


@given(some_keys, some_keys)
def test_lookup_finds_what_is_there_and_where(keys: list[bytes], batch: list[bytes]) -> None:
    keys = list(dict.fromkeys(keys))
    members, where = Lookup(packed(keys)).find(packed(batch))
    expected = {(k, keys.index(key)) for k, key in enumerate(batch) if key in keys}
    assert set(zip(members.tolist(), where.tolist(), strict=True)) == expected
    assert len(members) == len(expected)


def test_lookup_among_keys_in_order_is_the_same_as_among_shuffled_ones() -> None:
    generator = np.random.default_rng(0)
    keys = packed(whole(generator.integers(0, 2**63, 2000, dtype=np.uint64).view(KEYS)))
    shuffled = keys[generator.permutation(len(keys))]
    batch = np.concatenate([shuffled[:500], generator.integers(0, 2**63, 200, dtype=np.uint64).view(KEYS)])
    for among in (keys, shuffled):
        members, where = Lookup(among).find(batch)
        assert np.array_equal(np.sort(members), np.arange(500))
        assert np.array_equal(among[where], batch[members])
