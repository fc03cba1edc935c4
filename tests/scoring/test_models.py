"""Base models: how they are loaded, what is said when they can't be, and what tells their weights apart."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from sqsd_filter.errors import ModelError, UsageError
from sqsd_filter.scoring import adapters
from sqsd_filter.scoring.adapters import Adapter, load_adapter
from sqsd_filter.scoring.models import content_id, load_model, load_tokenizer
from tests.tiny import make_adapter, make_model


def test_a_model_that_is_not_there_is_one_sentence(tmp_path: Path) -> None:
    for load in (lambda name: load_tokenizer(name), lambda name: load_model(name, dtype=torch.float32)):
        with pytest.raises(ModelError, match=r"of '.*nowhere' can't be loaded \(.*\): check the name") as problem:
            load(str(tmp_path / "nowhere"))
        assert "\n" not in str(problem.value)


@pytest.mark.parametrize("name", ["nonsense", "flash_attention_2"])  # the second is not for a CPU
def test_an_attention_kernel_that_can_not_be_had_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match=f"kernel '{name}' .*: name another by .*--attention"):
        load_model(str(make_model(tmp_path)), dtype=torch.float32, attention=name)
    with pytest.raises(ModelError, match="check the name"):
        load_model(str(tmp_path / "nowhere"), dtype=torch.float32, attention="eager")


@pytest.mark.parametrize(
    ("stored", "wanted", "first"),
    [
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.float32, torch.float32, torch.float32),
        (torch.float32, torch.bfloat16, torch.float32),
        (torch.float16, torch.bfloat16, torch.float16),
    ],
)
def test_weights_to_merge_into_are_loaded_as_they_will_be_where_that_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stored: torch.dtype, wanted: torch.dtype, first: torch.dtype
) -> None:
    base, seen = make_model(tmp_path / "base"), list[torch.dtype]()
    AutoModelForCausalLM.from_pretrained(base, dtype=stored).save_pretrained(base)
    folder = make_adapter(base, tmp_path / "adapter")
    stored_model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    expected: dict[str, torch.Tensor] = dict(stored_model.named_parameters())
    for name, factors in load_adapter(folder).factors.items():
        expected[f"{name}.weight"] = expected[f"{name}.weight"] + factors.scaling * (factors.B @ factors.A)
    merge = adapters.merge

    def merge_and_note(model: PreTrainedModel, adapter: Adapter, dtype: torch.dtype) -> PreTrainedModel:
        seen.append(model.dtype)
        return merge(model, adapter, dtype)

    monkeypatch.setattr(adapters, "merge", merge_and_note)
    model = load_model(str(base), dtype=wanted, adapter=folder)
    assert seen == [first]
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, expected[name].to(wanted))


def test_other_weights_under_the_same_path_are_told_apart(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model")
    before = content_id(str(model))
    assert before == content_id(str(model))
    assert before != content_id(str(make_model(tmp_path / "other", seed=1)))
    (model / "optimizer.pt").write_bytes(b"not the model's")
    assert content_id(str(model)) == before
    with (model / "model.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)[0]
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last ^ 1]))
    assert content_id(str(model)) != before


def test_large_files_are_told_apart_by_samples_of_every_part(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(bytes(20 << 20))
    before = content_id(str(tmp_path))
    with path.open("r+b") as file:
        file.seek(7 << 20)
        file.write(b"x" * (1 << 20))
    assert content_id(str(tmp_path)) != before


def test_a_model_that_can_not_be_had_has_no_content(tmp_path: Path) -> None:
    assert content_id(str(tmp_path / "nowhere")) is None
    assert content_id("smollm2-135m-instruct")
