"""Build a pack from a recipe: directions by SFT or by DPO, states by SFT, linear probes by regression.

trl and peft train; this module resumes, chooses states, and records the provenance in the pack. An interrupted build
resumes from its last checkpoint if the same recipe is built into the same folder again, even if settings that training
does not depend on have changed. An interrupted choice of a state starts over.

On several GPUs, `torchrun --nproc-per-node 4 -m sqsd_filter pack build CONFIG.toml OUT` gives each a share of every
batch. A single process spreads the model over all GPUs that it sees, for a model larger than one GPU.
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
from sqsd_filter.directions.calibration import ReferenceCorpus, score_reference
from sqsd_filter.directions.data import TrainingData, prompt_of, read_data
from sqsd_filter.directions.linear_probe.make import make_linear, read_known
from sqsd_filter.directions.recipe import AdapterRecipe, PackRecipe
from sqsd_filter.directions.state_rows import usable
from sqsd_filter.directions.states import checkpoints, compare_states
from sqsd_filter.directions.training import WORK_DIR, take_checkpoint, train
from sqsd_filter.errors import DestinationExists, InputError, SQSDError
from sqsd_filter.progress import Progress, Silent
from sqsd_filter.scoring.pack import FORMAT, PACK_FILE, REFERENCE, LinearProbe, Pack, Risk, load_pack
from sqsd_filter.scoring.scorer import SQSDScorer
from sqsd_filter.storage.folder import write_json, write_text
from sqsd_filter.wording import many

PROMPT_SHOWN = 60  # characters of a prompt in an error


def build_pack(recipe: PackRecipe, target: str | Path, progress: Progress | None = None) -> Pack:
    """Train the adapters of the recipe that are still missing, and write the pack. A finished pack is loaded.

    Raises `DestinationExists` if `target` holds anything but this build, `SQSDError` if an extra is not installed.
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
    fingerprint = hashlib.blake2b(_text(_settings(recipe)).encode(), digest_size=8).hexdigest()
    plan, begun = _text(_trained(recipe)), work / "recipe.json"
    if target.is_dir() and any(target.iterdir()):
        if (target / PACK_FILE).is_file() and (done := load_pack(target)).notes.get("recipe") == fingerprint:
            _clear(recipe, work)  # if an earlier build was killed before it did
            return done
        if not begun.is_file():
            raise DestinationExists(f"{target} exists and is not an unfinished build: choose another folder.")
        if begun.read_text(encoding="utf-8") != plan:
            raise DestinationExists(f"{target} holds the build of another recipe: choose another folder or remove it.")
    # read all data before any training, so that a problem with the last adapter's shows now, not after hours
    records = {name: target / name / "training.json" for name in (*recipe.adapters, *recipe.linear)}
    data = {
        name: read_data(recipe, adapter)
        for name, adapter in recipe.adapters.items()
        if not _is_done(records[name], adapter)
    }
    known = {name: read_known(recipe, name) for name in recipe.linear}
    compared = _compared(recipe, target)
    references = _references(recipe)
    processes.wait()  # until all have read the folder as it was
    if processes.is_first():
        work.mkdir(parents=True, exist_ok=True)
        write_text(begun, plan)
        (target / PACK_FILE).unlink(missing_ok=True)  # from a recipe that chose otherwise among the same checkpoints

    for name in sorted(data, key=lambda name: name != recipe.base_adapter):
        train(recipe, name, data[name], target, progress)
    if processes.is_first():
        chosen = {
            name: _choose_state(recipe, name, compared, target, progress) for name in recipe.sensitive if compared
        }
    processes.wait()
    if processes.is_first():
        for name, rows in known.items():
            make_linear(recipe, name, rows, _unbuilt(recipe, target), progress)
        page = _pack(recipe, records, fingerprint, chosen)
        if references:
            built = _unbuilt(recipe, target)
            page[REFERENCE] = score_reference(SQSDScorer(built), references, progress)
            for name in built.risks:
                progress.note(f"the same for the risk '{name}'")
                record = score_reference(SQSDScorer(built.with_risk(name)), references, progress)
                page["risks"][name][REFERENCE] = record
        write_json(target / PACK_FILE, page)
    processes.wait()
    built = load_pack(target)
    processes.wait()
    _clear(recipe, work)
    return built


def _settings(recipe: PackRecipe) -> dict[str, Any]:
    """The whole recipe but its folder. A pack made by another recipe is not finished."""
    plan = asdict(recipe) | {"folder": None}
    for name in ("reference", "linear", "risks", "beside"):
        if not plan[name]:
            del plan[name]  # as recipes were before there was one
    return plan


