"""Which state is direction-sensitive: at which checkpoint of a benign fine-tune should gradients be taken?

All candidates are measured on the same rows; benign ones suffice. In module m, row n has the contrast

    c_nm = Σ_p w_p cos_npm

over the pack's probes p with their weights w_p, each direction taken at the candidate. Its sum over the modules is the
risk with every probe at this state, so that no other state hides a weakness of this one. The criterion, over rows, is

    sensitivity = M / (M - 1) · Σ_{m ≠ m'} cov(e_m, e_m') / var(Σ_m c_m)

with M modules and e_m the residual of c_m after a linear fit on the rank of the answer's length. It is the share of the
variance between rows that is neither noise, on which modules don't agree, nor length. For e = c it is Cronbach's alpha,
the mean reliability over all ways to split the modules into two halves, so no seed is needed.
The record has further figures, because each of them alone can mislead:

- `reliability` (Cronbach's alpha): highest for a state that measures little but the length of answers.
- `length` (rank correlation with it): zero for noise.
- `stability` (rank correlation with the previous candidate): as the learning rate falls, checkpoints become alike, good
  or bad.
- `probes`, each direction alone: a state that only sees what all rows and directions have in common is consistent in
  each of them. In the contrast that cancels and leaves noise.
- `directions` (rank correlation of the danger and safety projections): near zero if both are noise.
- `auc` needs labels, and is 1 for every candidate if the rows are few and easy. It is the only figure that sees the
  sign: whether unsafe rows have the higher contrast.

The fresh state (B = 0, the first checkpoint's A) is measured for comparison and never chosen: it sees G_B·A alone, and
consistency does not show what a state is blind to. Of equals, to four decimals, the earlier checkpoint is chosen.
"""

from __future__ import annotations

import shutil
import tempfile
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from sqsd_filter.corpus.conversation import NONFINITE
from sqsd_filter.directions.checkpoints import by_step
from sqsd_filter.directions.state_rows import Conversations, check_rows, usable
from sqsd_filter.errors import InputError
from sqsd_filter.progress import Progress, Silent
from sqsd_filter.scoring.chat_encoder import Encoded
from sqsd_filter.scoring.pack import ADAPTER_FILES, Pack, Probe
from sqsd_filter.scoring.scorer import FAILED, OUT_OF_MEMORY, SQSDScorer
from sqsd_filter.statistics import auc, ranks, spearman

FRESH = "fresh"
_CANDIDATES = ".states"  # the folder of candidates in a linked pack; no adapter of a pack can have this name


@dataclass(frozen=True)
class Candidate:
    """A state to compare: a LoRA folder, and the number of updates after which it was written."""

    name: str
    step: int
    folder: Path


def checkpoints(run: Path) -> list[Candidate]:
    """The LoRA checkpoints in a training run's output folder, by step. Raises `InputError` if there are none."""
    candidates = [
        Candidate(folder.name, step, folder)
        for step, folder in by_step(run)
        if all((folder / file).is_file() for file in ADAPTER_FILES)
    ]
    if not candidates:
        raise InputError(
            f"{run} has no folder checkpoint-<step> with a LoRA adapter: name the output folder of a run that saved "
            "checkpoints (pack build keeps them with keep_checkpoints = true)."
        )
    return candidates


