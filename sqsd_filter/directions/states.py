"""Which state is direction-sensitive: at which checkpoint of a benign fine-tune should gradients be taken?

All candidates are shown the same rows; benign ones suffice. In module m, row n has the contrast

    c_nm = Σ_p w_p cos_npm

over the pack's probes p with their weights w_p, each direction taken at the candidate. Its sum over the modules is the
risk with every probe at this state, so that no other state covers up what this one lacks. The criterion, over rows, is

    sensitivity = M / (M - 1) · Σ_{m ≠ m'} cov(e_m, e_m') / var(Σ_m c_m)

with M modules and e_m what is left of c_m when the part linear in the rank of the answer's length is taken away. It is
the share of the variance between rows that is neither noise, on which modules don't agree, nor length. For e = c it is
Cronbach's alpha, the mean reliability over all ways to split the modules into two halves: no seed is needed.
All else is in the record, too, because each figure alone goes wrong:

- `reliability` (Cronbach's alpha): a state that measures little but the length of answers is most consistent.
- `length` (rank correlation with it): noise has none.
- `stability` (rank correlation with the candidate before): as the learning rate falls, checkpoints become alike,
  whatever they are good for.
- `probes`, each direction alone: a state that sees what all rows and directions have in common is consistent in each of
  them. In the contrast that cancels, and such a state has only noise left.
- `directions` (rank correlation of the danger and safety projections): it is as good as zero where both are noise.
- `auc` needs labels, and among few rows that are easily told apart it is 1 for every candidate. It is the only one that
  sees the sign: whether unsafe rows are those with the higher contrast.

The fresh state (B = 0, the first checkpoint's A) is there for comparison and never chosen: it sees G_B·A alone, and no
consistency shows what a state is blind to. Of equals, to four decimals, the earlier checkpoint is taken.
"""

from __future__ import annotations

import shutil
import tempfile
import threading
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from sqsd_filter.corpus.conversation import NONFINITE, Message, RowError
from sqsd_filter.directions.checkpoints import by_step
from sqsd_filter.errors import InputError
from sqsd_filter.progress import Progress, Silent
from sqsd_filter.scoring.chat_encoder import Encoded, cut_answer
from sqsd_filter.scoring.pack import ADAPTER_FILES, Pack, Probe
from sqsd_filter.scoring.scorer import FAILED, OUT_OF_MEMORY, SQSDScorer
from sqsd_filter.statistics import auc, ranks, spearman

FRESH = "fresh"
FEWEST_ROWS = 8
TOO_SHORT = "too_short"  # an answer with fewer tokens than all are cut to
_PLACE = ".states"  # where candidates lie in a pack over links; no adapter of a pack is called so


@dataclass(frozen=True)
class Candidate:
    """A state that might be taken: a LoRA folder, and after how many updates it was written."""

    name: str
    step: int
    folder: Path


def checkpoints(run: Path) -> list[Candidate]:
    """The LoRA checkpoints in a training run's output folder, by step. Raises `InputError` where there are none."""
    found = [
        Candidate(folder.name, step, folder)
        for step, folder in by_step(run)
        if all((folder / file).is_file() for file in ADAPTER_FILES)
    ]
    if not found:
        raise InputError(
            f"{run} has no folder checkpoint-<step> with a LoRA adapter: name the output folder of a run that saved "
            "some (pack build keeps them with keep_checkpoints = true)."
        )
    return found


