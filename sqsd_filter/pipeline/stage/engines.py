"""What an engine is, and the one that scores shards in this process; `ray_engine` has the other.

All engines give the same bytes: micro-batches form inside a shard, and their scores depend on nothing outside it.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Protocol

from sqsd_filter.corpus.row_formats import RowFormat
from sqsd_filter.corpus.sources import Corpus
from sqsd_filter.pipeline.report import EngineFacts
from sqsd_filter.pipeline.stage.shards import Shard, score_shard
from sqsd_filter.progress import Progress
from sqsd_filter.scoring.results import Scores, ScoringCallbacks
from sqsd_filter.scoring.scorer import BatchedScorer

ScoredShard = tuple[Shard, list[bytes], Scores]


class Engine(Protocol):
    """Scores shards, in any order; each comes back once."""

    def prepare(self, scorer: BatchedScorer) -> BatchedScorer:
        """The scorer for this engine's devices. Raises `UsageError` where it can't use them, `SQSDError` where it
        can't reach them."""

    def score(
        self, corpus: Corpus, form: RowFormat, scorer: BatchedScorer, shards: Sequence[Shard], progress: Progress
    ) -> Generator[ScoredShard]:
        """Keys and scores of each shard, as soon as it is done."""

    def facts(self) -> EngineFacts:
        """The engine, as the report names it."""

    def close(self) -> None:
        """Release its processes."""


class LocalEngine:
    """In this process, shard after shard."""

    def prepare(self, scorer: BatchedScorer) -> BatchedScorer:
        scorer.check_device()
        return scorer

    def score(
        self, corpus: Corpus, form: RowFormat, scorer: BatchedScorer, shards: Sequence[Shard], progress: Progress
    ) -> Generator[ScoredShard]:
        callbacks = ProgressCallbacks(progress)
        for shard in shards:
            yield shard, *score_shard(corpus, form, scorer, shard, callbacks)

    def facts(self) -> EngineFacts:
        return {"engine": "local"}

    def close(self) -> None:
        pass


class ProgressCallbacks(ScoringCallbacks):
    """Reports the rows that are done to a `Progress`."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress

    def done(self, rows: int, tokens: int) -> None:
        self.progress.advance(rows, tokens)
