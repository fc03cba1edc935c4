"""The engine on Ray Data: one read task per shard, a pool of model replicas, scores back to the driver.

A shard travels as one row, so that its rows stay together whatever Ray does with blocks: conversations go out, and
scores come back, or an error as data. No row is dropped or counted by Ray.
"""

from __future__ import annotations

import copy
import json
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import chdir, contextmanager, nullcontext, suppress
from functools import partial
from typing import cast

import pyarrow as pa

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import ray
from ray.data import ActorPoolStrategy, DataContext, Datasource, ReadTask
from ray.data.block import BlockMetadata
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from sqsd_filter.corpus.row_formats import RowFormat
from sqsd_filter.corpus.sources import Corpus
from sqsd_filter.errors import SQSDError, first_line
from sqsd_filter.pipeline.report import EngineFacts
from sqsd_filter.pipeline.stage.engines import ScoredShard
from sqsd_filter.pipeline.stage.replica import (
    Ledger,
    LedgerHandle,
    Replica,
    as_data,
    from_bytes,
    pack_files_of,
    raise_from,
)
from sqsd_filter.pipeline.stage.shards import Shard, conversations
from sqsd_filter.progress import Progress
from sqsd_filter.scoring.scorer import BatchedScorer

log = logging.getLogger(__name__)

STALLED_AFTER = 300.0  # seconds without a finished row after which a note appears


