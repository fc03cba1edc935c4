"""A linear probe in a recipe: built, recorded, exact, and refused where its rows can't be right."""

from __future__ import annotations

import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from sqsd_filter.cli.main import cli
from sqsd_filter.corpus.conversation import conversation_key
from sqsd_filter.directions.build import _text, _trained, build_pack
from sqsd_filter.directions.linear_probe.make import read_known
from sqsd_filter.directions.recipe import PackRecipe
from sqsd_filter.errors import InputError, PackError, SQSDError, UsageError
from sqsd_filter.scoring.chat_encoder import Encoded
from sqsd_filter.scoring.pack import PACK_FILE, Pack, load_pack
from sqsd_filter.scoring.reference import ReferenceScorer
from sqsd_filter.scoring.reference_rows import Reference
from sqsd_filter.scoring.scorer import SQSDScorer
from tests.corpora import make_rows, write_jsonl
from tests.directions.recipes import files, write_recipe

LINEAR = """
[linear.unsafe]
layers = [1, 2]
ridge = 0.5
max_length = 48
[[linear.unsafe.rows]]
unsafe = true
data = "unsafe.jsonl"
by = "source"
licence = "CC0-1.0"
[[linear.unsafe.rows]]
unsafe = false
data = "plain.jsonl"
weight = 2.0
[[linear.unsafe.rows]]
unsafe = false
data = "short.jsonl"
rows = 6
"""


def with_probe(recipe: Path, linear: str = LINEAR) -> Path:
    """The recipe with a linear probe as another risk."""
    rows = make_rows(90)
    shout = [
        {**row, "output": "NO! " + row["output"].upper(), "source": "one two"[k % 2 * 4 :][:3]}
        for k, row in enumerate(rows)
    ]
    write_jsonl(recipe.with_name("unsafe.jsonl"), shout[30:50])
    write_jsonl(recipe.with_name("plain.jsonl"), rows[50:70])
    write_jsonl(recipe.with_name("short.jsonl"), [{**row, "output": str(k)} for k, row in enumerate(rows[70:])])
    named = recipe.with_name("linear.toml")
    named.write_text(recipe.read_text() + linear)
    return named


def begun(recipe: PackRecipe, trained: Path, out: Path) -> Path:
    """A build that was killed after its training."""
    shutil.copytree(trained, out)
    (out / PACK_FILE).unlink()
    (out / ".build").mkdir()
    (out / ".build" / "recipe.json").write_text(_text(_trained(recipe)))
    return out


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_pack: Path, built: Path) -> Pack:
    folder = tmp_path_factory.mktemp("made")
    loaded = PackRecipe.load(with_probe(write_recipe(folder, tiny_pack / "base")))
    return build_pack(loaded, begun(loaded, built, folder / "pack"))


def test_a_built_probe_tells_its_rows_apart(made: Pack) -> None:
    recipe = PackRecipe.load(made.path.parent / "linear.toml")
    data = read_known(recipe, "unsafe").rows.values()
    scorer = SQSDScorer(made.with_risk("unsafe"), max_length=48)
    scores = scorer.score([row.turns for row in data])
    unsafe = np.array([row.unsafe for row in data])
    assert scores.risk[unsafe].min() > scores.risk[~unsafe].max()
    assert np.array_equal(scores.risk, scores.probes["unsafe"])
    assert scorer.passes == 1
    assert load_pack(made.path) == made


