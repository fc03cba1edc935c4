"""Build a pack from a recipe: the danger direction by SFT, the safety direction by DPO, the benign state by SFT.

Training is trl's and peft's; here are resuming, the choice of states, and the provenance that goes into the pack. An
interrupted build goes on from its last checkpoint when the same recipe is built into the same folder again; a choice
that was interrupted is made again.

On several GPUs: `torchrun --nproc-per-node 4 -m sqsd_filter pack build CONFIG.toml OUT` gives each a share of every
batch. A single process spreads a model over all GPUs that it sees, for one that is larger than a card.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from sqsd_filter.directions import processes
from sqsd_filter.directions.data import TrainingData, read_data
from sqsd_filter.directions.pack import FORMAT, PACK_FILE, Pack, load_pack
from sqsd_filter.directions.recipe import PackRecipe
from sqsd_filter.directions.states import checkpoints, compare_states
from sqsd_filter.directions.training import WORK_DIR, take_checkpoint, train, write_json
from sqsd_filter.errors import DestinationExists, SQSDError
from sqsd_filter.progress import Progress, Silent


def build_pack(recipe: PackRecipe, target: str | Path, progress: Progress | None = None) -> Pack:
    """Train every adapter of the recipe that isn't there yet, and write the pack; a pack that is done is loaded.

    Raises `DestinationExists` when `target` holds anything but this very build, `SQSDError` when the extra `train`
    isn't installed.
    """
    try:
        import peft  # noqa: F401
        import trl  # noqa: F401
    except ImportError as problem:
        raise SQSDError("Building a pack needs trl and peft: pip install 'sqsd-filter[train]'.") from problem
    if recipe.quantization is not None and find_spec("bitsandbytes") is None:
        raise SQSDError("Training on a base in 4 bits needs bitsandbytes: pip install 'sqsd-filter[qlora]'.")
    with processes.together():
        return _build(recipe, Path(target), (progress if processes.is_first() else None) or Silent())


def _build(recipe: PackRecipe, target: Path, progress: Progress) -> Pack:
    work = target / WORK_DIR
    plan = json.dumps(asdict(recipe) | {"folder": None}, sort_keys=True, indent=1, default=str)
    fingerprint = hashlib.blake2b(plan.encode(), digest_size=8).hexdigest()
    if target.is_dir() and any(target.iterdir()):
        done = target / PACK_FILE
        if done.is_file() and json.loads(done.read_text(encoding="utf-8")).get("recipe") == fingerprint:
            return load_pack(target)
        if not (work / "recipe.json").is_file():
            raise DestinationExists(f"{target} exists and is not an unfinished build: choose another folder.")
        if (work / "recipe.json").read_text() != plan:
            raise DestinationExists(f"{target} holds the build of another recipe: choose another folder or remove it.")
    processes.wait()  # all have seen what was there
    if processes.is_first():
        work.mkdir(parents=True, exist_ok=True)
        (work / "recipe.json").write_text(plan)

    records = {name: target / name / "training.json" for name in recipe.adapters}
    # all data before any training: what is wrong with the last adapter's shows at once, not after hours
    data = {name: read_data(recipe, recipe.adapters[name]) for name, record in records.items() if not record.is_file()}
    shown = read_data(recipe, recipe.states.source, recipe.states.positive) if recipe.states else None
    for name in sorted(data, key=lambda name: name != recipe.base_adapter):
        train(recipe, name, data[name], target, progress)
    if processes.is_first():
        chosen = {name: _choose_state(recipe, name, shown, target, progress) for name in recipe.sensitive if shown}
        write_json(target / PACK_FILE, _pack(recipe, records, fingerprint, chosen))
    processes.wait()
    built = load_pack(target)
    processes.wait()
    if processes.is_first() and not recipe.keep_checkpoints:
        shutil.rmtree(work)
    return built


def _pack(
    recipe: PackRecipe, records: Mapping[str, Path], fingerprint: str, chosen: Mapping[str, Any]
) -> dict[str, Any]:
    """The content of `pack.json`."""
    return {
        "format": FORMAT,
        "name": recipe.name,
        "base_model": recipe.base_model,
        "base_revision": recipe.base_revision,
        "base_adapter": recipe.base_adapter,
        "chat_template_kwargs": dict(recipe.chat_template_kwargs),
        "max_length": recipe.max_length,
        "probes": [asdict(p) for p in recipe.probes],
        "provenance": {name: json.loads(record.read_text()) for name, record in records.items()},
        "recipe": fingerprint,
        **({"validation": {"states": chosen}} if chosen else {}),
        **recipe.notes,
    }


def _choose_state(
    recipe: PackRecipe, name: str, shown: TrainingData, target: Path, progress: Progress
) -> dict[str, Any]:
    """Publish the most sensitive checkpoint of an adapter; the record of all."""
    how = recipe.states
    assert how is not None
    settings = ("base_model", "probes", "base_revision", "base_adapter", "chat_template_kwargs", "max_length")
    pack = Pack(target, recipe.name, **{key: getattr(recipe, key) for key in settings})
    candidates = checkpoints(target / WORK_DIR / name)
    found = compare_states(
        pack,
        candidates,
        [turns for (turns,) in shown.examples],
        shown.positive,
        answer_tokens=how.answer_tokens,
        progress=progress,
    )
    best = next(c for c in candidates if c.name == found["chosen"])
    take_checkpoint(target, name, best.folder, best.step)
    return {**found, "data": shown.source, "asked": {k: v for k, v in asdict(how).items() if v not in (None, {})}}
