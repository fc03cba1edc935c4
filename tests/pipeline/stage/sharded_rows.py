"""Rows for six shards, and a run on them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sqsd_filter.pipeline.report import FinishedReport
from sqsd_filter.pipeline.run import filter_dataset
from sqsd_filter.scoring.scorer import SQSDScorer
from tests.corpora import make_rows

# 660 rows are six shards, each with a few conversations of its own
ROWS = [row if k % 128 < 8 else {**make_rows(1)[0], "id": k} for k, row in enumerate(make_rows(660))]
LINES = [*ROWS[:200], b"broken", {"id": -1, "instruction": "?", "output": ""}, *ROWS[200:]]
SHARDS = 6


def run(source: Path, pack: Path, engine: Any, dest: str = "out") -> FinishedReport:
    return filter_dataset(source, dest, drop_top="5%", scorer=SQSDScorer(pack), engine=engine)
