"""The Ray Data stage: one read task a shard, a pool of model replicas, scores back to the driver.

A shard travels as one row, so that its rows stay together whatever Ray does with blocks: out go the conversations, back
come the scores. Rows that can't be scored come back with their reason, and errors that end a run come back as data;
nothing relies on Ray to drop or to tell. A `Ledger` actor hears how far the replicas are, and how often each shard was
begun: a shard that keeps killing its replica is narrowed down to the row that does it.
"""

from __future__ import annotations

import copy
import json
import logging
import os
import signal
import socket
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import chdir, contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import ray
from ray.data import ActorPoolStrategy, DataContext, Datasource, ReadTask
from ray.data.block import BlockMetadata
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

import sqsd_filter.errors as errors
from sqsd_filter.directions.pack import ADAPTER_FILES, PACK_FILE, PACKS_DIR, Pack, load_pack
from sqsd_filter.errors import SQSDError
from sqsd_filter.pipeline.engines import ScoredShard
from sqsd_filter.pipeline.shards import Shard, conversations
from sqsd_filter.pipeline.sources import Corpus
from sqsd_filter.progress import Progress
from sqsd_filter.scoring.conversation import RowFormat, conversation_key
from sqsd_filter.scoring.scorer import Scores, SQSDScorer, Watch

log = logging.getLogger(__name__)

BEAT = 2.0  # seconds between a replica's signs of life
SILENT_FOR = 20.0  # seconds after which a replica counts as gone
STALLED_AFTER = 300.0  # seconds without a row after which the user is told
WATCHED_FROM = 3  # the attempt at a shard from which each bin is noted before it runs
LAST_ATTEMPT = 12


class Ledger:
    """What the replicas tell, and the pack's files for those that lack them: an actor, so that it outlives them."""

    def __init__(self, pack: Mapping[str, bytes]) -> None:
        self.pack = pack
        self.attempts: dict[int, int] = {}
        self.running: dict[int, set[int]] = {}  # shard -> rows noted as about to run and not done
        self.apart: dict[int, set[int]] = {}
        self.given_up: dict[int, set[int]] = {}
        self.rows = self.tokens = 0
        self.seen: dict[str, float] = {}

    def pack_files(self) -> Mapping[str, bytes]:
        return self.pack

    def begin(self, shard: int) -> tuple[int, set[int], set[int]]:
        """Another attempt at a shard: its number, the rows to run one by one, and those to give up."""
        self.attempts[shard] = self.attempts.get(shard, 0) + 1
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

    def told(self, replica: str, rows: int, tokens: int) -> None:
        self.rows += rows
        self.tokens += tokens
        self.seen[replica] = time.time()

    def state(self) -> dict[str, int]:
        now = time.time()
        return {
            "rows": self.rows,
            "tokens": self.tokens,
            "replicas": sum(now - seen < SILENT_FOR for seen in self.seen.values()),
            "retried": sum(attempts - 1 for attempts in self.attempts.values()),
        }


class ShardSource(Datasource):
    """One read task a shard; each gives a single row with the shard's number and its conversations as JSON."""

    def __init__(self, corpus: Any, form: RowFormat, shards: Sequence[Shard]) -> None:
        super().__init__()
        self._corpus, self._form, self._shards = corpus, form, shards

    def estimate_inmemory_data_size(self) -> int | None:
        return None

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: Any = None
    ) -> list[ReadTask]:
        meta = BlockMetadata(num_rows=1, size_bytes=None, exec_stats=None, input_files=None)
        return [ReadTask(partial(_read, self._corpus, self._form, os.getcwd(), shard), meta) for shard in self._shards]


def _read(corpus: Any, form: RowFormat, folder: str, shard: Shard) -> list[pa.Table]:
    try:
        with chdir(folder):  # the driver's, where relative paths lead: a session may be older than that
            turns, problem = [json.dumps(t) for t in conversations(ray.get(corpus), form, shard)], None
    except SQSDError as failure:
        turns, problem = [], _as_data(failure)
    columns = {
        "shard": pa.array([shard.number], pa.int64()),
        "conversations": pa.array([turns], pa.large_list(pa.large_string())),
        "problem": pa.array([problem], pa.string()),
    }
    return [pa.table(columns)]


