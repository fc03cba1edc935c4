"""What a run would cost, told before it is started."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sqsd_filter.pipeline.scan import Columns, Scan, as_paths
from sqsd_filter.progress import Progress, Silent
from sqsd_filter.scoring.conversation import RowError
from sqsd_filter.scoring.scorer import SQSDScorer


def estimate(
    sources: str | Path | Sequence[str | Path],
    scorer: SQSDScorer,
    *,
    columns: Columns | None = None,
    limit: int | None = None,
    progress: Progress | None = None,
    sample: int = 200,
    timed: int = 4,
) -> dict[str, Any]:
    """What a run would cost, without writing anything: tokens from `sample` rows, seconds from scoring `timed`."""
    scan = Scan(as_paths(sources), columns or Columns(), limit, progress or Silent())
    all_of = scan.index.conversations
    wanted = np.sort(all_of.first)
    chosen = set(wanted[np.linspace(0, len(wanted) - 1, min(sample, len(wanted))).astype(int)].tolist())
    turns = [
        scan.form.conversation(row.value)
        for row in scan.corpus.read(0, scan.corpus.n_rows, scan.form.columns)
        if row.index in chosen and row.value is not None
    ]
    lengths = [len(e) for e in scorer.encoder.encode(turns) if not isinstance(e, RowError)]
    mean = float(np.mean(lengths)) if lengths else 0.0
    scorer.check_device()
    scan.progress.start("timing a few rows", None)
    trial = turns[:: max(1, len(turns) // timed)][:timed]
    scorer.score(trial[:1])  # loads the model
    began = time.perf_counter()
    tried = scorer.score(trial)
    spent = time.perf_counter() - began
    scan.progress.finish()
    tokens = round(mean * len(wanted))
    return {
        "rows": scan.corpus.n_rows,
        "format": str(scan.form),
        "to_score": len(wanted),
        "duplicates": len(all_of.rows) - len(wanted),
        "unreadable": scan.corpus.n_rows - len(all_of.rows),
        "tokens": tokens,
        "passes": len({p.at for p in scorer.pack.probes}),
        "seconds": round(spent * tokens / max(1, int(tried.tokens.sum())), 1),
        "sampled": len(trial),
        "dtype": scorer.dtype,
        "device": scorer.device,
        "inputs": scan.corpus.inputs,
    }
