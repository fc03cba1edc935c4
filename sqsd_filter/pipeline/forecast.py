"""The cost of a run, estimated before it starts."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

import numpy as np

from sqsd_filter.corpus.addresses import Opener, expand
from sqsd_filter.corpus.conversation import RowError
from sqsd_filter.corpus.sources import InputFile
from sqsd_filter.pipeline.job import stage_of, staged
from sqsd_filter.pipeline.options import Scoring
from sqsd_filter.pipeline.scores.store import ScoreStore
from sqsd_filter.pipeline.stage.scan import Scan, as_list
from sqsd_filter.pipeline.writing.destination import without
from sqsd_filter.pipeline.writing.one_file import file_form
from sqsd_filter.progress import Progress, Silent
from sqsd_filter.scoring.scorer import BatchedScorer
from sqsd_filter.storage.folder import Folder
from sqsd_filter.storage.layout import homes_of

if TYPE_CHECKING:
    from sqsd_filter.pipeline.options import Sources


TRIALS = (4, 16, 64)  # rows that are timed: more of them until that takes `ENOUGH` seconds
ENOUGH = 5.0  # a few short rows fill no micro-batches, and take longer than their share


class Forecast(TypedDict):
    """Rows by what a run would do with them, and what it would cost; `tokens` and `seconds` are estimates."""

    rows: int
    format: str
    to_score: int
    reused: int
    duplicates: int
    unreadable: int
    tokens: int
    passes: int
    seconds: float
    sampled: int
    dtype: str
    device: str
    inputs: list[InputFile]


def estimate(
    sources: Sources,
    dest: str | Path,
    scoring: Scoring,
    *,
    progress: Progress | None = None,
    sample: int = 200,
) -> Forecast:
    """The cost of a run into `dest`, without writing anything: tokens from `sample` of the rows that have no score
    yet, there or in the score store, and seconds from scoring as many of them as take some seconds."""
    scorer = scoring.chosen_scorer
    target = staged(stage_of(str(dest)), file_form(dest)) if "://" in str(dest) else Path(dest)
    homes = homes_of(target)
    with closing(Opener(streaming=scoring.streaming)) as opener:
        given = without(target, homes, expand(as_list(sources)))
        scan = Scan(opener.open(given), scoring.columns or scorer.columns, scoring.limit, progress or Silent())
        stores: list[str | Path] = [home / "scores" for home in homes]
        stores += [scoring.score_store] if scoring.score_store is not None else []
        return _estimate(scan, scorer, stores, sample)


def _estimate(scan: Scan, scorer: BatchedScorer, stores: Sequence[str | Path], sample: int) -> Forecast:
    all_of = scan.index.conversations
    settled = np.zeros(len(all_of.keys), dtype=bool)
    for location in stores:
        store = ScoreStore(Folder(location), scorer.settings(), scorer.values)
        settled |= store.lookup(all_of.keys).settled
    wanted = np.sort(all_of.first[~settled])
    chosen = set(wanted[np.linspace(0, len(wanted) - 1, min(sample, len(wanted))).astype(int)].tolist())
    turns = [
        scan.form.conversation(row.value)
        for row in scan.corpus.read(0, scan.corpus.n_rows, scan.form.columns)
        if row.index in chosen and row.value is not None
    ]
    lengths = [len(e) for e in scorer.encode(turns) if not isinstance(e, RowError)]
    mean = float(np.mean(lengths)) if lengths else 0.0
    scorer.check_device()
    trial, spent, tried = turns[:0], 0.0, 0
    if turns:
        scan.progress.start("timing a few rows", None)
        scorer.score(turns[:1])  # loads the model
        for size in TRIALS:
            if spent < ENOUGH and len(trial) < len(turns):
                trial = turns[:: max(1, len(turns) // size)][:size]
                began = time.perf_counter()
                tried = int(scorer.score(trial).tokens.sum())
                spent = time.perf_counter() - began
        scan.progress.finish()
    tokens = round(mean * len(wanted))
    return {
        "rows": scan.corpus.n_rows,
        "format": str(scan.form),
        "to_score": len(wanted),
        "reused": int(settled.sum()),
        "duplicates": len(all_of.rows) - len(all_of.keys),
        "unreadable": scan.corpus.n_rows - len(all_of.rows),
        "tokens": tokens,
        "passes": scorer.passes,
        "seconds": round(spent * tokens / max(1, tried), 1),
        "sampled": len(trial),
        "dtype": scorer.dtype,
        "device": scorer.device,
        "inputs": scan.corpus.inputs,
    }
