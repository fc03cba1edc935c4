"""The low-rank form against dense matrices multiplied out here, in float64."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from sqsd_filter.scoring.adapters import LoraFactors
from sqsd_filter.scoring.projection import by_token, contract, cosines, per_module, prepare

ROWS, TOKENS, D_IN = 3, 7, 11
Factors = Sequence[LoraFactors | None]


def factors(d_out: int, rank: int, scaling: float = 1.0) -> LoraFactors:
    A, B = torch.randn(rank, D_IN, dtype=torch.float64), torch.randn(d_out, rank, dtype=torch.float64)
    return LoraFactors(A, B, scaling)


def dense(
    states: Sequence[LoraFactors], directions: Sequence[Factors], x: torch.Tensor, d: torch.Tensor, d_out: list[int]
) -> torch.Tensor:
    """cos (b, p, m) by the textbook: G_A and G_B of one row, ΔW and V multiplied out."""
    out = torch.zeros(len(x), len(directions), len(states), dtype=torch.float64)
    for b in range(len(x)):
        for m, (state, d_bto) in enumerate(zip(states, d.split(d_out, dim=-1), strict=True)):
            A, B, s = state.A, state.B, state.scaling
            G_B = s * d_bto[b].T @ (x[b] @ A.T)
            G_A = s * (d_bto[b] @ B).T @ x[b]
            update = -(G_B @ A + B @ G_A)
            for p, direction in enumerate(directions):
                found = direction[m]
                if found is not None:
                    V = found.scaling * found.B @ found.A
                    scale = update.norm() * V.norm()
                    out[b, p, m] = (update * V).sum() / scale if scale > 0 else 0
    return out


def low_rank(
    states: Sequence[LoraFactors], directions: Sequence[Factors], x: torch.Tensor, d: torch.Tensor, d_out: list[int]
) -> torch.Tensor:
    """The same by the module under test, from the stacked x, h, d, e."""
    group = prepare(states, directions, D_IN, d_out)
    ranks = [s.A.shape[0] for s in states]
    h = x @ torch.cat([s.A for s in states]).T
    e = d @ torch.block_diag(*[s.scaling * s.B for s in states])
    dots, norms = contract(group, x, h, d, e)
    return cosines(per_module(dots, ranks), per_module(norms, ranks), group.norm_pm)


def inputs(d_out: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    return (
        torch.randn(ROWS, TOKENS, D_IN, dtype=torch.float64),
        torch.randn(ROWS, TOKENS, sum(d_out), dtype=torch.float64),
    )


SHAPES: dict[str, tuple[list[int], list[int], list[list[int]]]] = {  # d_out, state ranks, ranks of each direction
    "one-module": ([5], [2], [[3]]),
    "rank-one": ([5], [1], [[1]]),
    "rank-above-the-width": ([4], [6], [[9]]),
    "three-modules": ([5, 8, 3], [2, 2, 2], [[2, 2, 2]]),
    "mixed-ranks": ([5, 8, 3], [1, 4, 2], [[3, 1, 2]]),
    "several-directions": ([5, 8], [2, 3], [[3, 1], [2, 2], [5, 4]]),
    "missing-coverage": ([5, 8, 3], [2, 3, 1], [[3, 0, 2], [0, 0, 4]]),  # 0: not covered
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("d_out", "ranks", "covered"), SHAPES.values(), ids=SHAPES)
def test_the_low_rank_form_equals_the_dense_one(
    d_out: list[int], ranks: list[int], covered: list[list[int]], seed: int
) -> None:
    torch.manual_seed(seed)
    states = [factors(o, r, scaling=0.5 + m) for m, (o, r) in enumerate(zip(d_out, ranks, strict=True))]
    directions = [[factors(o, r, 1.7) if r else None for o, r in zip(d_out, row, strict=True)] for row in covered]
    x, d = inputs(d_out)
    expected, found = dense(states, directions, x, d, d_out), low_rank(states, directions, x, d, d_out)
    assert found.shape == (ROWS, len(covered), len(d_out))
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_a_module_that_a_direction_does_not_cover_counts_nothing() -> None:
    torch.manual_seed(0)
    states = [factors(5, 2), factors(3, 2)]
    x, d = inputs([5, 3])
    found = low_rank(states, [[factors(5, 2), None]], x, d, [5, 3])
    assert (found[:, 0, 0] != 0).all()
    assert (found[:, 0, 1] == 0).all()


def test_the_sign_is_that_of_a_descent_step() -> None:
    """A direction equal to the update itself has cosine 1, its opposite -1."""
    torch.manual_seed(0)
    state = factors(5, 2, scaling=0.3)
    x, d = inputs([5])
    G_B, G_A = 0.3 * d[0].T @ (x[0] @ state.A.T), 0.3 * (d[0] @ state.B).T @ x[0]
    update = LoraFactors(torch.cat([state.A, G_A]), -torch.cat([G_B, state.B], dim=1), 1.0)
    back = LoraFactors(update.A, -update.B, 1.0)
    found = low_rank([state], [[update], [back]], x[:1], d[:1], [5])
    torch.testing.assert_close(found.flatten(), torch.tensor([1.0, -1.0], dtype=torch.float64))


@pytest.mark.parametrize("scale", [1e-6, 3.0, 1e6])
def test_cosines_do_not_depend_on_the_loss_or_the_direction_scale(scale: float) -> None:
    torch.manual_seed(0)
    state, V = factors(5, 2), factors(5, 3)
    x, d = inputs([5])
    longer = LoraFactors(V.A, V.B, V.scaling * scale)
    once, again = low_rank([state], [[V]], x, d, [5]), low_rank([state], [[longer]], x, scale * d, [5])
    torch.testing.assert_close(again, once, rtol=1e-10, atol=1e-12)


def test_a_row_without_a_gradient_and_a_direction_without_length_have_cosine_zero() -> None:
    torch.manual_seed(0)
    state, V = factors(5, 2), factors(5, 3)
    nothing = LoraFactors(V.A, torch.zeros_like(V.B), 1.0)
    x, d = inputs([5])
    d[1] = 0
    found = low_rank([state], [[V], [nothing]], x, d, [5])
    assert found[1, 0, 0] == 0
    assert (found[:, 1] == 0).all()
    assert found[0, 0, 0] != 0
    assert found[2, 0, 0] != 0


def test_a_fresh_state_still_projects_the_half_that_is_there() -> None:
    torch.manual_seed(0)
    fresh, V = factors(5, 2), factors(5, 3)
    fresh = LoraFactors(fresh.A, torch.zeros_like(fresh.B), 2.0)
    x, d = inputs([5])
    found = low_rank([fresh], [[V]], x, d, [5])
    assert found.abs().min() > 0
    torch.testing.assert_close(found, dense([fresh], [[V]], x, d, [5]), rtol=0, atol=1e-12)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")], ids=["nan", "inf"])
def test_a_gradient_that_is_not_finite_stays_so_and_stays_with_its_row(bad: float) -> None:
    torch.manual_seed(0)
    states = [factors(5, 2), factors(3, 2)]
    directions = [[factors(5, 2), factors(3, 1)]]
    x, d = inputs([5, 3])
    good = low_rank(states, directions, x, d, [5, 3])
    d[1, 2, 0] = bad
    found = low_rank(states, directions, x, d, [5, 3])
    assert not found[1].isfinite().all()
    torch.testing.assert_close(found[[0, 2]], good[[0, 2]])


def test_values_spread_over_ranks_are_summed_a_module() -> None:
    values = torch.arange(6.0).reshape(1, 6)
    assert per_module(values, [1, 2, 3]).tolist() == [[0, 3, 12]]


def test_padding_changes_nothing() -> None:
    torch.manual_seed(0)
    state, V = factors(5, 2), factors(5, 3)
    x, d = inputs([5])
    padded_x = torch.cat([x, torch.randn(ROWS, 4, D_IN, dtype=torch.float64)], dim=1)
    padded_d = torch.cat([d, torch.zeros(ROWS, 4, 5, dtype=torch.float64)], dim=1)
    torch.testing.assert_close(
        low_rank([state], [[V]], padded_x, padded_d, [5]), low_rank([state], [[V]], x, d, [5]), rtol=0, atol=1e-12
    )


@pytest.mark.parametrize(("d_out", "ranks", "covered"), SHAPES.values(), ids=SHAPES)
def test_what_each_position_adds_is_its_own_update_in_the_dense_form(
    d_out: list[int], ranks: list[int], covered: list[list[int]]
) -> None:
    torch.manual_seed(0)
    states = [factors(o, r, scaling=0.5 + m) for m, (o, r) in enumerate(zip(d_out, ranks, strict=True))]
    directions = [[factors(o, r, 1.7) if r else None for o, r in zip(d_out, row, strict=True)] for row in covered]
    x, d = inputs(d_out)
    expected = torch.zeros(ROWS, TOKENS, len(directions), dtype=torch.float64)
    for b in range(ROWS):
        for m, (state, d_bto) in enumerate(zip(states, d.split(d_out, dim=-1), strict=True)):
            updates = [
                -state.scaling
                * (torch.outer(d_t, state.A @ x_t) @ state.A + state.B @ torch.outer(state.B.T @ d_t, x_t))
                for x_t, d_t in zip(x[b], d_bto[b], strict=True)
            ]
            for p, direction in enumerate(directions):
                found = direction[m]
                if found is not None:
                    V = found.scaling * found.B @ found.A
                    scale = torch.stack(updates).sum(0).norm() * V.norm()
                    expected[b, :, p] += torch.stack([(update * V).sum() / scale for update in updates])
    group = prepare(states, directions, D_IN, d_out)
    h = x @ torch.cat([s.A for s in states]).T
    e = d @ torch.block_diag(*[s.scaling * s.B for s in states])
    _, norms = contract(group, x, h, d, e)
    parts = by_token(group, x, h, d, e, norms, ranks)
    torch.testing.assert_close(parts, expected, rtol=0, atol=1e-12)
    sums = low_rank(states, directions, x, d, d_out).sum(-1)
    torch.testing.assert_close(parts.sum(1), sums, rtol=0, atol=1e-12)
    assert sums.abs().max() > 1e-3


def test_a_position_without_a_gradient_adds_nothing() -> None:
    torch.manual_seed(0)
    state, V, nothing = factors(5, 2), factors(5, 3), LoraFactors(torch.ones(1, D_IN), torch.zeros(5, 1), 1.0)
    x, d = inputs([5])
    d[:, 3] = 0
    group = prepare([state], [[V], [nothing]], D_IN, [5])
    h, e = x @ state.A.T, d @ (state.scaling * state.B)
    parts = by_token(group, x, h, d, e, contract(group, x, h, d, e)[1], [2])
    assert (parts[:, 3] == 0).all()
    assert (parts[:, :, 1] == 0).all()
    assert (parts[:, 2, 0] != 0).all()
