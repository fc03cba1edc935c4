"""θ0 + αV by side paths is the dense merge, and leaves θ0 as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from sqsd_filter.directions.offset import offset, random_like
from sqsd_filter.errors import PackError
from sqsd_filter.scoring.adapters import load_adapter, norm
from sqsd_filter.scoring.models import load_model
from tests.tiny import ARCHITECTURES, make_adapter

IDS = torch.arange(3, 30).reshape(3, 9)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=IDS, use_cache=False).logits
    return logits


def dense(model: Any, folder: Path, alpha: float) -> Any:
    """The textbook form: every weight with α·s·B·A added."""
    modules = dict(model.named_modules())
    for name, f in load_adapter(folder).factors.items():
        V = f.scaling * f.B.double() @ f.A.double()
        weight = modules[name].weight
        weight.data += alpha * (V if isinstance(modules[name], nn.Linear) else V.T)
    return model


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_offset_model_is_the_dense_merge(packs: dict[str, Path], architecture: str) -> None:
    pack = packs[architecture]
    model = load_model(str(pack / "base"), dtype=torch.float64)
    for alpha in (-1.0, 0.25, 1.0):
        expected = logits(dense(load_model(str(pack / "base"), dtype=torch.float64), pack / "danger", alpha))
        with offset(model, load_adapter(pack / "danger"), alpha):
            torch.testing.assert_close(logits(model), expected, rtol=1e-10, atol=1e-10)
        assert not torch.allclose(expected, logits(model), atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_after_any_offset_the_model_is_bit_for_bit_what_it_was(tiny_pack: Path, dtype: torch.dtype) -> None:
    model, adapter = load_model(str(tiny_pack / "base"), dtype=dtype), load_adapter(tiny_pack / "danger")
    before, weights = logits(model), {name: p.clone() for name, p in model.named_parameters()}
    for alpha in (0.3, -7.0, 1e4):
        with offset(model, adapter, alpha):
            assert not torch.equal(logits(model), before)
        with offset(model, adapter, 0.0):
            assert torch.equal(logits(model), before)
    with pytest.raises(KeyError), offset(model, adapter, 1.0):
        raise KeyError
    assert torch.equal(logits(model), before)
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())


def test_a_direction_that_bfloat16_weights_would_swallow_is_there(tiny_pack: Path) -> None:
    adapter = load_adapter(tiny_pack / "danger")
    exact, model = (load_model(str(tiny_pack / "base"), dtype=dtype) for dtype in (torch.float64, torch.bfloat16))
    seen = {}
    for name, m in (("exact", exact), ("bfloat16", model)):
        grabbed: list[torch.Tensor] = []
        linear = m.get_submodule("model.layers.0.self_attn.v_proj")
        ones = torch.ones(1, 32, dtype=m.dtype)
        at_zero = linear(ones / 32)
        with offset(m, adapter, 1e-2):
            grabbed.append(linear(ones / 32) - at_zero)
        seen[name] = grabbed[0].double()
    torch.testing.assert_close(seen["bfloat16"], seen["exact"], rtol=0.3, atol=5e-4)


def test_a_direction_far_below_the_spacing_of_activations_needs_float32(tiny_pack: Path) -> None:
    adapter = load_adapter(tiny_pack / "danger")
    moved = {}
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        model = load_model(str(tiny_pack / "base"), dtype=dtype)
        before = logits(model)
        with offset(model, adapter, 1e-4):
            moved[dtype] = (logits(model) - before).double()
    exact = moved[torch.float64]
    assert float((moved[torch.float32] - exact).norm() / exact.norm()) < 0.05
    assert float((moved[torch.bfloat16] - exact).norm() / exact.norm()) > 0.5


@pytest.mark.parametrize("seed", range(3))
def test_a_random_direction_has_the_norms_of_its_model(tiny_pack: Path, seed: int) -> None:
    own = load_adapter(tiny_pack / "danger")
    other = random_like(own, seed)
    assert list(other.factors) == sorted(own.factors)
    for name, f in other.factors.items():
        g = own.factors[name]
        V, W = f.scaling * f.B.double() @ f.A.double(), g.scaling * g.B.double() @ g.A.double()
        assert norm(g) == pytest.approx(float(W.norm()), rel=1e-9)
        assert float(V.norm()) == pytest.approx(float(W.norm()), rel=1e-6)
        assert abs(float((V * W).sum() / (V.norm() * W.norm()))) < 0.3
    again = random_like(own, seed).factors
    assert all(torch.equal(f.A, again[name].A) for name, f in other.factors.items())
    assert not torch.equal(random_like(own, seed + 1).factors[name].A, f.A)


def test_a_direction_of_another_model_is_refused(packs: dict[str, Path], tmp_path: Path) -> None:
    model = load_model(str(packs["llama"] / "base"), dtype=torch.float32)
    foreign = load_adapter(make_adapter(packs["gpt2"] / "base", tmp_path / "foreign"))
    with pytest.raises(PackError, match="which LlamaForCausalLM does not have"), offset(model, foreign, 0.0):
        pass
