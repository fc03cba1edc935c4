"""One replica of the model on Ray, and the ledger it reports to.

Rows that can't be scored come back with their reason, and errors that end a run come back as data. The ledger outlives
the replicas: a shard that keeps killing its replica is narrowed down, attempt by attempt, to the row that does it.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import ray

import sqsd_filter.errors as errors
from sqsd_filter.corpus.conversation import conversation_key
from sqsd_filter.errors import ModelError, SQSDError
from sqsd_filter.scoring.pack import PACKS_DIR, Pack, load_pack
from sqsd_filter.scoring.results import Scores, ScoringCallbacks
from sqsd_filter.scoring.scorer import BatchedScorer

log = logging.getLogger(__name__)

LedgerHandle: TypeAlias = Any  # Ray's handle of a `Ledger`, with its methods; Ray's own type for it shows none of them

BEAT = 2.0  # seconds between a replica's signs of life
SILENT_FOR = 20.0  # seconds after which a replica counts as gone
WATCHED_FROM = 3  # the attempt at a shard from which on each micro-batch is noted before it runs
LAST_ATTEMPT = 12  # from here on all suspects are given up; after it the shard is


class Ledger:
    """What the replicas report, and the pack's files for nodes without them. An actor, so that it outlives them."""

    def __init__(self, pack: Mapping[str, bytes]) -> None:
        self.pack = pack
        self.attempts: dict[int, int] = {}
        self.running: dict[int, set[int]] = {}  # shard -> rows noted as about to run and not done
        self.apart: dict[int, set[int]] = {}
        self.given_up: dict[int, set[int]] = {}
        self.rows: dict[int, int] = {}  # done, by shard, in its latest attempt
        self.tokens = 0
        self.seen: dict[str, float] = {}

    def pack_files(self) -> Mapping[str, bytes]:
        return self.pack

    def begin(self, shard: int) -> tuple[int, set[int], set[int]]:
        """Another attempt at a shard: its number, the rows to run one by one, and those to give up."""
        self.attempts[shard] = self.attempts.get(shard, 0) + 1
        self.rows[shard] = 0
        apart, given_up = self.apart.setdefault(shard, set()), self.given_up.setdefault(shard, set())
        suspects = self.running.pop(shard, set())
        given_up |= suspects & apart if len(suspects) == 1 else set()
        apart |= suspects
        if self.attempts[shard] >= LAST_ATTEMPT:
            given_up |= apart
        return self.attempts[shard], apart, given_up

    def note(self, shard: int, rows: list[int]) -> None:
        self.running.setdefault(shard, set()).update(rows)

    def ran(self, shard: int, rows: list[int]) -> None:
        self.running.get(shard, set()).difference_update(rows)

    def lives(self, replica: str) -> None:
        self.seen[replica] = time.time()

    def done(self, replica: str, shard: int, rows: int, tokens: int) -> None:
        self.rows[shard] += rows
        self.tokens += tokens
        self.lives(replica)

    def state(self) -> dict[str, int]:
        now = time.time()
        return {
            "rows": sum(self.rows.values()),
            "tokens": self.tokens,
            "replicas": sum(now - seen < SILENT_FOR for seen in self.seen.values()),
            "retried": sum(attempts - 1 for attempts in self.attempts.values()),
        }


class Replica:
    """A model on a device of its own, scoring shards."""

    def __init__(self, scorer: BatchedScorer, ledger: LedgerHandle, threads: int, content: str | None) -> None:
        import torch

        torch.set_num_threads(threads)
        logging.getLogger("sqsd_filter").setLevel(logging.ERROR)
        self.name = uuid.uuid4().hex
        self.ledger = ledger
        self.problem: str | None = None
        threading.Thread(target=self._beat, daemon=True).start()
        try:
            with _local_copy(scorer.pack, ledger) as pack:
                self.scorer = scorer.with_pack(pack)
                self.scorer.check_device()
                if None not in (content, here := self.scorer.base_content) and here != content:
                    raise ModelError(
                        f"The node {os.uname().nodename} has other weights at {scorer.base_model} than the node where "
                        "the command runs: copy the same model to all nodes."
                    )
                self.scorer.model  # noqa: B018  (loads the model and the pack's adapters)
        except SQSDError as problem:
            self.problem = as_data(problem)

    def _beat(self) -> None:
        while True:
            self.ledger.lives.remote(self.name)
            time.sleep(BEAT)

    def __call__(self, batch: pa.Table) -> pa.Table:
        shard = batch["shard"][0].as_py()
        problem = batch["problem"][0].as_py() or self.problem
        turns = [] if problem else [json.loads(text) for text in batch["conversations"][0].as_py()]
        callbacks = _Reporting(self.ledger, self.name, shard)
        if callbacks.attempt > LAST_ATTEMPT:  # not for ever: nothing that was noted is to blame
            turns, problem = (
                [],
                as_data(
                    SQSDError(f"Shard {shard} killed its replica {LAST_ATTEMPT} times, and no row of it is to blame.")
                ),
            )
        try:
            scores = self.scorer.score(turns, callbacks) if turns else None
        except SQSDError as failure:
            scores, problem = None, as_data(failure)
        except Exception as failure:  # the device is lost: only a new process can go on
            log.error("a replica dies of %s: %s", type(failure).__name__, failure)
            os._exit(1)
        return _to_table(shard, [conversation_key(t) for t in turns], scores, problem)


