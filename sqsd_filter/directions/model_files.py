"""Whole models on disk, read one tensor at a time, so that no model is ever in memory as a whole."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from sqsd_filter.errors import InputError
from sqsd_filter.scoring.adapters import CONFIG_FILE
from sqsd_filter.scoring.models import skeleton

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_UNQUANTISED = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class Layout:
    """The names and kinds of a model's tensors, by its configuration alone.

    `linears` maps the names of linear layers' weights to those of the modules, for all layers but the head: the set
    that PEFT calls all-linear. `transposed` has those that are stored as (d_in, d_out), as GPT-2's are.
    """

    def __init__(self, base_model: str) -> None:
        """Raises `ModelError`."""
        from transformers.pytorch_utils import Conv1D

        model = skeleton(base_model)
        self._modules: dict[str, nn.Module] = dict(model.named_modules())
        self._head, self._prefix = model.get_output_embeddings(), model.base_model_prefix
        self._names = set(model.state_dict())
        kinds = {m: module for m, module in self._modules.items() if isinstance(module, nn.Linear | Conv1D)}
        self.linears = {f"{m}.weight": m for m, module in kinds.items() if module is not self._head}
        self.transposed = {f"{m}.weight" for m, module in kinds.items() if isinstance(module, Conv1D)}

    def name(self, stored: str) -> str:
        """The model's name for a stored tensor, whose own name may lack the prefix of the backbone."""
        prefixed = f"{self._prefix}.{stored}"
        return prefixed if stored not in self._names and prefixed in self._names else stored

    def kind(self, name: str) -> str:
        """The kind of a tensor that is not the weight of a linear layer."""
        owner, _, what = name.rpartition(".")
        module = self._modules.get(owner)
        if module is not None and module is self._head:
            return "head"
        if what == "bias":
            return "biases"
        if isinstance(module, nn.Embedding):
            return "embeddings"
        return "norms" if "norm" in type(module).__name__.lower() else "others"


class StoredModel:
    """The tensors of a model in safetensors by their names in its layout; made by `open_model`."""

    def __init__(self, where: str, stored: Mapping[str, tuple[safe_open, str]]) -> None:
        self.where = where
        self._stored = stored

    @property
    def names(self) -> set[str]:
        return set(self._stored)

    def shape(self, name: str) -> tuple[int, ...]:
        file, stored = self._stored[name]
        return tuple(file.get_slice(stored).get_shape())

    def read(self, name: str) -> torch.Tensor:
        """One tensor as it is stored. Raises `InputError` if it is quantised."""
        file, stored = self._stored[name]
        return unquantised(file.get_tensor(stored), name, self.where)


def unquantised(tensor: torch.Tensor, name: str, where: str | Path) -> torch.Tensor:
    """The tensor itself. Raises `InputError` if it holds codes for weights, not the weights."""
    if tensor.dtype not in _UNQUANTISED:
        raise InputError(
            f"'{name}' in {where} is quantised ({tensor.dtype}): name the model in its original precision."
        )
    return tensor


@contextmanager
def open_model(where: str, folder: Path, layout: Layout) -> Iterator[StoredModel]:
    """Open the weights in a folder: one file, or several with an index. Raises `InputError` if they can't be read."""
    with ExitStack() as stack:
        stored = {}
        for path in weight_files(where, folder):
            try:
                file = stack.enter_context(safe_open(path, framework="pt"))
            except (SafetensorError, OSError) as problem:
                raise InputError(f"{path} can't be read ({problem}): copy the checkpoint again.") from problem
            stored.update({layout.name(name): (file, name) for name in file.keys()})  # noqa: SIM118, not a dict
        yield StoredModel(where, stored)


def weight_files(where: str, folder: Path) -> list[Path]:
    """The safetensors files with a model's weights in a folder. Raises `InputError` if there are none."""
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if (folder / INDEX).is_file():
        try:
            index = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
            return sorted({folder / name for name in index.values()})
        except (ValueError, KeyError, TypeError, AttributeError) as problem:
            raise InputError(
                f"{folder / INDEX} is not an index of safetensors files: copy the checkpoint again."
            ) from problem
    if (folder / CONFIG_FILE).is_file():
        raise InputError(f"{where} holds a LoRA adapter, which already is a low-rank direction: use it as it is.")
    if list(folder.glob("*.bin")):
        raise InputError(
            f"{where} holds pickled weights (.bin), which are never loaded: save the model again with "
            "save_pretrained(..., safe_serialization=True)."
        )
    raise InputError(f"{where} has neither {SINGLE} nor {INDEX}: name the folder of a whole model.")