def compare_states(
    pack: Pack,
    candidates: Sequence[Candidate],
    conversations: Sequence[Sequence[Message] | RowError],
    positive: Sequence[bool] | None = None,
    *,
    answer_tokens: int | None = None,
    dtype: str | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure the candidates and a fresh state with the pack's directions on these rows: the record, and in it the
    name `chosen`. One model is loaded, and each row makes one pass for every candidate.

    `positive` marks rows that should have the higher risk. `answer_tokens` cuts all answers to this many tokens and
    leaves out rows with shorter ones. Raises `InputError` where fewer than `FEWEST_ROWS` rows can be measured, or all
    are positive or none.
    """
    progress = progress or Silent()
    with tempfile.TemporaryDirectory(prefix="sqsd-states-") as folder:
        fresh = Candidate(FRESH, 0, fresh_state(candidates[0].folder, Path(folder) / f".{FRESH}"))
        everything = [fresh, *candidates]
        places = {f"{_PLACE}/{c.name}": c.folder for c in everything}
        probes = [Probe(f"{p.name}|{at}", p.weight, p.direction, at) for at in places for p in pack.probes]
        linked = over_links(pack, probes, Path(folder), places)
        scorer = SQSDScorer(linked, dtype=dtype)
        rows, reasons = usable(scorer, conversations, positive, answer_tokens)
        progress.note(f"measuring {len(everything)} states on {len(rows)} rows")
        progress.start("measuring states", len(rows))
        cosines = _cosines(scorer, rows, reasons, progress)
        progress.finish()
    marks_n = _marks(cosines, conversations, positive, reasons)
    tokens_n = np.array([int(rows[k].answer.sum()) for k in cosines])
    table: list[dict[str, Any]] = []
    before: np.ndarray | None = None
    for candidate, at in zip(everything, places, strict=True):
        cos_npm = np.stack([found[at] for found in cosines.values()])
        parts = {p.name: p.weight * cos_npm[:, k] for k, p in enumerate(pack.probes)}
        contrast_nm = np.sum(list(parts.values()), axis=0)
        risk_n = contrast_nm.sum(-1)
        table.append(
            {
                "state": candidate.name,
                "step": candidate.step,
                **_figures(contrast_nm, tokens_n, marks_n),
                "stability": None if before is None else _rounded(spearman(risk_n, before)),
                "directions": _agreement(pack, parts),
                "probes": {name: _figures(part_nm, tokens_n, marks_n) for name, part_nm in parts.items()},
            }
        )
        before = risk_n
    best = min(table[1:], key=lambda entry: (-entry["sensitivity"], entry["step"]))
    if best["sensitivity"] <= 0:
        progress.note("no checkpoint tells these rows apart by more than noise and length: don't trust the choice")
    return {
        "chosen": best["state"],
        "rows": len(tokens_n),
        "positive": None if marks_n is None else int(marks_n.sum()),
        "left_out": dict(sorted(reasons.items())),
        "settings": {
            "device": scorer.device.split(":")[0],
            "dtype": scorer.dtype,
            "max_length": scorer.max_length,
            "answer_tokens": answer_tokens,
        },
        "candidates": table,
    }


def usable(
    scorer: SQSDScorer,
    conversations: Sequence[Sequence[Message] | RowError],
    positive: Sequence[bool] | None = None,
    answer_tokens: int | None = None,
) -> tuple[dict[int, Encoded], Counter[str]]:
    """The rows that can be measured, by number, and why others can't; no model is loaded.

    Raises `InputError` where fewer than `FEWEST_ROWS` are left, or all of them are positive or none.
    """
    reasons = Counter(row.status for row in conversations if isinstance(row, RowError))
    turns = {k: row for k, row in enumerate(conversations) if not isinstance(row, RowError)}
    rows: dict[int, Encoded] = {}
    for k, row in zip(turns, scorer.encoder.encode(list(turns.values())), strict=True):
        if isinstance(row, RowError):
            reasons[row.status] += 1
        elif row.answer.sum() < (answer_tokens or 1):
            reasons[TOO_SHORT] += 1
        else:
            rows[k] = cut_answer(row, answer_tokens)
    _marks(rows, conversations, positive, reasons)
    return rows, reasons


def _marks(
    numbers: Collection[int], of: Sequence[Any], positive: Sequence[bool] | None, reasons: Mapping[str, int]
) -> np.ndarray | None:
    """Which of the rows with these numbers are positive. Raises `InputError` for too few rows, or rows of one kind."""
    if len(numbers) < FEWEST_ROWS:
        why = ", ".join(f"{count} {status}" for status, count in sorted(reasons.items()))
        raise InputError(
            f"Only {len(numbers)} of {len(of)} rows can be measured{f' ({why})' if why else ''}: states are compared "
            f"on {FEWEST_ROWS} rows at least, 64 are better."
        )
    if positive is None:
        return None
    marks_n = np.array([positive[k] for k in numbers])
    if marks_n.all() == marks_n.any():
        which = "All" if marks_n.all() else "None"
        raise InputError(f"{which} of the {len(marks_n)} rows are positive: rows of both kinds are needed.")
    return marks_n


def _cosines(
    scorer: SQSDScorer, rows: Mapping[int, Encoded], reasons: Counter[str], progress: Progress
) -> dict[int, dict[str, np.ndarray]]:
    """Each row's cosines (p, m) at every state, in the order of the rows; those that fail are left out."""
    from sqsd_filter.scoring.batching import micro_batches, retry_in_halves, run_parallel

    model, numbers, lock = scorer.model, list(rows), threading.Lock()
    found: dict[int, dict[str, np.ndarray]] = {}

    def run(members: list[int]) -> None:
        cosines = {at: c.double().cpu().numpy() for (at, _), c in model.cosines([rows[k] for k in members]).items()}
        with lock:
            for n, k in enumerate(members):
                found[k] = {at: cos_bpm[n] for at, cos_bpm in cosines.items()}
            progress.advance(len(members), sum(len(rows[k]) for k in members))

    def give_up(row: int, error: str) -> None:
        with lock:
            reasons[FAILED if error else OUT_OF_MEMORY] += 1

    work = [
        [numbers[m] for m in members]
        for members in micro_batches([len(e) for e in rows.values()], model.default_budget)
    ]
    run_parallel(lambda members: retry_in_halves(run, members, give_up), work, model.workers)
    finite = {k for k, at in found.items() if all(np.isfinite(cos).all() for cos in at.values())}
    reasons.update([NONFINITE] * (len(found) - len(finite)))
    return {k: found[k] for k in numbers if k in finite}


# ------------------------------------------------------------------------------------------------ figures


def _figures(modules_nm: np.ndarray, tokens_n: np.ndarray, positive_n: np.ndarray | None) -> dict[str, float | None]:
    total_n = modules_nm.sum(-1)
    return {
        "sensitivity": _rounded(sensitivity(modules_nm, tokens_n)),
        "reliability": _rounded(reliability(modules_nm)),
        "length": _rounded(spearman(total_n, tokens_n)),
        "auc": None if positive_n is None else _rounded(auc(total_n[positive_n], total_n[~positive_n])),
    }


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4) + 0.0  # no -0.0