def _trained(recipe: PackRecipe) -> dict[str, Any]:
    """The settings that checkpoints depend on. A build reuses them if anything else in its recipe has changed."""
    plan = _settings(recipe)
    free = ("name", "probes", "risks", "linear", "beside", "states", "reference", "notes")
    for name in (*free, "keep_checkpoints", "max_length"):
        plan.pop(name, None)
    for name, adapter in plan["adapters"].items():
        if name != recipe.base_adapter:  # the others are trained on the base adapter
            del adapter["take_step"]
    return plan


def _text(plan: Mapping[str, Any]) -> str:
    return json.dumps(plan, sort_keys=True, indent=1, default=str)


def _is_done(record: Path, adapter: AdapterRecipe) -> bool:
    """Is the adapter complete, taken at the update that the recipe names? If not, training resumes from its last
    checkpoint."""
    if not record.is_file():
        return False
    return bool(json.loads(record.read_text(encoding="utf-8"))["settings"].get("take_step") == adapter.take_step)


def _clear(recipe: PackRecipe, work: Path) -> None:
    if processes.is_first() and work.exists() and not recipe.keep_checkpoints:
        shutil.rmtree(work)


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
        **({"risks": risks} if (risks := _risks(recipe)) else {}),
        **({"beside": list(recipe.beside)} if recipe.beside else {}),
        "provenance": {name: json.loads(record.read_text()) for name, record in records.items()},
        "recipe": fingerprint,
        **({"validation": {"states": chosen}} if chosen else {}),
        **recipe.notes,
    }


def _risks(recipe: PackRecipe) -> dict[str, Any]:
    probes = {name: {"probes": [asdict(p) for p in probes]} for name, probes in recipe.risks.items()}
    return {**probes, **{name: {"layers": list(how.layers)} for name, how in recipe.linear.items()}}


def _unbuilt(recipe: PackRecipe, target: Path) -> Pack:
    """The pack as it will be, for its settings; its adapters may not exist yet."""
    settings = ("base_model", "probes", "base_revision", "base_adapter", "chat_template_kwargs", "max_length")
    risks = {name: Risk(probes) for name, probes in recipe.risks.items()}
    risks |= {name: Risk(linear=LinearProbe(name, how.layers)) for name, how in recipe.linear.items()}
    return Pack(target, recipe.name, **{key: getattr(recipe, key) for key in settings}, risks=risks)


def _compared(recipe: PackRecipe, target: Path) -> TrainingData | None:
    """The rows that states are compared on. Raises `InputError` if they are too few or of one kind only."""
    how = recipe.states
    if how is None:
        return None
    compared = read_data(recipe, how.source, how.positive)
    turns = [turns for (turns,) in compared.examples]
    usable(SQSDScorer(_unbuilt(recipe, target)), turns, compared.positive, how.answer_tokens)
    return compared


def _references(recipe: PackRecipe) -> list[ReferenceCorpus]:
    """The rows of the pack's reference. Raises `InputError` if one of them has a prompt that the pack is trained or
    chosen on."""
    if not recipe.reference:
        return []
    used = {f"[adapters.{name}]": adapter for name, adapter in recipe.adapters.items()}
    used |= {"[states]": recipe.states.source} if recipe.states is not None else {}
    used |= {
        f"[[linear.{name}.rows]] {number + 1}": table.source
        for name, how in recipe.linear.items()
        for number, table in enumerate(how.rows)
    }
    prompts = {
        where: {prompt_of(turns) for turns, *_ in read_data(recipe, source).examples} for where, source in used.items()
    }
    corpora = []
    for name, how in recipe.reference.items():
        read = read_data(recipe, how.source)
        for where, known in prompts.items():
            if shared := [prompt for (turns,) in read.examples if (prompt := prompt_of(turns)) in known]:
                raise InputError(
                    f"[reference.{name}] has {many(len(shared), 'row')} with a prompt of {where}, for example "
                    f"{shared[0][:PROMPT_SHOWN]!r}: a reference must have other prompts than the rest of the recipe."
                )
        turns = [turns for (turns,) in read.examples]
        corpora.append(ReferenceCorpus(name, how.kind, turns, read.source, how.licence or read.licence))
    return corpora


def _choose_state(
    recipe: PackRecipe, name: str, compared: TrainingData, target: Path, progress: Progress
) -> dict[str, Any]:
    """Take the most sensitive checkpoint of an adapter into the pack. Returns the record of all candidates."""
    how = recipe.states
    assert how is not None
    candidates = checkpoints(target / WORK_DIR / name)
    record = compare_states(
        _unbuilt(recipe, target),
        candidates,
        [turns for (turns,) in compared.examples],
        compared.positive,
        answer_tokens=how.answer_tokens,
        progress=progress,
    )
    best = next(c for c in candidates if c.name == record["chosen"])
    take_checkpoint(target, name, best.folder, best.step)
    return {**record, "data": compared.source, "asked": {k: v for k, v in asdict(how).items() if v not in (None, {})}}
