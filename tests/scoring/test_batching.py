"""Bins of rows, and what happens when memory runs out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sqsd_filter.errors import ModelError
from sqsd_filter.scoring.batching import default_budget, is_out_of_memory, micro_batches, retry_in_halves
from sqsd_filter.scoring.chat_encoder import Encoded
from sqsd_filter.scoring.results import ScoringCallbacks
from sqsd_filter.scoring.scorer import SQSDScorer
from sqsd_filter.scoring.scoring_model import memory_share
from tests.tiny import CONVERSATIONS

lengths_of_rows = st.lists(st.integers(1, 300), max_size=60)
budgets = st.integers(1, 9000)


@given(lengths_of_rows, budgets)
def test_every_row_is_in_exactly_one_bin(lengths: list[int], budget: int) -> None:
    assert sorted(k for found in micro_batches(lengths, budget) for k in found) == list(range(len(lengths)))


@given(lengths_of_rows, budgets)
def test_padded_bins_hold_the_budget_unless_a_row_alone_exceeds_it(lengths: list[int], budget: int) -> None:
    for found in micro_batches(lengths, budget):
        assert len(found) == 1 or len(found) * max(lengths[k] for k in found) <= budget


@given(lengths_of_rows, budgets)
def test_bins_run_from_the_longest_row_to_the_shortest(lengths: list[int], budget: int) -> None:
    order = [k for found in micro_batches(lengths, budget) for k in found]
    assert order == sorted(range(len(lengths)), key=lambda k: (-lengths[k], k))


@given(lengths_of_rows, budgets)
def test_no_bin_could_take_the_next_row(lengths: list[int], budget: int) -> None:
    found = list(micro_batches(lengths, budget))
    for here, after in pairwise(found):
        longest, following = lengths[here[0]], lengths[after[0]]
        full = len(here) * longest >= 2048 and following < 0.8 * longest
        assert full or (len(here) + 1) * longest > budget


@given(lengths_of_rows, budgets)
def test_padding_is_bounded_whatever_the_budget(lengths: list[int], budget: int) -> None:
    for found in micro_batches(lengths, budget):
        longest = lengths[found[0]]
        padding = sum(longest - lengths[k] for k in found)
        assert padding <= 2048 + longest + 0.2 * longest * len(found)


@given(lengths_of_rows, budgets)
def test_the_same_rows_give_the_same_bins(lengths: list[int], budget: int) -> None:
    assert list(micro_batches(lengths, budget)) == list(micro_batches(tuple(lengths), budget))


def test_the_budget_of_a_gpu_grows_with_its_free_memory_within_bounds() -> None:
    def budget(free: int | None) -> int:
        return default_budget(free_bytes=free, layers=36, hidden=4096, intermediate=12288, bytes_per_value=2)

    assert budget(None) == 512  # a CPU
    assert budget(0) == 1024
    assert budget(1 << 45) == 65536
    assert 1024 < budget(40 << 30) < budget(80 << 30) < 65536
    assert isinstance(budget(40 << 30), int)


def real_out_of_memory() -> None:
    torch.empty(1 << 50, dtype=torch.uint8)  # a petabyte, beyond any address space


def no_memory() -> None:
    raise MemoryError


def no_gpu_memory() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


Failure = Callable[[], None]
failures = pytest.mark.parametrize(
    "fail", [no_memory, no_gpu_memory, real_out_of_memory], ids=["host", "gpu", "allocator"]
)


@failures
def test_failed_allocations_are_recognised(fail: Failure) -> None:
    with pytest.raises((RuntimeError, MemoryError)) as problem:
        fail()
    assert is_out_of_memory(problem.value)


def test_other_errors_are_not_taken_for_a_lack_of_memory() -> None:
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_out_of_memory(ValueError("can't allocate memory"))


class Device:
    """Runs at most `fits` rows at once, and none of those that are too large alone."""

    def __init__(self, fits: int, fail: Failure, too_large: Sequence[int] = ()) -> None:
        self.fits, self.fail, self.too_large = fits, fail, set(too_large)
        self.done: list[int] = []
        self.given_up: list[int] = []
        self.errors: list[str] = []

    def run(self, rows: list[int]) -> None:
        if len(rows) > self.fits or self.too_large & set(rows):
            self.fail()
        self.done += rows

    def give_up(self, row: int, error: str) -> None:
        self.given_up.append(row)
        self.errors.append(error)


@failures
@pytest.mark.parametrize("fits", [1, 2, 3, 7, 8])
def test_what_does_not_fit_is_halved_until_it_does(fits: int, fail: Failure) -> None:
    device = Device(fits, fail)
    retry_in_halves(device.run, list(range(7)), device.give_up)
    assert (device.done, device.given_up) == (list(range(7)), [])


def test_only_the_row_that_does_not_fit_alone_is_given_up() -> None:
    device = Device(4, no_memory, too_large=[2])
    retry_in_halves(device.run, list(range(6)), device.give_up)
    assert (device.done, device.given_up) == ([0, 1, 3, 4, 5], [2])


def test_a_row_that_makes_the_model_fail_is_given_up_with_its_error() -> None:
    def fail() -> None:
        raise ValueError("odd row")

    device = Device(8, fail, too_large=[4])
    retry_in_halves(device.run, list(range(6)), device.give_up)
    assert (sorted(device.done), device.given_up) == ([0, 1, 2, 3, 5], [4])
    assert device.errors == ["ValueError: odd row"]


@pytest.mark.parametrize(
    "problem", [ModelError("no"), torch.AcceleratorError("device-side assert"), KeyboardInterrupt()], ids=repr
)
def test_an_error_that_is_no_rows_comes_through_at_once(problem: BaseException) -> None:
    calls = []

    def run(rows: list[int]) -> None:
        calls.append(rows)
        raise problem

    with pytest.raises(type(problem)):
        retry_in_halves(run, [1, 2, 3], lambda row, error: None)
    assert calls == [[1, 2, 3]]


def short_of_memory(
    scorer: SQSDScorer, monkeypatch: pytest.MonkeyPatch, fits: Callable[[Sequence[Encoded]], bool]
) -> None:
    """Let the engine do its whole work and then fail on bins that don't fit, as a real lack of memory would: late."""
    project = scorer.model.project

    def stingy(rows: Sequence[Encoded]) -> Any:
        found = project(rows)
        if not fits(rows):
            no_gpu_memory()
        return found

    monkeypatch.setattr(scorer.model, "project", stingy)


