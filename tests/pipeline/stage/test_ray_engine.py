"""The Ray stage: the same bytes as in this process, whatever happens to replicas, nodes or the driver."""

from __future__ import annotations

import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import ray
import torch

from sqsd_filter.errors import InputError, ModelError, SQSDError, UsageError
from sqsd_filter.pipeline.report import FinishedReport
from sqsd_filter.pipeline.run import filter_dataset
from sqsd_filter.pipeline.stage import ray_engine
from sqsd_filter.pipeline.stage.choice import choose_engine
from sqsd_filter.pipeline.stage.engines import LocalEngine
from sqsd_filter.pipeline.stage.ray_engine import RayEngine
from sqsd_filter.pipeline.stage.replica import Ledger
from sqsd_filter.progress import Silent
from sqsd_filter.scoring.scorer import SQSDScorer
from tests.corpora import content, make_rows, read_report, write_jsonl
from tests.disks import small_disk
from tests.tiny import CONVERSATIONS

# 660 rows are six shards, each with a few conversations of its own
ROWS = [row if k % 128 < 8 else {**make_rows(1)[0], "id": k} for k, row in enumerate(make_rows(660))]
LINES = [*ROWS[:200], b"broken", {"id": -1, "instruction": "?", "output": ""}, *ROWS[200:]]
SHARDS = 6

pytestmark = pytest.mark.pictures  # what a module's fixture leaves is compared whole


@pytest.fixture(scope="module")
def session() -> Iterator[None]:
    """One Ray for all tests that don't break it."""
    os.environ["RAY_BACKEND_LOG_LEVEL"] = "fatal"
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    yield
    ray.shutdown()


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "in.jsonl", LINES)
    return Path("in.jsonl")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, tiny_pack: Path) -> dict[str, Any]:
    """What this process makes of the rows."""
    folder = tmp_path_factory.mktemp("undisturbed")
    write_jsonl(folder / "in.jsonl", LINES)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        filter_dataset("in.jsonl", "out", drop_top="5%", pack=tiny_pack)
        return content(Path("out"))


def run(source: Path, pack: Path, engine: Any, dest: str = "out") -> FinishedReport:
    return filter_dataset(source, dest, drop_top="5%", scorer=SQSDScorer(pack), engine=engine)


# ---------------------------------------------------------------------------------------------- the same bytes


@pytest.mark.parametrize("replicas", [1, 2])
def test_bytes_do_not_depend_on_the_number_of_replicas(
    session: None, source: Path, tiny_pack: Path, undisturbed: dict[str, Any], replicas: int
) -> None:
    report = run(source, tiny_pack, RayEngine(replicas))
    assert content(Path("out")) == undisturbed
    assert report["timing"]["engine"] == "ray"
    assert report["timing"]["replicas"] == replicas
    assert ray.is_initialized()  # only sessions started by the tool are shut down


@pytest.mark.slow
def test_a_killed_replica_costs_time_only(
    session: None, source: Path, tiny_pack: Path, undisturbed: dict[str, Any]
) -> None:
    scorer = SQSDScorer(tiny_pack)
    scorer.__class__ = type("Deadly", (SQSDScorer,), {"_score": die_once(Path("died").absolute(), signal.SIGKILL)})
    report = filter_dataset(source, Path("out"), drop_top="5%", scorer=scorer, engine=RayEngine(2))
    assert (Path("died").absolute()).exists()
    assert content(Path("out")) == undisturbed
    assert report["timing"]["shards_retried"] >= 1


def die_once(mark: Path, how: int) -> Callable[..., None]:
    """A `_score` that takes its process with it in the middle of its first shard, once."""

    def score(self: Any, rows: Any, results: Any) -> None:
        project = self.model.project

        def deadly(members: Any) -> Any:
            found = project(members)
            if not mark.exists():
                mark.touch()
                os.kill(os.getpid(), how)
            return found

        self.model.project = deadly
        SQSDScorer._score(self, rows, results)  # noqa: SLF001  (the fault lies inside the scorer)

    return score


