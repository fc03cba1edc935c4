"""Make a linear probe of a recipe: the hidden states of its rows, the regression on them, a folder with the weights."""

from __future__ import annotations

import hashlib
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
from sqsd_filter.directions.data import TrainingData, prompt_of, read_data
from sqsd_filter.directions.linear_probe.fit import Standardised, balanced, solve
from sqsd_filter.directions.linear_probe.held_out import Rows, figures, scores_without
from sqsd_filter.directions.recipe import LinearProbeRecipe, PackRecipe
from sqsd_filter.errors import InputError
from sqsd_filter.progress import Progress
from sqsd_filter.scoring.batching import micro_batches, retry_in_halves, run_parallel
from sqsd_filter.scoring.chat_encoder import Encoded
from sqsd_filter.scoring.linear_probe import ReadingModel, save_weights
from sqsd_filter.scoring.pack import LinearProbe, Pack
from sqsd_filter.scoring.scorer import FAILED, OUT_OF_MEMORY, SQSDScorer
from sqsd_filter.storage.folder import write_json
from sqsd_filter.wording import many


@dataclass(frozen=True)
class KnownRow:
    """A conversation that is known to be unsafe or not, and the source that it counts to."""

    turns: list[Message]
    unsafe: bool
    source: str
    weight: float


@dataclass
class KnownRows:
    """The rows of a linear probe by key, equal ones once, and the record of where they are from."""

    rows: dict[str, KnownRow] = field(default_factory=dict)
    record: list[dict[str, Any]] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)


def read_known(recipe: PackRecipe, name: str) -> KnownRows:
    """The rows of a linear probe of the recipe. Raises `InputError` if a row is both unsafe and not, if two tables
    share a source, or as `read_data`."""
    data = KnownRows()
    tables: dict[tuple[bool, str], int] = {}
    for number, table in enumerate(recipe.linear[name].rows):
        read = read_data(recipe, table.source, by=table.by)
        named = table.name or f"{Path(table.data).stem} {number + 1}"
        sources = read.sources or [named] * len(read.examples)
        for source in set(sources):
            if tables.setdefault((table.unsafe, source), number) != number:
                raise InputError(
                    f"[[linear.{name}.rows]]: two tables have the source '{source}': give one of them another name."
                )
        shares = table.weight / len(set(sources))
        for (turns,), source in zip(read.examples, sources, strict=True):
            key = conversation_key(turns).hex()
            known = data.rows.setdefault(key, KnownRow(turns, table.unsafe, source, shares))
            if known.unsafe != table.unsafe:
                raise InputError(
                    f"[linear.{name}] has a row that is unsafe in one of its tables and not in another, in the source "
                    f"{source}: leave it out of one."
                )
        data.left_out.update(read.left_out)
        data.record.append(_record(table.unsafe, sources, read, table.licence))
    return data


def _record(unsafe: bool, sources: Sequence[str], read: TrainingData, licence: str | None) -> dict[str, Any]:
    counts = dict(sorted(Counter(sources).items()))
    return {"unsafe": unsafe, "sources": counts, "data": read.source, "licence": licence or read.licence}


def make_linear(recipe: PackRecipe, name: str, data: KnownRows, unbuilt: Pack, progress: Progress) -> None:
    """Write a linear probe of the recipe, with its record, into the pack's folder.

    Raises `InputError` where no row of either kind can be read.
    """
    how = recipe.linear[name]
    progress.note(f"reading the hidden states of {many(len(data.rows), 'row')} for '{name}'")
    read, left_out = read_states(unbuilt, LinearProbe(name, how.layers), how.max_length, data.rows, progress)
    rows = [data.rows[key] for key in read]
    left_out += data.left_out
    if len({row.unsafe for row in rows}) < 2:
        why = ", ".join(f"{count} {status}" for status, count in sorted(left_out.items()))
        raise InputError(f"[linear.{name}] has no usable rows of one kind{f' ({why})' if why else ''}.")
    progress.note(f"fitting '{name}' on {many(len(rows), 'row')}")
    weight_lsh, bias, found = _fit(how, rows, np.stack(list(read.values())))
    save_weights(unbuilt.path / name, weight_lsh, bias)
    record = {"data": data.record, "licence": _licences(data), "rows": len(rows), "left_out": dict(left_out)}
    settings = {key: value for key, value in asdict(how).items() if key != "rows"}
    write_json(unbuilt.path / name / "training.json", {**record, "settings": settings, "held_out": found})


def _licences(data: KnownRows) -> str | None:
    names = dict.fromkeys(each["licence"] for each in data.record if each["licence"])
    return "; ".join(names) or None


def read_states(
    pack: Pack, probe: LinearProbe, max_length: int, rows: Mapping[str, KnownRow], progress: Progress
) -> tuple[dict[str, np.ndarray], Counter[str]]:
    """What the pack's model reads of the rows at the layers of a probe, by the rows' keys: (layers, 2, h) float32. Rows
    that it can't read are counted by their reasons."""
    scorer = SQSDScorer(replace(pack, probes=(), linear=probe, risk=probe.name), max_length=max_length)
    encoded = scorer.encoder.encode([row.turns for row in rows.values()])
    reasons = Counter(row.status for row in encoded if isinstance(row, RowError))
    known = {key: row for key, row in zip(rows, encoded, strict=True) if isinstance(row, Encoded)}
    if not known:
        return {}, reasons
    gpus = torch.cuda.device_count() if processes.device() is None else 1
    model = ReadingModel.load(scorer.on_device(processes.device() or "cuda:0", gpus=gpus))
    progress.start("reading hidden states", len(known))
    keys, inputs = list(known), list(known.values())
    read: dict[int, np.ndarray] = {}

    def run(members: list[int]) -> None:
        vectors = model.read([inputs[k] for k in members]).float().numpy()
        read.update(zip(members, vectors, strict=True))
        progress.advance(len(members), sum(len(inputs[k]) for k in members))

    def give_up(_row: int, error: str) -> None:
        reasons[FAILED if error else OUT_OF_MEMORY] += 1

    work = micro_batches([len(row) for row in inputs], model.default_budget)
    run_parallel(partial(retry_in_halves, run, give_up=give_up), work, model.workers)
    progress.finish()
    finite = {keys[k]: read[k] for k in sorted(read) if np.isfinite(read[k]).all()}
    if len(finite) < len(read):
        reasons[NONFINITE] += len(read) - len(finite)
    return finite, reasons


def as_rows(rows: Sequence[KnownRow]) -> Rows:
    """The rows as arrays."""
    prompts = [hashlib.blake2b(prompt_of(row.turns).encode(), digest_size=4).digest() for row in rows]
    return Rows(
        unsafe=np.array([row.unsafe for row in rows]),
        source=np.array([row.source for row in rows]),
        weight=np.array([row.weight for row in rows]),
        prompt=np.array([int.from_bytes(prompt) for prompt in prompts]),
    )


def _fit(
    how: LinearProbeRecipe, known: Sequence[KnownRow], read_nlsh: np.ndarray
) -> tuple[np.ndarray, float, list[Any]]:
    """The weights, the bias, and what shows whether the probe tells beyond its own rows."""
    rows, values = as_rows(known), Standardised.of(read_nlsh.reshape(len(known), -1))
    kernel_nn = values.kernel()
    weights_n = balanced(rows.unsafe, rows.source, rows.weight)
    weight_d, bias = values.weights(*solve(kernel_nn, rows.unsafe, weights_n, how.ridge))
    found = figures(rows, scores_without(rows, kernel_nn, how.ridge))
    return weight_d.reshape(read_nlsh.shape[1:]), bias, list(found)