def _as_data(problem: SQSDError) -> str:
    return json.dumps([type(problem).__name__, str(problem)])


def _raise(problem: str) -> None:
    kind, message = json.loads(problem)
    raise getattr(errors, kind, SQSDError)(message)


class Replica:
    """A model on a device of its own, scoring shards."""

    def __init__(self, scorer: SQSDScorer, ledger: Any, threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        logging.getLogger("sqsd_filter").setLevel(logging.ERROR)
        self.name = uuid.uuid4().hex
        self.ledger = ledger
        self.problem: str | None = None
        threading.Thread(target=self._beat, daemon=True).start()
        try:
            self.scorer = scorer.with_pack(_at_hand(scorer.pack, ledger))
            self.scorer.check_device()
            self.scorer.engine  # noqa: B018  (loads the model)
        except SQSDError as problem:
            self.problem = _as_data(problem)

    def _beat(self) -> None:
        while True:
            self.ledger.told.remote(self.name, 0, 0)
            time.sleep(BEAT)

    def __call__(self, batch: pa.Table) -> pa.Table:
        shard = batch["shard"][0].as_py()
        problem = batch["problem"][0].as_py() or self.problem
        turns = [] if problem else [json.loads(text) for text in batch["conversations"][0].as_py()]
        watch = _Reporting(self.ledger, self.name, shard)
        try:
            scores = self.scorer.score(turns, watch) if turns else None
        except SQSDError as failure:
            scores, problem = None, _as_data(failure)
        except Exception as failure:  # the device is lost: only a new process can go on
            log.error("a replica dies of %s: %s", type(failure).__name__, failure)
            os._exit(1)
        return _to_table(shard, [conversation_key(t) for t in turns], scores, problem)


class _Reporting(Watch):
    def __init__(self, ledger: Any, replica: str, shard: int) -> None:
        self.ledger, self.replica, self.shard = ledger, replica, shard
        attempt, apart, given_up = ray.get(ledger.begin.remote(shard))
        self.apart, self.given_up = frozenset(apart), frozenset(given_up)
        self.careful = attempt >= WATCHED_FROM

    def starting(self, rows: Sequence[int]) -> None:
        if self.careful:
            ray.get(self.ledger.note.remote(self.shard, list(rows)))

    def finished(self, rows: Sequence[int]) -> None:
        if self.careful:
            ray.get(self.ledger.ran.remote(self.shard, list(rows)))

    def done(self, rows: int, tokens: int) -> None:
        self.ledger.told.remote(self.replica, rows, tokens)


def _to_table(shard: int, keys: list[bytes], scores: Scores | None, problem: str | None) -> pa.Table:
    columns: dict[str, Any] = {}
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


def _from_bytes(data: bytes) -> tuple[list[bytes], Scores]:
    table = pa.ipc.open_stream(data).read_all()
    probes = {n.removeprefix("probe:"): table[n].to_numpy() for n in table.column_names if n.startswith("probe:")}
    return table["key"].to_pylist(), Scores(
        probes,
        table["risk"].to_numpy(),
        table["status"].to_pylist(),
        table["detail"].to_pylist(),
        table["tokens"].to_numpy(),
    )


def _pack_files(pack: Pack) -> dict[str, bytes]:
    names = [PACK_FILE, *(f"{adapter}/{file}" for adapter in pack.adapters for file in ADAPTER_FILES)]
    return {name: (pack.path / name).read_bytes() for name in names}


def _at_hand(pack: Pack, ledger: Any) -> Pack:
    """The pack on this node: where the driver has it, if the same is there, else written from what the ledger keeps."""
    with suppress(SQSDError):
        found = load_pack(pack.path if pack.path.parent != PACKS_DIR else pack.name)
        if found.fingerprint == pack.fingerprint:
            return found
    folder = Path(tempfile.mkdtemp(prefix="sqsd-pack-"))
    for name, content in ray.get(ledger.pack_files.remote()).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return load_pack(folder)


class RayEngine:
    """Replicas on Ray: `replicas` of them (default: as many as the GPUs hold, or one a node without any), each with
    `gpus_per_replica` GPUs (a share, or several with the model spread over them) or, on CPUs, `threads` threads.

    Uses the session that is there, else the cluster at `address`, else one of its own, which `close` shuts down.
    `place` raises `SQSDError` when the cluster can't be reached or lacks the GPUs.
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

    def place(self, scorer: SQSDScorer) -> SQSDScorer:
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
        return scorer.on_device("cuda" if share else "cpu", spread=share > 1)

    def facts(self) -> Mapping[str, Any]:
        return {
            "engine": "ray",
            "replicas": self.replicas,
            "gpus_per_replica": self.gpus_per_replica,
            "shards_retried": self._state.get("retried", 0),
        }

    def close(self) -> None:
        if self._ours and ray.is_initialized():
            ray.shutdown()

    def score(
        self, corpus: Corpus, form: RowFormat, scorer: SQSDScorer, shards: Sequence[Shard], progress: Progress
    ) -> Iterator[ScoredShard]:
        expected = {shard.number: shard for shard in shards}
        if not expected:
            return
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        ledger = ray.remote(Ledger).options(num_cpus=0, scheduling_strategy=here).remote(_pack_files(scorer.pack))
        arguments = {
            "scorer": copy.copy(scorer),  # without its model
            "ledger": ledger,
            "threads": self.threads,
        }
        with _quiet_data(), self._told(ledger, progress):
            # The files are the driver's: they are read where it runs, without a claim to a CPU that a replica may hold.
            source = ray.data.read_datasource(
                ShardSource(ray.put(corpus), form, list(shards)),
                override_num_blocks=len(shards),
                num_cpus=0,
                resources={_this_node(): 0.0001},
            )
            scored = source.map_batches(
                Replica,
                fn_constructor_kwargs=arguments,
                batch_size=1,
                batch_format="pyarrow",
                compute=ActorPoolStrategy(size=self.replicas),
                num_cpus=0 if self.gpus_per_replica else self.threads,
                num_gpus=self.gpus_per_replica or None,
            )
            for batch in _batches(scored):
                for row in batch.to_pylist():
                    if row["problem"]:
                        _raise(row["problem"])
                    shard = expected.pop(row["shard"], None)
                    if shard is None:
                        raise SQSDError(f"Shard {row['shard']} came back twice: please report this as a bug.")
                    yield shard, *_from_bytes(row["scores"])
        if expected:
            raise SQSDError(f"{len(expected)} shards did not come back from Ray: run the same command again.")

    @contextmanager
    def _told(self, ledger: Any, progress: Progress) -> Iterator[None]:
        """Hand on to `progress` what the ledger hears, and say so when nothing moves."""
        stop = threading.Event()
        rows = tokens = 0
        moved = time.monotonic()

        def look() -> None:
            nonlocal rows, tokens, moved
            state = ray.get(ledger.state.remote(), timeout=30)
            if state["rows"] > rows:
                progress.advance(state["rows"] - rows, state["tokens"] - tokens)
                rows, tokens, moved = state["rows"], state["tokens"], time.monotonic()
            if state["retried"] > self._state.get("retried", 0):
                progress.note(f"{state['retried']} shards had to be started again; {state['replicas']} replicas alive")
            if time.monotonic() - moved > STALLED_AFTER:
                progress.note(
                    f"no row was finished for {STALLED_AFTER / 60:.0f} minutes; {state['replicas']} of {self.replicas} "
                    "replicas alive (a model may be loading, or the cluster may lack what a replica needs)"
                )
                moved = time.monotonic()
            self._state = state

        def keep_looking() -> None:
            while not stop.wait(1.0):
                try:
                    look()
                except (ray.exceptions.RayError, OSError) as problem:
                    log.info("the replicas' ledger doesn't answer: %s", problem)

        thread = threading.Thread(target=keep_looking, daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join(5)
        look()


def _batches(scored: Any) -> Iterator[pa.Table]:
    try:
        yield from scored.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0)
    except ray.exceptions.RayError as problem:
        lines = [line for line in str(problem).splitlines() if line.strip()]
        raise SQSDError(
            f"Ray gave up ({lines[-1].strip() if lines else type(problem).__name__}): run the same command again, "
            "what was scored is kept."
        ) from problem


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
        first = next(iter(str(problem).strip().splitlines()), type(problem).__name__)
        where = f"The Ray cluster at {address} can't be joined" if address else "Ray can't be started here"
        raise SQSDError(f"{where} ({first}): check it, or use --engine local.") from problem
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
