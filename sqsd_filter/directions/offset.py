"""A model at θ0 + αV: what a direction does to it when the weights are moved along it.

V = s·B·A is added as a side path, y = Wx + α·s·B(Ax), and taken away with it: θ0 itself is never touched, so that no
rounding is left behind, and a V smaller than the spacing of the weights isn't swallowed. Activations are rounded to the
model's dtype, though: in bfloat16, whose spacing is 1/256 of a value, the effect of a small V is lost in y.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn import functional as F

from sqsd_filter.scoring.adapters import Adapter, LoraFactors, adapted, norm


@contextmanager
def offset(model: Any, direction: Adapter, alpha: float) -> Iterator[None]:
    """Inside, `model` is at θ0 + `alpha`·V; at 0 it is left as it is. Raises `PackError` where V does not fit."""
    modules = list(adapted(model, direction))
    hooks = [module.register_forward_hook(_side_path(module, factors, alpha)) for module, factors in modules if alpha]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _side_path(module: Any, factors: LoraFactors, alpha: float) -> Any:
    weight = module.weight
    exact = torch.promote_types(weight.dtype, torch.float32)
    A_ri = factors.A.to(weight.device, weight.dtype)
    B_or = (alpha * factors.scaling * factors.B.to(weight.device, exact)).to(weight.dtype)
    return lambda _module, inputs, y: y + F.linear(F.linear(inputs[0], A_ri), B_or)


def random_like(direction: Adapter, seed: int) -> Adapter:
    """A random direction of the same ranks and norms ‖V‖, a module: what an arbitrary one would do.

    Drawn on the CPU in the order of the modules' names, so that a seed means the same everywhere.
    """
    generator = torch.Generator().manual_seed(seed)
    factors = {}
    for module, own in sorted(direction.factors.items()):
        A, B = (torch.randn(side.shape, generator=generator) for side in (own.A, own.B))
        drawn = LoraFactors(A, B, 1.0)
        factors[module] = LoraFactors(A, B, norm(own) / norm(drawn))
    return Adapter(direction.path, factors)
