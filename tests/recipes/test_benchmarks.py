"""The benchmarks run, at their smallest size: what they measure there means nothing."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest

from sqsd_filter.pipeline.stage import ray_engine
from sqsd_filter.pipeline.stage.engines import LocalEngine

BENCHMARKS = Path(__file__).parents[2] / "recipes" / "benchmarks"


@pytest.fixture(autouse=True)
def _on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scripts import each other as they do when they are run."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))


@pytest.mark.slow
def test_speed_compares_the_scorer_with_the_bare_passes_and_the_dense_form(capsys: pytest.CaptureFixture[str]) -> None:
    speed = importlib.import_module("speed")
    speed.main(["--shape", "tiny", "--rows", "3", "--block", "2", "--longest", "24", "--dense-rows", "1"])
    printed = capsys.readouterr().out
    assert "tiny, float32, 3 rows, " in printed
    for ratio in ("a/b", "a2/b", "c/a"):
        assert f"{ratio:5} median" in printed
    assert "peak memory (a)" in printed


@pytest.mark.parametrize(
    "arguments",
    [
        ["nightly", "--rows", "4", "--rounds", "1"],
        ["known", "--rows", "4", "--rounds", "1"],
        ["lookup", "--keys", "1000"],
        ["selection", "--scores", "1000", "--check"],
        ["selection", "--scores", "1000", "--groups", "3"],
        pytest.param(["memory", "--rows", "4", "--engine", "local"], marks=pytest.mark.slow),
    ],
    ids=" ".join,
)
def test_scale_measures(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    importlib.import_module("scale").main(arguments)
    measured = json.loads(capsys.readouterr().out)[arguments[0]]
    assert measured
    if "--check" in arguments:
        assert measured["the same as by sorting"]


@pytest.mark.slow
def test_scale_compares_engines(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The engines on Ray are this process here: six sessions of replicas that load a model take minutes."""
    asked = []

    def engine(replicas: int, *, threads: int | None = None) -> LocalEngine:
        asked.append((replicas, threads))
        return LocalEngine()

    monkeypatch.setattr(ray_engine, "RayEngine", engine)
    importlib.import_module("scale").main(["engines", "--rows", "4", "--rounds", "1"])
    measured = json.loads(capsys.readouterr().out)["engines"]
    assert asked == [(1, None), (1, None), (1, 1), (1, 1), (2, 1), (2, 1)]  # with one row, and with all
    assert set(measured["seconds"]) == set(measured["rows/s"])


def test_a_random_pack_has_the_usual_probes(tmp_path: Path) -> None:
    random_pack = importlib.import_module("random_pack")
    tokenizer = random_pack.make_tokenizer(["a few words to learn from"], 300)
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    pack = random_pack.make_pack(tmp_path, tokenizer, **shape)
    assert {probe.name: probe.weight for probe in pack.probes} == {"danger": 1.0, "safety": -1.0}