def test_a_scorer_short_of_memory_scores_every_row_the_same(tiny_pack: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = SQSDScorer(tiny_pack).score(CONVERSATIONS)
    scorer = SQSDScorer(tiny_pack, token_budget=100_000)
    short_of_memory(scorer, monkeypatch, lambda rows: len(rows) <= 2)
    counted = []

    class Counting(ScoringCallbacks):
        def done(self, rows: int, tokens: int) -> None:
            counted.append((rows, tokens))

    scores = scorer.score(CONVERSATIONS, Counting())
    assert scores.status == ["scored"] * len(CONVERSATIONS)
    assert np.abs(scores.risk - expected.risk).max() <= 1e-5
    assert [sum(column) for column in zip(*counted, strict=True)] == [len(CONVERSATIONS), scores.tokens.sum()]


@pytest.mark.parametrize("when", ["forward", "backward"])
def test_memory_that_runs_out_in_the_middle_of_a_pass_leaves_no_trace(tiny_pack: Path, when: str) -> None:
    expected = SQSDScorer(tiny_pack).score(CONVERSATIONS)
    scorer = SQSDScorer(tiny_pack, token_budget=100_000)
    failures_left = [None] * 2

    def fail(*_: Any) -> None:
        if failures_left:
            failures_left.pop()
            no_gpu_memory()

    def hook(_module: torch.nn.Module, _inputs: Any, output: torch.Tensor) -> None:
        if when == "forward":
            fail()
        elif output.requires_grad:
            output.register_hook(fail)

    scorer.model.gradient.model.model.layers[1].mlp.register_forward_hook(hook)
    scores = scorer.score(CONVERSATIONS)
    assert not failures_left
    assert np.abs(scores.risk - expected.risk).max() <= 1e-5


def test_a_row_that_never_fits_is_out_of_memory_and_the_others_are_scored(
    tiny_pack: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = SQSDScorer(tiny_pack).score(CONVERSATIONS)
    longest = int(expected.tokens.argmax())
    scorer = SQSDScorer(tiny_pack, token_budget=100_000)
    short_of_memory(scorer, monkeypatch, lambda rows: max(map(len, rows)) < expected.tokens[longest])
    scores = scorer.score(CONVERSATIONS)
    assert [k for k, status in enumerate(scores.status) if status == "out_of_memory"] == [longest]
    assert str(expected.tokens[longest]) in scores.detail[longest]
    assert np.isnan(scores.risk[longest])
    assert np.nanmax(np.abs(scores.risk - expected.risk)) <= 1e-5


def test_the_room_on_a_gpu_depends_on_the_share_and_the_model_not_on_what_is_free(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = torch.nn.Linear(100, 10, bias=False)  # 4,000 bytes
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=100_000))
    here = torch.device("cpu")
    assert [memory_share(model, here, gpus) for gpus in (1.0, 2.0, 0.5, 0.01)] == [96_000, 96_000, 46_000, 0]
