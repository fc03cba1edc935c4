"""Can a score of this pack, model and machine be trusted? The same rows are scored in ways that should agree.

Each comparison holds one way against a plainer one: rows in a batch against each alone, bfloat16 against float32, an
attention kernel against the eager one, a GPU against the CPU, the fast form against the dense one in float64. One model
is loaded at a time.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from sqsd_filter.corpus.addresses import Opener, expand, peek
from sqsd_filter.corpus.conversation import Message, RowError
from sqsd_filter.corpus.row_formats import Columns
from sqsd_filter.errors import InputError, ModelError, UsageError
from sqsd_filter.pipeline.selecting.selection import DROPPED, Cut, cut_rows
from sqsd_filter.pipeline.stage.engines import Telling
from sqsd_filter.progress import Progress, Silent
from sqsd_filter.scoring.results import Scores
from sqsd_filter.scoring.scorer import SQSDScorer
from sqsd_filter.statistics import spearman

ROWS = Path(__file__).with_name("check_rows.jsonl")
LIMIT = 24  # rows, unless more are asked for
FEWEST = 8  # rows that say anything of ranks
FEW = 4  # rows for a slow way: on a CPU instead of a GPU, or in the dense form
EXACT = 1e-4  # the largest difference of a risk or a probe's value between two ways in float32
RANK = 0.99  # the least rank correlation of the risk where one way is in bfloat16
SIDES = 0.1  # there, of the dropped rows so many (at least one) may change places with kept ones
HALVES = "bfloat16 against float32"  # without which no score in bfloat16 can be trusted
GIB = 1 << 30


def check_pack(
    pack: str | Path = "smollm2-135m",
    rows: str | Path | None = None,
    *,
    scorer: SQSDScorer | None = None,
    columns: Columns | None = None,
    limit: int | None = None,
    streaming: bool = False,
    drop_top: str | float = "5%",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Score the first `limit` of `rows` (a source as for `filter_dataset`; default: 24 that come with this package) as
    `scorer`, which takes the place of `SQSDScorer(pack)`, is set up, and in other ways, and compare.

    Returns the "comparisons", each "ok" or not, and whether all of those that are "used" by such a scorer are:
    "trusted". Scores in bfloat16 are not where those in float32, which would decide, can't be had: then that comparison
    is "missing". Raises `InputError` where fewer than 8 rows can be scored, and what `SQSDScorer` raises.
    """
    cut, meter = Cut.of(drop_top), progress or Silent()
    turns, unreadable = _conversations(rows or ROWS, columns, limit or LIMIT, streaming)
    return _Check((scorer or SQSDScorer(pack)).changed(), turns, cut, meter).run() | {"unreadable": unreadable}


def _conversations(
    source: str | Path, columns: Columns | None, limit: int, streaming: bool
) -> tuple[list[list[Message]], int]:
    """The conversations among the first rows of a source, and how many rows are none."""
    with closing(Opener(streaming=streaming)) as opener:
        rows = peek(opener.open(expand([source])), limit)
    form = (columns or Columns()).choose(rows)
    turns = []
    for row in rows:
        try:
            turns.append(form.conversation(row))
        except RowError:
            continue  # counted below
    return turns, len(rows) - len(turns)


class _Batches(Telling):
    """Remembers the largest batch."""

    largest = 0

    def starting(self, rows: Sequence[int]) -> None:
        self.largest = max(self.largest, len(rows))