@pytest.mark.slow
def test_a_row_that_keeps_killing_its_replica_is_set_apart_and_the_rest_is_scored(
    session: None, source: Path, tiny_pack: Path, undisturbed: dict[str, Any]
) -> None:
    poison = ROWS[131]["instruction"]

    def score(self: Any, rows: Any, results: Any) -> None:
        project = self.model.project

        def deadly(members: Any) -> Any:
            if any(poison in self.encoder.tokenizer.decode(m.ids) for m in members):
                os.kill(os.getpid(), signal.SIGSEGV)
            return project(members)

        self.model.project = deadly
        SQSDScorer._score(self, rows, results)  # noqa: SLF001  (the fault lies inside the scorer)
        self.model.project = project

    scorer = SQSDScorer(tiny_pack)
    scorer.__class__ = type("Poisoned", (SQSDScorer,), {"_score": score})
    report = filter_dataset(source, Path("out"), drop_top="5%", scorer=scorer, engine=RayEngine(2))
    assert report["unscored"] == {"bad_json": 1, "no_answer": 1, "crashed": 1}
    assert report["rows"]["total"] == len(LINES)
    assert report["timing"]["shards_retried"] >= 3


def short_of_memory(self: Any, members: Any) -> Any:
    """A `project` for which three rows at once are too many."""
    if len(members) > 2:
        raise MemoryError
    return type(self.model).project(self.model, members)


def failing_row(self: Any, members: Any) -> Any:
    """A `project` whose model can't do with one of the rows."""
    if any(ROWS[131]["instruction"] in self.encoder.tokenizer.decode(m.ids) for m in members):
        raise RuntimeError("no such shape")
    return type(self.model).project(self.model, members)


@pytest.mark.slow
@pytest.mark.parametrize(("project", "unscored"), [(short_of_memory, {}), (failing_row, {"failed": 1})])
def test_what_a_batch_can_not_do_its_rows_do_apart_on_any_engine(
    session: None, source: Path, tiny_pack: Path, project: Any, unscored: dict[str, int]
) -> None:
    def score(self: Any, rows: Any, results: Any) -> None:
        self.model.project = partial(project, self)
        SQSDScorer._score(self, rows, results)  # noqa: SLF001  (the fault lies inside the scorer)

    for dest, engine in (("local", LocalEngine()), ("ray", RayEngine(2))):
        scorer = SQSDScorer(tiny_pack)
        scorer.__class__ = type("Troubled", (SQSDScorer,), {"_score": score})
        report = filter_dataset(source, dest, drop_top="5%", scorer=scorer, engine=engine)
        assert report["unscored"] == {"bad_json": 1, "no_answer": 1, **unscored}
        assert report["rows"]["scored"] + report["rows"]["duplicates"] + report["rows"]["errors"] == len(LINES)
    assert content(Path("ray")) == content(Path("local"))


@pytest.mark.slow
@pytest.mark.parametrize("where", ["destination", "shared store"])
def test_a_disk_that_fills_up_is_one_sentence_and_room_finishes_the_run(
    session: None,
    source: Path,
    tiny_pack: Path,
    undisturbed: dict[str, Any],
    where: str,
) -> None:
    full = ExitStack()

    class Filling(RayEngine):
        def score(self, *arguments: Any, **named: Any) -> Any:
            for number, shard in enumerate(super().score(*arguments, **named)):
                if number == 2 and where == "destination":
                    full.enter_context(small_disk(1000))
                yield shard

    shared = "full" if where == "shared store" else None
    if shared:
        Path(shared).symlink_to("/proc")
    sentence = r"^The scores can't be written to [^\n]*check the free space and your rights there and run the same"
    scorer = SQSDScorer(tiny_pack)
    with pytest.raises(SQSDError, match=sentence), full:
        filter_dataset(source, "out", drop_top="5%", scorer=scorer, engine=Filling(2), score_store=shared)
    assert len(list(Path("out/sqsd/scores").iterdir())) == (1 if shared else 2)
    assert not shared or read_report(Path("out"))["status"] == "failed"
    run(source, tiny_pack, RayEngine(2))
    assert content(Path("out")) == undisturbed


