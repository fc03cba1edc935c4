"""The paper's experiment: its settings, and the study that repeats it on two cores."""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sqsd_filter import Scoring
from sqsd_filter.cli.evaluate import design_of
from sqsd_filter.evaluation.settings import FineTuning
from sqsd_filter.pipeline.run import score_dataset
from sqsd_filter.scoring.baselines import SCORERS, make_scorer
from tests.commands import exit_code, parse
from tests.corpora import write_jsonl
from tests.recipes.scripts import RECIPES, load_script, write_open_data

EVALUATIONS = sorted((RECIPES / "paper").glob("*/evaluate.toml"))


@pytest.mark.parametrize("path", EVALUATIONS, ids=lambda path: path.parent.name)
def test_an_evaluation_s_config_is_read_and_makes_sense(path: Path) -> None:
    words = ["evaluate", "scores.parquet", "out", "--harmful", "harmful.jsonl", "--config", str(path)]
    params = parse(words).params
    given = tomllib.loads(path.read_text())
    assert {name: list(value) if isinstance(value := params[name], tuple) else value for name in given} == given
    design = design_of(params)
    assert design.windows == 5
    assert design.tuning.schedule == "cosine"
    assert design.tuning.warmup_ratio == 0.1


def test_the_settings_of_the_paper_s_evaluation_are_kept() -> None:
    [path] = [path for path in EVALUATIONS if "2605.04572" in path.read_text()]
    design = design_of(parse(["evaluate", "s.parquet", "out", "--harmful", "h.jsonl", "--config", str(path)]).params)
    assert design.size == 1000
    assert "Llama-Guard-3" in design.judges[0]
    assert replace(design.tuning, device_batch_size=8) == FineTuning()
    for line in re.findall(r"^# .*: +sqsd-filter (.*)", path.read_text(), re.MULTILINE):
        assert parse(line.replace("--config evaluate.toml", f"--config {path}").split()).params


