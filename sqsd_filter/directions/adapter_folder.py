"""Adapter folders as they go into a pack: plain, without traces of the machine that made them, whole or not there."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqsd_filter.errors import DestinationExists
from sqsd_filter.scoring.pack import ADAPTER_FILES

if TYPE_CHECKING:
    import torch


def write_adapter(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
    """Write a PEFT adapter folder; its config names no base model, which is the pack's to name."""
    from safetensors.torch import save

    config_file, weights_file = ADAPTER_FILES
    folder.mkdir(parents=True, exist_ok=True)
    plain = {**config, "base_model_name_or_path": None}
    if not isinstance(modules := plain.get("target_modules"), str | None):  # else a pattern, or PEFT's default
        plain["target_modules"] = sorted(modules)
    (folder / config_file).write_text(json.dumps(plain, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    stored = {name: tensor.contiguous() for name, tensor in sorted(tensors.items())}
    (folder / weights_file).write_bytes(save(stored))  # save_file's would be for this user only


def is_free(target: Path) -> bool:
    """Is there nothing at `target`, or an empty folder?"""
    return not target.exists() or (target.is_dir() and not any(target.iterdir()))


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """A folder to write into, which becomes `target` when all is written; where that fails nothing is left of it.

    Raises `DestinationExists` when `target` holds anything.
    """
    if not is_free(target):
        raise DestinationExists(f"{target} exists and holds something else: choose another folder or remove it.")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as beside:
        folder = Path(beside) / target.name
        folder.mkdir()
        yield folder
        folder.rename(target)