@pytest.mark.slow
def test_progress_tells_of_replicas_and_rows_once_each(session: None, source: Path, tiny_pack: Path) -> None:
    class Shown(Silent):
        rows = tokens = alive = 0

        def advance(self, rows: int, tokens: int = 0) -> None:
            if self.phase == "scoring":
                self.rows += rows
                self.tokens += tokens

        def start(self, phase: str, rows: int | None) -> None:
            self.phase = phase

        def replicas(self, alive: int, retried: int) -> None:
            self.alive, self.retried = max(alive, self.alive), retried

    shown, scorer = Shown(), SQSDScorer(tiny_pack)
    scorer.__class__ = type("Deadly", (SQSDScorer,), {"_score": die_once(Path("died").absolute(), signal.SIGKILL)})
    report = filter_dataset(source, "out", drop_top="5%", scorer=scorer, engine=RayEngine(2), progress=shown)
    assert shown.rows == report["rows"]["scored"] < shown.tokens
    assert shown.alive >= 2
    assert shown.retried == report["timing"]["shards_retried"] >= 1


@pytest.mark.slow
def test_a_stall_is_told(session: None, source: Path, tiny_pack: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Shown(Silent):
        notes: ClassVar[list[str]] = []

        def note(self, message: str) -> None:
            self.notes.append(message)

    def score(self: Any, rows: Any, results: Any) -> None:
        time.sleep(8)
        SQSDScorer._score(self, rows, results)  # noqa: SLF001  (the fault lies inside the scorer)

    monkeypatch.setattr(ray_engine, "STALLED_AFTER", 3.0)
    scorer = SQSDScorer(tiny_pack)
    scorer.__class__ = type("Slow", (SQSDScorer,), {"_score": score})
    write_jsonl(source, LINES[:3])
    filter_dataset(source, "out", drop_top="50%", scorer=scorer, engine=RayEngine(1), progress=Shown())
    assert any(re.search(r"no row was finished for .*; 1 of 1 replicas alive", note) for note in Shown.notes)


def test_an_error_that_ends_the_run_is_one_sentence(
    session: None, source: Path, tiny_pack: Path, tmp_path: Path
) -> None:
    scorer = SQSDScorer(tiny_pack, model=str(tmp_path / "no-model"))
    with pytest.raises(SQSDError, match=r"no-model' can't be loaded .*check the name") as problem:
        filter_dataset(source, tmp_path / "out", drop_top="5%", scorer=scorer, engine=RayEngine(1))
    assert "\n" not in str(problem.value)
    assert read_report(tmp_path / "out")["status"] == "failed"


def test_a_node_with_another_model_under_the_same_name_is_refused(session: None, source: Path, tiny_pack: Path) -> None:
    def elsewhere(self: Any) -> str:
        return f"as process {os.getpid()} sees it"

    scorer = SQSDScorer(tiny_pack)
    scorer.__class__ = type("Elsewhere", (SQSDScorer,), {"base_content": property(elsewhere)})
    with pytest.raises(ModelError, match=r"^The node \S+ has other weights at .* copy the same model to all nodes\.$"):
        filter_dataset(source, "out", drop_top="5%", scorer=scorer, engine=RayEngine(1))


@pytest.mark.slow
def test_a_file_that_changes_under_the_run_is_an_input_error(session: None, source: Path, tiny_pack: Path) -> None:
    class Meddling(RayEngine):
        def score(self, *arguments: Any, **named: Any) -> Any:
            write_jsonl(source, LINES[:-1])
            return super().score(*arguments, **named)

    with pytest.raises(InputError, match="has changed since it was scanned"):
        run(source, tiny_pack, Meddling(1))


# ---------------------------------------------------------------------------------------------- in anyone's pipeline


@pytest.mark.parametrize("form", ["pyarrow", "numpy"])
def test_the_scorer_is_a_callable_class_for_ray_data(session: None, tiny_pack: Path, form: str) -> None:
    rows = [{"id": k, "messages": turns} for k, turns in enumerate(CONVERSATIONS)]
    scored = ray.data.from_items(rows, override_num_blocks=2).map_batches(
        SQSDScorer,
        fn_constructor_kwargs={"pack": str(tiny_pack)},
        batch_format=form,
        batch_size=4,
        compute=ray.data.ActorPoolStrategy(size=1),
    )
    found = sorted(scored.take_all(), key=lambda row: row["id"])
    expected = SQSDScorer(tiny_pack).score(CONVERSATIONS)
    assert [row["sqsd_status"] for row in found] == expected.status
    assert np.abs(np.array([row["sqsd_risk"] for row in found]) - expected.risk).max() <= 1e-5


# ---------------------------------------------------------------------------------------------- which engine


def test_auto_stays_in_this_process_until_ray_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert isinstance(choose_engine(), LocalEngine)
    assert isinstance(choose_engine(replicas=1), LocalEngine)
    assert isinstance(choose_engine(replicas=2), RayEngine)
    assert isinstance(choose_engine("ray"), RayEngine)
    assert isinstance(choose_engine(gpus_per_replica=0.5), RayEngine)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert isinstance(choose_engine(), RayEngine)
    assert isinstance(choose_engine(device="cuda:1"), LocalEngine)
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    assert choose_engine().address == "head:6379"  # type: ignore[attr-defined]
    assert choose_engine(ray_address="other:1").address == "other:1"  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("asked", "complaint"),
    [
        ({"engine": "slurm"}, "one of auto, local, ray"),
        ({"replicas": 0}, "at least 1"),
        ({"gpus_per_replica": 1.5}, "whole number"),
        ({"gpus_per_replica": -1}, "whole number"),
        ({"engine": "local", "replicas": 2}, "--engine ray"),
    ],
    ids=lambda value: str(value),
)
def test_senseless_engines_are_usage_errors(asked: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UsageError, match=re.escape(complaint)):
        choose_engine(**asked)


