"""The recipes of packs: each can be read, finds its data, and builds a pack, in miniature."""

from __future__ import annotations

import argparse
import gzip
import importlib.util
import json
import re
import sys
import tomllib
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sqsd_filter.cli.evaluate import design_of
from sqsd_filter.directions.build import build_pack
from sqsd_filter.directions.data import read_data
from sqsd_filter.directions.recipe import SENSITIVE, AdapterRecipe, LoraShape, PackRecipe
from sqsd_filter.evaluation.settings import FineTuning
from sqsd_filter.pipeline.run import score_dataset
from sqsd_filter.scoring.baselines import SCORERS, make_scorer
from sqsd_filter.scoring.scorer import SQSDScorer
from tests.commands import parse
from tests.corpora import write_jsonl
from tests.directions import hub_data
from tests.hub import Hub
from tests.tiny import CONVERSATIONS

RECIPES_ROOT = Path(__file__).parents[1] / "recipes"
RECIPES = sorted((RECIPES_ROOT / "packs").glob("*/*.toml"))
EVALUATIONS = sorted((RECIPES_ROOT / "paper").glob("*/evaluate.toml"))
every_recipe = pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}-{path.stem}")
of_the_paper = pytest.mark.parametrize(
    "path", [path for path in RECIPES if "2605.04572" in path.read_text()], ids=lambda path: path.parent.name
)


@pytest.fixture
def served(hub: Hub) -> Hub:
    hub_data.serve(hub)
    return hub


def miniature(path: Path, folder: Path, base: Path) -> PackRecipe:
    """The recipe on a tiny model, with a few rows and steps; local data is made up of the columns that it names."""
    recipe = PackRecipe.load(path)
    for adapter in recipe.adapters.values():
        if (folder / adapter.data).suffix == ".jsonl":
            (folder / adapter.data).parent.mkdir(exist_ok=True, parents=True)
            rows = [{column: f"{column} {k}" for column in adapter.columns} | adapter.where for k in range(6)]
            write_jsonl(folder / adapter.data, rows)
    if recipe.states is not None:
        (marked, value), *_ = recipe.states.positive.items()
        asked = recipe.states.source.columns
        rows = [
            {**{column: f"{column} {k}" for column in asked}, marked: value if k % 2 else "other"} for k in range(10)
        ]
        write_jsonl(folder / recipe.states.data, rows)
    adapters = {name: small(adapter) for name, adapter in recipe.adapters.items()}
    return replace(recipe, base_model=str(base), folder=folder, adapters=adapters, lora=LoraShape(r=2, alpha=4))


def small(adapter: AdapterRecipe) -> AdapterRecipe:
    step = adapter.take_step if adapter.take_step in (None, SENSITIVE) else 1
    return replace(
        adapter, rows=6, epochs=1, batch_size=2, device_batch_size=1, save_steps=1, take_step=step, max_length=256
    )


def test_there_are_recipes_for_the_models_of_the_paper() -> None:
    models = {PackRecipe.load(path).base_model for path in RECIPES}
    assert {"Qwen/Qwen3-8B", "meta-llama/Llama-3.1-8B-Instruct", "meta-llama/Llama-2-7b-chat-hf"} <= models


@of_the_paper
def test_the_settings_of_the_paper_are_kept(path: Path) -> None:
    recipe = PackRecipe.load(path)
    assert recipe.lora == LoraShape(r=8, alpha=16, dropout=0.05, target_modules="all-linear")
    assert {recipe.max_length} | {adapter.max_length for adapter in recipe.adapters.values()} == {1024}
    danger, safety, state = (recipe.adapters[name] for name in ("danger", "safety", "initial"))
    assert danger.learning_rate == safety.learning_rate == 5e-6
    assert (danger.rows, safety.rows, state.rows) == (3000, 10000, 5000)
    assert (danger.method, safety.method, state.method) == ("sft", "dpo", "sft")
    steps = state.rows / state.batch_size * state.epochs
    assert state.take_step == 5850
    assert steps - state.rows / state.batch_size < 5850 <= steps
    assert [(p.name, p.weight, p.direction, p.state, p.state_scaling) for p in recipe.probes] == [
        ("danger", 1.0, "danger", "initial", None),
        ("safety", -1.0, "safety", "safety", 1.0),
    ]
    assert ("Qwen3" in recipe.base_model) == (recipe.chat_template_kwargs.get("enable_thinking") is False)


