"""Can scores of this pack, model and machine be trusted? The same rows are scored in ways that should agree.

Each comparison tests one way against a plainer one: rows in a batch against each alone, bfloat16 against float32, an
attention kernel against the eager one, a GPU against the CPU, the fast computation against the dense one in float64.
One model is loaded at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

import numpy as np

from sqsd_filter.corpus.addresses import Opener, expand, peek
from sqsd_filter.corpus.conversation import Message, RowError
from sqsd_filter.corpus.row_formats import Columns
from sqsd_filter.errors import InputError, ModelError, UsageError
from sqsd_filter.pipeline.comparison import EXACT, FEWEST, RANK, SIDES, ScoreDifference, compare
from sqsd_filter.pipeline.selecting.selection import Cut
from sqsd_filter.pipeline.stage.engines import ProgressCallbacks
from sqsd_filter.progress import Progress, Silent
from sqsd_filter.scoring.placement import free_memory, release_memory
from sqsd_filter.scoring.results import Scores
from sqsd_filter.scoring.scorer import Scorer, SQSDScorer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ROWS = Path(__file__).with_name("check_rows.jsonl")
LIMIT = 24  # rows, unless more are asked for
FEW = 4  # rows for a slow way: on a CPU instead of a GPU, or the dense computation
HALVES = "bfloat16 against float32"  # without it, no score in bfloat16 can be trusted
GIB = 1 << 30


class Comparison(ScoreDifference):
    """`used` says whether the scorer as asked for computes in the way that was tested, `fix` names the flag to use."""

    name: str
    used: bool
    fix: str


class Skipped(TypedDict):
    """A way that could not be tested."""

    name: str
    why: str


class CheckedPack(TypedDict):
    name: str
    fingerprint: str
    base_model: str
    risk: str | None
    shared_state: str | None


class Tolerance(TypedDict):
    exact: float
    rank: float
    sides: float


class CheckReport(TypedDict):
    """`trusted` is whether all comparisons that are used are ok and none is `missing`."""

    trusted: bool
    missing: list[str]
    pack: CheckedPack
    dtype: str
    device: str
    attention: str
    rows: int
    unscored: int
    cut: str
    tolerance: Tolerance
    comparisons: list[Comparison]
    skipped: list[Skipped]
    unreadable: int


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
) -> CheckReport:
    """Score rows with `scorer` (default: `SQSDScorer(pack)`) as it is set up, and in other ways, and compare.

    The rows are the first `limit` of `rows`, a source as for `filter_dataset`; the default is 24 that come with this
    package. Scores in bfloat16 are trusted only if those in float32 agree: where these can't be computed, that
    comparison is `missing`. Raises `InputError` where fewer than 8 rows can be scored, and what `SQSDScorer` raises.
    """
    cut = Cut.of(drop_top)
    turns, unreadable = _conversations(rows or ROWS, columns, limit or LIMIT, streaming)
    checked = (scorer or SQSDScorer(pack)).changed()
    return _Check(checked, turns, unreadable, cut, progress or Silent()).run()


def _conversations(
    source: str | Path, columns: Columns | None, limit: int, streaming: bool
) -> tuple[list[list[Message]], int]:
    """The conversations in the first rows of a source, and the number of rows that have none."""
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


class _LargestBatch(ProgressCallbacks):
    """Notes the size of the largest batch."""

    largest = 0

    def starting(self, rows: Sequence[int]) -> None:
        self.largest = max(self.largest, len(rows))


class _Check:
    """Makes the comparisons one after the other."""

    def __init__(
        self, scorer: SQSDScorer, turns: list[list[Message]], unreadable: int, cut: Cut, progress: Progress
    ) -> None:
        self.scorer, self.turns, self.unreadable, self.cut, self.progress = scorer, turns, unreadable, cut, progress
        self.comparisons: list[Comparison] = []
        self.skipped: list[Skipped] = []
        self.parameters = 0  # of the model, once it was loaded

    def run(self) -> CheckReport:
        scorer, half = self.scorer, self.scorer.dtype == "bfloat16"
        asked, kernel, kernels = self._as_asked()
        n = int(np.isfinite(asked.risk).sum())
        anywhere = kernel in ("eager", "sdpa")  # others may be for a GPU, or for 16 bits, only
        full = {"dtype": "float32"} | ({} if anywhere else {"attention": "eager"})
        exact = self._other("float32", full) if half else asked
        plain, device = exact, scorer.device
        if plain is None and device.startswith("cuda"):  # slow, but it decides
            plain, device = self._other("float32 on the CPU", {"device": "cpu", **full}), "cpu"
        other = asked if half else self._other("bfloat16", {"dtype": "bfloat16"})
        self._compare(HALVES, other, plain, fix="--dtype float32", exact=False, used=half)
        eager = asked if kernel == "eager" else self._other("eager attention", {"attention": "eager"})
        for name in kernels:
            scores = asked if name == kernel else self._other(f"{name} attention", {"attention": name})
            self._compare(
                f"{name} against eager attention",
                scores,
                eager,
                fix="--attention eager",
                exact=not half,
                used=name == kernel,
            )
        few = _spread(asked)
        if scorer.device.startswith("cuda") and exact is not None:
            there = self._other("the CPU", {"device": "cpu", **full}, few)
            self._compare("cuda against cpu", _take(exact, few), there, fix="--device cpu")
        elif scorer.device.startswith("cuda"):
            self.skipped.append({"name": "cuda against cpu", "why": "there are no scores in float32 on the GPU"})
        if plain is not None:
            dense = self._dense(few, device)
            self._compare("fast against dense", _take(plain, few), dense, fix="--pack or --model with another model")
        else:
            self.skipped.append({"name": "the dense form", "why": "there are no scores in float32"})
        release_memory()
        self.progress.finish()
        used = {comparison["name"]: comparison["ok"] for comparison in self.comparisons if comparison["used"]}
        missing = [HALVES] if half and HALVES not in used else []
        return {
            "trusted": bool(used) and all(used.values()) and not missing,
            "missing": missing,
            "pack": {
                "name": scorer.pack.name,
                "fingerprint": scorer.pack.fingerprint,
                "base_model": scorer.base_model,
                "risk": scorer.pack.risk,
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
            "unreadable": self.unreadable,
        }

    def _as_asked(self) -> tuple[Scores, str, list[str]]:
        """The scores by the scorer as it is set up, its attention kernel, and the kernels other than eager that the
        model supports. Compares the scores with those of each row alone."""
        scorer, callbacks = self.scorer.changed(), _LargestBatch(self.progress)
        self.progress.start("as asked", len(self.turns))
        asked = scorer.score(self.turns, callbacks)
        if (scored := int(np.isfinite(asked.risk).sum())) < FEWEST:
            raise InputError(f"Only {scored} rows can be scored, which is too few to compare: give at least {FEWEST}.")
        name = "batched against alone"
        if callbacks.largest > 1:
            lone = ProgressCallbacks(self.progress)
            lone.apart = frozenset(range(len(self.turns)))
            self.progress.start("each row alone", len(self.turns))
            alone = scorer.score(self.turns, lone)
            self._compare(name, asked, alone, fix="--token-budget 1", exact=scorer.dtype != "bfloat16")
        else:
            self.skipped.append({"name": name, "why": "no batch holds two of these rows"})
        model = scorer.model.model
        self.parameters = sum(p.numel() for p in model.parameters())
        kernel = str(model.config._attn_implementation)  # noqa: SLF001  (transformers has no public name for it)
        return asked, kernel, list(dict.fromkeys(name for name in (kernel, *_kernels(model)) if name != "eager"))

    def _other(self, phase: str, settings: Mapping[str, str], rows: Sequence[int] | None = None) -> Scores | None:
        """The scores by a scorer with other settings; None where it can't be set up so, which is noted."""
        return self._score(phase, rows, lambda: self.scorer.changed(**settings))

    def _score(self, phase: str, rows: Sequence[int] | None, make: Callable[[], Scorer]) -> Scores | None:
        from sqsd_filter.scoring.batching import is_out_of_memory

        release_memory()  # of the model before
        turns = self.turns if rows is None else [self.turns[k] for k in rows]
        self.progress.start(phase, len(turns))
        try:
            return make().score(turns, ProgressCallbacks(self.progress))
        except (ModelError, UsageError) as problem:  # the model was loaded before: it can't run in this way
            self.skipped.append({"name": phase, "why": str(problem)})
        except Exception as problem:
            if not is_out_of_memory(problem):
                raise
            self.skipped.append({"name": phase, "why": "it does not fit into the device's memory"})
        return None

    def _dense(self, rows: Sequence[int], device: str) -> Scores | None:
        """The scores in the dense form; None, which is noted, where that needs more memory than there is: a machine
        would rather kill the process than say so."""
        from sqsd_filter.scoring.reference import ReferenceScorer

        own = self.scorer
        other = None if own.base_model == own.pack.base_model else own.base_model
        # In float32 the dense form would be the less exact one of the two.
        device = "cpu" if device == "mps" else device  # which has no float64
        scorer = ReferenceScorer(
            own.pack,
            other,
            device=device,
            dtype="float64",
            max_length=own.max_length,
            trust_remote_code=own.trust_remote_code,
        )
        release_memory()  # of the model before
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
        fix: str,
        exact: bool = True,
        used: bool = True,
    ) -> None:
        if tested is not None and plainer is not None:
            difference = compare(tested, plainer, self.cut, exact)
            self.comparisons.append({"name": name, "used": used, **difference, "fix": fix})


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


def _kernels(model: PreTrainedModel) -> list[str]:
    """The attention kernels, as transformers names them, that this model supports on its device and in its dtype."""
    import torch
    from transformers.utils.import_utils import is_flash_attn_2_available

    kernels = ["sdpa"] if getattr(model, "_supports_sdpa", False) else []
    halves = model.device.type == "cuda" and model.dtype in (torch.bfloat16, torch.float16)
    if halves and getattr(model, "_supports_flash_attn", False) and is_flash_attn_2_available():
        kernels.append("flash_attention_2")
    return kernels
