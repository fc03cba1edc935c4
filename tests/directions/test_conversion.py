"""Full checkpoints become low-rank directions: exact where they are low-rank, the best there is where not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from sqsd_filter.cli.main import main
from sqsd_filter.directions.conversion import CONVERSION_FILE, convert, truncate
from sqsd_filter.directions.model_files import Layout
from sqsd_filter.errors import DestinationExists, InputError, ModelError, PackError, SQSDError, UsageError
from sqsd_filter.scoring.adapters import load_adapter
from sqsd_filter.scoring.pack import ADAPTER_FILES
from tests.hub import Hub
from tests.tiny import ARCHITECTURES, PECULIAR, make_model

EXACT: dict[str, Any] = {"rtol": 0, "atol": 0}


def state(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def finetune(
    base: Path, folder: Path, change: Callable[[str, torch.Tensor], torch.Tensor | None], **saved: Any
) -> Path:
    """A copy of a model, every parameter changed by what `change` makes of its name and itself, if anything."""
    dtype = saved.pop("dtype", torch.float32)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if (moved := change(name, parameter)) is not None:
                parameter.add_(moved)
    model.save_pretrained(folder, **saved)
    return folder


def low_rank(rank: int, size: float = 0.3) -> Callable[[str, torch.Tensor], torch.Tensor | None]:
    """Adds a random matrix of this rank to each linear weight but the head, to nothing else."""
    random = torch.Generator().manual_seed(rank)

    def change(name: str, weight: torch.Tensor) -> torch.Tensor | None:
        if weight.ndim != 2 or any(part in name for part in ("embed", "lm_head", "wte", "wpe")):
            return None
        left, right = (torch.randn(n, rank, generator=random) for n in weight.shape)
        return (size * left @ right.T).to(weight.dtype)

    return change


def noise(name: str, weight: torch.Tensor) -> torch.Tensor:
    return torch.randn(weight.shape, generator=torch.Generator().manual_seed(len(name))).to(weight.dtype) * 0.01


def changes(base: Path, checkpoint: Path) -> dict[str, torch.Tensor]:
    before, after = state(base), state(checkpoint)
    return {name: after[name].double() - before[name].double() for name in before}


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "qwen2_moe"])
def test_a_change_of_low_rank_comes_back_exactly(architecture: str, tmp_path: Path) -> None:
    base = make_model(tmp_path / "base", architecture)
    tuned = finetune(base, tmp_path / "tuned", low_rank(3))
    report = convert(str(tuned), tmp_path / "out", base=str(base), rank=3)
    factors, layout = load_adapter(tmp_path / "out").factors, Layout(str(base))
    exact = changes(base, tuned)
    assert set(factors) == set(layout.linears.values())
    for name, module in layout.linears.items():
        D = exact[name].T if name in layout.transposed else exact[name]
        f = factors[module]
        assert f.scaling == 1
        assert f.A.shape[0] == min(3, *D.shape)
        assert float((f.B.double() @ f.A.double() - D).norm() / D.norm()) < 1e-6
        assert report["modules"][module]["norm"] == pytest.approx(float(D.norm()))
    assert report["energy"] == pytest.approx(1, abs=1e-10)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "phi3"])
@pytest.mark.parametrize("how", [{"rank": 3}, {"energy": 0.6}], ids=["one-rank", "ranks-by-energy"])
def test_peft_reads_the_adapter_and_merges_it_to_the_truncated_checkpoint(
    architecture: str, how: dict[str, Any], tmp_path: Path
) -> None:
    base = make_model(tmp_path / "base", architecture)
    tuned = finetune(base, tmp_path / "tuned", noise)
    report = convert(str(tuned), tmp_path / "out", base=str(base), **how)
    model: Any = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "out")
    merged = model.merge_and_unload().state_dict()
    layout, before, exact = Layout(str(base)), state(base), changes(base, tuned)
    for name, module in layout.linears.items():
        U, S, Vh = torch.linalg.svd(exact[name])
        k = report["modules"][module]["rank"]
        nearest = U[:, :k] * S[:k] @ Vh[:k]
        torch.testing.assert_close(merged[name].double(), before[name] + nearest, rtol=0, atol=1e-6)
        kept = float(S[:k].square().sum() / S.square().sum())
        assert report["modules"][module]["energy"] == pytest.approx(kept, rel=1e-9)
        if "energy" in how:
            assert kept >= 0.6 > float(S[: k - 1].square().sum() / S.square().sum())
    ranks = {m["rank"] for m in report["modules"].values()}
    assert (len(ranks) > 1) == ("energy" in how)


@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 14), st.integers(0, 6), st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None)
def test_no_matrix_of_the_same_rank_is_nearer(d_out: int, d_in: int, rank: int, true: int, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    left, right = (torch.randn(n, true, generator=random, dtype=torch.float64) for n in (d_out, d_in))
    D = left @ right.T
    found = truncate(D, rank)
    error = float((D - found.B.double() @ found.A.double()).square().sum())
    S = torch.linalg.svdvals(D)
    assert error == pytest.approx(float(S[rank:].square().sum()), rel=1e-5, abs=1e-10 * (1 + float(D.square().sum())))
    assert found.total == pytest.approx(float(D.square().sum()))
    assert found.kept == pytest.approx(float(S[:rank].square().sum()), rel=1e-9, abs=1e-12)


def test_energy_is_met_by_the_lowest_rank_that_does_and_rank_caps_it() -> None:
    D = torch.diag(torch.tensor([4.0, 2.0, 2.0, 1.0], dtype=torch.float64))  # shares .64, .16, .16, .04
    ranks = [len(truncate(D, None, energy).A) for energy in (0.1, 0.63, 0.65, 0.79, 0.81, 0.97, 1.0)]
    assert ranks == [1, 1, 2, 2, 3, 4, 4]
    assert len(truncate(D, 2, 0.97).A) == 2
    assert len(truncate(D, 9).A) == 4


def test_the_linear_layers_are_those_that_peft_calls_all_linear(tmp_path: Path) -> None:
    for architecture in (*ARCHITECTURES, *PECULIAR):
        base = make_model(tmp_path / architecture, architecture)
        config = LoraConfig(r=1, target_modules="all-linear", task_type="CAUSAL_LM")
        wrapped: Any = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
        adapted = {n for n, m in wrapped.base_model.model.named_modules() if hasattr(m, "lora_A")}
        assert set(Layout(str(base)).linears.values()) == adapted, architecture


def test_what_cannot_be_held_is_named_with_its_share(tmp_path: Path) -> None:
    base = make_model(tmp_path / "base", "gpt2")
    tuned = finetune(base, tmp_path / "tuned", noise)
    report = convert(str(tuned), tmp_path / "out", base=str(base))
    exact = {name: float(D.square().sum()) for name, D in changes(base, tuned).items()}
    total = sum(exact.values())
    assert set(report["not_held"]) == {"biases", "embeddings", "head", "norms"}
    assert report["not_held"]["head"]["tensors"] == {"lm_head.weight": pytest.approx(exact["lm_head.weight"] / total)}
    assert report["not_held"]["norms"]["tensors"]["transformer.ln_f.weight"] == pytest.approx(
        exact["transformer.ln_f.weight"] / total
    )
    assert report["linear_share"] + sum(k["share"] for k in report["not_held"].values()) == pytest.approx(1)
    assert report["norm"] == pytest.approx(total**0.5)
    assert json.loads((tmp_path / "out" / CONVERSION_FILE).read_text()) == report
    assert (report["checkpoint"], report["base"], report["unmatched"]) == ("tuned", "base", [])


def test_modules_that_did_not_change_are_left_out(tmp_path: Path, tiny_pack: Path) -> None:
    change = low_rank(2)
    tuned = finetune(tiny_pack / "base", tmp_path / "tuned", lambda n, w: change(n, w) if "layers.1.mlp" in n else None)
    report = convert(str(tuned), tmp_path / "out", base=str(tiny_pack / "base"))
    assert set(load_adapter(tmp_path / "out").factors) == {
        f"model.layers.1.mlp.{p}_proj" for p in ("up", "gate", "down")
    }
    assert len(report["unchanged"]) == 11
    assert report["not_held"] == {}
    with pytest.raises(PackError, match="are the same: name a fine-tuned checkpoint"):
        convert(str(tiny_pack / "base"), tmp_path / "none", base=str(tiny_pack / "base"))
    assert not (tmp_path / "none").exists()


def test_shards_and_bfloat16_give_what_one_float32_file_of_the_same_values_does(
    tmp_path: Path, tiny_pack: Path
) -> None:
    base = tiny_pack / "base"
    half = finetune(base, tmp_path / "half", noise, dtype=torch.bfloat16, max_shard_size="20KB")
    assert len(list(half.glob("model-*.safetensors"))) > 2
    assert next(iter(load_file(next(half.glob("model-*.safetensors"))).values())).dtype == torch.bfloat16
    whole = finetune(half, tmp_path / "whole", lambda name, weight: None, dtype=torch.float32)
    reports = [convert(str(c), tmp_path / f"out-{c.name}", base=str(base), rank=4) for c in (half, whole)]
    first, second = (load_file(tmp_path / f"out-{c.name}" / ADAPTER_FILES[1]) for c in (half, whole))
    for name, tensor in first.items():
        torch.testing.assert_close(tensor, second[name], **EXACT)
    assert reports[0]["modules"] == reports[1]["modules"]


def test_a_base_from_the_hub_may_lack_its_backbones_prefix(hub: Hub, tmp_path: Path) -> None:
    base = make_model(tmp_path / "base", "gpt2")
    tuned = finetune(base, tmp_path / "tuned", low_rank(2))
    expected = convert(str(tuned), tmp_path / "expected", base=str(base), rank=2)
    bare = {name.removeprefix("transformer."): tensor for name, tensor in state(base).items()}
    save_file(bare, base / "model.safetensors", {"format": "pt"})
    hub.add("org/gpt2", {p.name: p.read_bytes() for p in base.iterdir()}, kind="models")
    found = convert(str(tuned), tmp_path / "out", base="org/gpt2", rank=2)
    assert found == {**expected, "base": "org/gpt2"}


def resized(base: Path, folder: Path) -> Path:
    model = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(model.config.vocab_size + 3)
    model.save_pretrained(folder)
    return finetune(folder, folder, low_rank(2))


def test_embeddings_of_another_size_are_told_but_do_not_hinder(tmp_path: Path, tiny_pack: Path) -> None:
    tuned = resized(tiny_pack / "base", tmp_path / "tuned")
    report = convert(str(tuned), tmp_path / "out", base=str(tiny_pack / "base"), rank=2)
    assert report["unmatched"] == ["lm_head.weight", "model.embed_tokens.weight"]
    assert report["energy"] == pytest.approx(1, abs=1e-10)


def rewritten(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], object]:
    def rewrite(folder: Path) -> None:
        tensors = state(folder)
        change(tensors)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    return rewrite


def as_adapter(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / ADAPTER_FILES[0]).write_text("{}")


Q = "model.layers.0.self_attn.q_proj.weight"
BROKEN: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "pickled": (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), ("pickled weights",)),
    "adapter": (as_adapter, ("LoRA adapter", "use it as it is")),
    "no-weights": (lambda f: (f / "model.safetensors").unlink(), ("has neither model.safetensors",)),
    "cut-off": (lambda f: (f / "model.safetensors").write_bytes(b"{"), ("can't be read", "copy")),
    "no-index": (
        lambda f: (f / "model.safetensors").rename(f / "model.safetensors.index.json").write_text("{}"),
        ("is not an index of safetensors files",),
    ),
    "missing-shard": (
        lambda f: (
            (f / "model.safetensors")
            .rename(f / "model.safetensors.index.json")
            .write_text('{"weight_map": {"a": "model-2.safetensors"}}')
        ),
        ("model-2.safetensors", "can't be read"),
    ),
    "missing": (rewritten(lambda t: t.pop(Q)), (Q, "--base must be the model")),
    "shape": (rewritten(lambda t: t.update({Q: torch.zeros(4, 8)})), (Q, "is 4 × 8 in", "but 32 × 32 in")),
    "quantised": (rewritten(lambda t: t.update({Q: t[Q].to(torch.int8)})), (Q, "quantised")),
    "nan": (rewritten(lambda t: t[Q][0].fill_(float("nan"))), (Q, "not finite")),
}


FOREIGN = ("missing", "shape", "nan")  # what can be read, but is no change of the base


@pytest.mark.parametrize("kind", BROKEN)
def test_a_checkpoint_that_does_not_belong_to_the_base_is_one_sentence(
    kind: str, tmp_path: Path, tiny_pack: Path
) -> None:
    breaks, named = BROKEN[kind]
    tuned = shutil.copytree(tiny_pack / "base", tmp_path / "tuned")
    breaks(tuned)
    with pytest.raises(PackError if kind in FOREIGN else InputError) as problem:
        convert(str(tuned), tmp_path / "out", base=str(tiny_pack / "base"))
    assert all(text in str(problem.value) for text in (*named, str(tmp_path)))
    assert "\n" not in str(problem.value)
    assert [p.name for p in tmp_path.iterdir()] == ["tuned"]


REFUSED: dict[str, tuple[dict[str, Any], type[SQSDError], str]] = {
    "rank": ({"rank": 0}, UsageError, "--rank"),
    "energy": ({"energy": 0.0}, UsageError, "--energy"),
    "percent": ({"energy": 90.0}, UsageError, "--energy"),
    "device": ({"device": "cuda:7"}, UsageError, "cuda:7"),
    "no-base": ({"base": "./nowhere"}, ModelError, "'./nowhere' can't be loaded"),
    "other-architecture": ({"base": "gpt2"}, PackError, "--base must be the model"),
    "no-config": ({"base": "bare"}, ModelError, "configuration"),
}


@pytest.mark.parametrize(("how", "kind", "named"), REFUSED.values(), ids=REFUSED)
def test_a_request_that_makes_no_sense_is_one_sentence(
    how: dict[str, Any], kind: type[SQSDError], named: str, tmp_path: Path, packs: dict[str, Path]
) -> None:
    (tmp_path / "bare").mkdir()
    places = {"gpt2": packs["gpt2"] / "base", "bare": tmp_path / "bare"}
    how = {"base": str(packs["llama"] / "base"), **how}
    how["base"] = str(places.get(how["base"], how["base"]))
    with pytest.raises(kind, match=named):
        convert(str(packs["llama"] / "base"), tmp_path / "out", **how)
    assert not (tmp_path / "out").exists()


def test_the_command_prints_one_object_and_leaves_a_full_folder_alone(
    tmp_path: Path, tiny_pack: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tuned = finetune(tiny_pack / "base", tmp_path / "tuned", noise)
    arguments = ["pack", "convert", str(tuned), "--base", str(tiny_pack / "base"), "--energy", "0.9", "--rank", "20"]
    for extra in (["--json"], []):
        with pytest.raises(SystemExit) as left:
            main([*arguments, str(tmp_path / f"out{len(extra)}"), *extra])
        assert left.value.code == 0
        out = capsys.readouterr().out
        if extra:
            report = json.loads(out)
    assert report["path"] == str(tmp_path / "out1")
    assert report["rank"]["max"] <= 20
    assert f"{report['energy']:.1%}" in out
    assert f"{report['not_held']['embeddings']['share']:.2%} in embeddings" in out
    with pytest.raises(SystemExit) as left:
        main([*arguments, str(tmp_path / "out1")])
    assert left.value.code == DestinationExists.exit_code