class _Check:
    """The comparisons, as they are made, and those that could not be."""

    def __init__(self, scorer: SQSDScorer, turns: list[list[Message]], cut: Cut, progress: Progress) -> None:
        self.scorer, self.turns, self.cut, self.progress = scorer, turns, cut, progress
        self.comparisons: list[dict[str, Any]] = []
        self.skipped: list[dict[str, str]] = []
        self.parameters = 0  # of the model, once it was loaded

    def run(self) -> dict[str, Any]:
        scorer, half = self.scorer, self.scorer.dtype == "bfloat16"
        asked, kernel, kernels = self._as_asked()
        n = int(np.isfinite(asked.risk).sum())
        anywhere = kernel in ("eager", "sdpa")  # others may be for a GPU, or for 16 bits, only
        full: dict[str, Any] = {"dtype": "float32"} | ({} if anywhere else {"attention": "eager"})
        exact = self._other("float32", **full) if half else asked
        plain, device = exact, scorer.device
        if plain is None and device.startswith("cuda"):  # slow, but it decides
            plain, device = self._other("float32 on the CPU", device="cpu", **full), "cpu"
        other = asked if half else self._other("bfloat16", dtype="bfloat16")
        self._compare(HALVES, other, plain, mend="--dtype float32", exact=False, used=half)
        eager = asked if kernel == "eager" else self._other("eager attention", attention="eager")
        for name in kernels:
            scores = asked if name == kernel else self._other(f"{name} attention", attention=name)
            how: dict[str, Any] = {"mend": "--attention eager", "exact": not half, "used": name == kernel}
            self._compare(f"{name} against eager attention", scores, eager, **how)
        few = _spread(asked)
        if scorer.device.startswith("cuda") and exact is not None:
            there = self._other("the CPU", few, device="cpu", **full)
            self._compare("cuda against cpu", _take(exact, few), there, mend="--device cpu")
        elif scorer.device.startswith("cuda"):
            self.skipped.append({"name": "cuda against cpu", "why": "there are no scores in float32 on the GPU"})
        if plain is not None:
            dense = self._dense(few, device)
            self._compare("fast against dense", _take(plain, few), dense, mend="--pack or --model with another model")
        else:
            self.skipped.append({"name": "the dense form", "why": "there are no scores in float32"})
        _free()
        self.progress.finish()
        used = {found["name"]: found["ok"] for found in self.comparisons if found["used"]}
        missing = [HALVES] if half and HALVES not in used else []
        return {
            "trusted": bool(used) and all(used.values()) and not missing,
            "missing": missing,
            "pack": {
                "name": scorer.pack.name,
                "fingerprint": scorer.pack.fingerprint,
                "base_model": scorer.base_model,
                "shared_state": scorer.pack.shared_state,
            },
            "dtype": scorer.dtype,
            "device": scorer.device,
            "attention": kernel,
            "rows": n,
            "unscored": len(self.turns) - n,
            "cut": str(self.cut),
            "tolerance": {"exact": EXACT, "rank": RANK, "sides": SIDES},
            "comparisons": self.comparisons,
            "skipped": self.skipped,
        }

    def _as_asked(self) -> tuple[Scores, str, list[str]]:
        """The scores as such a scorer gives them, after they were compared with those of each row alone; the attention
        kernel they were made with, and those other than eager that can be had."""
        scorer, watch = self.scorer.changed(), _Batches(self.progress)
        self.progress.start("as asked", len(self.turns))
        asked = scorer.score(self.turns, watch)
        if (scored := int(np.isfinite(asked.risk).sum())) < FEWEST:
            raise InputError(f"Only {scored} rows can be scored, which says too little: give at least {FEWEST}.")
        name = "batched against alone"
        if watch.largest > 1:
            lone = Telling(self.progress)
            lone.apart = frozenset(range(len(self.turns)))
            self.progress.start("each row alone", len(self.turns))
            alone = scorer.score(self.turns, lone)
            self._compare(name, asked, alone, mend="--token-budget 1", exact=scorer.dtype != "bfloat16")
        else:
            self.skipped.append({"name": name, "why": "no batch holds two of these rows"})
        model = scorer.engine.gradient.model
        self.parameters = sum(p.numel() for p in model.parameters())
        kernel = str(model.config._attn_implementation)
        return asked, kernel, list(dict.fromkeys(name for name in (kernel, *_kernels(model)) if name != "eager"))

    def _other(self, phase: str, rows: Sequence[int] | None = None, **settings: str) -> Scores | None:
        """The scores of a scorer with other settings; None where there can be none, which is noted."""
        return self._score(phase, rows, lambda: self.scorer.changed(**settings))

    def _score(self, phase: str, rows: Sequence[int] | None, make: Callable[[], Any]) -> Scores | None:
        from sqsd_filter.scoring.batching import is_out_of_memory

        _free()  # of the model before
        turns = self.turns if rows is None else [self.turns[k] for k in rows]
        self.progress.start(phase, len(turns))
        try:
            scores: Scores = make().score(turns, Telling(self.progress))
            return scores
        except (ModelError, UsageError) as problem:  # the model has been loaded before: this way is not open to it
            self.skipped.append({"name": phase, "why": str(problem)})
        except Exception as problem:
            if not is_out_of_memory(problem):
                raise
            self.skipped.append({"name": phase, "why": "it does not fit into the device's memory"})
        return None

    def _dense(self, rows: Sequence[int], device: str) -> Scores | None:
        """The scores in the dense form; None, which is noted, where that needs more memory than there is: a machine
        would rather kill the process than say so."""
        from sqsd_filter.scoring.placement import free_memory
        from sqsd_filter.scoring.reference import ReferenceScorer

        own = self.scorer
        how: dict[str, Any] = {"max_length": own.max_length, "trust_remote_code": own.trust_remote_code}
        other = None if own.base_model == own.pack.base_model else own.base_model
        # In float32 the dense form would be the less exact one of the two.
        device = "cpu" if device == "mps" else device  # which has no float64
        scorer = ReferenceScorer(own.pack, other, device, "float64", **how)
        _free()  # of the model before
        need, free = 8 * self.parameters + scorer.dense_bytes, free_memory(device)
        if need > free:
            why = f"it takes {need / GIB:,.1f} GiB of memory, of which {free / GIB:,.1f} are free"
            self.skipped.append({"name": "the dense form", "why": why})
            return None
        return self._score("the dense form", rows, lambda: scorer)

    def _compare(
        self,
        name: str,
        tested: Scores | None,
        plainer: Scores | None,
        *,
        mend: str,
        exact: bool = True,
        used: bool = True,
    ) -> None:
        if tested is not None and plainer is not None:
            self.comparisons.append(
                {"name": name, "used": used, **compare(tested, plainer, self.cut, exact), "mend": mend}
            )


