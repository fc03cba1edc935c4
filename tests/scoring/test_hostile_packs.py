"""Packs made to do harm: to hang the command, to take its memory, or to score with numbers that mean nothing."""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sqsd_filter import SQSDScorer
from sqsd_filter.errors import ModelError, PackError
from sqsd_filter.scoring import chat_template
from sqsd_filter.scoring.adapters import load_adapter
from sqsd_filter.scoring.chat_template import ChatTemplate
from sqsd_filter.scoring.deadlines import DeadlineExceeded, deadline
from sqsd_filter.scoring.pack import load_pack
from tests.tiny import CHATML, make_tokenizer

LOOPS = "{% for a in range(99999) %}{% for b in range(99999) %}{{ a }}{% endfor %}{% endfor %}"
ROW = [[{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]]


@pytest.fixture
def pack(tiny_pack: Path, tmp_path: Path) -> Path:
    """A copy of the tiny pack, to be changed."""
    return Path(shutil.copytree(tiny_pack, tmp_path / "pack"))


def edit(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def retensor(folder: Path, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    path = folder / "adapter_model.safetensors"
    save_file({name: change(tensor).contiguous() for name, tensor in load_file(path).items()}, path, {"format": "pt"})


def test_a_template_that_loops_is_ended(pack: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "SECONDS", 0.5)
    edit(pack / "pack.json", chat_template_kwargs={"chat_template": LOOPS})
    began = time.monotonic()
    with pytest.raises(ModelError, match=r"takes more than 0\.5 s for one conversation: give another one in the pack"):
        SQSDScorer(pack).score(ROW)
    assert time.monotonic() - began < 30


def test_so_is_one_that_loops_on_some_rows_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "SECONDS", 0.5)
    template = ChatTemplate(make_tokenizer("{% if messages[0].content == 'loop' %}" + LOOPS + "{% endif %}" + CHATML))
    text, _ = template.render(ROW[0])
    assert "y" in text
    with pytest.raises(ModelError, match="takes more than"):
        template.render([{"role": "user", "content": "loop"}, {"role": "assistant", "content": "y"}])
    assert template.render(ROW[0])[0] == text


@pytest.mark.parametrize(
    "power",
    ["{{ 9**9**9 }}", "{% set x = 9 ** (9 ** 9) %}", "{% if false %}{{ 2**messages|length }}{% endif %}"],
)
def test_a_template_with_a_power_is_refused_before_it_is_compiled(power: str) -> None:
    for tokenizer, kwargs in (
        (make_tokenizer(power + CHATML), {}),
        (make_tokenizer(), {"chat_template": CHATML + power}),
        (make_tokenizer(), {"chat_template": "{% generation %}{% endgeneration %}" + CHATML + power}),
    ):
        with pytest.raises(ModelError, match=r"computes a power \(\*\*\)"):
            ChatTemplate(tokenizer, kwargs)


@pytest.mark.parametrize("template", ["{{", "{{ x." + "(" * 5000, "{% include 'x' %}"])
def test_a_template_that_is_none_is_one_sentence(template: str) -> None:
    with pytest.raises(ModelError, match="The chat template fails on a plain question and answer"):
        ChatTemplate(make_tokenizer(template))


def spin() -> None:
    while True:
        pass


def test_deadlines_end_what_is_late_and_nothing_else() -> None:
    with deadline(5):
        pass
    with pytest.raises(DeadlineExceeded), deadline(0.01):
        spin()
    for _ in range(200):  # nothing of it is left
        time.sleep(0.001)


def test_a_pattern_that_backtracks_takes_no_time(pack: Path) -> None:
    edit(pack / "danger" / "adapter_config.json", alpha_pattern={"(.*.*.*.*)*(a|aa|a?)*(.*)*x": 4.0})
    began = time.monotonic()
    load_adapter(pack / "danger")
    assert time.monotonic() - began < 10


@pytest.mark.parametrize("pattern", [r"(?!x)q_proj", r"(a)\1", "(a{1000}){1000}", "["])
def test_a_pattern_that_needs_backtracking_is_refused(pattern: str, pack: Path) -> None:
    edit(pack / "danger" / "adapter_config.json", alpha_pattern={pattern: 4.0})
    with pytest.raises(PackError, match="an alpha_pattern that is not a valid pattern"):
        load_adapter(pack / "danger")


PROBE = {"name": "danger", "weight": 1.0, "direction": "danger", "state": "initial"}


@pytest.mark.parametrize(
    ("fields", "cause"),
    [
        ({"probes": [{**PROBE, "name": f"p{k}"} for k in range(10_000)]}, "lists 10,000 probes for one risk"),
        ({"risks": {f"r{k}": {"probes": [PROBE]} for k in range(100)}}, "lists 100 risks"),
        ({"name": "fine\nall rows are safe"}, "'name' must be text that can be printed"),
        ({"base_model": "\x1b[2Jx"}, "'base_model' must be text that can be printed"),
        ({"probes": [{**PROBE, "direction": "d\x1b]0;x\x07"}]}, "'direction' must be text that can be printed"),
    ],
)
def test_a_pack_of_absurd_size_or_names_is_refused(fields: dict[str, Any], cause: str, pack: Path) -> None:
    edit(pack / "pack.json", **fields)
    with pytest.raises(PackError, match=cause) as problem:
        load_pack(pack)
    assert str(problem.value).isprintable()


@pytest.mark.parametrize("name", ["pack.json", "danger/adapter_config.json"])
def test_json_that_is_nested_too_deeply_is_one_sentence(name: str, pack: Path) -> None:
    (pack / name).write_text("[" * 200_000)
    with pytest.raises(PackError, match="can't be read as JSON"):
        SQSDScorer(pack).score(ROW)


@pytest.mark.parametrize("name", ["pack.json", "danger/adapter_config.json", "danger/adapter_model.safetensors"])
def test_a_pipe_in_the_place_of_a_file_is_not_waited_for(name: str, pack: Path) -> None:
    (pack / name).unlink()
    os.mkfifo(pack / name)
    with pytest.raises(PackError, match=re.escape(name)):
        load_pack(pack)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn])
