"""Writing the adapter folders of a pack: complete or absent, and without traces of the machine that made them."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from sqsd_filter.errors import DestinationExists
from sqsd_filter.scoring.pack import ADAPTER_FILES

if TYPE_CHECKING:
    import torch


def write_adapter(folder: Path, config: Mapping[str, object], tensors: Mapping[str, torch.Tensor]) -> None:
    """Write a PEFT adapter folder. Its config names no base model: the pack does."""
    from safetensors.torch import save

    config_file, tensors_file = ADAPTER_FILES
    folder.mkdir(parents=True, exist_ok=True)
    plain = {**config, "base_model_name_or_path": None}
    modules = plain.get("target_modules")
    if isinstance(modules, Iterable) and not isinstance(modules, str):  # else a pattern, or PEFT's default
        plain["target_modules"] = sorted(modules)
    (folder / config_file).write_text(json.dumps(plain, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    stored = {name: tensor.contiguous() for name, tensor in sorted(tensors.items())}
    (folder / tensors_file).write_bytes(save(stored))  # save_file would let only this user read it


def is_free(target: Path) -> bool:
    """Is there nothing at `target`, or an empty folder?"""
    return not target.exists() or (target.is_dir() and not any(target.iterdir()))


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """A folder to write into. It becomes `target` at the end; after an error nothing of it is left.

    Raises `DestinationExists` if `target` is not free.
    """
    if not is_free(target):
        raise DestinationExists(
            f"{target} already exists and holds something else: choose another folder or remove it."
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as beside:
        folder = Path(beside) / target.name
        folder.mkdir()
        yield folder
        folder.rename(target)
