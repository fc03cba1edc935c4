"""A contrast in a recipe: built, resumed, recorded, and refused where its rows can't be right."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from sqsd_filter.cli.main import cli
from sqsd_filter.corpus.conversation import conversation_key
from sqsd_filter.directions.build import _text, _trained, build_pack
from sqsd_filter.directions.contrast import make
from sqsd_filter.directions.contrast.make import read_contrast
from sqsd_filter.directions.contrast.updates import UpdateModel
from sqsd_filter.directions.recipe import PackRecipe
from sqsd_filter.errors import InputError, SQSDError, UsageError
from sqsd_filter.scoring.adapters import load_adapter
from sqsd_filter.scoring.pack import PACK_FILE, Pack, load_pack
from sqsd_filter.scoring.reference import ReferenceScorer
from sqsd_filter.scoring.reference_rows import Reference
from sqsd_filter.scoring.scorer import SQSDScorer
from tests.corpora import make_rows, write_jsonl
from tests.directions.recipes import RECIPE, files, write_recipe

CONTRAST = """
[contrasts.contrast]
state = "initial"
ridge = 0.5
max_length = 48
[[contrasts.contrast.rows]]
unsafe = true
data = "unsafe.jsonl"
by = "source"
licence = "CC0-1.0"
[[contrasts.contrast.rows]]
unsafe = false
data = "plain.jsonl"
weight = 2.0
[[contrasts.contrast.rows]]
unsafe = false
data = "short.jsonl"
rows = 6
"""
PAPER = RECIPE[RECIPE.index("[[probes]]") :]
OWN = '[[probes]]\nname = "danger"\nweight = 1.0\ndirection = "contrast"\nstate = "initial"\n'


def with_contrast(recipe: Path, contrast: str = CONTRAST) -> Path:
    """The recipe whose own risk is a contrast, with the former one as the risk "paper"."""
    rows = make_rows(90)
    shout = [
        {**row, "output": "NO! " + row["output"].upper(), "source": "one two"[k % 2 * 4 :][:3]}
        for k, row in enumerate(rows)
    ]
    write_jsonl(recipe.with_name("unsafe.jsonl"), shout[30:50])
    write_jsonl(recipe.with_name("plain.jsonl"), rows[50:70])
    write_jsonl(recipe.with_name("short.jsonl"), [{**row, "output": str(k)} for k, row in enumerate(rows[70:])])
    text = recipe.read_text().replace(PAPER, PAPER.replace("[[probes]]", "[[risks.paper]]"))
    named = recipe.with_name("contrast.toml")
    named.write_text(text + OWN + contrast)
    return named


def begun(recipe: PackRecipe, trained: Path, out: Path) -> Path:
    """A build that was killed after its training."""
    shutil.copytree(trained, out)
    (out / PACK_FILE).unlink()
    (out / ".build").mkdir()
    (out / ".build" / "recipe.json").write_text(_text(_trained(recipe)))
    return out


@pytest.fixture(scope="module", autouse=True)
def small_parts() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(make, "AT_ONCE", 8)
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_pack: Path, built: Path, small_parts: None) -> Pack:
    folder = tmp_path_factory.mktemp("made")
    loaded = PackRecipe.load(with_contrast(write_recipe(folder, tiny_pack / "base")))
    return build_pack(loaded, begun(loaded, built, folder / "pack"))


def test_a_built_contrast_tells_its_rows_apart(made: Pack) -> None:
    recipe = PackRecipe.load(made.path.parent / "contrast.toml")
    data = read_contrast(recipe, "contrast").rows.values()
    scorer = SQSDScorer(made, max_length=48)
    risk = scorer.score([row.turns for row in data]).risk
    unsafe = np.array([row.unsafe for row in data])
    assert risk[unsafe].min() > risk[~unsafe].max()
    assert scorer.passes == 1
    few = [row.turns for row in data][:4]
    assert scorer.score(few).risk == pytest.approx(ReferenceScorer(made, max_length=48).score(few).risk, abs=1e-3)


def test_its_own_risk_leaves_the_paper_one_flag_away(made: Pack, built: Path) -> None:
    paper = made.with_risk("paper")
    assert [p.direction for p in made.probes] == ["contrast"]
    assert paper.probes == load_pack(built).probes
    assert paper.fingerprint == load_pack(built).fingerprint != made.fingerprint
    assert load_pack(made.path) == made


def test_the_record_says_what_the_contrast_is_of_and_how_far_it_points(made: Pack) -> None:
    record = made.notes["provenance"]["contrast"]
    assert (record["rows"], record["licence"]) == (46, "CC0-1.0")
    assert record["settings"] == {"state": "initial", "ridge": 0.5, "max_length": 48}
    assert [(each["unsafe"], each["sources"]) for each in record["data"]] == [
        (True, {"one": 10, "two": 10}),
        (False, {"plain 2": 20}),
        (False, {"short 3": 6}),
    ]
    assert {each["source"] for each in record["held_out"]} == {"one", "two"}
    for each in record["held_out"]:
        assert each["rows"] == 10
        assert set(each["auc"]) == {"plain 2", "short 3"}
        assert each["auc"]["plain 2"] > 0.9  # one source of shouting tells of the other


def test_a_killed_build_keeps_the_updates_that_it_measured(
    made: Pack, built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = replace(PackRecipe.load(made.path.parent / "contrast.toml"), keep_checkpoints=True)
    out = begun(recipe, built, tmp_path / "pack")
    real, seen = UpdateModel.project, [0]

    def dying(self: UpdateModel, rows: list[object]) -> np.ndarray:
        seen[0] += len(rows)
        if seen[0] > 20:
            raise KeyboardInterrupt
        return real(self, rows)  # type: ignore[arg-type]

    monkeypatch.setattr(UpdateModel, "project", dying)
    with pytest.raises(KeyboardInterrupt):
        build_pack(recipe, out)
    kept = len((out / ".build" / "contrast" / "updates-0.keys").read_text().splitlines()) - 1
    assert 8 <= kept < 46
    measured: list[int] = []

    def counted(self: UpdateModel, rows: list[object]) -> np.ndarray:
        measured.append(len(rows))
        return real(self, rows)  # type: ignore[arg-type]

    monkeypatch.setattr(UpdateModel, "project", counted)
    again = build_pack(recipe, out)
    assert sum(measured) == 46 - kept + 1  # and the row that a model tries when it is loaded
    assert again.fingerprint == made.fingerprint
    measured.clear()
    build_pack(replace(recipe, contrasts={"contrast": replace(recipe.contrasts["contrast"], ridge=5.0)}), out)
    assert not measured  # another fit on the same updates
    assert load_pack(out).fingerprint != made.fingerprint


def test_inspect_shows_how_far_the_contrast_points(made: Pack, capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["pack", "inspect", str(made.path)], standalone_mode=False)
    shown = capsys.readouterr().out
    assert "'contrast' is a contrast at 'initial' of 46 rows, ridge 0.5." in shown
    assert "one (10)" in shown
    assert "unsafe.jsonl, plain.jsonl, short.jsonl, 4 sources, 46 rows" in shown
    auc = made.notes["provenance"]["contrast"]["held_out"][0]["auc"]["plain 2"]
    [line] = [line for line in shown.splitlines() if line.startswith("plain 2 ")]
    assert f"{auc:.3f}" in line
    assert "above 99 % of all" in shown
    cli.main(["pack", "inspect", str(made.path), "--risk", "paper"], standalone_mode=False)
    assert "is a contrast at" not in capsys.readouterr().out  # the other risk does not use it


def test_two_tables_with_one_source_are_refused(recipe: Path) -> None:
    named = with_contrast(recipe, CONTRAST.replace('data = "short.jsonl"', 'data = "short.jsonl"\nname = "plain 2"'))
    with pytest.raises(InputError, match="two tables have the source 'plain 2': give one of them another name"):
        read_contrast(PackRecipe.load(named), "contrast")


def test_a_build_scores_the_reference_by_each_risk(made: Pack, built: Path, tmp_path: Path) -> None:
    named = made.path.parent / "contrast.toml"
    text = named.read_text() + '[reference.held-out]\nkind = "benign"\ndata = "held-out.jsonl"\n'
    write_jsonl(named.with_name("held-out.jsonl"), make_rows(130)[100:])
    named.with_name("measured.toml").write_text(text)
    recipe = PackRecipe.load(named.with_name("measured.toml"))
    pack = build_pack(recipe, begun(recipe, built, tmp_path / "pack"))
    for each in (pack, pack.with_risk("paper")):
        reference = Reference.of(each)
        assert reference is not None
        assert reference.outdated(each) is None
    write_jsonl(named.with_name("held-out.jsonl"), make_rows(70)[40:])
    with pytest.raises(InputError, match=r"rows with a prompt of \[\[contrasts.contrast.rows\]\]"):
        build_pack(recipe, begun(recipe, built, tmp_path / "other"))


def test_the_direction_has_the_length_of_its_state(made: Pack) -> None:
    def length(name: str) -> float:
        factors = load_adapter(made.adapter(name)).factors.values()
        return float(np.hypot.reduce([f.scaling * np.linalg.norm((f.B @ f.A).numpy()) for f in factors]))

    assert length("contrast") == pytest.approx(length("initial"), rel=0.02)


def test_rows_count_once_and_not_for_both_kinds(recipe: Path) -> None:
    loaded = PackRecipe.load(with_contrast(recipe))
    rows = make_rows(90)
    write_jsonl(recipe.with_name("plain.jsonl"), [*rows[50:70], *rows[50:60]])
    data = read_contrast(loaded, "contrast")
    assert len(data.rows) == 46
    assert set(data.rows) == {conversation_key(row.turns).hex() for row in data.rows.values()}
    shared = {**rows[30], "output": "NO! " + rows[30]["output"].upper()}
    write_jsonl(recipe.with_name("plain.jsonl"), [*rows[50:70], shared])
    with pytest.raises(
        InputError, match=r"^\[contrasts.contrast\] has a row that is unsafe in one of its tables and not"
    ):
        read_contrast(loaded, "contrast")


def test_weights_are_shared_by_the_sources_of_a_table(recipe: Path) -> None:
    data = read_contrast(PackRecipe.load(with_contrast(recipe)), "contrast")
    assert {row.source: row.weight for row in data.rows.values()} == {
        **{"one": 0.5, "two": 0.5},
        **{"plain 2": 2.0, "short 3": 1.0},
    }


BROKEN = {
    "no other rows": ("unsafe = false", "unsafe = true", UsageError, "needs rows with unsafe = true and"),
    "weight": ("weight = 2.0", "weight = 0.0", UsageError, "weight of a contrast's rows must be above 0"),
    "ridge": ("ridge = 0.5", "ridge = -1.0", UsageError, "ridge of a contrast must be above 0"),
    "max_length": ("max_length = 48", "max_length = 1", UsageError, "at least 2 tokens"),
    "no such state": ('state = "initial"\nridge', 'state = "begin"\nridge', UsageError, r"lacks \[adapters.begin\]"),
    "no such key": ("ridge = 0.5", "rigde = 0.5", UsageError, "unknown keys: rigde"),
    "name": ("contrasts.contrast", "contrasts.safety", UsageError, "an adapter and a contrast called 'safety'"),
    "unused": ("[contrasts.contrast]", "[contrasts.spare]", UsageError, "is no probe's direction"),
    "column": ('by = "source"', 'by = "origin"', InputError, "lacks the columns origin"),
    "too long": ("max_length = 48", "max_length = 2", InputError, "has no usable rows of one kind"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_recipe_that_can_not_be_right_is_refused(case: str, recipe: Path, built: Path) -> None:
    before, after, error, message = BROKEN[case]
    contrast = CONTRAST.replace(before, after)
    if case == "unused":
        contrast = CONTRAST + CONTRAST.replace("contrasts.contrast", "contrasts.spare")
    named = with_contrast(recipe, contrast)

    def build() -> None:
        loaded = PackRecipe.load(named)
        build_pack(loaded, begun(loaded, built, recipe.parent / "pack"))

    with pytest.raises(SQSDError, match=message) as problem:
        build()
    assert type(problem.value) is error


def test_a_state_is_chosen_by_trained_directions(recipe: Path) -> None:
    loaded = PackRecipe.load(with_contrast(recipe))
    assert [p.direction for p in loaded.trained_probes] == ["danger", "safety"]
    assert replace(loaded, risks={}).trained_probes == ()


def test_a_recipe_without_a_contrast_has_the_identity_that_it_had(recipe: Path, made: Pack) -> None:
    loaded = PackRecipe.load(recipe)
    assert _trained(PackRecipe.load(with_contrast(recipe))) == _trained(loaded)
    assert files(made.path).keys() >= {"contrast/training.json"}
