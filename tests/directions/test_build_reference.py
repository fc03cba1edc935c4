"""Reference rows of a recipe: a build scores them, and they must not be among what it trains on."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from sqsd_filter.directions.build import _settings, _text, _trained, build_pack
from sqsd_filter.directions.data import read_data
from sqsd_filter.directions.recipe import PackRecipe
from sqsd_filter.errors import InputError, UsageError
from sqsd_filter.scoring.pack import PACK_FILE, load_pack
from sqsd_filter.scoring.reference_rows import Reference
from sqsd_filter.scoring.scorer import SQSDScorer
from tests.corpora import make_rows, write_jsonl
from tests.directions.recipes import files

REFERENCE = """
[reference.held-out]
kind = "benign"
data = "other.jsonl"
rows = 25
licence = "CC0-1.0"
[reference.bad]
kind = "unsafe"
data = "bad.jsonl"
"""


def with_reference(recipe: Path, reference: str = REFERENCE) -> Path:
    rows = make_rows(90)
    write_jsonl(recipe.with_name("other.jsonl"), rows[30:60])
    write_jsonl(recipe.with_name("bad.jsonl"), rows[60:])
    named = recipe.with_name("reference.toml")
    named.write_text(recipe.read_text() + reference)
    return named


def test_a_build_scores_its_reference_rows(recipe: Path, built: Path) -> None:
    out = recipe.parent / "pack"
    shutil.copytree(built, out)
    (out / PACK_FILE).unlink()
    loaded = PackRecipe.load(with_reference(recipe))
    (out / ".build").mkdir()
    (out / ".build" / "recipe.json").write_text(_text(_trained(loaded)))  # as a build killed after its training
    pack = build_pack(loaded, out)
    assert pack.fingerprint == load_pack(built).fingerprint
    reference = Reference.of(pack)
    assert reference is not None
    held_out, bad = reference.record["corpora"]
    assert (held_out["name"], held_out["kind"], held_out["rows"], held_out["licence"]) == (
        *("held-out", "benign", 25),
        "CC0-1.0",
    )
    assert (bad["name"], bad["kind"], bad["rows"]) == ("bad", "unsafe", 30)
    turns = [example for (example,) in read_data(loaded, loaded.reference["bad"].source).examples]
    assert bad["risks"] == pytest.approx(sorted(SQSDScorer(pack).score(turns).risk.tolist()), abs=1e-5)
    assert reference.outdated(pack) is None
    before = files(out)
    build_pack(loaded, out)
    assert files(out) == before


def test_a_recipe_without_a_reference_has_the_identity_that_it_had(recipe: Path) -> None:
    loaded = PackRecipe.load(recipe)
    assert "reference" not in _settings(loaded)
    assert _trained(PackRecipe.load(with_reference(recipe))) == _trained(loaded)


def test_reference_rows_with_a_prompt_of_the_training_data_are_refused(recipe: Path) -> None:
    named = with_reference(recipe)
    rows = make_rows(60)
    asked_again = {**rows[2], "instruction": f"  {rows[2]['instruction'].upper()}", "output": "Another answer."}
    write_jsonl(recipe.with_name("other.jsonl"), [*rows[30:], asked_again])
    loaded = PackRecipe.load(named)
    loaded = replace(loaded, reference={**loaded.reference, "held-out": replace(loaded.reference["held-out"], rows=99)})
    with pytest.raises(InputError, match=r"^\[reference.held-out\] has 1 row with a prompt of \[adapters") as problem:
        build_pack(loaded, recipe.parent / "pack")
    assert repr(rows[2]["instruction"].lower()) in str(problem.value)
    assert not (recipe.parent / "pack").exists()


@pytest.mark.parametrize(
    ("reference", "words"),
    [
        (REFERENCE.replace('"benign"', '"good"'), "must be 'benign' or 'unsafe', not 'good'"),
        (REFERENCE.replace('"benign"', '"unsafe"'), "no corpus of the kind 'benign'"),
        ("[reference.a]\ndata = 'x'", "lacks kind"),
    ],
    ids=["kind", "no benign", "missing"],
)
def test_a_senseless_reference_is_refused(recipe: Path, reference: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        PackRecipe.load(with_reference(recipe, reference))