class ShardSource(Datasource):
    """One read task per shard; each gives a single row with the shard's number and its conversations as JSON."""

    def __init__(self, corpus: ray.ObjectRef[Corpus], form: RowFormat, shards: Sequence[Shard]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # Ray's own is not typed
        self._corpus, self._form, self._shards = corpus, form, shards

    def estimate_inmemory_data_size(self) -> int | None:
        return None

    def get_read_tasks(
        self,
        parallelism: int,  # noqa: ARG002  (there are as many tasks as shards)
        per_task_row_limit: int | None = None,  # noqa: ARG002
        data_context: DataContext | None = None,  # noqa: ARG002
    ) -> list[ReadTask]:
        meta = BlockMetadata(num_rows=1, size_bytes=None, exec_stats=None, input_files=None)
        return [ReadTask(partial(_read, self._corpus, self._form, os.getcwd(), shard), meta) for shard in self._shards]


def _read(corpus: ray.ObjectRef[Corpus], form: RowFormat, folder: str, shard: Shard) -> list[pa.Table]:
    try:
        with chdir(folder):  # the driver's, where relative paths lead: a session may be older than that
            turns, problem = [json.dumps(t) for t in conversations(ray.get(corpus), form, shard)], None
    except SQSDError as failure:
        turns, problem = [], as_data(failure)
    columns = {
        "shard": pa.array([shard.number], pa.int64()),
        "conversations": pa.array([turns], pa.large_list(pa.large_string())),
        "problem": pa.array([problem], pa.string()),
    }
    return [pa.table(columns)]


class RayEngine:
    """Replicas of the model on Ray.

    `replicas` is their number; the default fills the GPUs, or starts one per node where there is no GPU. Each has
    `gpus_per_replica` GPUs (a share of one, or several, over which the model is spread) or, on CPUs, `threads` threads.

    Uses the running session, else the cluster at `address`, else a session of its own, which `close` shuts down.
    `prepare` raises `SQSDError` when the cluster can't be reached or lacks the GPUs.
    """

    def __init__(
        self,
        replicas: int | None = None,
        gpus_per_replica: float | None = None,
        address: str | None = None,
        threads: int | None = None,
    ) -> None:
        self.replicas, self.gpus_per_replica, self.threads = replicas, gpus_per_replica, threads
        self.address = address
        self._ours = False
        self._state: dict[str, int] = {}

    def prepare(self, scorer: BatchedScorer) -> BatchedScorer:
        if not ray.is_initialized():
            self._ours = True
            _connect(self.address)
        resources = ray.cluster_resources()
        cpus = [int(n["Resources"].get("CPU", 0)) for n in ray.nodes() if n["Alive"]]
        gpus = resources.get("GPU", 0.0)
        if self.gpus_per_replica is None:
            self.gpus_per_replica = 1.0 if gpus else 0.0
        share = self.gpus_per_replica
        fits = int(gpus / share) if share else sum(n > 0 for n in cpus)
        if share and fits < (self.replicas or 1):
            raise SQSDError(
                f"{self.replicas or 1} replicas of {share:g} GPUs don't fit on the {gpus:g} GPUs that Ray has: "
                "ask for fewer, or for a smaller share."
            )
        self.replicas = self.replicas or max(1, fits)
        if self.threads is None:  # the largest equal share of the nodes' CPUs that all replicas find room for
            shares = range(max(1, sum(cpus) // self.replicas), 0, -1)
            self.threads = next((t for t in shares if sum(n // t for n in cpus) >= self.replicas), 1)
        return scorer.on_device("cuda" if share else "cpu", gpus=share or 1.0)

    def facts(self) -> EngineFacts:
        return {
            "engine": "ray",
            "replicas": self.replicas,
            "gpus_per_replica": self.gpus_per_replica,
            "shards_retried": self._state.get("retried", 0),
        }

    def close(self) -> None:
        """Shut down a session of our own. After an interruption that is left to the end of this process, at which Ray's
        reaper does it: in the middle of its work, native code may end the process here and now, with exit code 1."""
        if self._ours and ray.is_initialized() and not isinstance(sys.exception(), KeyboardInterrupt):
            ray.shutdown()

    def score(
        self, corpus: Corpus, form: RowFormat, scorer: BatchedScorer, shards: Sequence[Shard], progress: Progress
    ) -> Generator[ScoredShard]:
        expected = {shard.number: shard for shard in shards}
        if not expected:
            return
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        actor = ray.remote(Ledger).options(num_cpus=0, scheduling_strategy=here)
        ledger: LedgerHandle = actor.remote(pack_files_of(scorer.pack))
        arguments = {
            "scorer": copy.copy(scorer),  # without its model
            "ledger": ledger,
            "threads": self.threads,
            "content": scorer.base_content,
        }
        replicas = min(self.replicas or 1, len(shards))
        readers = max(2, min(replicas, os.cpu_count() or 1))  # more would only hold memory
        with _quiet_data(), self._reports(ledger, progress, replicas):
            # The files are the driver's: they are read where it runs, without a claim to a CPU that a replica may hold.
            source = ray.data.read_datasource(
                ShardSource(ray.put(corpus), form, list(shards)),
                override_num_blocks=len(shards),
                concurrency=min(readers, len(shards)),
                num_cpus=0,
                resources={_this_node(): 0.0001},
            )
            scored = source.map_batches(
                Replica,
                fn_constructor_kwargs=arguments,
                batch_size=1,
                batch_format="pyarrow",
                compute=ActorPoolStrategy(size=replicas),
                num_cpus=0 if self.gpus_per_replica else self.threads,
                num_gpus=self.gpus_per_replica or None,
            )
            for batch in _batches(scored):
                for row in batch.to_pylist():
                    if row["problem"]:
                        raise_from(row["problem"])
                    shard = expected.pop(row["shard"], None)
                    if shard is None:
                        raise SQSDError(f"Shard {row['shard']} came back twice: please report this as a bug.")
                    yield shard, *from_bytes(row["scores"])
        if expected:
            raise SQSDError(f"{len(expected)} shards did not come back from Ray: run the same command again.")

    @contextmanager
    def _reports(self, ledger: LedgerHandle, progress: Progress, replicas: int) -> Iterator[None]:
        """Report the ledger's figures to `progress`, with a note when no row is finished for long."""
        stop = threading.Event()
        rows = tokens = retried = 0
        moved = time.monotonic()

        def look() -> None:
            nonlocal rows, tokens, retried, moved
            state: dict[str, int] = ray.get(ledger.state.remote(), timeout=30)
            progress.replicas(state["replicas"], state["retried"])
            if (state["rows"], state["tokens"]) != (rows, tokens):
                progress.advance(state["rows"] - rows, state["tokens"] - tokens)
                rows, tokens, moved = state["rows"], state["tokens"], time.monotonic()
            if state["retried"] > retried:
                progress.note(f"a shard had to be started again, since its replica died ({state['retried']} so far)")
                retried = state["retried"]
            if time.monotonic() - moved > STALLED_AFTER:
                progress.note(
                    f"no row was finished for {STALLED_AFTER / 60:.0f} minutes; {state['replicas']} of {replicas} "
                    "replicas alive (a model may be loading, or the cluster may lack what a replica needs)"
                )
                moved = time.monotonic()
            self._state = state

        def try_to_look() -> None:
            try:
                look()
            except (ray.exceptions.RayError, OSError) as problem:
                log.info("the replicas' ledger doesn't answer: %s", problem)

        def keep_looking() -> None:
            while not stop.wait(1.0):
                try_to_look()

        thread = threading.Thread(target=keep_looking, daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join(30)
        try_to_look()


def _batches(scored: ray.data.Dataset) -> Iterator[pa.Table]:
    iterable = scored.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0)
    batches = cast("Generator[pa.Table]", iter(iterable))  # a generator in truth, of this format
    try:
        while (batch := next(batches, None)) is not None:
            yield batch
    except (ray.exceptions.RayError, OSError) as problem:
        lines = [line for line in str(problem).splitlines() if line.strip()]
        raise SQSDError(
            f"Ray gave up ({lines[-1].strip() if lines else type(problem).__name__}): run the same command again, "
            "what was scored is kept."
        ) from problem
    finally:
        with suppress(OSError):  # Ray's logs may lie on a disk that is full
            batches.close()


def _this_node() -> str:
    """The resource that only the driver's node has."""
    here = ray.get_runtime_context().get_node_id()
    node = next(n for n in ray.nodes() if n["NodeID"] == here)
    return f"node:{node['NodeManagerAddress']}"


def _connect(address: str | None) -> None:
    if address and address not in ("auto", "local"):
        _probe(address)
    verbose = log.isEnabledFor(logging.INFO)
    if not verbose:
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    outside = signal.getsignal(signal.SIGTERM) if threading.current_thread() is threading.main_thread() else None
    try:
        with nullcontext() if verbose else _silent_stderr():
            ray.init(
                address=address or "local",
                include_dashboard=None if address else False,
                log_to_driver=verbose,
                logging_level=logging.INFO if verbose else logging.ERROR,
            )
    except (ray.exceptions.RayError, ConnectionError, RuntimeError, ValueError, TimeoutError) as problem:
        where = f"The Ray cluster at {address} can't be joined" if address else "Ray can't be started here"
        raise SQSDError(f"{where} ({first_line(problem)}): check it, or use --engine local.") from problem
    if outside is not None:
        signal.signal(signal.SIGTERM, outside)  # Ray puts its own there
    if not verbose:
        for name in ("ray", "ray.data"):
            logging.getLogger(name).setLevel(logging.ERROR)


@contextmanager
def _silent_stderr() -> Iterator[None]:
    """Keep what Ray's native code has to say while it starts off the terminal; its errors come as exceptions."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _probe(address: str, timeout: float = 5.0) -> None:
    """Is anyone there? Ray itself would wait for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        with socket.create_connection((host, int(port)), timeout):
            return
    except (OSError, ValueError) as problem:
        raise SQSDError(
            f"No Ray cluster answers at {address} ({problem}): give --ray-address as HOST:PORT of its head node."
        ) from problem


@contextmanager
def _quiet_data() -> Iterator[None]:
    """Ray Data without its bars, and without its own idea of when a long shard is a hung job."""
    context = DataContext.get_current()
    wanted = {
        "enable_progress_bars": False,
        "print_on_execution_start": False,
        "execution_no_progress_timeout_s": -1,
    }
    before = {name: getattr(context, name) for name in wanted}
    for name, value in wanted.items():
        setattr(context, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(context, name, value)
