"""The checkpoints of a fine-tuning run, and what each of them changed in each module: θ_t - θ_0.

A checkpoint is a PEFT LoRA folder or a full model in safetensors. Full models, and the base model beside them, are read
one module at a time.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open

from sqsd_filter.directions.model_files import INDEX, SINGLE, unquantised, weight_files
from sqsd_filter.errors import InputError, PackError
from sqsd_filter.scoring.adapters import CONFIG_FILE, WEIGHTS_FILE, LoraFactors, exact, load_adapter, read_config
from sqsd_filter.scoring.models import skeleton, weights_folder
from sqsd_filter.scoring.pack import Pack

log = logging.getLogger(__name__)

STATE_FILE = "trainer_state.json"
T = TypeVar("T")
Change = LoraFactors | torch.Tensor  # of one module: a product s·B·A, or dense (d_out, d_in)


@dataclass(frozen=True)
class Checkpoint:
    """The LoRA or full model that a run had after `step` updates."""

    step: int
    folder: Path

    @property
    def is_adapter(self) -> bool:
        return (self.folder / CONFIG_FILE).is_file()


@dataclass(frozen=True)
class Origin:
    """θ_0, where a run started: a base model, perhaps a LoRA merged into it, and perhaps a LoRA that it continued."""

    model: str
    revision: str | None = None
    merged: Path | None = None
    continued: Path | None = None

    @classmethod
    def of(cls, pack: Pack, base: str | None) -> Origin:
        """The pack's base model, unless `base` names another model, or a LoRA folder on the pack's base model that the
        run continued to train. Raises `ModelError` if `base` is neither."""
        if base is not None and not (Path(base) / CONFIG_FILE).is_file():
            skeleton(base)  # a misspelt LoRA folder must not pass for a model that is never looked at
            return cls(base)
        return cls(pack.base_model, pack.base_revision, pack.base_folder, None if base is None else Path(base))

    @cached_property
    def factors(self) -> Mapping[str, LoraFactors]:
        """The LoRA that the run continued from, by module."""
        return load_adapter(self.continued).factors if self.continued else {}

    @cached_property
    def merged_factors(self) -> Mapping[str, LoraFactors]:
        """The LoRA that is merged into the base model, by module."""
        return load_adapter(self.merged).factors if self.merged else {}

    @cached_property
    def modules(self) -> dict[str, torch.nn.Module]:
        return dict(skeleton(self.model, self.revision).named_modules())

    @cached_property
    def tensors(self) -> ModelTensors:
        return ModelTensors(weights_folder(self.model, self.revision))


class ModelTensors:
    """A model's tensors in one safetensors file, or several with an index. Raises `InputError`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        paths = weight_files(str(folder), folder)
        self._files: dict[str, Path] = {
            key: path for path in paths for key in _read(path, lambda file: list(file.keys()))
        }

    def module(self, name: str) -> torch.Tensor:
        """The weight of a module as it is stored. Its name in the file may have a longer or shorter prefix."""
        wanted = f"{name}.weight"
        keys = [wanted] if wanted in self._files else [k for k in self._files if _same_end(k, wanted)]
        if len(keys) != 1:
            raise InputError(
                f"{self._folder} has no weight for '{name}': it has another architecture than the base model."
            )
        return unquantised(_read(self._files[keys[0]], lambda file: file.get_tensor(keys[0])), wanted, self._folder)


def _same_end(one: str, other: str) -> bool:
    return f".{one}".endswith(f".{other}") or f".{other}".endswith(f".{one}")


def _read(path: Path, take: Callable[[safe_open], T]) -> T:
    try:
        with safe_open(path, framework="pt") as file:
            return take(file)
    except (SafetensorError, OSError) as problem:
        raise InputError(f"{path} can't be read ({problem}): copy or save the checkpoint again.") from problem


def by_step(run: Path) -> list[tuple[int, Path]]:
    """The folders checkpoint-<step> of a run, by step."""
    folders = ((re.fullmatch(r"checkpoint-([0-9]+)", path.name), path) for path in run.glob("*") if path.is_dir())
    return sorted((int(step[1]), path) for step, path in folders if step)


