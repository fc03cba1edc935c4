"""Steering: what is measured, what is written, and what is there after a kill."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from sqsd_filter.directions.steering import run
from sqsd_filter.directions.steering.curves import parse_alphas
from sqsd_filter.directions.steering.run import directions, steer
from sqsd_filter.errors import DestinationExists, InputError, UsageError
from sqsd_filter.judges import is_refusal
from sqsd_filter.judges.generation import answer
from sqsd_filter.judges.likelihood import log_probabilities
from sqsd_filter.scoring.adapters import Adapter, LoraFactors, load_adapter, merge
from sqsd_filter.scoring.chat_encoder import ChatEncoder, Encoded
from sqsd_filter.scoring.models import load_model, load_tokenizer
from sqsd_filter.scoring.pack import load_pack
from sqsd_filter.scoring.scorer import SQSDScorer
from tests.compass import COMPLIANCE, PAIRS, QUESTIONS, REFUSAL
from tests.corpora import write_jsonl
from tests.tiny import chat, make_pack

GRID = parse_alphas("-1:1:0.5")
FILES = ["answers.jsonl", "steer.csv", "steer.json", "steer.png"]


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four prompts with both answers, and one without."""
    return write_jsonl(tmp_path_factory.mktemp("rows") / "rows.jsonl", [*PAIRS, {"prompt": "And blue?"}])


