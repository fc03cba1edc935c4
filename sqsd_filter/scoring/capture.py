"""Projections taken during one shared backward pass: each adapted module's x, h, d and e are contracted there.

The adapted linears of a model are replaced by `SideLinear`s. Linears that read the same tensor (q, k and v; gate and
up) form a group that owns their stacked weights and runs them as one autograd Function: one product forward, one
backward, and the narrow products of the side paths stacked beside them. The base stays frozen, so only input
gradients are computed. Nothing is merged into the base tensors, since bfloat16 would lose it. Threads may run passes
in parallel.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Generic, TypeVar

import torch
from torch import nn
from torch.autograd.function import FunctionCtx
from torch.nn import functional as F

from sqsd_filter.errors import ModelError, PackError
from sqsd_filter.scoring.adapters import Adapter, LoraFactors
from sqsd_filter.scoring.models import input_device, output_head
from sqsd_filter.scoring.projection import (
    GroupProjection,
    contract,
    cosines,
    of_gradient,
    per_module,
    prepare,
    towards,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class GroupState:
    """One state's side paths of a group: y += (x Aᵀ) (sB)ᵀ, ranks stacked, and the projection taken there, if any."""

    A_ri: torch.Tensor
    sB_or: torch.Tensor
    ranks: tuple[int, ...]
    projection: GroupProjection | None


# Computes something more in a group's backward pass, from its projection, x, h, d, e (b, t, …), ‖ΔW‖² (b, r) and the
# ranks of its modules: a tensor, or the pair of sums that `projection.summed` gives.
Collected = torch.Tensor | tuple[torch.Tensor, torch.Tensor]
Collect = Callable[
    [GroupProjection, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, Sequence[int]], Collected
]
Key = TypeVar("Key", bound=Hashable)


class _ThreadState:
    """A group's state in one thread: each thread uses one of the adapter states and runs its own rows."""

    def __init__(self) -> None:
        self.shape = (0, 0)  # rows and tokens of the batch
        self.state: GroupState | None = None
        self.collect: Collect | None = None
        self.contracted: tuple[torch.Tensor, torch.Tensor] | None = None  # by the last backward pass
        self.collected: Collected | None = None  # by its `collect`
        self.x: torch.Tensor | None = None
        self.outputs: dict[int, torch.Tensor] = {}


class LinearGroup:
    """Linears with a common input, run as one: weight (o, i) and bias (o,) stacked over the members."""

    def __init__(self, names: Sequence[str], linears: Sequence[nn.Module]) -> None:
        self.names = tuple(names)
        weights = [_weight_oi(m) for m in linears]
        self.widths = [w.shape[0] for w in weights]
        self.weight_oi = torch.cat(weights) if len(weights) > 1 else weights[0].contiguous()
        biases = [getattr(m, "bias", None) for m in linears]
        self.bias_o: torch.Tensor | None = None
        if any(b is not None for b in biases):
            self.bias_o = torch.cat(
                [w.new_zeros(w.shape[0]) if b is None else b.detach() for w, b in zip(weights, biases, strict=True)]
            )
        self._threads = threading.local()

    @property
    def now(self) -> _ThreadState:
        now: _ThreadState | None = getattr(self._threads, "now", None)
        if now is None:
            now = self._threads.now = _ThreadState()
        return now

    def output(self, member: int, x: torch.Tensor) -> torch.Tensor:
        """The member's output for x; the first member that is called computes all outputs."""
        now = self.now
        if now.x is not x or member not in now.outputs:
            now.x = x
            outputs = _GroupFunction.apply(x, self)  # type: ignore[no-untyped-call]  # untyped in torch
            now.outputs = dict(enumerate(outputs))
        y = now.outputs.pop(member)
        if not now.outputs:
            now.x = None
        return y

    def reset(self) -> None:
        self.now.x, self.now.outputs, self.now.contracted, self.now.collected = None, {}, None, None


