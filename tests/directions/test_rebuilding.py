"""A build that is begun or done already: what of its recipe may change, and what is kept, taken again or swept away."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sqsd_filter.directions.build import build_pack
from sqsd_filter.directions.recipe import PackRecipe
from sqsd_filter.errors import DestinationExists, PackError
from sqsd_filter.scoring.adapters import load_adapter
from sqsd_filter.scoring.pack import PACK_FILE
from tests.directions.recipes import files, with_choice, write_recipe


@pytest.fixture
def recipe(tmp_path: Path, tiny_pack: Path) -> Path:
    return write_recipe(tmp_path, tiny_pack / "base")


@pytest.fixture(scope="module")
def chosen(tmp_path_factory: pytest.TempPathFactory, tiny_pack: Path) -> Path:
    """A finished build that kept its checkpoints."""
    folder = tmp_path_factory.mktemp("chosen")
    recipe = PackRecipe.load(with_choice(write_recipe(folder, tiny_pack / "base")))
    return build_pack(recipe, folder / "pack").path


def test_what_training_does_not_depend_on_may_change_in_a_finished_build(chosen: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(chosen.parent, tmp_path / "copy")
    out, recipe = folder / "pack", PackRecipe.load(folder / "choice.toml")
    trained = {p: p.stat().st_mtime_ns for p in out.glob("*/training.json") if p.parent.name != "initial"}
    assert recipe.states is not None
    changed = replace(recipe, name="renamed", notes={"remark": "ß"}, states=replace(recipe.states, rows=12))
    manifest = json.loads((build_pack(changed, out).path / PACK_FILE).read_text())
    assert (manifest["name"], manifest["remark"]) == ("renamed", "ß")
    assert manifest["validation"]["states"]["initial"]["rows"] == 12
    assert {p: p.stat().st_mtime_ns for p in trained} == trained
    with pytest.raises(DestinationExists, match="another recipe"):
        build_pack(replace(changed, seed=3), out)
    build_pack(replace(changed, keep_checkpoints=False), out)
    assert not (out / ".build").exists()
    with pytest.raises(DestinationExists, match="not an unfinished build"):
        build_pack(recipe, out)


def test_another_step_is_taken_without_training_again(recipe: Path, chosen: Path, tmp_path: Path) -> None:
    out = shutil.copytree(chosen, tmp_path / "other")
    last = out / ".build" / "initial" / "checkpoint-4"
    trained = {p: p.stat().st_mtime_ns for p in last.iterdir()}
    fixed = replace(PackRecipe.load(recipe), keep_checkpoints=True)  # takes the second
    taken = load_adapter(build_pack(fixed, out).path / "initial").factors
    second = load_adapter(last.with_name("checkpoint-2")).factors
    assert all(torch.equal(taken[m].B, second[m].B.bfloat16().float()) for m in second)
    assert {p: p.stat().st_mtime_ns for p in last.iterdir()} == trained
    assert files(build_pack(replace(fixed, keep_checkpoints=False), out).path) == files(
        build_pack(PackRecipe.load(recipe), tmp_path / "fresh").path
    )


def test_what_a_kill_at_the_end_left_of_the_work_is_swept_away(recipe: Path, chosen: Path, tmp_path: Path) -> None:
    out = shutil.copytree(chosen, tmp_path / "pack")
    kept = PackRecipe.load(with_choice(recipe))
    build_pack(kept, out)
    assert (out / ".build").is_dir()
    brief = replace(kept, keep_checkpoints=False)
    build_pack(brief, out)
    (out / ".build" / "initial").mkdir(parents=True)  # as a kill leaves it
    before = (out / PACK_FILE).stat().st_mtime_ns
    build_pack(brief, out)
    assert not (out / ".build").exists()
    assert (out / PACK_FILE).stat().st_mtime_ns == before


def test_a_damaged_page_is_a_sentence(recipe: Path, chosen: Path, tmp_path: Path) -> None:
    out = shutil.copytree(chosen, tmp_path / "pack")
    (out / PACK_FILE).write_text("{")
    with pytest.raises(PackError, match=r"pack\.json can't be read as JSON"):
        build_pack(PackRecipe.load(recipe), out)


def test_pairs_are_written_once_and_again_only_when_they_change(recipe: Path) -> None:
    """trl keeps the base's log-probabilities beside them."""
    loaded = replace(PackRecipe.load(recipe), keep_checkpoints=True)
    out = recipe.parent / "pack"
    build_pack(loaded, out)

    def again() -> set[str]:
        (out / "safety" / "training.json").unlink()
        (out / PACK_FILE).unlink()
        build_pack(loaded, out)
        return {p.name for p in (out / ".build" / "safety" / "pairs").iterdir()}

    pairs = out / ".build" / "safety" / "pairs"
    written = {p: p.stat().st_mtime_ns for p in pairs.iterdir()}
    assert any(p.name.startswith("cache-") for p in written)
    assert again() == {p.name for p in written}
    assert {p: p.stat().st_mtime_ns for p in written} == written
    (recipe.parent / "pairs.jsonl").write_text((recipe.parent / "pairs.jsonl").read_text().replace("No idea", "None"))
    again()
    assert not any(p.exists() and p.stat().st_mtime_ns == t for p, t in written.items())