@pytest.fixture(scope="session")
def steered(compass: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("steered") / "out"
    steer(SQSDScorer(compass), rows, out, alphas=GRID, max_new_tokens=16)
    return out


def report_of(out: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((out / "steer.json").read_text())
    return report


def contents(out: Path) -> dict[str, bytes]:
    assert sorted(path.name for path in out.iterdir()) == FILES
    return {name: (out / name).read_bytes() for name in FILES}


def copied(pack: Path, target: Path) -> Path:
    shutil.copytree(pack, target, ignore=shutil.ignore_patterns("base"))
    return target


def test_directions_that_steer_are_found_to_steer(steered: Path) -> None:
    danger, safety = report_of(steered)["directions"]
    assert [danger["name"], safety["name"]] == ["danger", "safety"]
    assert danger["steers"] is True
    assert safety["steers"] is True
    assert danger["margin"]["monotone"]
    assert danger["margin"]["change"] > 0
    assert safety["margin"]["monotone"]
    assert safety["margin"]["change"] < 0
    assert danger["refusals"]["against"] == safety["refusals"]["against"] == 0
    assert danger["points"][0]["refusal_rate"] == 1.0 > danger["points"][-1]["refusal_rate"]
    assert safety["points"][0]["refusal_rate"] < safety["points"][-1]["refusal_rate"] == 1.0


def test_each_point_is_that_of_a_dense_merge(compass: Path, rows: Path, tmp_path: Path) -> None:
    report = steer(SQSDScorer(compass, dtype="float64"), rows, tmp_path / "out", alphas=GRID, max_new_tokens=16)
    tokenizer = load_tokenizer(str(compass / "base"))
    encoder = ChatEncoder(tokenizer)
    pairs = [encoder.encode([chat(q, reply) for q in QUESTIONS]) for reply in (REFUSAL, COMPLIANCE)]
    for curve in report["directions"]:
        for point in curve["points"]:
            model = load_model(str(compass / "base"), dtype=torch.float64, adapter=compass / "aligned")
            V = load_adapter(compass / curve["adapter"])
            scaled = {m: LoraFactors(f.A, f.B, f.scaling * point["alpha"]) for m, f in V.factors.items()}
            merged = merge(model, Adapter(V.path, scaled), torch.float64)
            means = [log_probabilities(merged, [r for r in p if isinstance(r, Encoded)]).mean() for p in pairs]
            found = [point["safe"], point["unsafe"], point["margin"]]
            np.testing.assert_allclose(found, [*means, means[1] - means[0]], rtol=1e-6)
            answers = answer(merged, tokenizer, [*QUESTIONS, "And blue?"], max_new_tokens=16)
            assert point["prompts"] == 5
            assert point["refusals"] == sum(map(is_refusal, answers))


def test_the_model_itself_is_one_point_of_all_curves(steered: Path) -> None:
    zeros = [next(p for p in c["points"] if p["alpha"] == 0) for c in report_of(steered)["directions"]]
    assert zeros[0] == zeros[1]
    answers = [json.loads(line) for line in (steered / "answers.jsonl").read_text().splitlines()]
    assert len(answers) == 5 * (1 + 2 * 4)
    assert [(a["direction"], a["alpha"]) for a in answers[:5]] == [(None, 0.0)] * 5


def test_the_answers_are_there_for_another_judge(steered: Path) -> None:
    answers = [json.loads(line) for line in (steered / "answers.jsonl").read_text().splitlines()]
    for curve in report_of(steered)["directions"]:
        for point in curve["points"]:
            name = curve["name"] if point["alpha"] else None
            own = [a for a in answers if (a["direction"], a["alpha"]) == (name, point["alpha"])]
            assert [a["prompt"] for a in own] == [*QUESTIONS, "And blue?"]
            assert sum(a["refusal"] for a in own) == sum(is_refusal(a["answer"]) for a in own) == point["refusals"]


def test_the_table_has_the_report_s_points(steered: Path) -> None:
    with (steered / "steer.csv").open() as file:
        lines = list(csv.DictReader(file))
    points = [{"direction": c["name"], **p} for c in report_of(steered)["directions"] for p in c["points"]]
    assert [{k: str(v) for k, v in p.items()} for p in points] == lines


def test_the_picture_has_a_column_a_direction(steered: Path) -> None:
    with Image.open(steered / "steer.png") as image:
        assert image.size == (1100, 1000)


@pytest.fixture
def flat(compass: Path, tmp_path: Path) -> Path:
    """The compass with a danger direction that is zero, and a safety direction at random."""
    pack = copied(compass, tmp_path / "flat")
    generator = torch.Generator().manual_seed(5)
    for name, change in (
        ("danger", torch.zeros_like),
        ("safety", lambda t: torch.randn(t.shape, generator=generator) * t.norm() / t.numel() ** 0.5),
    ):
        file = pack / name / "adapter_model.safetensors"
        save_file({key: change(tensor) for key, tensor in load_file(file).items()}, file)
    return pack


def test_a_zero_and_a_random_direction_do_not_steer(flat: Path, rows: Path, tmp_path: Path) -> None:
    zero, random = steer(SQSDScorer(flat), rows, tmp_path / "out", alphas=GRID, max_new_tokens=4)["directions"]
    assert zero["steers"] is False
    assert zero["margin"]["change"] == 0.0
    assert zero["margin"]["spearman"] is None
    assert random["steers"] is False
    assert random["margin"]["change"] != 0.0


@pytest.mark.pictures
def test_without_answers_refusals_are_all_there_is(compass: Path, tmp_path: Path) -> None:
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": q, "chosen": None, "rejected": "x"} for q in QUESTIONS])
    out = tmp_path / "out"
    report = steer(SQSDScorer(compass), rows, out, alphas=parse_alphas("1"), max_new_tokens=16)
    assert report["settings"]["rows"]["pairs"] == 0
    for curve in report["directions"]:
        assert curve["steers"] is curve["margin"] is None
        assert curve["random"] == []
        assert [p["margin"] for p in curve["points"]] == [None, None]
    with Image.open(out / "steer.png") as image:
        assert image.size == (1100, 400)


@pytest.mark.pictures
def test_a_model_that_overflows_is_reported_without_figures(compass: Path, rows: Path, tmp_path: Path) -> None:
    report = steer(SQSDScorer(compass), rows, tmp_path / "out", alphas=parse_alphas("1,1e38"), max_new_tokens=4)
    danger = report["directions"][0]
    assert danger["points"][-1]["margin"] is None
    assert danger["points"][1]["margin"] is not None
    assert danger["steers"] is False
    assert danger["margin"]["change"] is None
    assert "NaN" not in (tmp_path / "out" / "steer.json").read_text()


def test_the_same_call_again_does_nothing(compass: Path, rows: Path, steered: Path) -> None:
    before = contents(steered)
    again = steer(SQSDScorer(compass), rows, steered, alphas=GRID, max_new_tokens=16)
    assert again == report_of(steered)
    assert contents(steered) == before


@pytest.mark.slow
def test_a_run_killed_again_and_again_ends_in_the_same_bytes(
    compass: Path, rows: Path, steered: Path, tmp_path: Path
) -> None:
    """SIGKILL as soon as a few more points are there."""
    out = tmp_path / "out"
    command = [sys.executable, "-m", "sqsd_filter", "steer", str(compass), "--rows", str(rows), "--out", str(out)]
    command += ["--alpha", "-1:1:0.5", "--max-new-tokens", "16", "-q"]
    kills = 0
    for wanted in (1, 4, 9, 14):
        process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"})
        while process.poll() is None and len(list((out / ".steer").glob("*@*.json"))) < wanted:
            time.sleep(0.002)
        process.kill()
        kills += process.wait() == -signal.SIGKILL
    assert kills >= 2
    assert not (out / "steer.json").exists()
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert contents(out) == contents(steered)


@pytest.mark.pictures
def test_known_points_are_not_measured_again(
    compass: Path, rows: Path, steered: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"

    def stop_at_third(*given: Any, **how: Any) -> list[str]:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return answer(*given, **how)

    calls: list[int] = []
    monkeypatch.setattr(run, "answer", stop_at_third)
    with pytest.raises(KeyboardInterrupt):
        steer(SQSDScorer(compass), rows, out, alphas=GRID, max_new_tokens=16)
    steer(SQSDScorer(compass), rows, out, alphas=GRID, max_new_tokens=16)
    assert len(calls) == 3 + 9 - 2
    assert contents(out) == contents(steered)


@pytest.mark.parametrize("finished", [True, False], ids=["finished", "unfinished"])
def test_another_run_s_folder_is_refused(
    compass: Path, rows: Path, steered: Path, tmp_path: Path, finished: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    if finished:
        shutil.copytree(steered, out)
    else:
        with monkeypatch.context() as patch:
            patch.setattr(run.Measuring, "measure_random", lambda *_: signal.raise_signal(signal.SIGINT))
            with pytest.raises(KeyboardInterrupt):
                steer(SQSDScorer(compass), rows, out, alphas=GRID, max_new_tokens=16)
    with pytest.raises(DestinationExists, match=r"other settings \(alphas, max_new_tokens\)"):
        steer(SQSDScorer(compass), rows, out, alphas=parse_alphas("1"), max_new_tokens=15)


def test_foreign_files_are_refused(compass: Path, rows: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    for out, why in ((tmp_path / "out", "other files"), (tmp_path / "out" / "notes.txt", "is a file")):
        with pytest.raises(DestinationExists, match=why):
            steer(SQSDScorer(compass), rows, out, alphas=GRID)


def test_a_run_that_failed_before_its_first_point_gives_its_folder_free(compass: Path, tmp_path: Path) -> None:
    long = write_jsonl(tmp_path / "long.jsonl", [{"prompt": "word " * 600}])
    short = write_jsonl(tmp_path / "short.jsonl", [{"prompt": "hi"}])
    with pytest.raises(InputError, match=r"Prompt 1 has \d+ tokens"):
        steer(SQSDScorer(compass), long, tmp_path / "out", alphas=GRID)
    report = steer(SQSDScorer(compass), short, tmp_path / "out", alphas=parse_alphas("1"), max_new_tokens=2)
    assert report["settings"]["rows"]["prompts"] == 1


def test_a_senseless_length_and_device_are_refused(compass: Path, rows: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="max_new_tokens"):
        steer(SQSDScorer(compass), rows, tmp_path / "out", alphas=GRID, max_new_tokens=0)
    with pytest.raises(UsageError, match="'cuda:9' can't be used"):
        steer(SQSDScorer(compass, device="cuda:9"), rows, tmp_path / "out", alphas=GRID)
    assert not (tmp_path / "out").exists()


def test_each_direction_is_named_by_its_first_probe(tmp_path: Path) -> None:
    probes = [
        {"name": name, "weight": weight, "direction": direction, "state": "initial"}
        for name, weight, direction in (
            ("a", 1.0, "danger"),
            ("b", -1.0, "safety"),
            ("c", 0.5, "danger"),
            ("d", 0.0, "initial"),
        )
    ]
    pack = load_pack(make_pack(tmp_path / "pack", probes=probes))
    assert directions(pack) == {"a": ("danger", 1), "b": ("safety", -1), "d": ("initial", 1)}