class SideLinear(nn.Module):
    """Replaces an adapted linear; its group computes the output."""

    def __init__(self, group: LinearGroup, member: int) -> None:
        super().__init__()
        self.group, self.member = group, member
        # Some models read a linear's weight (for its dtype or device). This is a view, not a copy.
        start = sum(group.widths[:member])
        self.weight = nn.Parameter(group.weight_oi[start : start + group.widths[member]], requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.group.output(self.member, x)


class _Context(FunctionCtx):
    """What forward keeps for backward."""

    group: LinearGroup
    now: _ThreadState
    state: GroupState | None
    saved_tensors: tuple[torch.Tensor, ...]


class _GroupFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _Context, x: torch.Tensor, group: LinearGroup) -> tuple[torch.Tensor, ...]:
        # The calling thread's state: on a GPU, another thread runs backward.
        ctx.group, ctx.now = group, group.now
        state = ctx.now.state
        y = F.linear(x, group.weight_oi, group.bias_o)
        if state is not None:
            h = F.linear(x, state.A_ri)
            y.view(-1, y.shape[-1]).addmm_(h.view(-1, h.shape[-1]), state.sB_or.t())
            if state.projection is not None:
                ctx.save_for_backward(x, h)
        ctx.state = state
        return y.split(group.widths, dim=-1) if len(group.widths) > 1 else (y,)

    @staticmethod
    def backward(ctx: _Context, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        group, state = ctx.group, ctx.state
        d = torch.cat(grads, dim=-1) if len(grads) > 1 else grads[0].contiguous()
        dx = d.matmul(group.weight_oi)
        if state is not None:
            e = d.matmul(state.sB_or)
            dx.view(-1, dx.shape[-1]).addmm_(e.view(-1, e.shape[-1]), state.A_ri)
            if state.projection is not None:
                x, h = ctx.saved_tensors
                x, h, d, e = (_by_row(v, ctx.now.shape) for v in (x, h, d, e))
                ctx.now.contracted = contract(state.projection, x, h, d, e)
                if ctx.now.collect is not None:
                    ranks = [r for r in state.ranks if r]
                    norms_br = ctx.now.contracted[1]
                    ctx.now.collected = ctx.now.collect(state.projection, x, h, d, e, norms_br, ranks)
        return dx, None


def _by_row(values: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    """A module's values as (b, t, …); some models flatten them to (b·t, …)."""
    if values.shape[:2] == shape:
        return values
    if values.dim() == 2 and values.shape[0] == shape[0] * shape[1]:
        return values.view(*shape, -1)
    raise ModelError("A linear layer sees only some of the tokens (a routed expert?): this model can't be scored.")


class Capture(Generic[Key]):
    """A model with its adapted linears replaced, which can run at any of several states.

    `states` maps a key to the state's adapter and the direction adapters to project on there. None in the place of
    directions asks for products with the gradient itself instead of the update that it causes. Raises `PackError` when
    an adapter does not fit the model, or a direction shares no module with its state.
    """

    def __init__(self, model: PreTrainedModel, states: Mapping[Key, tuple[Adapter, Sequence[Adapter] | None]]) -> None:
        wanted = {m: state.path for state, _ in states.values() for m in state.factors}
        linears = _find_linears(model, wanted)
        self.groups = []
        for names in _sharing_input(model, linears):
            group = LinearGroup(names, [linears.pop(name) for name in names])
            for member, name in enumerate(names):  # now, so that only one group's weights exist twice
                parent, _, leaf = name.rpartition(".")
                setattr(model.get_submodule(parent), leaf, SideLinear(group, member))
            self.groups.append(group)
        self._states = {key: self._prepare(state, directions) for key, (state, directions) in states.items()}

    def coverage(self, key: Key) -> list[int]:
        """The number of modules that a state and each of its directions both adapt."""
        norms = [s.projection.norm_pm for s in self._states[key].values() if s.projection is not None]
        return [int(sum((n[p] > 0).sum() for n in norms)) for p in range(len(norms[0]) if norms else 0)]

    def modules(self, key: Key) -> list[str]:
        """Names of the modules whose cosines `cosines` gives, in its order."""
        return [
            name
            for group in self.groups
            if (s := self._states[key].get(id(group))) is not None and s.projection is not None
            for name, rank in zip(group.names, s.ranks, strict=True)
            if rank
        ]

    def use(self, key: Key, shape: tuple[int, int], *, collect: Collect | None = None) -> None:
        """Use a state for this thread's next forward pass, whose input has this shape (rows, tokens).

        Its backward pass keeps what `collect` returns.
        """
        for group in self.groups:
            group.reset()
            group.now.shape, group.now.collect = shape, collect
            group.now.state = self._states[key].get(id(group))

    def rest(self) -> None:
        """Run this thread's next forward pass at no state."""
        for group in self.groups:
            group.reset()
            group.now.state = group.now.collect = None

    def towards(self, key: Key, gradients: Sequence[Mapping[int, tuple[torch.Tensor, torch.Tensor]]]) -> None:
        """From now on, project the gradient at this state on these p gradients, each given as sums by group number."""
        for number, group in enumerate(self.groups):
            state = self._states[key].get(id(group))
            if state is not None and state.projection is not None:
                projection = towards(state.projection, [each[number] for each in gradients])
                self._states[key][id(group)] = replace(state, projection=projection)

    def cosines(self) -> torch.Tensor:
        """cos (b, p, m) of the rows of the backward pass that just ran."""
        return cosines(*self.products())

    def products(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """<ΔW, V> (b, p, m), ‖ΔW‖² (b, m) and ‖V‖ (p, m) of the rows of the backward pass that just ran."""
        parts: list[tuple[torch.Tensor, ...]] = []
        for group in self.groups:
            state, contracted = group.now.state, group.now.contracted
            if state is None or state.projection is None:
                continue
            if contracted is None:
                raise ModelError(f"The model's loss does not depend on {', '.join(group.names)}: it can't be scored.")
            dots_bpr, norms_br = contracted
            ranks = [r for r in state.ranks if r]
            sums = per_module(dots_bpr, ranks), per_module(norms_br, ranks), state.projection.norm_pm
            device = parts[0][0].device if parts else dots_bpr.device  # a model may be spread over devices
            parts.append(tuple(t.to(device) for t in sums))
            group.reset()
        dots, norms2, norms = (torch.cat(columns, dim=-1) for columns in zip(*parts, strict=True))
        return dots, norms2, norms

    def collected(self) -> dict[int, Collected]:
        """What `collect` returned, by the group's number. Call it before `products`, which resets it."""
        return {number: g.now.collected for number, g in enumerate(self.groups) if g.now.collected is not None}

    def token_parts(self) -> torch.Tensor:
        """Each position's part of the sum of all cosines (b, t, p), after a pass that collects `by_token`."""
        parts = [part for part in self.collected().values() if isinstance(part, torch.Tensor)]
        return torch.stack([part.to(parts[0].device) for part in parts]).sum(0)

    def _prepare(self, state: Adapter, given: Sequence[Adapter] | None) -> dict[int, GroupState]:
        """The state's side paths and projection for each group that it adapts, by the group's `id`."""
        directions = given or ()
        for direction in directions:
            if not set(direction.factors) & set(state.factors):
                raise PackError(f"{direction.path} and {state.path} have no module in common: nothing can be scored.")
        prepared = {}
        for group in self.groups:
            present = [state.factors.get(name) for name in group.names]
            factors = [f for f in present if f is not None]
            if not factors:
                continue
            weight = group.weight_oi
            ranks = tuple(f.A.shape[0] if f is not None else 0 for f in present)
            A_ri = torch.cat([f.A for f in factors])
            sB_or = weight.new_zeros(sum(group.widths), sum(ranks), dtype=torch.float32, device="cpu")
            o0 = r0 = 0
            widths = []
            for name, width, factor in zip(group.names, group.widths, present, strict=True):
                if factor is not None:
                    rank = factor.A.shape[0]
                    if factor.A.shape[1] != weight.shape[1] or factor.B.shape[0] != width:
                        raise PackError(
                            f"{state.path} does not fit the model: '{name}' is {width} × {weight.shape[1]} there, "
                            f"{factor.B.shape[0]} × {factor.A.shape[1]} in the adapter."
                        )
                    sB_or[o0 : o0 + width, r0 : r0 + rank] = factor.scaling * factor.B
                    r0 += rank
                widths.append(width)
                o0 += width
            names = group.names
            targets = [[d.factors.get(n) for n in names] for d in directions]
            for direction, target in zip(directions, targets, strict=True):
                for name, width, factor in zip(names, widths, target, strict=True):
                    if factor is not None and (factor.A.shape[1], factor.B.shape[0]) != (weight.shape[1], width):
                        raise PackError(
                            f"{direction.path} does not fit the model: '{name}' has a different shape there."
                        )
            projection = None
            covered = any(f is not None and s is not None for t in targets for f, s in zip(t, present, strict=True))
            if covered or given is None:
                projection = _project(present, targets, weight.shape[1], widths, gradient=given is None)
                exact = torch.float64 if weight.dtype == torch.float64 else torch.float32
                projection = projection.to(weight.device, exact)
            prepared[id(group)] = GroupState(
                A_ri.to(weight.device, weight.dtype), sB_or.to(weight.device, weight.dtype), ranks, projection
            )
        return prepared


def _project(
    present: Sequence[LoraFactors | None],
    directions: Sequence[Sequence[LoraFactors | None]],
    d_in: int,
    widths: list[int],
    *,
    gradient: bool,
) -> GroupProjection:
    """`prepare` over the members that the state adapts, widened to the whole group's outputs."""
    here = [m for m, f in enumerate(present) if f is not None]
    states = [factors for factors in present if factors is not None]
    narrow = prepare(states, [[factors[m] for m in here] for factors in directions], d_in, [widths[m] for m in here])
    narrow = of_gradient(narrow, states) if gradient else narrow
    if len(here) == len(present):
        return narrow
    columns = torch.cat([torch.arange(sum(widths[:m]), sum(widths[: m + 1])) for m in here])
    r, _, p = narrow.query_B_rop.shape
    query_B_rop = narrow.query_B_rop.new_zeros(r, sum(widths), p).index_copy_(1, columns, narrow.query_B_rop)
    block_ro = narrow.block_ro.new_zeros(r, sum(widths)).index_copy_(1, columns, narrow.block_ro)
    return replace(narrow, query_B_rop=query_B_rop, block_ro=block_ro, masked=True)


def _weight_oi(linear: nn.Module) -> torch.Tensor:
    weight = linear.weight
    assert isinstance(weight, torch.Tensor)
    return weight.detach() if isinstance(linear, nn.Linear) else weight.detach().t()


def _find_linears(model: PreTrainedModel, wanted: Mapping[str, Path]) -> dict[str, nn.Module]:
    """The modules to adapt, by name; `wanted` names the adapter that adapts each."""
    from transformers.pytorch_utils import Conv1D

    modules = dict(model.named_modules())
    head = output_head(model)
    linears: dict[str, nn.Module] = {}
    for name, adapter in sorted(wanted.items()):
        module = modules.get(name)
        if module is None:
            raise PackError(
                f"{adapter} adapts '{name}', which {type(model).__name__} does not have: the pack was made for "
                "another model."
            )
        if module is head:
            raise PackError(f"{adapter} adapts the output head '{name}', which can't be scored: train without it.")
        if not isinstance(module, Conv1D) and not _is_plain(module):
            raise PackError(f"'{name}' is a {type(module).__name__}, not a plain linear layer: it can't be scored.")
        linears[name] = module
    return linears


def _is_plain(module: nn.Module) -> bool:
    """Is this a linear layer with an ordinary weight? Quantised subclasses of Linear store it in another form."""
    floats = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    return (
        isinstance(module, nn.Linear)
        and module.weight.shape == (module.out_features, module.in_features)
        and module.weight.dtype in floats
    )


def _sharing_input(model: PreTrainedModel, linears: Mapping[str, nn.Module]) -> list[list[str]]:
    """The names of linears that get the very same tensor as input, found by running two tokens through the model."""
    seen: list[tuple[torch.Tensor, list[str]]] = []
    calls: dict[str, int] = {}

    def note(name: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
        def hook(_: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
            calls[name] = calls.get(name, 0) + 1
            if seen and seen[-1][0] is arguments[0]:
                seen[-1][1].append(name)
            else:
                seen.append((arguments[0], [name]))

        return hook

    handles = [module.register_forward_pre_hook(note(name)) for name, module in linears.items()]
    try:
        with torch.no_grad():
            model(torch.zeros((1, 2), dtype=torch.long, device=input_device(model)), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    if repeated := [name for name, count in calls.items() if count > 1]:
        raise ModelError(
            f"{repeated[0]} runs more than once in a forward pass: models that share layers can't be scored."
        )
    return [names for _, names in seen]
