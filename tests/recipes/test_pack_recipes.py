"""The recipe.toml of each pack: it can be read, finds its data, and builds a pack in miniature."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from sqsd_filter.directions.build import build_pack
from sqsd_filter.directions.calibration import FEWEST_ROWS
from sqsd_filter.directions.data import read_data
from sqsd_filter.directions.linear_probe.make import read_known
from sqsd_filter.directions.recipe import SENSITIVE, AdapterRecipe, LoraShape, PackRecipe
from sqsd_filter.scoring.reference_rows import Reference
from sqsd_filter.scoring.scorer import SQSDScorer
from tests.commands import parse
from tests.corpora import write_jsonl
from tests.directions import hub_data
from tests.hub import Hub
from tests.tiny import CONVERSATIONS

RECIPES = sorted((Path(__file__).parents[2] / "recipes" / "packs").glob("*/*.toml"))
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
            rows = [{**{column: f"{column} {k}" for column in adapter.columns}, **adapter.where} for k in range(6)]
            write_jsonl(folder / adapter.data, rows)
    if recipe.states is not None:
        (marked, value), *_ = recipe.states.positive.items()
        asked = recipe.states.source.columns
        rows = [
            {**{column: f"{column} {k}" for column in asked}, marked: value if k % 2 else "other"} for k in range(10)
        ]
        write_jsonl(folder / recipe.states.data, rows)
    measured: dict[str, list[dict[str, object]]] = {}
    tables = [table for probe in recipe.linear.values() for table in probe.rows]
    for number, table in enumerate([*tables, *recipe.reference.values()]):
        rows = [
            {**{column: f"{column} {number} {k}" for column in table.source.columns}, **table.where}
            for k in range(FEWEST_ROWS)
        ]
        measured.setdefault(table.data, []).extend(rows)
    for data, rows in measured.items():
        write_jsonl(folder / data, rows)
    adapters = {name: small(adapter) for name, adapter in recipe.adapters.items()}
    linear = {name: replace(probe, layers=(1, 2)) for name, probe in recipe.linear.items()}
    lora = LoraShape(r=2, alpha=4)
    return replace(recipe, base_model=str(base), folder=folder, adapters=adapters, linear=linear, lora=lora)


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
    epoch = 5000 / state.batch_size  # steps
    assert state.take_step == 5850
    assert epoch * (state.epochs - 1) < 5850 <= epoch * state.epochs
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
    commented = re.search(r'^data = "PKU-Alignment/BeaverTails"\n(.*\n){6}((?:# .*\n)+)', text, re.MULTILINE)
    assert commented
    other = "prompt = 'prompt'\nanswer = 'response'\n" + re.sub("^# ", "", commented[2], flags=re.MULTILINE)
    (tmp_path / "recipe.toml").write_text(text.replace(commented[0], other))
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
    for name, probe in recipe.linear.items():
        read = read_known(recipe, name)
        assert len(read.rows) == FEWEST_ROWS * len(probe.rows)
        assert all(record["licence"] for record in read.record)


@pytest.mark.slow
@every_recipe
def test_a_recipe_builds_a_pack(path: Path, served: Hub, tmp_path: Path, tiny_pack: Path) -> None:
    recipe = miniature(path, tmp_path, tiny_pack / "base")
    pack = build_pack(recipe, tmp_path / "pack")
    kind = "" if path.stem == "recipe" else f"-{path.stem}"
    assert pack.name == f"{path.parent.name}{kind}"
    for each in (pack, *map(pack.with_risk, pack.risks)):
        assert set(SQSDScorer(each).score(CONVERSATIONS[:2]).status) == {"scored"}
        known = Reference.of(each)
        assert set(recipe.reference) == ({c["name"] for c in known.record["corpora"]} if known else set())