def test_an_address_where_nobody_answers_is_one_sentence_at_once(
    tiny_pack: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: False)  # a session that is open would be used instead
    began = time.monotonic()
    with pytest.raises(SQSDError, match=r"No Ray cluster answers at 127\.0\.0\.1:9 .*--ray-address"):
        RayEngine(address="127.0.0.1:9").prepare(SQSDScorer(tiny_pack))
    assert time.monotonic() - began < 10


def test_more_gpus_than_there_are_is_one_sentence(session: None, tiny_pack: Path) -> None:
    with pytest.raises(SQSDError, match="don't fit on the 0 GPUs"):
        RayEngine(2, gpus_per_replica=1).prepare(SQSDScorer(tiny_pack))


# ---------------------------------------------------------------------------------------------- the ledger


def test_a_shard_that_dies_is_narrowed_down_to_a_row() -> None:
    ledger = Ledger({})
    assert [ledger.begin(7)[0] for _ in range(3)] == [1, 2, 3]
    ledger.note(7, [4, 5, 6])
    ledger.note(7, [1])
    ledger.ran(7, [1])
    attempt, apart, given_up = ledger.begin(7)  # died in the bin of three
    assert (attempt, apart, given_up) == (4, {4, 5, 6}, set())
    ledger.note(7, [4])
    ledger.ran(7, [4])
    ledger.note(7, [5])
    assert ledger.begin(7)[1:] == ({4, 5, 6}, {5})  # died with that row alone
    assert ledger.begin(8) == (1, set(), set())
    assert ledger.state()["retried"] == 4


def test_a_shard_that_never_gets_through_is_given_up_in_the_end() -> None:
    ledger = Ledger({})
    for _ in range(3):
        ledger.begin(0)
    for _ in range(8):
        ledger.note(0, [1, 2])
        ledger.begin(0)
    ledger.note(0, [1, 2])
    assert ledger.begin(0)[2] == {1, 2}


# ---------------------------------------------------------------------------------------------- nodes and the driver


