"""Fine-tuning runs on disk without any training, and their drift as a textbook has it: dense, in float64."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from tests.tiny import make_adapter

Matrices = Mapping[str, np.ndarray]


def multiplied(folder: Path) -> dict[str, np.ndarray]:
    """s·B·A of every module of a LoRA folder with one rank, (d_out, d_in)."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    found = {}
    for key in tensors:
        if key.endswith(".lora_A.weight"):
            A, B = (tensors[key.replace("lora_A", side)].double().numpy() for side in ("lora_A", "lora_B"))
            name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            found[name] = config["lora_alpha"] / config["r"] * B @ A
    return found


def stored(folder: Path) -> dict[str, np.ndarray]:
    """Every linear weight of a model, (d_out, d_in)."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return {
        name: (m.weight.T if isinstance(m, Conv1D) else m.weight).detach().double().numpy()
        for name, m in model.named_modules()
        if isinstance(m, torch.nn.Linear | Conv1D)
    }


def minus(one: Matrices, other: Matrices) -> dict[str, np.ndarray]:
    return {name: one[name] - other.get(name, 0) for name in one}


def textbook(change: Matrices, direction: Matrices) -> dict[str, float]:
    """The four numbers of a drift, and its modules' cosines under their names."""
    changed = {name: change.get(name, np.zeros_like(V)).ravel() for name, V in direction.items()}
    flat = {name: V.ravel() for name, V in direction.items()}
    all_change, all_direction = (np.concatenate(list(vectors.values())) for vectors in (changed, flat))
    projections = {name: flat[name] @ changed[name] / np.linalg.norm(flat[name]) for name in flat}
    sizes = {name: np.linalg.norm(vector) for name, vector in changed.items()}
    cosines = {name: projections[name] / sizes[name] if sizes[name] else 0.0 for name in flat}
    norm = float(np.linalg.norm(all_change))
    return {
        "projection": sum(projections.values()),
        "cosine": all_change @ all_direction / (norm * np.linalg.norm(all_direction)) if norm else 0.0,
        "cosine_sum": sum(cosines.values()),
        "norm": norm,
        **cosines,
    }


def lora_run(folder: Path, model: Path, steps: tuple[int, ...] = (10, 20), **config: Any) -> Path:
    """A run with a random LoRA at each step."""
    for step in steps:
        make_adapter(model, folder / f"checkpoint-{step}", seed=step, **config)
    return folder


def full_run(folder: Path, model: Path, steps: tuple[int, ...] = (10, 20), shards: str = "1GB") -> Path:
    """A run that moved all weights at random, the more the later."""
    for step in steps:
        torch.manual_seed(step)
        moved = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        with torch.no_grad():
            for parameter in moved.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=step / 1000)
        moved.save_pretrained(folder / f"checkpoint-{step}", max_shard_size=shards)
    return folder
