"""Exports of a corpus with made-up scores, and the files that they wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sqsd_filter.corpus.sources import Corpus
from sqsd_filter.pipeline.report import Written
from sqsd_filter.pipeline.writing.export import check_columns, export_splits
from sqsd_filter.pipeline.writing.writers import Output
from sqsd_filter.progress import Silent
from sqsd_filter.storage.layout import Layout, home_in
from tests.corpora import by_hand

SCORES = ["sqsd_risk", "sqsd_danger", "sqsd_safety", "sqsd_status"]


def export(
    corpus: Corpus, fates: list[int], root: Path, to: str, shard_size: int = 1, with_scores: bool = False, **more: Any
) -> Written:
    output = Output(to, shard_size, with_scores)
    check_columns(corpus, output)
    return export_splits(*by_hand(corpus, fates, **more), Layout(root, home_in(root)), output, Silent())


def paths(root: Path, report: Written, config: str, split: str = "train") -> list[Path]:
    return [root / f["path"] for f in report["files"] if (f["config"], f["split"]) == (config, split)]


def raw_lines(root: Path, report: Written, config: str) -> list[bytes]:
    return [line for path in paths(root, report, config) for line in path.read_bytes().split(b"\n")[:-1]]