@pytest.mark.slow
def test_a_node_that_goes_away_costs_time_only(source: Path, tiny_pack: Path, undisturbed: dict[str, Any]) -> None:
    from ray.cluster_utils import Cluster

    ray.shutdown()
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        other = cluster.add_node(num_cpus=1)
        cluster.wait_for_nodes()
        ray.init(address=cluster.address, log_to_driver=False, logging_level=logging.ERROR)
        engine = RayEngine(2)

        class Losing(RayEngine):
            def score(self, *arguments: Any, **named: Any) -> Any:
                removal = threading.Timer(0, cluster.remove_node, [other])
                for number, shard in enumerate(super().score(*arguments, **named)):
                    if number == 0:
                        removal.start()
                    yield shard
                removal.join()

        engine.__class__ = Losing
        run(source, tiny_pack, engine)
        assert sum(node["Alive"] for node in ray.nodes()) == 1
    finally:
        ray.shutdown()
        cluster.shutdown()
    assert content(Path("out")) == undisturbed


@pytest.mark.slow
def test_shares_of_a_gpu_hold_as_many_replicas_whatever_the_cpus(
    source: Path, tiny_pack: Path, undisturbed: dict[str, Any]
) -> None:
    """With a GPU that is only declared: the model runs on the CPU, but is placed where the GPU is said to be."""

    def on_device(self: Any, device: str, *, gpus: float) -> Any:
        assert (device, gpus) == ("cuda", 0.5)
        return self

    ray.shutdown()
    ray.init(num_cpus=1, num_gpus=1, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    try:
        scorer = SQSDScorer(tiny_pack)
        scorer.__class__ = type("OnCPU", (SQSDScorer,), {"on_device": on_device})
        engine = RayEngine(gpus_per_replica=0.5)
        report = filter_dataset(source, "out", drop_top="5%", scorer=scorer, engine=engine)
    finally:
        ray.shutdown()
    assert (report["timing"]["replicas"], report["timing"]["gpus_per_replica"]) == (2, 0.5)
    assert content(Path("out")) == undisturbed


def driver(folder: Path, pack: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "sqsd_filter", "in.jsonl", "out", "--drop-top", "5%", "--pack", str(pack)]
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([*command, "--engine", "ray", "--replicas", "1"], cwd=folder, **pipes)


def wait_for_a_segment(process: subprocess.Popen[str], folder: Path) -> None:
    deadline = time.monotonic() + 120
    while not list(folder.glob("out/sqsd/scores/*.parquet")) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.slow
def test_a_killed_driver_is_followed_by_one_that_goes_on(
    source: Path, tiny_pack: Path, undisturbed: dict[str, Any]
) -> None:
    folder = Path.cwd()
    process = driver(folder, tiny_pack)
    wait_for_a_segment(process, folder)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    before = {p: p.stat().st_mtime_ns for p in folder.glob("out/sqsd/scores/*.parquet")}
    assert process.returncode == -signal.SIGKILL
    assert 0 < len(before) < SHARDS
    process = driver(folder, tiny_pack)
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0
    assert "rows kept in out" in out
    assert "ray" not in err.lower()
    assert before.items() <= {p: p.stat().st_mtime_ns for p in folder.glob("out/sqsd/scores/*.parquet")}.items()
    found = content(folder / "out")
    found["sqsd/report.json"]["settings"] = undisturbed["sqsd/report.json"]["settings"]  # the command's and the API's
    assert found["sqsd/report.json"].pop("command")[:3] == ["sqsd-filter", "in.jsonl", "out"]
    card = found.pop("README.md").decode()  # which tells the command, too
    assert "sqsd-filter in.jsonl out" in card
    assert b"sqsd-filter in.jsonl out" in found.pop("sqsd/report.html")
    assert found == {name: undisturbed[name] for name in undisturbed.keys() - {"README.md", "sqsd/report.html"}}


@pytest.mark.slow
@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-C", "SIGTERM"])
def test_an_interrupted_driver_prints_the_command_that_goes_on(source: Path, tiny_pack: Path, kind: int) -> None:
    folder = Path.cwd()
    process = driver(folder, tiny_pack)
    wait_for_a_segment(process, folder)
    process.send_signal(kind)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, ""), err
    assert err.splitlines()[-1].startswith("  sqsd-filter in.jsonl out")
    assert "Traceback" not in err
    assert read_report(folder / "out")["status"] == "interrupted"