def test_the_fit_is_a_weighted_ridge_regression(made: Pack) -> None:
    """On the readings of the dense form, with the bias as a value that is not penalised."""
    recipe = PackRecipe.load(made.path.parent / "linear.toml")
    rows = list(read_known(recipe, "unsafe").rows.values())
    dense = ReferenceScorer(made.with_risk("unsafe"), max_length=48)
    risks = dense.score([row.turns for row in rows]).risk
    read_nd = []
    for encoded in dense.encoder.encode([row.turns for row in rows]):
        assert isinstance(encoded, Encoded)
        hidden = dense.base(input_ids=torch.from_numpy(encoded.ids)[None], output_hidden_states=True).hidden_states
        first = int(encoded.answer.argmax())
        parts = [[hidden[layer][0, encoded.answer].mean(0), hidden[layer][0, first - 1]] for layer in (1, 2)]
        read_nd.append(np.concatenate([each.detach().numpy() for pair in parts for each in pair]))
    values = np.array(read_nd)
    standard = np.column_stack([(values - values.mean(0)) / values.std(0), np.ones(len(rows))])
    shares = {"one": 1 / 2, "two": 1 / 2, "plain 2": 2 / 3, "short 3": 1 / 3}
    counts = Counter(row.source for row in rows)
    weights = np.array([shares[row.source] / counts[row.source] for row in rows])
    weights *= len(rows) / weights.sum()
    penalty = np.diag([0.5 * values.shape[1]] * values.shape[1] + [0.0])
    y = np.where([row.unsafe for row in rows], 1.0, -1.0)
    solution = np.linalg.solve(standard.T * weights @ standard + penalty, standard.T * weights @ y)
    assert np.abs(standard @ solution - risks).max() < 1e-4


def test_the_pack_keeps_its_own_risk(made: Pack, built: Path) -> None:
    own, unsafe = load_pack(built), made.with_risk("unsafe")
    assert (made.probes, made.fingerprint) == (own.probes, own.fingerprint)
    assert unsafe.fingerprint != own.fingerprint
    assert (unsafe.probes, unsafe.adapters) == ((), [])


def test_the_record_says_what_the_probe_was_fitted_on_and_how_far_it_points(made: Pack) -> None:
    record = made.notes["provenance"]["unsafe"]
    assert (record["rows"], record["licence"]) == (46, "CC0-1.0")
    assert record["settings"] == {"layers": [1, 2], "ridge": 0.5, "max_length": 48}
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


def test_another_fit_is_another_risk_of_the_same_adapters(made: Pack, built: Path, tmp_path: Path) -> None:
    recipe = PackRecipe.load(made.path.parent / "linear.toml")
    other = replace(recipe, linear={"unsafe": replace(recipe.linear["unsafe"], ridge=5.0)})
    pack = build_pack(other, begun(other, built, tmp_path / "pack"))
    assert pack.fingerprint == made.fingerprint
    assert pack.with_risk("unsafe").fingerprint != made.with_risk("unsafe").fingerprint


def test_inspect_shows_the_probe_and_how_far_it_points(made: Pack, capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["pack", "inspect", str(made.path)], standalone_mode=False)
    shown = capsys.readouterr().out
    assert "risk 'unsafe' is a linear probe of hidden states in layers 1, 2: --risk unsafe" in shown
    cli.main(["pack", "inspect", str(made.path), "--risk", "unsafe"], standalone_mode=False)
    shown = capsys.readouterr().out
    assert "'unsafe' is a linear probe of hidden states in layers 1, 2: " in shown
    assert (
        "fitted on 46 rows of up to 48 tokens, ridge 0.5 (unsafe.jsonl, plain.jsonl, short.jsonl, 4 sources;" in shown
    )
    assert "one (10)" in shown
    auc = made.notes["provenance"]["unsafe"]["held_out"][0]["auc"]["plain 2"]
    [line] = [line for line in shown.splitlines() if line.startswith("plain 2 ")]
    assert f"{auc:.3f}" in line
    assert "above 99 % of all" in shown


def test_two_tables_with_one_source_are_refused(recipe: Path) -> None:
    named = with_probe(recipe, LINEAR.replace('data = "short.jsonl"', 'data = "short.jsonl"\nname = "plain 2"'))
    with pytest.raises(InputError, match="two tables have the source 'plain 2': give one of them another name"):
        read_known(PackRecipe.load(named), "unsafe")