class _Reporting(ScoringCallbacks):
    def __init__(self, ledger: LedgerHandle, replica: str, shard: int) -> None:
        self.ledger, self.replica, self.shard = ledger, replica, shard
        begun: tuple[int, set[int], set[int]] = ray.get(ledger.begin.remote(shard))
        self.attempt, apart, given_up = begun
        self.apart, self.given_up = frozenset(apart), frozenset(given_up)
        self.careful = self.attempt >= WATCHED_FROM

    def starting(self, rows: Sequence[int]) -> None:
        if self.careful:
            ray.get(self.ledger.note.remote(self.shard, list(rows)))

    def finished(self, rows: Sequence[int]) -> None:
        if self.careful:
            ray.get(self.ledger.ran.remote(self.shard, list(rows)))

    def done(self, rows: int, tokens: int) -> None:
        self.ledger.done.remote(self.replica, self.shard, rows, tokens)


def _to_table(shard: int, keys: list[bytes], scores: Scores | None, problem: str | None) -> pa.Table:
    columns: dict[str, np.ndarray | list[str]] = {}
    if scores is not None:
        columns = {f"probe:{name}": values for name, values in scores.probes.items()}
        columns |= {"risk": scores.risk, "status": scores.status, "detail": scores.detail, "tokens": scores.tokens}
    inner = pa.table({"key": pa.array(keys, pa.binary()), **columns})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, inner.schema) as writer:
        writer.write_table(inner)
    return pa.table(
        {
            "shard": pa.array([shard], pa.int64()),
            "scores": pa.array([sink.getvalue().to_pybytes()], pa.large_binary()),
            "problem": pa.array([problem], pa.string()),
        }
    )


def from_bytes(data: bytes) -> tuple[list[bytes], Scores]:
    table = pa.ipc.open_stream(data).read_all()
    probes = {n.removeprefix("probe:"): table[n].to_numpy() for n in table.column_names if n.startswith("probe:")}
    return table["key"].to_pylist(), Scores(
        probes,
        table["risk"].to_numpy(),
        table["status"].to_pylist(),
        table["detail"].to_pylist(),
        table["tokens"].to_numpy(),
    )


def pack_files_of(pack: Pack) -> dict[str, bytes]:
    return {name: (pack.path / name).read_bytes() for name in pack.files}


@contextmanager
def _local_copy(pack: Pack, ledger: LedgerHandle) -> Iterator[Pack]:
    """The pack on this node: at the driver's path if the same files are there, else written from the ledger's.

    Only the adapters are read here; the probes are the driver's, which need not be those of the file.
    """
    same = False
    with suppress(SQSDError, OSError):
        local = pack.at(load_pack(pack.path if pack.path.parent != PACKS_DIR else pack.name).path)
        same = local.fingerprints == pack.fingerprints
    if same:
        yield local
        return
    with tempfile.TemporaryDirectory(prefix="sqsd-pack-") as folder:
        files: Mapping[str, bytes] = ray.get(ledger.pack_files.remote())
        for name, content in files.items():
            path = Path(folder) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        yield pack.at(Path(folder))


def as_data(problem: SQSDError) -> str:
    return json.dumps([type(problem).__name__, str(problem)])


def raise_from(problem: str) -> None:
    kind, message = json.loads(problem)
    raise getattr(errors, kind, SQSDError)(message)