@pytest.fixture
def study(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load_script("paper/small/study.py", monkeypatch)


@pytest.fixture
def open_data(tmp_path: Path) -> Path:
    return write_open_data(tmp_path / "data")


def test_the_small_study_takes_only_what_the_pack_has_not_seen(study: ModuleType, open_data: Path) -> None:
    made = study.study_rows(open_data)
    prepared = study.prepare.prepare(open_data, 0)
    asked = {name: {study.asked(row) for row in rows} for name, rows in (prepared | made).items()}
    anchors = {"anchors-unsafe", "anchors-safe"}
    assert anchors < made.keys()
    assert asked["anchors-unsafe"] == asked["anchors-safe"] <= asked["safety"]
    trained = set().union(*(asked[name] for name in ("align", "initial", "danger", "safety", "val")))
    for name in made.keys() - anchors:
        assert asked[name], name
        assert not asked[name] & trained, name
    assert not (asked["dolly"] | asked["gsm8k"]) & asked["test"]
    assert len(asked["dolly"]) == len(made["dolly"])
    assert {row["source"] for row in made["harmful"]} == {"AdvBench"}


def test_the_commands_of_the_small_study_parse(
    study: ModuleType, open_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[list[str]] = []
    monkeypatch.setattr(study, "call", lambda *words: called.append([str(word) for word in words]))
    monkeypatch.setattr(sys, "argv", ["study.py", str(open_data), str(tmp_path / "out"), "--transfer", "other"])
    monkeypatch.setattr(study, "part", lambda whole, scorer, target: scorer == study.HALF)
    study.main()
    params = [(words[0], parse(words).params) for words in called]
    scored = {(Path(p["dest"]).parent.name, p["scorer"], p["pack"], p["risk"]) for kind, p in params if kind == "score"}
    packs = {(scorer, "smollm2-135m", "sqsd") for scorer in SCORERS}
    packs |= {("sqsd", "other", "sqsd"), ("sqsd", "smollm2-135m", "unsafe")}
    assert scored >= {(rows, *how) for rows in ("dolly", "unsafe") for how in packs} | {
        ("gsm8k", "sqsd", "smollm2-135m", "sqsd"),
    }
    evaluations = [p for kind, p in params if kind == "evaluate"]
    assert [(p["dest"].name, len(p["scores"]), len(p["poison"]), p["seeds"], p["arms"]) for p in evaluations] == [
        ("dolly-mixes", len(SCORERS) + 3, len(SCORERS) + 3, "0,1,2", "none"),
        ("gsm8k-mixes", 3, 3, "0,1,2", "none"),
        ("dolly", 3, 0, "0,1", "windows"),  # shares its models with the next three
        ("dolly", len(SCORERS) + 3, 0, "0", "windows"),
        ("dolly", 4, 0, "0,1", "windows"),
        ("dolly", 1, 0, "0,1", "windows"),
        ("dolly", 2, 0, "0", "windows"),
        ("gsm8k", 3, 0, "0", "windows"),
        ("dolly-cut", 1, 0, "0", "cut"),
        ("dolly-cut", 1, 0, "0", "cut"),  # of another share
    ]


def test_the_small_study_runs(
    study: ModuleType, open_data: Path, tiny_pack: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def in_this_process(command: Sequence[str], *, check: bool) -> subprocess.CompletedProcess[str]:
        assert (command[:3], check) == ([sys.executable, "-m", "sqsd_filter"], False)
        return subprocess.CompletedProcess(command, exit_code(*command[3:]))

    config = tmp_path / "evaluate.toml"
    config.write_text("size = 2\nheld_out = 2\nprompts = 2\nmax_new_tokens = 2\nepochs = 1\nr = 2\ndtype = 'float32'\n")
    monkeypatch.setattr(study, "CONFIG", config)
    monkeypatch.setattr(subprocess, "run", in_this_process)
    words = [open_data, tmp_path / "out", "--results", "gsm8k-mixes,gsm8k", "--scorers", "length", "--pack", tiny_pack]
    monkeypatch.setattr(sys, "argv", ["study.py", *map(str, words), "--windows", "2"])
    study.main()
    mixes, windows = (
        json.loads((tmp_path / "out" / name / "results.json").read_text()) for name in ("gsm8k-mixes", "gsm8k")
    )
    assert list(mixes["poisoned"]) == list(windows["scorers"]) == ["length"]
    assert windows["scorers"]["length"]["rows"] == [2, 2]
    assert (tmp_path / "out" / "gsm8k" / "asr.png").is_file()
    assert pq.read_schema(tmp_path / "out" / "scores" / "gsm8k.parquet").names == ["row", "sqsd_length"]


def test_another_pack_s_scores_are_not_those_that_are_kept(
    study: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[tuple[str, str]] = []
    monkeypatch.setattr(study, "score", lambda files, rows, target, scorer, pack: called.append((scorer, pack)))
    monkeypatch.setattr(study, "restore", lambda *_: True)
    for pack, rescore in (("smollm2-135m", False), ("mine", False), ("smollm2-135m", True)):
        options = argparse.Namespace(out=tmp_path, pack=pack, rescore=rescore, transfer="other")
        study.obtain("danger", "dolly", {"dolly": tmp_path / "dolly.jsonl"}, options)
    assert called == [(scorer, pack) for pack in ("mine", "smollm2-135m") for scorer in ("sqsd", "danger")]


@pytest.mark.parametrize("wrong", [["--scorers", "sqsd,lenght"], ["--results", "doly"]], ids=lambda words: words[0])
def test_a_study_of_nothing_known_is_refused(
    wrong: list[str], study: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["study.py", "data", "out", *wrong])
    with pytest.raises(SystemExit) as left:
        study.main()
    assert left.value.code == 2
    assert f"{wrong[0]} must be among" in capsys.readouterr().err


def test_scores_of_the_small_study_are_kept_without_a_word_and_come_back(study: ModuleType, tmp_path: Path) -> None:
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": f"Say {k}.", "response": "Well." * k} for k in range(4)])
    for name, risk in (("one", [0.5, None, -1.0, 2.0]), ("two", [1.0, 2.0, 3.0, None])):
        (tmp_path / "scores").mkdir(exist_ok=True)
        pq.write_table(pa.table({"sqsd_risk": risk}), tmp_path / "scores" / f"{name}.parquet")
    study.keep(rows, tmp_path / "scores")
    kept, back = tmp_path / "scores.parquet", tmp_path / "back.parquet"
    assert b"Say" not in kept.read_bytes()
    assert pq.read_schema(kept).names == ["row", "sqsd_one", "sqsd_two"]
    assert study.restore(rows, kept, "two", back)
    assert study.restore(rows, kept, "two", back)
    assert pq.read_table(back).to_pylist() == [
        {"prompt": f"Say {k}.", "response": "Well." * k, "sqsd_risk": risk, "sqsd_status": status}
        for k, (risk, status) in enumerate([(1.0, "scored"), (2.0, "scored"), (3.0, "scored"), (None, "error")])
    ]
    assert not study.restore(rows, kept, "three", tmp_path / "three.parquet")
    other = write_jsonl(tmp_path / "other.jsonl", [{"prompt": "Say.", "response": ""}] * 4)
    assert not study.restore(other, kept, "two", tmp_path / "other.parquet")


def test_parts_of_sqsd_s_risk_are_those_that_their_scorers_give(
    study: ModuleType, tiny_pack: Path, tmp_path: Path
) -> None:
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": f"Say {k}.", "response": "Well." * k} for k in range(4)])
    score_dataset(rows, whole := tmp_path / "sqsd.parquet", Scoring(scorer=make_scorer("sqsd", tiny_pack)))
    for scorer in ("danger", "safety"):
        score_dataset(rows, alone := tmp_path / f"{scorer}.parquet", Scoring(scorer=make_scorer(scorer, tiny_pack)))
        assert study.part(whole, scorer, tmp_path / "part.parquet")
        expected, computed = (pq.read_table(path).to_pydict() for path in (alone, tmp_path / "part.parquet"))
        assert computed.pop("sqsd_risk")[1:] == pytest.approx(expected["sqsd_risk"][1:], rel=1e-4)
        assert computed == {name: values for name, values in expected.items() if name in computed}
    assert study.part(whole, study.HALF, tmp_path / "part.parquet")
    expected, computed = pq.read_table(whole).to_pylist(), pq.read_table(tmp_path / "part.parquet").to_pylist()
    for row, half in zip(expected[1:], computed[1:], strict=True):
        assert half["sqsd_risk"] == pytest.approx(row["sqsd_danger"] - row["sqsd_safety"] / 2)
    assert not study.part(whole, "length", tmp_path / "length.parquet")
    assert not study.part(tmp_path / "none.parquet", "danger", tmp_path / "part.parquet")


def test_rows_of_the_small_study_have_an_answer_and_are_there_once(study: ModuleType) -> None:
    rows = [{"instruction": f"Say {k}", "context": "", "response": "" if k == 5 else "Yes."} for k in range(9)]
    assert [study.asked(row) for row in study.fresh([*rows, rows[2]], {"say 3"})] == [
        f"say {k}" for k in (0, 1, 2, 4, 6, 7, 8)
    ]
    assert study.asked({"question": "What is 2 + 2?"}) == "what is 2 2"


def test_the_page_of_evidence_has_the_results_of_the_small_study(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    load_script("paper/small/tables.py", monkeypatch).main()
    printed = capsys.readouterr().out.splitlines()
    rows = [line for line in printed if line.startswith("| ")]
    page = (RECIPES.parent / "docs" / "evidence.md").read_text(encoding="utf-8").splitlines()
    flowing = " ".join(page)
    assert [line for line in printed if line.startswith("Seeds: ") and line not in flowing] == []
    assert len(rows) > 10
    assert [line for line in rows if line not in page] == []
    of_others = ("| scorer |", "| --- | --- |", "| `")  # the table of scorers' names
    assert [row for row in page if row.startswith("| ") and not row.startswith(of_others) and row not in rows] == []