@of_the_paper
def test_one_line_makes_a_recipe_one_for_a_small_card(path: Path, tmp_path: Path) -> None:
    text, count = re.subn(r"^# (quantization = .*)", r"\1", path.read_text(), flags=re.MULTILINE)
    (tmp_path / "recipe.toml").write_text(text)
    small_card = PackRecipe.load(tmp_path / "recipe.toml")
    assert count == 1
    assert small_card == replace(PackRecipe.load(path), quantization="nf4", folder=tmp_path)


@of_the_paper
def test_the_other_danger_data_are_there_too(path: Path, served: Hub, tmp_path: Path) -> None:
    text = path.read_text()
    found = re.search(r'^data = "PKU-Alignment/BeaverTails"\n(.*\n){6}((?:# .*\n)+)', text, re.MULTILINE)
    assert found
    other = "prompt = 'prompt'\nanswer = 'response'\n" + re.sub("^# ", "", found[2], flags=re.MULTILINE)
    (tmp_path / "recipe.toml").write_text(text.replace(found[0], other))
    recipe = PackRecipe.load(tmp_path / "recipe.toml")
    assert read_data(recipe, recipe.adapters["danger"]).licence == "cc-by-4.0"


@of_the_paper
def test_the_commands_in_a_recipe_parse(path: Path) -> None:
    lines = re.findall(r"^# .*: +(?:sqsd-filter|torchrun .*-m sqsd_filter) (.*)", path.read_text(), re.MULTILINE)
    assert len(lines) == 2
    for line in lines:
        assert parse(line.split()).params["recipe"] == Path("recipe.toml")


@every_recipe
def test_a_recipe_finds_its_data(path: Path, served: Hub, tmp_path: Path, tiny_pack: Path) -> None:
    recipe = miniature(path, tmp_path, tiny_pack / "base")
    for adapter in recipe.adapters.values():
        data = read_data(recipe, adapter)
        assert len(data.examples) == 6
        assert data.licence
        assert not data.left_out


@pytest.mark.slow
@every_recipe
def test_a_recipe_builds_a_pack(path: Path, served: Hub, tmp_path: Path, tiny_pack: Path) -> None:
    recipe = miniature(path, tmp_path, tiny_pack / "base")
    pack = build_pack(recipe, tmp_path / "pack")
    kind = "" if path.stem == "recipe" else f"-{path.stem}"
    assert pack.name == f"{path.parent.name}{kind}"
    assert set(SQSDScorer(pack.path).score(CONVERSATIONS[:2]).status) == {"scored"}


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


