"""What a run would cost, told before it is started."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from sqsd_filter.corpus.addresses import Opener, expand
from sqsd_filter.corpus.conversation import RowError
from sqsd_filter.corpus.row_formats import Columns
from sqsd_filter.pipeline.job import stage_of
from sqsd_filter.pipeline.scores.store import ScoreStore
from sqsd_filter.pipeline.stage.scan import Scan, as_list
from sqsd_filter.pipeline.writing.destination import without
from sqsd_filter.progress import Progress, Silent
from sqsd_filter.scoring.scorer import BatchedScorer
from sqsd_filter.storage.folder import Folder


def estimate(
    sources: Any,
    dest: str | Path,
    scorer: BatchedScorer,
    *,
    score_store: str | Path | None = None,
    columns: Columns | None = None,
    streaming: bool = False,
    limit: int | None = None,
    progress: Progress | None = None,
    sample: int = 200,
    timed: int = 4,
) -> dict[str, Any]:
    """What a run into `dest` would cost, without writing anything: tokens from `sample` of the rows that have no score
    yet, there or in `score_store`, and seconds from scoring `timed` of them."""
    target = stage_of(str(dest)) / "out" if "://" in str(dest) else Path(dest)
    homes = [target / "sqsd", Path(f"{target}.sqsd")]
    with closing(Opener(streaming=streaming)) as opener:
        given = without(target, homes, expand(as_list(sources)))
        scan = Scan(opener.open(given), columns or scorer.columns, limit, progress or Silent())
        stores = [*(home / "scores" for home in homes), *([score_store] if score_store is not None else [])]
        return _estimate(scan, scorer, stores, sample, timed)


def _estimate(
    scan: Scan, scorer: BatchedScorer, stores: Sequence[str | Path], sample: int, timed: int
) -> dict[str, Any]:
    all_of = scan.index.conversations
    settled = np.zeros(len(all_of.keys), dtype=bool)
    for place in stores:
        store = ScoreStore(Folder(place), scorer.settings(), scorer.values)
        settled |= store.lookup(all_of.keys).settled
    wanted = np.sort(all_of.first[~settled])
    chosen = set(wanted[np.linspace(0, len(wanted) - 1, min(sample, len(wanted))).astype(int)].tolist())
    turns = [
        scan.form.conversation(row.value)
        for row in scan.corpus.read(0, scan.corpus.n_rows, scan.form.columns)
        if row.index in chosen and row.value is not None
    ]
    lengths = [len(e) for e in scorer.encoder.encode(turns) if not isinstance(e, RowError)]
    mean = float(np.mean(lengths)) if lengths else 0.0
    scorer.check_device()
    trial = turns[:: max(1, len(turns) // timed)][:timed]
    spent, tried = 0.0, 0
    if trial:
        scan.progress.start("timing a few rows", None)
        scorer.score(trial[:1])  # loads the model
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
