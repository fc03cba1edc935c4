"""Make a direction of a recipe's contrast: the updates of its rows, the regression on them, an adapter folder."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sqsd_filter.corpus.conversation import NONFINITE, Message, RowError, conversation_key
from sqsd_filter.directions import processes
from sqsd_filter.directions.adapter_folder import write_adapter
from sqsd_filter.directions.contrast.held_out import Rows, figures, fits_without
from sqsd_filter.directions.contrast.ridge import apply, balanced, kernel, solve
from sqsd_filter.directions.contrast.store import UpdateStore
from sqsd_filter.directions.contrast.updates import UpdateModel, UpdateSpace, as_adapter
from sqsd_filter.directions.data import TrainingData, prompt_of, read_data
from sqsd_filter.directions.recipe import ContrastRecipe, PackRecipe
from sqsd_filter.errors import InputError
from sqsd_filter.progress import Progress
from sqsd_filter.scoring.adapters import load_adapter, norm
from sqsd_filter.scoring.batching import micro_batches, retry_in_halves, run_parallel
from sqsd_filter.scoring.chat_encoder import Encoded
from sqsd_filter.scoring.pack import ADAPTER_FILES, Pack, Probe
from sqsd_filter.scoring.scorer import FAILED, OUT_OF_MEMORY, SQSDScorer
from sqsd_filter.storage.folder import write_json
from sqsd_filter.wording import many

AT_ONCE = 256  # rows whose micro-batches are made together


@dataclass(frozen=True)
class ContrastRow:
    """A conversation of a contrast, and the source that it counts to."""

    turns: list[Message]
    unsafe: bool
    source: str
    weight: float


@dataclass
class ContrastData:
    """The rows of a contrast by key, equal ones once, and the record of where they are from."""

    rows: dict[str, ContrastRow] = field(default_factory=dict)
    record: list[dict[str, Any]] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)


def read_contrast(recipe: PackRecipe, name: str) -> ContrastData:
    """The rows of a contrast of the recipe. Raises `InputError` if a row is both unsafe and not, if two tables
    share a source, or as `read_data`."""
    data = ContrastData()
    tables: dict[tuple[bool, str], int] = {}
    for number, table in enumerate(recipe.contrasts[name].rows):
        read = read_data(recipe, table.source, by=table.by)
        named = table.name or f"{Path(table.data).stem} {number + 1}"
        sources = read.sources or [named] * len(read.examples)
        for source in set(sources):
            if tables.setdefault((table.unsafe, source), number) != number:
                raise InputError(
                    f"[[contrasts.{name}.rows]]: two tables have the source '{source}': give one of them another name."
                )
        shares = table.weight / len(set(sources))
        for (turns,), source in zip(read.examples, sources, strict=True):
            key = conversation_key(turns).hex()
            known = data.rows.setdefault(key, ContrastRow(turns, table.unsafe, source, shares))
            if known.unsafe != table.unsafe:
                raise InputError(
                    f"[contrasts.{name}] has a row that is unsafe in one of its tables and not in another, in the "
                    f"source {source}: leave it out of one."
                )
        data.left_out.update(read.left_out)
        data.record.append(_record(table.unsafe, sources, read, table.licence))
    return data


def _record(unsafe: bool, sources: Sequence[str], read: TrainingData, licence: str | None) -> dict[str, Any]:
    counts = dict(sorted(Counter(sources).items()))
    return {"unsafe": unsafe, "sources": counts, "data": read.source, "licence": licence or read.licence}


def make_contrast(
    recipe: PackRecipe, name: str, data: ContrastData, unbuilt: Pack, work: Path, progress: Progress
) -> None:
    """Write a contrast of the recipe, with its record, into the pack's folder. All processes call this together.

    Raises `InputError` where no row of either kind has an update.
    """
    how = recipe.contrasts[name]
    progress.note(f"measuring the updates of {many(len(data.rows), 'row')} for '{name}'")
    pack = replace(unbuilt, probes=(Probe(name, 1.0, how.state, how.state),))
    scorer = SQSDScorer(pack, max_length=how.max_length)
    state = load_adapter(pack.adapter(how.state))
    space = UpdateSpace(state)
    store = open_store(work, scorer, space)
    left_out = data.left_out + measure(scorer, {key: row.turns for key, row in data.rows.items()}, store, progress)
    processes.wait()  # until all rows are in the store
    if processes.is_first():
        places = store.places()
        keys = [key for key in data.rows if key in places]
        rows = [data.rows[key] for key in keys]
        if len({row.unsafe for row in rows}) < 2:
            why = ", ".join(f"{count} {status}" for status, count in sorted(left_out.items()))
            raise InputError(f"[contrasts.{name}] has no usable rows of one kind{f' ({why})' if why else ''}.")
        progress.note(f"fitting '{name}' on {many(len(rows), 'row')}")
        vector, found = _fit(how, rows, store, keys, space)
        length = math.hypot(*(norm(each) for each in state.factors.values())) or 1.0
        write_adapter(pack.adapter(name), *as_adapter(space.factors(vector), length))
        record = {"data": data.record, "licence": _licences(data), "rows": len(rows), "left_out": dict(left_out)}
        settings_of = {k: v for k, v in asdict(how).items() if k != "rows"}
        write_json(pack.adapter(name) / "training.json", {**record, "settings": settings_of, **found})
    processes.wait()


def _licences(data: ContrastData) -> str | None:
    names = dict.fromkeys(each["licence"] for each in data.record if each["licence"])
    return "; ".join(names) or None


def _digest(pack: Pack, adapter: str) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for file in ADAPTER_FILES:
        digest.update((pack.adapter(adapter) / file).read_bytes())
    return digest.hexdigest()


def open_store(folder: Path, scorer: SQSDScorer, space: UpdateSpace) -> UpdateStore:
    """The store in a folder for updates at the state of the scorer's first probe."""
    pack = scorer.pack
    settings = {
        "state": _digest(pack, pack.probes[0].state),
        "max_length": scorer.max_length,
        "base": pack.base_model,
        "revision": pack.base_revision,
        "template": dict(pack.chat_template_kwargs),
        "base_adapter": _digest(pack, pack.base_adapter) if pack.base_adapter else None,
    }
    return UpdateStore(folder, settings, space.width, processes.rank())


