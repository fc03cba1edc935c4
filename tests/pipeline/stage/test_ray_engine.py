"""The Ray engine: the same bytes as in this process, whatever happens to replicas, disks or rows."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import ray

from sqsd_filter.errors import InputError, ModelError, SQSDError
from sqsd_filter.pipeline.run import filter_dataset
from sqsd_filter.pipeline.stage import ray_engine
from sqsd_filter.pipeline.stage.engines import LocalEngine
from sqsd_filter.pipeline.stage.ray_engine import RayEngine
from sqsd_filter.progress import Silent
from sqsd_filter.scoring.scorer import SQSDScorer
from tests.corpora import content, read_report, write_jsonl
from tests.disks import small_disk
from tests.pipeline.stage.sharded_rows import LINES, ROWS, run
from tests.tiny import CONVERSATIONS

pytestmark = pytest.mark.pictures  # `undisturbed` is drawn in full


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
    assert len(list(Path("out/_sqsd/scores").iterdir())) == (1 if shared else 2)
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


def test_more_replicas_than_shards_are_not_started(session: None, tmp_path: Path, tiny_pack: Path) -> None:
    write_jsonl(tmp_path / "few.jsonl", LINES[:3])
    report = run(tmp_path / "few.jsonl", tiny_pack, RayEngine(2), str(tmp_path / "few"))  # without a warning of Ray's
    assert report["rows"]["scored"] == 3


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


def test_more_gpus_than_there_are_is_one_sentence(session: None, tiny_pack: Path) -> None:
    with pytest.raises(SQSDError, match="don't fit on the 0 GPUs"):
        RayEngine(2, gpus_per_replica=1).prepare(SQSDScorer(tiny_pack))


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