def compare_states(
    pack: Pack,
    candidates: Sequence[Candidate],
    conversations: Conversations,
    positive: Sequence[bool] | None = None,
    *,
    answer_tokens: int | None = None,
    dtype: str | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure the candidates and a fresh state with the pack's directions on these rows.

    Returns the record, with the chosen candidate's name under `chosen`. One model is loaded; each row takes one pass
    per candidate. `positive` marks rows that should have a higher risk. `answer_tokens` cuts all answers to this length
    and leaves out rows with shorter ones. Raises `InputError` as `state_rows.usable` does.
    """
    progress = progress or Silent()
    with tempfile.TemporaryDirectory(prefix="sqsd-states-") as folder:
        fresh = Candidate(FRESH, 0, fresh_state(candidates[0].folder, Path(folder) / f".{FRESH}"))
        everything = [fresh, *candidates]
        adapters = {f"{_CANDIDATES}/{c.name}": c.folder for c in everything}
        probes = [Probe(f"{p.name}|{at}", p.weight, p.direction, at) for at in adapters for p in pack.probes]
        linked = over_links(pack, probes, Path(folder), adapters)
        scorer = SQSDScorer(linked, dtype=dtype)
        rows, reasons = usable(scorer, conversations, positive, answer_tokens)
        progress.note(f"measuring {len(everything)} states on {len(rows)} rows")
        progress.start("measuring states", len(rows))
        cosines = _cosines(scorer, rows, reasons, progress)
        progress.finish()
    marks_n = check_rows(cosines, conversations, positive, reasons)
    tokens_n = np.array([int(rows[k].answer.sum()) for k in cosines])
    table: list[dict[str, Any]] = []
    before: np.ndarray | None = None
    for candidate, at in zip(everything, adapters, strict=True):
        cos_npm = np.stack([by_state[at] for by_state in cosines.values()])
        parts = {p.name: p.weight * cos_npm[:, k] for k, p in enumerate(pack.probes)}
        contrast_nm = np.sum(list(parts.values()), axis=0)
        risk_n = contrast_nm.sum(-1)
        table.append(
            {
                "state": candidate.name,
                "step": candidate.step,
                **_figures(contrast_nm, tokens_n, marks_n),
                "stability": None if before is None else _rounded(spearman(risk_n, before)),
                "directions": _danger_safety_correlation(pack, parts),
                "probes": {name: _figures(part_nm, tokens_n, marks_n) for name, part_nm in parts.items()},
            }
        )
        before = risk_n
    best = min(table[1:], key=lambda entry: (-entry["sensitivity"], entry["step"]))
    if best["sensitivity"] <= 0:
        progress.note("no checkpoint distinguishes these rows by more than noise and length: don't trust the choice")
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


def _cosines(
    scorer: SQSDScorer, rows: Mapping[int, Encoded], reasons: Counter[str], progress: Progress
) -> dict[int, dict[str, np.ndarray]]:
    """Each row's cosines (p, m) at every state, in the order of the rows. Rows that fail are counted in `reasons`."""
    from sqsd_filter.scoring.batching import micro_batches, retry_in_halves, run_parallel

    model, numbers, lock = scorer.model, list(rows), threading.Lock()
    measured: dict[int, dict[str, np.ndarray]] = {}

    def run(members: list[int]) -> None:
        cosines = {at: c.double().cpu().numpy() for (at, _), c in model.cosines([rows[k] for k in members]).items()}
        with lock:
            for n, k in enumerate(members):
                measured[k] = {at: cos_bpm[n] for at, cos_bpm in cosines.items()}
            progress.advance(len(members), sum(len(rows[k]) for k in members))

    def give_up(_row: int, error: str) -> None:
        with lock:
            reasons[FAILED if error else OUT_OF_MEMORY] += 1

    work = [
        [numbers[m] for m in members]
        for members in micro_batches([len(e) for e in rows.values()], model.default_budget)
    ]
    run_parallel(lambda members: retry_in_halves(run, members, give_up), work, model.workers)
    finite = {k for k, at in measured.items() if all(np.isfinite(cos).all() for cos in at.values())}
    reasons.update([NONFINITE] * (len(measured) - len(finite)))
    return {k: measured[k] for k in numbers if k in finite}


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


def _danger_safety_correlation(pack: Pack, parts: Mapping[str, np.ndarray]) -> float | None:
    """Rank correlation of the danger and the safety projections; None if the pack has one kind only."""
    danger = [parts[p.name].sum(-1) for p in pack.probes if p.weight > 0]
    safety = [-parts[p.name].sum(-1) for p in pack.probes if p.weight < 0]
    return _rounded(spearman(np.sum(danger, axis=0), np.sum(safety, axis=0))) if danger and safety else None


def sensitivity(modules_nm: np.ndarray, tokens_n: np.ndarray) -> float:
    """The criterion above for the contrasts (n, m) of n rows in m modules; 0 if the rows' sums are all equal."""
    length_n = ranks(tokens_n) - (len(tokens_n) + 1) / 2
    free_nm = modules_nm - modules_nm.mean(0)
    if length_n.any():
        free_nm = free_nm - np.outer(length_n, length_n @ free_nm / (length_n @ length_n))
    return _shared(free_nm, modules_nm)


def reliability(modules_nm: np.ndarray) -> float:
    """Cronbach's alpha of the values (n, m) of n rows in m modules; 0 if the rows' sums are all equal."""
    return _shared(modules_nm, modules_nm)


def _shared(part_nm: np.ndarray, whole_nm: np.ndarray) -> float:
    """The share of the variance of `whole_nm`'s sums that comes from the covariance between modules of `part_nm`."""
    modules, variance = part_nm.shape[1], whole_nm.sum(-1).var()
    common = part_nm.sum(-1).var() - part_nm.var(axis=0).sum()
    return float(modules / (modules - 1) * common / variance) if modules > 1 and variance > 0 else 0.0


# ------------------------------------------------------------------------------------------------ folders


def fresh_state(state: Path, target: Path) -> Path:
    """A copy of a LoRA folder with B = 0, as before the first update."""
    from safetensors.torch import load_file, save_file

    config_file, tensors_file = ADAPTER_FILES
    target.mkdir(parents=True)
    shutil.copyfile(state / config_file, target / config_file)
    tensors = load_file(state / tensors_file)
    save_file({k: v.zero_() if ".lora_B." in k else v for k, v in tensors.items()}, target / tensors_file)
    return target


def over_links(pack: Pack, probes: Sequence[Probe], folder: Path, adapters: Mapping[str, Path]) -> Pack:
    """The pack with these probes, as a folder of links to `adapters` by name, and to the pack's own for the others."""
    linked = replace(pack.alone, path=folder, probes=tuple(probes))
    for name in linked.folders:
        link = folder / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(adapters.get(name, pack.adapter(name)).resolve(), target_is_directory=True)
    return linked