def script(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, RECIPES_ROOT / "paper" / "small" / f"{name}.py")
    assert spec
    assert spec.loader
    monkeypatch.setattr(sys, "path", list(sys.path))
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def study(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return script("study", monkeypatch)


OPEN_DATA: dict[str, list[dict[str, Any]]] = {
    "judged-completions": [
        {"category": f"c{p % 3}", "prompt": f"Judged {p}?", "response": f"{p}", "unsafe": unsafe, "refusal": not unsafe}
        for p in range(30)
        for unsafe in (True, False)
    ],
    "safety-pairs": [{"prompt": f"Pair {p}?", "safer": f"No {p}.", "less_safe": f"Sure {p}."} for p in range(40)],
    "dolly-15k": [{"instruction": f"Say {p}", "context": "", "response": f"Said {p}."} for p in range(1200)],
    "gsm8k-train": [{"question": f"{p} + 1?", "answer": f"{p + 1}"} for p in range(200)],
    "xstest-completions": [
        {"prompt": f"{kind} {p}?", "type": kind, "label": label, "response": f"{label} {p}"}
        for p in range(150)
        for kind, label in (("safe", "1_full_compliance"), ("contrast_safe", "2_full_refusal"))
    ],
    "harmful-prompts": [
        *({"prompt": f"Bad {p}!", "source": "AdvBench", "harmful": True} for p in range(200)),
        *({"prompt": f"safe {p}?", "source": "XSTest", "harmful": False} for p in range(150)),
    ],
}


@pytest.fixture
def open_data(tmp_path: Path) -> Path:
    (folder := tmp_path / "data").mkdir()
    for name, rows in OPEN_DATA.items():
        with gzip.open(folder / f"{name}.jsonl.gz", "wt") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    return folder


def test_the_small_study_takes_only_what_the_pack_has_not_seen(study: ModuleType, open_data: Path) -> None:
    made = study.study_rows(open_data)
    prepared = study.prepare.prepare(open_data, 0)
    asked = {name: {study.asked(row) for row in rows} for name, rows in (prepared | made).items()}
    anchors = {"anchors-unsafe", "anchors-safe"}
    assert anchors < made.keys()
    assert asked["anchors-unsafe"] == asked["anchors-safe"] <= asked["safety"]
    trained = set().union(*(asked[name] for name in ("align", "initial", "danger", "safety", "val")))
    for name in made.keys() - anchors:
        assert asked[name] and not asked[name] & trained, name
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
    scored = {(Path(p["dest"]).parent.name, p["scorer"], p["pack"]) for kind, p in params if kind == "score"}
    packs = {(scorer, "smollm2-135m") for scorer in SCORERS} | {("sqsd", "other")}
    assert scored >= {(rows, *how) for rows in ("dolly", "unsafe") for how in packs} | {
        ("gsm8k", "sqsd", "smollm2-135m")
    }
    evaluations = [p for kind, p in params if kind == "evaluate"]
    assert [(p["dest"].name, len(p["scores"]), len(p["poison"]), p["seeds"], p["arms"]) for p in evaluations] == [
        ("dolly-mixes", len(SCORERS) + 2, len(SCORERS) + 2, "0,1,2", "none"),
        ("gsm8k-mixes", 3, 3, "0,1,2", "none"),
        ("dolly", 3, 0, "0,1", "windows"),  # shares its models with the next three
        ("dolly", len(SCORERS) + 2, 0, "0", "windows"),
        ("dolly", 4, 0, "0,1", "windows"),
        ("dolly", 2, 0, "0", "windows"),
        ("gsm8k", 3, 0, "0", "windows"),
        ("dolly-cut", 1, 0, "0", "cut"),
        ("dolly-cut", 1, 0, "0", "cut"),  # of another share
    ]


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
    assert f"{wrong[0]} are of" in capsys.readouterr().err


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
    score_dataset(rows, whole := tmp_path / "sqsd.parquet", scorer=make_scorer("sqsd", tiny_pack))
    for scorer in ("danger", "safety"):
        score_dataset(rows, alone := tmp_path / f"{scorer}.parquet", scorer=make_scorer(scorer, tiny_pack))
        assert study.part(whole, scorer, tmp_path / "part.parquet")
        expected, found = (pq.read_table(path).to_pydict() for path in (alone, tmp_path / "part.parquet"))
        assert found.pop("sqsd_risk")[1:] == pytest.approx(expected["sqsd_risk"][1:], rel=1e-4)
        assert found == {name: values for name, values in expected.items() if name in found}
    assert study.part(whole, study.HALF, tmp_path / "part.parquet")
    expected, found = pq.read_table(whole).to_pylist(), pq.read_table(tmp_path / "part.parquet").to_pylist()
    for row, half in zip(expected[1:], found[1:], strict=True):
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
    script("tables", monkeypatch).main()
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    page = (RECIPES_ROOT.parent / "docs" / "evidence.md").read_text(encoding="utf-8").splitlines()
    assert len(rows) > 10
    assert [line for line in rows if line not in page] == []
    of_others = ("| scorer |", "| --- | --- |", "| `")  # the table of scorers' names
    assert [row for row in page if row.startswith("| ") and not row.startswith(of_others) and row not in rows] == []