def find_checkpoints(run: Path) -> list[Checkpoint]:
    """The folders checkpoint-<step> of a run that have weights in safetensors, by step.

    The model in `run` itself is among them if its step is known and no checkpoint has it. Raises `InputError` if there
    are none.
    """
    if not run.is_dir():
        raise InputError(f"{run} is not a folder: give the output folder of a training run.")
    checkpoints = {}
    for step, folder in by_step(run):
        if _has_weights(folder):
            checkpoints[step] = Checkpoint(step, folder)
        else:
            log.warning("%s is left out: it has no weights in safetensors", folder)
    checkpoints.pop(0, None)  # the origin, which is measured anyway
    if _has_weights(run):
        end = _state(run).get("global_step")
        last = _state(checkpoints[max(checkpoints)].folder) if checkpoints else {}
        if end:
            checkpoints.setdefault(end, Checkpoint(end, run))
        elif not last or last.get("global_step") != last.get("max_steps"):
            log.warning(
                "the model in %s is left out: no %s beside it says after which step it was saved", run, STATE_FILE
            )
    if not checkpoints:
        raise InputError(
            f"{run} has no folder checkpoint-<step> with {WEIGHTS_FILE}, {SINGLE} or {INDEX}: give the folders "
            "such names, and convert pickled weights and the shards of FSDP or ZeRO to safetensors."
        )
    return [checkpoints[step] for step in sorted(checkpoints)]


def _has_weights(folder: Path) -> bool:
    names = {path.name for path in folder.iterdir()}
    return {CONFIG_FILE, WEIGHTS_FILE} <= names or bool({SINGLE, INDEX} & names)


def _state(folder: Path) -> dict[str, Any]:
    """The state that the trainer wrote, {} if there is none."""
    path = folder / STATE_FILE
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as problem:
        raise InputError(f"{path} can't be read as JSON ({problem}): copy or remove it.") from problem
    return state if isinstance(state, dict) else {}


def trained_on(folder: Path) -> str | None:
    """The base model that a LoRA folder names, if any. Raises `PackError` if the folder can't be read."""
    name = read_config(folder).get("base_model_name_or_path")
    return name if isinstance(name, str) and name else None


def changes(checkpoint: Checkpoint, origin: Origin) -> Callable[[str], Change | None]:
    """A function from a module's name to its change since the origin, or None if the run does not train it.

    Both raise `PackError` or `InputError` if the checkpoint can't be read or has another architecture.
    """
    if checkpoint.is_adapter:
        now, before = load_adapter(checkpoint.folder).factors, origin.factors
        return lambda module: difference(now.get(module), before.get(module))
    tensors = ModelTensors(checkpoint.folder)
    return lambda module: _dense(module, tensors, origin)


def difference(now: LoraFactors | None, before: LoraFactors | None) -> LoraFactors | None:
    """B_1 A_1 - B_0 A_0 as one product of twice the rank, (B_1 - B_0) A_1 + B_0 (A_1 - A_0), with the scalings in B.

    In this form a small difference loses no digits, and no difference gives exactly zero. The smaller rank is padded
    with zeros. Raises `PackError` if the shapes differ.
    """
    if before is None or now is None:
        return now if before is None else LoraFactors(before.A, before.B, -before.scaling)
    if shape(now) != shape(before):
        raise PackError(
            "The run's LoRA and the one it started from (--base) have different shapes: name the right one."
        )
    rank = max(now.A.shape[0], before.A.shape[0])
    A_1, A_0 = (_fill(exact(f.A), rank) for f in (now, before))
    B_1, B_0 = (_fill(f.scaling * exact(f.B).T, rank).T for f in (now, before))
    return LoraFactors(torch.cat([A_1, A_1 - A_0]), torch.cat([B_1 - B_0, B_0], dim=1), 1.0)


def _fill(rows: torch.Tensor, count: int) -> torch.Tensor:
    return torch.nn.functional.pad(rows, (0, 0, 0, count - rows.shape[0]))


def shape(change: Change) -> tuple[int, ...]:
    """(d_out, d_in) of a change."""
    return tuple(change.shape) if isinstance(change, torch.Tensor) else (change.B.shape[0], change.A.shape[1])


def upright(weight: torch.Tensor, module: torch.nn.Module) -> torch.Tensor:
    """A module's weight as (d_out, d_in); GPT-2's Conv1D stores the transpose."""
    return weight if isinstance(module, torch.nn.Linear) else weight.T


def _dense(name: str, tensors: ModelTensors, origin: Origin) -> torch.Tensor:
    module = origin.modules.get(name)
    if module is None:
        raise PackError(
            f"The base model '{origin.model}' has no module '{name}', but the pack does: name another with --base."
        )
    now, before = tensors.module(name), origin.tensors.module(name)
    if now.shape != before.shape or now.ndim != 2:
        raise InputError(
            f"'{name}' has the shape {tuple(now.shape)} in the checkpoint and {tuple(before.shape)} in the base model "
            f"'{origin.model}': name the model that the run started from with --base."
        )
    change = upright(exact(now) - exact(before), module)
    for factors in (origin.merged_factors.get(name), origin.factors.get(name)):
        if factors is not None:
            if shape(factors) != shape(change):
                raise PackError(
                    f"'{name}' has different shapes in the base model '{origin.model}' and in its adapter: name "
                    "another with --base."
                )
            change = change - factors.scaling * (exact(factors.B) @ exact(factors.A))
    return change