def test_a_build_scores_the_reference_by_each_risk(made: Pack, built: Path, tmp_path: Path) -> None:
    named = made.path.parent / "linear.toml"
    text = named.read_text() + '[reference.held-out]\nkind = "benign"\ndata = "held-out.jsonl"\n'
    write_jsonl(named.with_name("held-out.jsonl"), make_rows(130)[100:])
    named.with_name("measured.toml").write_text(text)
    recipe = PackRecipe.load(named.with_name("measured.toml"))
    pack = build_pack(recipe, begun(recipe, built, tmp_path / "pack"))
    for each in (pack, pack.with_risk("unsafe")):
        reference = Reference.of(each)
        assert reference is not None
        assert reference.outdated(each) is None
    write_jsonl(named.with_name("held-out.jsonl"), make_rows(70)[40:])
    with pytest.raises(InputError, match=r"rows with a prompt of \[\[linear.unsafe.rows\]\]"):
        build_pack(recipe, begun(recipe, built, tmp_path / "other"))


def test_rows_count_once_and_not_for_both_kinds(recipe: Path) -> None:
    loaded = PackRecipe.load(with_probe(recipe))
    rows = make_rows(90)
    write_jsonl(recipe.with_name("plain.jsonl"), [*rows[50:70], *rows[50:60]])
    data = read_known(loaded, "unsafe")
    assert len(data.rows) == 46
    assert set(data.rows) == {conversation_key(row.turns).hex() for row in data.rows.values()}
    shared = {**rows[30], "output": "NO! " + rows[30]["output"].upper()}
    write_jsonl(recipe.with_name("plain.jsonl"), [*rows[50:70], shared])
    with pytest.raises(InputError, match=r"^\[linear.unsafe\] has a row that is unsafe in one of its tables and not"):
        read_known(loaded, "unsafe")


def test_weights_are_shared_by_the_sources_of_a_table(recipe: Path) -> None:
    data = read_known(PackRecipe.load(with_probe(recipe)), "unsafe")
    assert {row.source: row.weight for row in data.rows.values()} == {
        **{"one": 0.5, "two": 0.5},
        **{"plain 2": 2.0, "short 3": 1.0},
    }


BROKEN = {
    "no other rows": ("unsafe = false", "unsafe = true", UsageError, "needs rows with unsafe = true and"),
    "weight": ("weight = 2.0", "weight = 0.0", UsageError, "weight of a linear probe's rows must be above 0"),
    "ridge": ("ridge = 0.5", "ridge = -1.0", UsageError, "ridge of a linear probe must be above 0"),
    "max_length": ("max_length = 48", "max_length = 1", UsageError, "at least 2 tokens"),
    "no layers": ("[1, 2]", "[]", UsageError, "layers of a linear probe must be numbers from 1 on"),
    "layer 0": ("[1, 2]", "[0]", UsageError, "layers of a linear probe must be numbers from 1 on"),
    "no such layer": ("[1, 2]", "[1, 99]", PackError, "reads layer 99, but .* has 2: it was fitted on another model"),
    "no such key": ("ridge = 0.5", "rigde = 0.5", UsageError, "unknown keys: rigde"),
    "name": ("linear.unsafe", "linear.safety", UsageError, "calls a linear probe 'safety', as something else"),
    "no column": ("linear.unsafe", "linear.risk", UsageError, "'risk' can't be a probe's name"),
    "column": ('by = "source"', 'by = "origin"', InputError, "lacks the columns origin"),
    "too long": ("max_length = 48", "max_length = 2", InputError, "has no usable rows of one kind"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_recipe_that_can_not_be_right_is_refused(case: str, recipe: Path, built: Path) -> None:
    before, after, error, message = BROKEN[case]
    linear = LINEAR.replace(before, after)
    named = with_probe(recipe, linear)

    def build() -> None:
        loaded = PackRecipe.load(named)
        build_pack(loaded, begun(loaded, built, recipe.parent / "pack"))

    with pytest.raises(SQSDError, match=message) as problem:
        build()
    assert type(problem.value) is error


def test_a_recipe_without_a_probe_has_the_identity_that_it_had(recipe: Path, made: Pack) -> None:
    loaded = PackRecipe.load(recipe)
    assert _trained(PackRecipe.load(with_probe(recipe))) == _trained(loaded)
    assert files(made.path).keys() >= {"unsafe/training.json", "unsafe/linear_probe.safetensors"}
