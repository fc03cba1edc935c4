"""A model at θ0 + αV: its weights moved along a direction, for a while.

V = s·B·A is a side path, y = Wx + α·s·B(Ax). θ0 itself is never touched, so no rounding error stays behind, and a V
smaller than the spacing of the weights still counts. Activations are rounded to the model's dtype, though: bfloat16 has
a spacing of 1/256 of a value, in which the effect of a small V is lost.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch.nn import functional as F

from sqsd_filter.scoring.adapters import Adapter, LoraFactors, adapted, norm

Hook = Callable[[torch.nn.Module, tuple[torch.Tensor, ...], torch.Tensor], torch.Tensor]  # (module, inputs, y) to y


@contextmanager
def offset(model: torch.nn.Module, direction: Adapter, alpha: float) -> Iterator[None]:
    """Inside this context `model` is at θ0 + `alpha`·V. Raises `PackError` if V does not fit the model."""
    modules = list(adapted(model, direction))
    hooks = [module.register_forward_hook(_side_path(module, factors, alpha)) for module, factors in modules if alpha]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _side_path(module: torch.nn.Module, factors: LoraFactors, alpha: float) -> Hook:
    weight = module.get_parameter("weight")
    exact = torch.promote_types(weight.dtype, torch.float32)
    A_ri = factors.A.to(weight.device, weight.dtype)
    B_or = (alpha * factors.scaling * factors.B.to(weight.device, exact)).to(weight.dtype)

    def add(_module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], y: torch.Tensor) -> torch.Tensor:
        return y + F.linear(F.linear(inputs[0], A_ri), B_or)

    return add


def random_like(direction: Adapter, seed: int) -> Adapter:
    """A random direction with the same rank and norm ‖V_m‖ in each module, to compare with.

    It is drawn on the CPU in the order of the modules' names, so that a seed gives the same on every machine.
    """
    generator = torch.Generator().manual_seed(seed)
    factors = {}
    for module, own in sorted(direction.factors.items()):
        A, B = (torch.randn(side.shape, generator=generator) for side in (own.A, own.B))
        drawn = LoraFactors(A, B, 1.0)
        factors[module] = LoraFactors(A, B, norm(own) / norm(drawn))
    return Adapter(direction.path, factors)