def _agreement(pack: Pack, parts: Mapping[str, np.ndarray]) -> float | None:
    """Rank correlation of the danger and the safety projections; None where a pack has one kind only."""
    danger = [parts[p.name].sum(-1) for p in pack.probes if p.weight > 0]
    safety = [-parts[p.name].sum(-1) for p in pack.probes if p.weight < 0]
    return _rounded(spearman(np.sum(danger, axis=0), np.sum(safety, axis=0))) if danger and safety else None


def sensitivity(modules_nm: np.ndarray, tokens_n: np.ndarray) -> float:
    """The criterion above, of n rows' contrasts in m modules; 0 where the rows' sums don't differ."""
    length_n = ranks(tokens_n) - (len(tokens_n) + 1) / 2
    free_nm = modules_nm - modules_nm.mean(0)
    if length_n.any():
        free_nm = free_nm - np.outer(length_n, length_n @ free_nm / (length_n @ length_n))
    return _shared(free_nm, modules_nm)


def reliability(modules_nm: np.ndarray) -> float:
    """Cronbach's alpha of n rows' values in m modules; 0 where the rows' sums don't differ."""
    return _shared(modules_nm, modules_nm)


def _shared(part_nm: np.ndarray, whole_nm: np.ndarray) -> float:
    """How much of the variance of the whole's sums is that of the part on which its modules agree."""
    modules, variance = part_nm.shape[1], whole_nm.sum(-1).var()
    common = part_nm.sum(-1).var() - part_nm.var(axis=0).sum()
    return float(modules / (modules - 1) * common / variance) if modules > 1 and variance > 0 else 0.0


# ------------------------------------------------------------------------------------------------ folders


def fresh_state(state: Path, target: Path) -> Path:
    """A copy of a LoRA folder with B = 0, as before the first update."""
    from safetensors.torch import load_file, save_file

    config, weights = ADAPTER_FILES
    target.mkdir(parents=True)
    shutil.copyfile(state / config, target / config)
    tensors = load_file(state / weights)
    save_file({k: v.zero_() if ".lora_B." in k else v for k, v in tensors.items()}, target / weights)
    return target


def over_links(pack: Pack, probes: Sequence[Probe], folder: Path, places: Mapping[str, Path]) -> Pack:
    """The pack with these probes, in a folder of links: an adapter lies in one of the `places`, or in the pack."""
    linked = replace(pack, path=folder, probes=tuple(probes))
    for name in linked.folders:
        link = folder / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(places.get(name, pack.adapter(name)).resolve(), target_is_directory=True)
    return linked
