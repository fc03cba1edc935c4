"""The maths of a projection, with r-sized matrices only: no d_out × d_in matrix is ever formed.

For a module y = Wx + s·B(Ax) and one row's loss gradients G_A, G_B, the row's first-order update of the effective
weight is ΔW = -(G_B A + B G_A). Against a direction V = B_V A_V:

    <ΔW, V> = -( <G_B, B_V (A_V Aᵀ)> + <G_A, (Bᵀ B_V) A_V> )
    ‖ΔW‖²   = <G_Bᵀ G_B, A Aᵀ> + <G_A G_Aᵀ, Bᵀ B> + 2 ‖hᵀ e‖²
    ‖V‖²    = <B_Vᵀ B_V, A_V A_Vᵀ>

with x the module's input, h = Ax, d = ∂L/∂y and e = s Bᵀ d, so that G_B = s dᵀ h and G_A = eᵀ x (SQSD,
arXiv 2605.04572; the cross term holds because G_Bᵀ B = hᵀ e = (G_A Aᵀ)ᵀ).

Both products on the right are sums over the row's tokens t, each linear in d: with the norms fixed, cos_m is a sum over
positions of

    -( s d_tᵀ B_V A_V Aᵀ h_t + e_tᵀ Bᵀ B_V A_V x_t ) / (‖ΔW‖ ‖V‖).

Modules that share their input are handled together, with their ranks stacked. Off-diagonal blocks of the stacked
products belong to no module and are masked.

Shapes, as suffixes: b rows, t tokens, i = d_in, o = d_out (stacked over the group's modules), r = the state's rank
(stacked likewise), k = a direction's rank, p = directions, m = modules.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from sqsd_filter.scoring.adapters import LoraFactors


@dataclass(frozen=True)
class GroupProjection:
    """A group's fixed factors for projecting rows from one state on p directions; computed once per state.

    `query_A_rip` and `query_B_rop` are the right-hand factors of <ΔW, V>, `gram_*_rr` those of ‖ΔW‖². `block_ro` is 1
    where row and column belong to the same module; `block_rr` is the same for the cross term of ‖ΔW‖². `norm_pm` is
    ‖V‖, 0 where a direction does not cover a module.
    """

    query_A_rip: torch.Tensor
    query_B_rop: torch.Tensor
    gram_A_rr: torch.Tensor
    gram_B_rr: torch.Tensor
    block_ro: torch.Tensor
    block_rr: torch.Tensor
    norm_pm: torch.Tensor
    masked: bool  # are there blocks to mask?

    def to(self, device: torch.device, dtype: torch.dtype) -> GroupProjection:
        """The same factors on a device, in a dtype."""
        moved: dict[str, Any] = {k: v.to(device, dtype) for k, v in vars(self).items() if isinstance(v, torch.Tensor)}
        return replace(self, **moved)


def prepare(
    states: Sequence[LoraFactors], directions: Sequence[Sequence[LoraFactors | None]], d_in: int, d_out: Sequence[int]
) -> GroupProjection:
    """Precompute a group's factors in float64.

    `states` holds the m modules' state factors; `directions` has p entries of m factors each (None: not covered);
    `d_out` the modules' output widths.
    """
    double = torch.float64
    modules, ranks = len(states), [s.A.shape[0] for s in states]
    p, r, o = len(directions), sum(ranks), sum(d_out)
    query_A_rip = torch.zeros(r, d_in, p, dtype=double)
    query_B_rop = torch.zeros(r, o, p, dtype=double)
    gram_A_rr, gram_B_rr, block_rr = (torch.zeros(r, r, dtype=double) for _ in range(3))
    block_ro = torch.zeros(r, o, dtype=double)
    norm_pm = torch.zeros(p, modules, dtype=double)
    r0 = o0 = 0
    for m, state in enumerate(states):
        rows, columns = slice(r0, r0 + ranks[m]), slice(o0, o0 + d_out[m])
        r0, o0 = rows.stop, columns.stop
        A_ri, B_or, s = state.A.to(double), state.B.to(double), state.scaling
        gram_A_rr[rows, rows] = s * s * (A_ri @ A_ri.T)  # s², since the stacked G_B lacks its factor s
        gram_B_rr[rows, rows] = B_or.T @ B_or
        block_rr[rows, rows] = 1
        block_ro[rows, columns] = 1
        for number, direction in enumerate(directions):
            factors = direction[m]
            if factors is None:
                continue
            V_A_ki, V_B_ok = factors.A.to(double), factors.B.to(double) * factors.scaling
            query_A_rip[rows, :, number] = (B_or.T @ V_B_ok) @ V_A_ki
            query_B_rop[rows, columns, number] = s * (V_B_ok @ (V_A_ki @ A_ri.T)).T
            norm_pm[number, m] = ((V_B_ok.T @ V_B_ok) * (V_A_ki @ V_A_ki.T)).sum().clamp_min(0).sqrt()
    return GroupProjection(query_A_rip, query_B_rop, gram_A_rr, gram_B_rr, block_ro, block_rr, norm_pm, modules > 1)


def of_gradient(group: GroupProjection, states: Sequence[LoraFactors]) -> GroupProjection:
    """The same group for the gradient itself: `contract` then gives ‖G_A‖² + ‖G_B‖² instead of ‖ΔW‖²."""
    scaling_r = torch.cat([group.gram_A_rr.new_full((len(s.A),), s.scaling) for s in states])
    return replace(
        group,
        gram_A_rr=torch.diag(scaling_r**2),  # s², since the stacked G_B lacks its factor s
        gram_B_rr=torch.eye(len(scaling_r), dtype=scaling_r.dtype),
        block_rr=torch.zeros_like(group.block_rr),
        masked=True,
    )


def towards(group: GroupProjection, gradients: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> GroupProjection:
    """A group of `of_gradient` with p gradients, as `summed` gives them, instead of directions: `contract` then gives
    <G_A, G_A'> + <G_B, G_B'> with each. Their norms are not computed."""
    A_pri, B_pro = (torch.stack(side) for side in zip(*gradients, strict=True))
    scaled_B_pro = group.gram_A_rr @ B_pro
    return replace(
        group,
        query_A_rip=-A_pri.permute(1, 2, 0).contiguous(),  # `contract` negates, for a step against the gradient
        query_B_rop=-scaled_B_pro.permute(1, 2, 0).contiguous(),
    )


def summed(
    group: GroupProjection,
    weight_b: torch.Tensor,
    x_bti: torch.Tensor,
    h_btr: torch.Tensor,
    d_bto: torch.Tensor,
    e_btr: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Σ_b weight_b · (G_A (r, i), G_B (r, o) without its factor s), without forming any row's own gradient."""
    dtype = group.gram_A_rr.dtype
    weight_b11 = weight_b.to(x_bti.device, dtype)[:, None, None]
    A_ri = torch.einsum("btr,bti->ri", e_btr.to(dtype) * weight_b11, x_bti.to(dtype))
    B_ro = torch.einsum("btr,bto->ro", h_btr.to(dtype) * weight_b11, d_bto.to(dtype))
    return A_ri, B_ro.mul_(group.block_ro)