def measure(
    scorer: SQSDScorer, conversations: Mapping[str, list[Message]], store: UpdateStore, progress: Progress
) -> Counter[str]:
    """Fill the store with this process's share of the conversations, by key, that it lacks. Returns the reasons of
    those that have no update."""
    known = store.places()
    processes.wait()  # until all processes have read what is there
    encoded = scorer.encoder.encode(list(conversations.values()))
    reasons = Counter(row.status for row in encoded if isinstance(row, RowError)) if processes.is_first() else Counter()
    rows = {key: row for key, row in zip(conversations, encoded, strict=True) if isinstance(row, Encoded)}
    keys = list(rows)[processes.rank() :: processes.count()]
    # the same micro-batches whatever was measured before, so that a build that was killed ends in the same bytes
    parts = [keys[start : start + AT_ONCE] for start in range(0, len(keys), AT_ONCE)]
    missing = [[key for key in part if key not in known] for part in parts]
    if not any(missing):
        return reasons
    store.make_room(sum(map(len, missing)))
    gpus = torch.cuda.device_count() if processes.device() is None else 1
    model = UpdateModel.load(scorer.on_device(processes.device() or "cuda:0", gpus=gpus))
    progress.start("measuring updates", sum(map(len, missing)))
    for part in filter(None, missing):
        found = _vectors_of(model, [rows[key] for key in part], reasons, progress)
        store.append([part[k] for k in found], np.array(list(found.values()), np.float32))
    progress.finish()
    return reasons


def _vectors_of(
    model: UpdateModel, rows: Sequence[Encoded], reasons: Counter[str], progress: Progress
) -> dict[int, np.ndarray]:
    """The vectors of the rows that have one, by number; the `reasons` of the others are counted."""
    vectors: dict[int, np.ndarray] = {}

    def run(members: list[int]) -> None:
        vectors.update(zip(members, model.project([rows[k] for k in members]), strict=True))
        progress.advance(len(members), sum(len(rows[k]) for k in members))

    def give_up(_row: int, error: str) -> None:
        reasons[FAILED if error else OUT_OF_MEMORY] += 1

    work = micro_batches([len(row) for row in rows], model.default_budget)
    run_parallel(partial(retry_in_halves, run, give_up=give_up), work, model.workers)
    finite = {k: vectors[k] for k in sorted(vectors) if np.isfinite(vectors[k]).all()}
    if len(finite) < len(vectors):
        reasons[NONFINITE] += len(vectors) - len(finite)
    return finite


def _fit(
    how: ContrastRecipe, rows: Sequence[ContrastRow], store: UpdateStore, keys: Sequence[str], space: UpdateSpace
) -> tuple[np.ndarray, Mapping[str, Any]]:
    """The coordinates of the direction, and what shows whether it points beyond its own rows."""
    prompts = [hashlib.blake2b(prompt_of(row.turns).encode(), digest_size=4).digest() for row in rows]
    fitted = Rows(
        unsafe=np.array([row.unsafe for row in rows]),
        source=np.array([row.source for row in rows]),
        weight=np.array([row.weight for row in rows]),
        prompt=np.array([int.from_bytes(prompt) for prompt in prompts]),
    )
    vectors, modules = store.vectors(keys), [module.where for module in space.modules.values()]
    kernel_nn = kernel(vectors, modules)
    weights_n = balanced(fitted.unsafe, fitted.source, fitted.weight)
    alpha_n = solve(kernel_nn, fitted.unsafe, weights_n, how.ridge)
    fits, without_nf = fits_without(fitted, kernel_nn, how.ridge)
    vector, scores_nf = apply(vectors, modules, np.column_stack([alpha_n, without_nf]))
    return vector, {"held_out": figures(fitted, fits, scores_nf[:, 1:])}
