"""Who scores the shards: this process (`LocalEngine`), or replicas of the model on Ray (`stage.RayEngine`).

Bytes don't depend on the choice: bins form inside a shard, and a bin's scores on nothing outside it.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Sequence
from typing import Protocol

from sqsd_filter.corpus.row_formats import RowFormat
from sqsd_filter.corpus.sources import Corpus
from sqsd_filter.errors import UsageError
from sqsd_filter.pipeline.report import EngineFacts
from sqsd_filter.pipeline.stage.shards import Shard, score_shard
from sqsd_filter.progress import Progress
from sqsd_filter.scoring.results import Scores, ScoringCallbacks
from sqsd_filter.scoring.scorer import BatchedScorer

ENGINES = ("auto", "local", "ray")
ScoredShard = tuple[Shard, list[bytes], Scores]


class Engine(Protocol):
    """Scores shards, in any order; each comes back once."""

    def on_its_device(self, scorer: BatchedScorer) -> BatchedScorer:
        """The scorer for the devices that this engine has. Raises `UsageError` where they can't be used."""

    def score(
        self, corpus: Corpus, form: RowFormat, scorer: BatchedScorer, shards: Sequence[Shard], progress: Progress
    ) -> Generator[ScoredShard]:
        """Keys and scores of every shard, as they are done."""

    def facts(self) -> EngineFacts:
        """What the report says of it."""

    def close(self) -> None:
        """Give back what it took."""


class LocalEngine:
    """In this process, shard after shard."""

    def on_its_device(self, scorer: BatchedScorer) -> BatchedScorer:
        scorer.check_device()
        return scorer

    def score(
        self, corpus: Corpus, form: RowFormat, scorer: BatchedScorer, shards: Sequence[Shard], progress: Progress
    ) -> Generator[ScoredShard]:
        watch = Telling(progress)
        for shard in shards:
            yield shard, *score_shard(corpus, form, scorer, shard, watch)

    def facts(self) -> EngineFacts:
        return {"engine": "local"}

    def close(self) -> None:
        pass


class Telling(ScoringCallbacks):
    """Hands on to a `Progress`."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress

    def done(self, rows: int, tokens: int) -> None:
        self.progress.advance(rows, tokens)


def choose_engine(
    engine: str = "auto",
    *,
    replicas: int | None = None,
    gpus_per_replica: float | None = None,
    ray_address: str | None = None,
    device: str | None = None,
) -> Engine:
    """The engine asked for. `auto` is Ray as soon as there is more than one replica, a cluster's address, or more than
    one GPU and no device named.

    Raises `UsageError` for senseless numbers, or Ray's settings without Ray.
    """
    if engine not in ENGINES:
        raise UsageError(f"The engine must be one of {', '.join(ENGINES)}, not '{engine}'.")
    if replicas is not None and replicas < 1:
        raise UsageError("--replicas must be at least 1.")
    if gpus_per_replica is not None and (gpus_per_replica < 0 or (gpus_per_replica > 1 and gpus_per_replica % 1)):
        raise UsageError("--gpus-per-replica must be a share of one GPU, or a whole number of them.")
    asked = (replicas or 1) > 1 or bool(gpus_per_replica) or bool(ray_address)
    if engine == "local":
        if asked:
            raise UsageError("--engine local runs one replica in this process: leave out --replicas, "
                             "--gpus-per-replica and --ray-address, or choose --engine ray.")  # fmt: skip
        return LocalEngine()
    if engine == "auto" and not asked and not os.environ.get("RAY_ADDRESS") and (device or _gpus() < 2):
        return LocalEngine()
    from sqsd_filter.pipeline.stage.ray_engine import RayEngine

    return RayEngine(replicas, gpus_per_replica, ray_address or os.environ.get("RAY_ADDRESS"))


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()