def each_gradient(
    group: GroupProjection,
    x_bti: torch.Tensor,
    h_btr: torch.Tensor,
    d_bto: torch.Tensor,
    e_btr: torch.Tensor,
    *_: object,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Every row's own G_A (b, r, i) and G_B (b, r, o), the latter without its factor s."""
    dtype = group.gram_A_rr.dtype
    G_A_bri = torch.bmm(e_btr.transpose(1, 2), x_bti).to(dtype)
    G_B_bro = torch.bmm(h_btr.transpose(1, 2), d_bto).to(dtype)  # hᵀd, without its factor s
    return G_A_bri, G_B_bro.mul_(group.block_ro) if group.masked else G_B_bro


def contract(
    group: GroupProjection, x_bti: torch.Tensor, h_btr: torch.Tensor, d_bto: torch.Tensor, e_btr: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """<ΔW, V> (b, p, r) and ‖ΔW‖² (b, r) of every row, each still one term per rank.

    Sum over a module's ranks (`per_module`) for the module's value. The large products are computed in the inputs'
    dtype, the small ones in the projection's.
    """
    G_A_bri, G_B_bro = each_gradient(group, x_bti, h_btr, d_bto, e_btr)
    cross_brr = torch.bmm(h_btr.transpose(1, 2), e_btr).to(group.gram_A_rr.dtype)
    if group.masked:
        cross_brr.mul_(group.block_rr)
    # One small product per rank: (r, b, i) by (r, i, p).
    dots_rbp = torch.bmm(G_A_bri.transpose(0, 1), group.query_A_rip)
    dots_rbp.baddbmm_(G_B_bro.transpose(0, 1), group.query_B_rop)
    norms_brr = torch.bmm(G_B_bro, G_B_bro.transpose(1, 2)).mul_(group.gram_A_rr)
    norms_brr.addcmul_(torch.bmm(G_A_bri, G_A_bri.transpose(1, 2)), group.gram_B_rr)
    norms_brr.addcmul_(cross_brr, cross_brr, value=2)
    return dots_rbp.permute(1, 2, 0).neg(), norms_brr.sum(-1)


def by_token(
    group: GroupProjection,
    x_bti: torch.Tensor,
    h_btr: torch.Tensor,
    d_bto: torch.Tensor,
    e_btr: torch.Tensor,
    norms_br: torch.Tensor,
    ranks: Sequence[int],
) -> torch.Tensor:
    """Each position's part of the sum of the group's cosines: (b, t, p), which sums over t to that sum.

    `norms_br` is ‖ΔW‖² as `contract` gives it; `ranks` are the ranks of the group's modules.
    """
    dtype = group.gram_A_rr.dtype
    terms_bptr = torch.einsum("bto,rop->bptr", d_bto.to(dtype), group.query_B_rop).mul_(h_btr.to(dtype).unsqueeze(1))
    terms_bptr += torch.einsum("bti,rip->bptr", x_bti.to(dtype), group.query_A_rip).mul_(e_btr.to(dtype).unsqueeze(1))
    scale_bpm = _scale(per_module(norms_br, ranks), group.norm_pm)
    return -_ratio(per_module(terms_bptr, ranks), scale_bpm.unsqueeze(2)).sum(-1).transpose(1, 2)


def per_module(values: torch.Tensor, ranks: Sequence[int]) -> torch.Tensor:
    """(…, r) summed over each module's ranks: (…, m)."""
    index = torch.repeat_interleave(
        torch.arange(len(ranks), device=values.device), torch.tensor(ranks, device=values.device)
    )
    return values.new_zeros(*values.shape[:-1], len(ranks)).index_add_(-1, index, values)


def cosines(dots_bpm: torch.Tensor, norms2_bm: torch.Tensor, norm_pm: torch.Tensor) -> torch.Tensor:
    """cos of each row's update with each direction, per module: (b, p, m); 0 where either norm is 0."""
    return _ratio(dots_bpm, _scale(norms2_bm, norm_pm))


def _scale(norms2_bm: torch.Tensor, norm_pm: torch.Tensor) -> torch.Tensor:
    """‖ΔW‖ ‖V‖ (b, p, m)."""
    return norms2_bm.clamp_min(0).sqrt().unsqueeze(1) * norm_pm


def _ratio(part: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return torch.where(scale == 0, 0, part / scale)  # values that are not finite stay so, and are reported
