"""Adapters are read as PEFT means them, or refused by name with the fix."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from sqsd_filter.errors import PackError
from sqsd_filter.scoring.adapters import CONFIG_FILE, WEIGHTS_FILE, load_adapter
from sqsd_filter.scoring.models import load_model
from sqsd_filter.scoring.scorer import SQSDScorer
from tests.tiny import CONVERSATIONS, make_adapter, make_model, make_pack


def peft_deltas(model: Path, adapter: Path) -> dict[str, torch.Tensor]:
    """s·B·A of every module, as PEFT would merge it, (d_out, d_in)."""
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    wrapped = PeftModel.from_pretrained(base, str(adapter))
    deltas = {}
    for name, module in wrapped.get_base_model().named_modules():
        if hasattr(module, "get_delta_weight") and "default" in module.lora_A:
            delta = module.get_delta_weight("default").detach()
            deltas[name] = delta.T if module.fan_in_fan_out else delta
    return deltas


KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama", {}),
    "rslora": ("llama", {"use_rslora": True}),
    "rank-and-alpha-patterns": ("llama", {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 32, "v_proj": 3}}),
    "patterns-with-rslora": ("llama", {"use_rslora": True, "rank_pattern": {"mlp.up_proj": 6}}),
    "patterns-by-regex": ("llama", {"alpha_pattern": {r"^model\.layers\.1\..*": 5, r"layers\.0\.mlp\.\w+": 7}}),
    "patterns-of-part-of-a-name": ("llama", {"alpha_pattern": {"proj": 99, "k_proj": 5}}),
    "some-modules": ("llama", {"target_modules": ["k_proj", "down_proj"], "layers_to_transform": [1]}),
    "conv1d": ("gpt2", {"fan_in_fan_out": True}),
    "conv1d-patterns": ("gpt2", {"fan_in_fan_out": True, "rank_pattern": {"c_attn": 2}, "alpha_pattern": {"c_fc": 1}}),
    "fused-projections": ("phi3", {}),
}


@pytest.mark.parametrize(("architecture", "config"), KINDS.values(), ids=KINDS)
def test_an_adapter_is_read_as_peft_applies_it(
    packs: dict[str, Path], tmp_path: Path, architecture: str, config: dict[str, Any]
) -> None:
    model = packs[architecture] / "base"
    folder = make_adapter(model, tmp_path / "adapter", r=4, alpha=16, **config)
    expected = peft_deltas(model, folder)
    adapter = load_adapter(folder)
    assert set(adapter.factors) == set(expected)
    for name, factors in adapter.factors.items():
        torch.testing.assert_close(factors.scaling * factors.B @ factors.A, expected[name], rtol=1e-6, atol=1e-7)


def test_weights_stored_in_bfloat16_come_back_in_float32(tiny_pack: Path, tmp_path: Path) -> None:
    folder = make_adapter(tiny_pack / "base", tmp_path / "adapter")
    tensors = load_file(folder / WEIGHTS_FILE)
    save_file({k: v.bfloat16() for k, v in tensors.items()}, folder / WEIGHTS_FILE)
    for factors in load_adapter(folder).factors.values():
        assert factors.A.dtype == factors.B.dtype == torch.float32


def test_an_overridden_scaling_replaces_every_modules_own(tiny_pack: Path) -> None:
    adapter = load_adapter(tiny_pack / "danger")
    assert adapter.with_scaling(None) is adapter
    assert {f.scaling for f in adapter.factors.values()} == {4.0}
    assert {f.scaling for f in adapter.with_scaling(0.5).factors.values()} == {0.5}


# ---------------------------------------------------------------------------------------------- refusals


def made(**config: Any) -> Callable[[Path, Path], None]:
    """An adapter that PEFT itself makes with these settings."""

    def make(model: Path, folder: Path) -> None:
        make_adapter(model, folder, **config)

    return make


def plain_but(change: Callable[[Path], object]) -> Callable[[Path, Path], None]:
    """A plain adapter whose folder is changed afterwards."""

    def make(model: Path, folder: Path) -> None:
        make_adapter(model, folder)
        change(folder)

    return make


def configured(**values: Any) -> Callable[[Path, Path], None]:
    def change(folder: Path) -> None:
        path = folder / CONFIG_FILE
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return plain_but(change)


def retensored(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path, Path], None]:
    def rewrite(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS_FILE)
        change(tensors)
        save_file(tensors, folder / WEIGHTS_FILE)

    return plain_but(rewrite)


def ia3(model: Path, folder: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(model)
    config = IA3Config(target_modules=["k_proj"], feedforward_modules=[], task_type="CAUSAL_LM")
    get_peft_model(base, config).save_pretrained(str(folder))


def pickled(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS_FILE), folder / "adapter_model.bin")
    (folder / WEIGHTS_FILE).unlink()


def cut_short(folder: Path) -> None:
    path = folder / WEIGHTS_FILE
    path.write_bytes(path.read_bytes()[:-100])


FIRST_A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
REFUSALS: dict[str, tuple[Callable[[Path, Path], None], str, str]] = {  # how it is made, the cause, the fix
    "dora": (made(use_dora=True), "uses DoRA", "train without it"),
    "bias": (made(bias="lora_only"), "trained biases", "bias='none'"),
    "lora-bias": (made(lora_bias=True), "a LoRA bias", "train without it"),
    "modules-to-save": (made(modules_to_save=["lm_head"]), "modules_to_save", "train without it"),
    "embeddings": (made(target_modules=["q_proj", "embed_tokens"]), "LoRA on embeddings", "train without it"),
    "trained-tokens": (configured(trainable_token_indices=[1]), "trained token embeddings", "train without it"),
    "pissa": (configured(init_lora_weights="pissa_niter_4"), "also changes the base weights", "convert it to plain"),
    "olora": (configured(init_lora_weights="olora"), "also changes the base weights", "convert it to plain"),
    "alpha-as-text": (configured(lora_alpha="16"), "no number for lora_alpha", "again"),
    "alpha-missing": (configured(lora_alpha=None), "no number for lora_alpha", "again"),
    "alpha-list": (configured(alpha_pattern=[1]), "no number for lora_alpha", "again"),
    "alpha-pattern": (configured(alpha_pattern={"(": 1}), "is not a valid pattern", "missing )"),
    "not-lora": (ia3, "of type IA3", "train a LoRA"),
    "pickle-only": (plain_but(pickled), "never loaded", "safe_serialization=True"),
    "damaged-weights": (plain_but(cut_short), "can't be read", "copy or build the adapter again"),
    "empty-weights": (
        plain_but(lambda folder: (folder / WEIGHTS_FILE).write_bytes(b"")),
        "can't be read",
        "copy or build the adapter again",
    ),
    "no-weights": (plain_but(lambda folder: (folder / WEIGHTS_FILE).unlink()), WEIGHTS_FILE, "copy or build"),
    "no-config": (plain_but(lambda folder: (folder / CONFIG_FILE).unlink()), CONFIG_FILE, "copy or build"),
    "broken-config": (
        plain_but(lambda folder: (folder / CONFIG_FILE).write_text("{")),
        "can't be read as JSON",
        "copy or build",
    ),
    "config-not-an-object": (
        plain_but(lambda folder: (folder / CONFIG_FILE).write_text("[]")),
        "does not hold a JSON object",
        "copy or build",
    ),
    "config-not-text": (
        plain_but(lambda folder: (folder / CONFIG_FILE).write_bytes(b"\xff\xfe{}")),
        "can't be read as JSON",
        "copy or build",
    ),
    "no-tensors": (retensored(dict.clear), "no LoRA weights", "copy or build"),
    "half-a-pair": (retensored(lambda tensors: tensors.pop(FIRST_A)), "don't belong together", "copy or build"),
    "ranks-differ": (
        retensored(lambda tensors: tensors.update({FIRST_A: torch.zeros(3, 32)})),
        "don't belong together",
        "copy or build",
    ),
    "foreign-tensor": (
        retensored(lambda tensors: tensors.update({"lm_head.weight": torch.zeros(2, 2)})),
        "the tensor 'lm_head.weight'",
        "train without it",
    ),
}


@pytest.mark.parametrize(("make", "cause", "fix"), REFUSALS.values(), ids=REFUSALS)
def test_an_adapter_that_is_not_plain_lora_is_refused_with_cause_and_fix(
    tiny_pack: Path, tmp_path: Path, make: Callable[[Path, Path], None], cause: str, fix: str
) -> None:
    folder = tmp_path / "adapter"
    make(tiny_pack / "base", folder)
    with pytest.raises(PackError) as problem:
        load_adapter(folder)
    sentence = str(problem.value)
    assert cause in sentence
    assert fix in sentence
    assert str(folder) in sentence
    assert "\n" not in sentence
    assert sentence.endswith(".")


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PackError, match="is not a PEFT adapter folder"):
        load_adapter(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["initial", "safety"])
def test_a_state_with_lora_on_the_output_head_is_refused_at_scoring(tiny_pack: Path, tmp_path: Path, name: str) -> None:
    pack = make_pack(tmp_path, tiny_pack / "base")
    make_adapter(tiny_pack / "base", tmp_path / name, target_modules=["q_proj", "lm_head"])
    with pytest.raises(PackError, match=f"{name} adapts the output head 'lm_head'.*train without it"):
        SQSDScorer(pack).score(CONVERSATIONS[:1])


def test_a_direction_on_the_output_head_counts_only_where_its_state_has_modules(
    tiny_pack: Path, tmp_path: Path
) -> None:
    pack = make_pack(tmp_path, tiny_pack / "base")
    make_adapter(tiny_pack / "base", tmp_path / "danger", target_modules=["q_proj", "lm_head"])
    scorer = SQSDScorer(pack)
    assert scorer.score(CONVERSATIONS[:1]).status == ["scored"]
    assert scorer.model.coverage["danger"] == 2


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16, torch.float64])
def test_a_base_adapter_is_added_in_full_precision_and_rounded_once(
    tmp_path: Path, stored: torch.dtype, wanted: torch.dtype
) -> None:
    base = make_model(tmp_path / "model")
    folder = make_adapter(base, tmp_path / "adapter", target_modules=["q_proj", "down_proj"])
    AutoModelForCausalLM.from_pretrained(base, dtype=stored).save_pretrained(base)
    before = dict(AutoModelForCausalLM.from_pretrained(base, dtype=stored).named_parameters())
    merged = load_model(str(base), dtype=wanted, adapter=folder)
    plain = load_model(str(base), dtype=wanted)
    assert merged.config.dtype == plain.config.dtype
    buffers, expected_buffers = dict(merged.named_buffers()), dict(plain.named_buffers())
    assert buffers
    assert buffers.keys() == expected_buffers.keys()
    for name, buffer in buffers.items():
        assert buffer.dtype == expected_buffers[name].dtype
        assert torch.equal(buffer, expected_buffers[name])
    factors = load_adapter(folder).factors
    assert len(factors) == 4
    for name, weight in merged.named_parameters():
        expected, factor = before[name].double(), factors.get(name.removesuffix(".weight"))
        if factor is not None:
            expected = expected + factor.scaling * (factor.B.double() @ factor.A.double())
        assert weight.dtype == wanted
        rounding = 2**-7 if wanted == torch.bfloat16 else 1e-6
        torch.testing.assert_close(weight, expected.to(wanted), rtol=rounding, atol=1e-6)


def test_a_base_adapter_of_another_model_is_refused(tmp_path: Path, packs: dict[str, Path]) -> None:
    with pytest.raises(PackError, match=r"adapts .*, which .* does not have"):
        load_model(str(packs["gpt2"] / "base"), dtype=torch.float32, adapter=packs["llama"] / "danger")
