"""Ray clusters: nodes that go away, shares of a GPU, and drivers that are killed or interrupted."""

from __future__ import annotations

import logging
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import ray

from sqsd_filter.pipeline.run import filter_dataset
from sqsd_filter.pipeline.stage.ray_engine import RayEngine
from sqsd_filter.scoring.scorer import SQSDScorer
from tests.corpora import content, read_report
from tests.pipeline.stage.sharded_rows import SHARDS, run

pytestmark = pytest.mark.pictures  # `undisturbed` is drawn in full


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
    while not list(folder.glob("out/_sqsd/scores/*.parquet")) and process.poll() is None:
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
    before = {p: p.stat().st_mtime_ns for p in folder.glob("out/_sqsd/scores/*.parquet")}
    assert process.returncode == -signal.SIGKILL
    assert 0 < len(before) < SHARDS
    process = driver(folder, tiny_pack)
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0
    assert "rows kept in out" in out
    assert "ray" not in err.lower()
    assert before.items() <= {p: p.stat().st_mtime_ns for p in folder.glob("out/_sqsd/scores/*.parquet")}.items()
    found = content(folder / "out")
    found["_sqsd/report.json"]["settings"] = undisturbed["_sqsd/report.json"]["settings"]  # the command's and the API's
    assert found["_sqsd/report.json"].pop("command")[:3] == ["sqsd-filter", "in.jsonl", "out"]
    card = found.pop("README.md").decode()  # which tells the command, too
    assert "sqsd-filter in.jsonl out" in card
    assert b"sqsd-filter in.jsonl out" in found.pop("_sqsd/report.html")
    assert found == {name: undisturbed[name] for name in undisturbed.keys() - {"README.md", "_sqsd/report.html"}}


@pytest.mark.slow
def test_an_interrupted_driver_prints_the_command_that_goes_on(source: Path, tiny_pack: Path) -> None:
    folder = Path.cwd()
    process = driver(folder, tiny_pack)
    wait_for_a_segment(process, folder)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, ""), err
    assert err.splitlines()[-1].startswith("  sqsd-filter in.jsonl out")
    assert "Traceback" not in err
    assert read_report(folder / "out")["status"] == "interrupted"
