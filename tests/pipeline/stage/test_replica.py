"""The ledger of the replicas: a shard that keeps dying is narrowed down to the row that kills it."""

from __future__ import annotations

from sqsd_filter.pipeline.stage.replica import Ledger


def test_a_shard_that_dies_is_narrowed_down_to_a_row() -> None:
    ledger = Ledger({})
    assert [ledger.begin(7)[0] for _ in range(3)] == [1, 2, 3]
    ledger.note(7, [4, 5, 6])
    ledger.note(7, [1])
    ledger.ran(7, [1])
    attempt, apart, given_up = ledger.begin(7)  # died in the bin of three
    assert (attempt, apart, given_up) == (4, {4, 5, 6}, set())
    ledger.note(7, [4])
    ledger.ran(7, [4])
    ledger.note(7, [5])
    assert ledger.begin(7)[1:] == ({4, 5, 6}, {5})  # died with that row alone
    assert ledger.begin(8) == (1, set(), set())
    assert ledger.state()["retried"] == 4


def test_a_shard_that_never_gets_through_is_given_up_in_the_end() -> None:
    ledger = Ledger({})
    for _ in range(3):
        ledger.begin(0)
    for _ in range(8):
        ledger.note(0, [1, 2])
        ledger.begin(0)
    ledger.note(0, [1, 2])
    assert ledger.begin(0)[2] == {1, 2}