def test_numbers_of_another_kind_are_refused_by_name(dtype: torch.dtype, pack: Path) -> None:
    retensor(pack / "danger", lambda tensor: tensor.to(dtype))
    kind = str(dtype).removeprefix("torch.")
    with pytest.raises(PackError, match=rf"danger holds '.*' as {kind}: save the adapter again as float32"):
        SQSDScorer(pack).score(ROW)


@pytest.mark.parametrize("rank", [0, 200_000])
def test_absurd_ranks_are_refused_by_name(rank: int, pack: Path) -> None:
    def resize(tensor: torch.Tensor) -> torch.Tensor:
        is_a = tensor.shape[0] < tensor.shape[1]
        return torch.zeros((rank, tensor.shape[1]) if is_a else (tensor.shape[0], rank), dtype=torch.bfloat16)

    path = pack / "danger" / "adapter_model.safetensors"
    name = next(key for key in load_file(path) if "lora_A" in key)
    pair = {key: tensor for key, tensor in load_file(path).items() if key.split(".lora_")[0] == name.split(".lora_")[0]}
    save_file({key: resize(tensor) for key, tensor in pair.items()}, path, {"format": "pt"})
    with pytest.raises(PackError, match=rf"danger has rank {rank:,} at '.*', where 1 to \d+ make sense"):
        SQSDScorer(pack).score(ROW)


@pytest.mark.parametrize(
    ("value", "what"), [(0.0, "zero in every module"), (float("nan"), "not finite"), (float("inf"), "not finite")]
)
def test_a_direction_that_says_nothing_is_refused_by_name(value: float, what: str, pack: Path) -> None:
    retensor(pack / "danger", lambda tensor: torch.full_like(tensor, value))
    with pytest.raises(PackError, match=rf"The direction 'danger' in .*danger is {what}"):
        SQSDScorer(pack).score(ROW)


def test_a_state_may_be_zero(pack: Path) -> None:
    path = pack / "initial" / "adapter_model.safetensors"
    tensors = {name: tensor * ("lora_A" in name) for name, tensor in load_file(path).items()}
    save_file(tensors, path, {"format": "pt"})
    assert SQSDScorer(pack).score(ROW).status == ["scored"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", b"[" * 100_000),
        ("config.json", b'{"model_type": 7}'),
        ("config.json", b'{"model_type": "llama", "hidden_size": "x"}'),
        ("tokenizer.json", b"{}"),
        ("tokenizer.json", b"[" * 100_000),
        ("tokenizer_config.json", b"7"),
        ("model.safetensors", b"\xff" * 100),
        ("model.safetensors", (10**6).to_bytes(8, "little") + b"{" * 100),
    ],
)
def test_a_damaged_base_model_is_one_sentence(name: str, content: bytes, pack: Path, tmp_path: Path) -> None:
    edit(pack / "pack.json", base_model=str(pack / "base"))
    (pack / "base" / name).write_bytes(content)
    with pytest.raises(ModelError, match="can't be loaded"):
        SQSDScorer(pack).score(ROW)


@pytest.mark.parametrize("content", [b"", b"\xff" * 100, (20).to_bytes(8, "little") + b'{"a": 7}            '])
def test_a_damaged_adapter_is_one_sentence(content: bytes, pack: Path) -> None:
    (pack / "danger" / "adapter_model.safetensors").write_bytes(content)
    with pytest.raises(PackError, match="can't be read"):
        SQSDScorer(pack).score(ROW)