def compare(tested: Scores, plainer: Scores, cut: Cut, exact: bool) -> dict[str, Any]:
    """Hold scores of the same rows against each other.

    "difference" has the largest |Δ| of the risk and of each probe among the rows with both scores, "rank" Spearman's
    correlation of their risks and "sides" how many rows only one of the two drops: both None below `FEWEST` rows. Then
    whether that is "ok": when `exact`, by the differences, else by rank and sides; and "why" not.
    """
    fine, plain = np.isfinite(tested.risk), np.isfinite(plainer.risk)
    both = fine & plain
    pairs = {"risk": (tested.risk, plainer.risk)}
    pairs |= {name: (values, plainer.probes[name]) for name, values in tested.probes.items()}
    difference = {name: float(np.abs(a - b)[both].max(initial=0.0)) for name, (a, b) in pairs.items()}
    lone, n = int((fine != plain).sum()), int(both.sum())
    rank = sides = None
    if n >= FEWEST:
        rank = _agreement(tested.risk[both], plainer.risk[both])
        sides = int((_dropped(tested, both, cut) != _dropped(plainer, both, cut)).sum())
    why, worst = "", max(difference.values())
    if lone:
        why = f"{lone} of {len(both)} rows have a score in one way only"
    elif exact and worst > EXACT:
        why = f"values differ by up to {worst:.2g}, more than {EXACT:g}"
    elif not exact and rank is not None and rank < RANK:
        why = f"the rank correlation is {rank:.4f}, less than {RANK:g}"
    elif not exact and sides is not None and sides > 2 * max(1, int(SIDES * cut.count(tested.risk[both]))):
        why = f"{sides} of {n} rows change sides"
    return {"rows": n, "difference": difference, "rank": rank, "sides": sides, "ok": not why, "why": why}


def _agreement(a_n: np.ndarray, b_n: np.ndarray) -> float:
    """The rank correlation; where one side does not vary, 1 if the other does not either, else 0."""
    found = spearman(a_n, b_n)
    return float(np.ptp(a_n) == np.ptp(b_n)) if found is None else found


def _dropped(scores: Scores, rows: np.ndarray, cut: Cut) -> np.ndarray:
    """Which of all rows are dropped when these (n,) bool are cut: (n,) bool."""
    dropped: np.ndarray = cut_rows(scores.risk, rows, cut).fate == DROPPED
    return dropped


def _spread(scores: Scores) -> list[int]:
    """A few rows from the shortest to the longest of those that have a score, in row order."""
    rows = np.flatnonzero(np.isfinite(scores.risk))
    by_length = rows[np.argsort(scores.tokens[rows], kind="stable")]
    chosen: list[int] = sorted(by_length[np.linspace(0, len(rows) - 1, FEW).astype(int)].tolist())
    return chosen


def _take(scores: Scores, rows: Sequence[int]) -> Scores:
    at = list(rows)
    probes = {name: values[at] for name, values in scores.probes.items()}
    status, detail = ([column[k] for k in at] for column in (scores.status, scores.detail))
    return Scores(probes, scores.risk[at], status, detail, scores.tokens[at])


def _kernels(model: Any) -> list[str]:
    """The attention kernels, as transformers names them, that this model can run with as it is loaded."""
    import torch
    from transformers.utils import is_flash_attn_2_available

    found = ["sdpa"] if getattr(model, "_supports_sdpa", False) else []
    halves = model.device.type == "cuda" and model.dtype in (torch.bfloat16, torch.float16)
    if halves and getattr(model, "_supports_flash_attn", False) and is_flash_attn_2_available():
        found.append("flash_attention_2")
    return found


def _free() -> None:
    """Give back what a model took that nothing refers to any more."""
    import torch

    gc.collect()
    torch.cuda.empty_cache()  # does nothing where no GPU was used
