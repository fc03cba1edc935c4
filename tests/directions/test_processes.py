"""A pack that several processes build together is the one that a single process builds."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sqsd_filter.directions import processes
from sqsd_filter.directions.build import build_pack
from sqsd_filter.directions.recipe import PackRecipe
from sqsd_filter.scoring.pack import ADAPTER_FILES, PACK_FILE, load_pack
from tests.directions.recipes import write_recipe

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]


def build(processes: int, recipe: Path, out: Path) -> subprocess.CompletedProcess[str]:
    command = [*TORCHRUN, str(processes), "-m", "sqsd_filter", "pack", "build", str(recipe), str(out)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=1500)


@pytest.fixture
def recipe(tmp_path: Path, tiny_pack: Path) -> Path:
    path = write_recipe(tmp_path, tiny_pack / "base")
    text = path.read_text().replace("alpha = 4", "alpha = 4\ndropout = 0.0")  # processes draw masks of their own
    path.write_text(text.replace("[lora]", 'base_adapter = "initial"\n[lora]'))
    return path


@pytest.mark.parametrize(
    ("gpus", "started", "expected"),
    [(0, 1, "cpu"), (0, 2, "cpu"), (1, 1, "cuda:0"), (4, 1, None), (4, 2, "cuda:1")],
    ids=["no GPU", "no GPU, two processes", "one GPU", "one process with all GPUs", "one of two processes"],
)
def test_a_process_trains_on_its_gpu_or_alone_on_all(
    gpus: int, started: int, expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setenv("WORLD_SIZE", str(started))
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert processes.device() == expected


@pytest.mark.slow
def test_two_processes_build_what_one_builds(recipe: Path) -> None:
    alone = build_pack(PackRecipe.load(recipe), recipe.parent / "alone")
    run = build(2, recipe, recipe.parent / "both")
    assert run.returncode == 0, run.stderr
    both = load_pack(recipe.parent / "both")
    assert run.stdout.count("pack tiny") == 1
    assert run.stderr.count("training 'danger'") == 1
    assert {p.name for p in both.path.iterdir()} == {PACK_FILE, "initial", "danger", "safety"}
    for name in ("initial", "danger", "safety"):
        records = [json.loads((pack.path / name / "training.json").read_text()) for pack in (alone, both)]
        assert records[0]["steps"] == records[1]["steps"]
        assert records[0]["settings"] == records[1]["settings"]
        for one, two in zip(records[0]["losses"], records[1]["losses"], strict=True):
            assert one["step"] == two["step"]
            assert one["loss"] == pytest.approx(two["loss"], abs=2e-3)
        ours, theirs = (load_file(pack.path / name / ADAPTER_FILES[1]) for pack in (both, alone))
        for key, tensor in theirs.items():
            torch.testing.assert_close(ours[key].float(), tensor.float(), rtol=0.02, atol=2e-4)
    again = build(2, recipe, recipe.parent / "both")
    assert again.returncode == 0
    assert "training" not in again.stderr


@pytest.mark.slow
def test_a_batch_that_can_not_be_shared_is_refused(recipe: Path) -> None:
    run = build(3, recipe, recipe.parent / "three")
    assert run.returncode != 0
    assert "batch_size of 4, which 3 processes can't share: start fewer" in run.stderr
    assert not list((recipe.parent / "three").glob("*/training.json"))
