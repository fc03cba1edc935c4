"""Adapters that are trained on a base in 4 bits. bitsandbytes can do that on a CPU, too."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, get_peft_model

from sqsd_filter.directions import training
from sqsd_filter.directions.build import build_pack
from sqsd_filter.directions.recipe import PackRecipe
from sqsd_filter.errors import SQSDError, UsageError
from sqsd_filter.scoring.models import load_in_4bit, load_model
from sqsd_filter.scoring.scorer import SQSDScorer
from tests.directions.recipes import write_recipe
from tests.tiny import CONVERSATIONS, make_model

PACKED = "packing_format_for_cpu"


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PackRecipe:
    monkeypatch.setitem(make_model.__globals__["ARCHITECTURES"], "wide", {**WIDE})
    model = make_model(tmp_path / "base", "wide")
    return replace(PackRecipe.load(write_recipe(tmp_path, model)), quantization="nf4")


WIDE: dict[str, Any] = {  # a block of 64 weights shares a scale
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 512,
}


def test_a_base_in_4_bits_gives_the_gradients_of_the_weights_that_it_stands_for(recipe: PackRecipe) -> None:
    quarter = load_in_4bit(recipe.base_model, dtype=torch.float32, device="cpu")
    dense = load_model(recipe.base_model, dtype=torch.float32)
    for name, module in quarter.named_modules():
        if isinstance(module, Linear4bit):
            stored: Any = module.weight
            weight = dequantize_4bit(stored.data, stored.quant_state)
            twin = dense.get_submodule(name).get_parameter("weight")
            assert module.weight.dtype == torch.uint8
            assert 0 < (weight - twin).norm() / twin.norm() < 0.2
            twin.copy_(weight)
    ids, gradients = torch.arange(20).reshape(1, -1), []
    for model in (quarter, dense.train()):
        torch.manual_seed(0)
        adapted = get_peft_model(model, LoraConfig(r=2, init_lora_weights=False, target_modules="all-linear"))
        adapted(input_ids=ids, labels=ids).loss.backward()
        gradients.append({name: p.grad for name, p in adapted.named_parameters() if p.requires_grad})
    ours, theirs = gradients
    assert ours
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-3, atol=1e-5)


def test_a_pack_is_trained_on_a_base_in_4_bits_and_scores_on_one_in_16(
    recipe: PackRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[set[torch.dtype]] = []

    def look(model: Any) -> None:
        in_float32(model)
        seen.append({p.dtype for p in model.parameters() if p.requires_grad})
        frozen = {name for name, p in model.named_parameters() if p.dtype == torch.uint8}
        assert frozen
        assert all("proj" in name for name in frozen)
        weights: list[Any] = [m.weight for m in model.modules() if isinstance(m, Linear4bit)]
        assert not [
            weight for weight in weights if hasattr(weight.quant_state, PACKED)
        ]  # a product of repacked weights has no gradient

    merged: list[Path | None] = []

    def load(*where: Any, adapter: Path | None = None, **how: Any) -> Any:
        merged.append(adapter)
        return load_model(*where, adapter=adapter, **how)

    in_float32 = training.make_trainable_float32
    monkeypatch.setattr(training, "make_trainable_float32", look)
    monkeypatch.setattr(training, "load_model", load)
    aligned = replace(recipe, base_adapter="initial")
    pack = build_pack(aligned, recipe.folder / "pack")
    assert seen == [{torch.float32}] * 3
    assert merged == [pack.path / "initial"]  # once for both of the others
    provenance = json.loads((pack.path / "pack.json").read_text())["provenance"]
    for name in ("danger", "safety", "initial"):
        losses = [entry["loss"] for entry in provenance[name]["losses"]]
        assert provenance[name]["settings"]["quantization"] == "nf4"
        assert all(0 < loss < 20 for loss in losses)
    assert provenance["danger"]["losses"][-1]["loss"] < provenance["danger"]["losses"][0]["loss"]
    assert not (pack.path / ".build").exists()
    assert set(SQSDScorer(pack.path).score(CONVERSATIONS[:2]).status) == {"scored"}


def test_another_quantization_is_refused(recipe: PackRecipe) -> None:
    with pytest.raises(UsageError, match="'nf4' or left out, not 'int8'"):
        replace(recipe, quantization="int8")


def test_without_bitsandbytes_the_extra_to_install_is_named(
    recipe: PackRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "sqsd_filter.directions.build.find_spec", lambda name: None if name == "bitsandbytes" else find(name)
    )
    with pytest.raises(SQSDError, match=r"sqsd-filter\[qlora\]"):
        build_pack(recipe, recipe.folder / "pack")
