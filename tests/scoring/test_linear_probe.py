"""A risk that is a linear probe of hidden states: exact, batched, one flag away, and refused where it can't be read."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from sqsd_filter.cli.main import cli
from sqsd_filter.directions.inspection import inspect_pack
from sqsd_filter.errors import PackError, UsageError
from sqsd_filter.pipeline.check import check_pack
from sqsd_filter.pipeline.stage.replica import pack_files_of
from sqsd_filter.scoring.baselines import make_scorer
from sqsd_filter.scoring.explain import explain
from sqsd_filter.scoring.hidden_states import starts
from sqsd_filter.scoring.linear_probe import save_weights
from sqsd_filter.scoring.pack import LINEAR_FILE, PACK_FILE, load_pack
from sqsd_filter.scoring.reference import ReferenceScorer
from sqsd_filter.scoring.scorer import SQSDScorer
from tests.commands import exit_code
from tests.corpora import make_rows, read_report, rows_of, write_jsonl
from tests.tiny import ARCHITECTURES, CONVERSATIONS, encoded

LAYERS = [1, 2]


def with_probe(pack: Path, folder: Path, **changes: Any) -> Path:
    """A copy of the pack with a linear probe of random weights as the risk "unsafe"."""
    shutil.copytree(pack, folder, ignore=shutil.ignore_patterns("base"))
    page = json.loads((folder / PACK_FILE).read_text())
    page["risks"] = {"unsafe": {"layers": LAYERS, **changes}}
    (folder / PACK_FILE).write_text(json.dumps(page))
    config = json.loads((Path(page["base_model"]) / "config.json").read_text())
    hidden = config.get("hidden_size") or config["n_embd"]
    save_weights(folder / "unsafe", np.random.default_rng(0).normal(size=(2, 2, hidden)), 0.25)
    return folder


@pytest.fixture
def probed(tiny_pack: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "in.jsonl", make_rows(12))
    return with_probe(tiny_pack, tmp_path / "pack")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_batches_agree_with_the_dense_form(packs: dict[str, Path], architecture: str, tmp_path: Path) -> None:
    pack = load_pack(with_probe(packs[architecture], tmp_path / "pack")).with_risk("unsafe")
    fast = SQSDScorer(pack, dtype="float32", token_budget=400).score(CONVERSATIONS)
    dense = ReferenceScorer(pack).score(CONVERSATIONS)
    assert set(fast.status) == {"scored"}
    assert np.ptp(dense.risk) > 0.5
    assert np.abs(fast.risk - dense.risk).max() < 1e-4
    assert np.array_equal(fast.risk, fast.probes["unsafe"])
    alone = SQSDScorer(pack, dtype="float32", token_budget=1).score(CONVERSATIONS)
    assert np.abs(fast.risk - alone.risk).max() < 1e-4


def test_an_answer_starts_where_its_first_token_is_predicted() -> None:
    answer = torch.tensor([[0, 0, 1, 1, 0, 1], [0, 1, 0, 0, 0, 0]], dtype=torch.bool)
    assert starts(answer).int().tolist() == [[0, 1, 0, 0, 1, 0], [1, 0, 0, 0, 0, 0]]


def test_the_risk_is_a_column_and_the_own_risk_stays(probed: Path, tiny_pack: Path) -> None:
    words = ["in.jsonl", "out", "--drop-count", "2", "--pack", str(probed), "--risk", "unsafe"]
    cli.main(words, standalone_mode=False)
    report = read_report(Path("out"))
    assert (report["pack"]["risk"], report["pack"]["weights"]) == ("unsafe", {"unsafe": 1.0})
    rows = [*rows_of(Path("out"), "kept"), *rows_of(Path("out"), "dropped")]
    assert len(rows) == 12
    assert all(row["sqsd_risk"] == row["sqsd_unsafe"] for row in rows)
    assert not {"sqsd_danger", "sqsd_safety"} & set(rows[0])
    assert load_pack(probed).fingerprint == load_pack(tiny_pack).fingerprint
    unsafe = load_pack(probed).with_risk("unsafe")
    assert unsafe.fingerprint != load_pack(probed).fingerprint
    save_weights(probed / "unsafe", np.zeros((2, 2, 64)), 0.0)
    assert load_pack(probed).with_risk("unsafe").fingerprint != unsafe.fingerprint


def test_it_takes_one_forward_pass_and_no_adapter(probed: Path) -> None:
    pack = load_pack(probed).with_risk("unsafe")
    assert (SQSDScorer(pack).passes, pack.adapters, pack.shared_state) == (1, [], None)
    assert "unsafe" not in load_pack(probed).all_folders


def test_another_node_gets_its_weights(probed: Path, tmp_path: Path) -> None:
    pack = load_pack(probed).with_risk("unsafe")
    for name, content in pack_files_of(pack).items():
        (tmp_path / "copy" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "copy" / name).write_bytes(content)
    copied = replace(pack, path=tmp_path / "copy")
    assert copied.fingerprint == pack.fingerprint
    assert np.array_equal(SQSDScorer(copied).score(CONVERSATIONS).risk, SQSDScorer(pack).score(CONVERSATIONS).risk)


def test_check_and_inspect_know_it(probed: Path) -> None:
    pack = load_pack(probed).with_risk("unsafe")
    report = check_pack(scorer=SQSDScorer(pack))
    dense = next(each for each in report["comparisons"] if "dense" in each["name"])
    assert dense["difference"]["risk"] < 1e-4
    shown = inspect_pack(pack)
    assert (shown["linear"]["layers"], shown["linear"]["record"], shown["states"]) == (LAYERS, None, [])
    assert inspect_pack(load_pack(probed))["risks"] == {"unsafe": {"layers": LAYERS}}
    assert exit_code("pack", "inspect", str(probed), "--risk", "unsafe") == 0
    assert exit_code("pack", "inspect", str(probed), "--risk", "unsafe", "--modules") == 0


def test_reference_rows_give_it_a_meaning(probed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_jsonl(Path("plain.jsonl"), make_rows(60)[20:])
    cli.main(
        ["pack", "calibrate", str(probed), "--benign", "plain.jsonl", "--risk", "unsafe", "-q"], standalone_mode=False
    )
    reference = json.loads((probed / PACK_FILE).read_text())["risks"]["unsafe"]["reference"]
    assert set(reference["corpora"][0]["quantiles"]) == {"risk", "unsafe"}
    words = ["in.jsonl", "out", "--above-reference", "90%", "--pack", str(probed), "--risk", "unsafe", "-q"]
    cli.main(words, standalone_mode=False)
    assert read_report(Path("out"))["reference"]["threshold"] == sorted(reference["corpora"][0]["risks"])[35]
    assert exit_code("in.jsonl", "own", "--above-reference", "90%", "--pack", str(probed)) == 2
    assert "choose its risk unsafe (--risk unsafe), which has some, or run" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"per_module": True}, "The risk 'unsafe' has no cosine at each module: leave out --per-module"),
        ({"name": "unnormalised"}, "The risk 'unsafe' has no projections to leave unnormalised"),
        ({"name": "danger"}, "has no probe of danger"),
    ],
    ids=["per module", "unnormalised", "danger"],
)
def test_what_needs_projections_is_refused(probed: Path, options: dict[str, Any], message: str) -> None:
    name = options.pop("name", "sqsd")
    with pytest.raises(UsageError, match=message):
        make_scorer(name, load_pack(probed).with_risk("unsafe"), **options)


def test_one_state_is_refused(probed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["in.jsonl", "out", "--drop-count", "2", "--pack", str(probed), "--risk", "unsafe"]
    assert exit_code(*words, "--shared-state", "x") == 2
    assert "takes no gradients" in capsys.readouterr().err


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_its_parts_are_what_each_token_adds(packs: dict[str, Path], architecture: str, tmp_path: Path) -> None:
    pack = load_pack(with_probe(packs[architecture], tmp_path / "pack")).with_risk("unsafe")
    scorer = SQSDScorer(pack, dtype="float32")
    weights = load_file(pack.path / "unsafe" / LINEAR_FILE)["weight"]
    for turns in CONVERSATIONS:
        explained, (risk,) = explain(scorer, turns), scorer.score([turns]).risk
        (row,) = encoded(scorer, [turns])
        with torch.no_grad():
            states = scorer.model.model(torch.tensor(row.ids)[None], output_hidden_states=True).hidden_states
        answer, first = row.answer, np.flatnonzero(np.diff(row.answer.astype(int)) == 1)
        answers = sum(states[layer][0].numpy() @ weights[k, 0] for k, layer in enumerate(LAYERS))
        begins = sum(states[layer][0].numpy() @ weights[k, 1] for k, layer in enumerate(LAYERS))
        parts = [part["risk"] for part in explained["tokens"]]
        assert parts == pytest.approx((answers[answer] / answer.sum()).tolist(), abs=1e-4)
        assert explained["prompt"]["risk"] == pytest.approx(begins[first].mean(), abs=1e-4)
        assert sum(parts) + explained["prompt"]["risk"] + explained["bias"] == pytest.approx(risk, abs=1e-4)
        layers = [part["risk"] for part in explained["layers"]]
        assert sum(layers) + explained["bias"] == pytest.approx(risk, abs=1e-4)
        assert layers == sorted(layers, reverse=True)
        assert explained["modules"] == []


BROKEN: dict[str, tuple[dict[str, Any], str]] = {
    "no layers": ({"layers": []}, "the layers of the risk 'unsafe' must be numbers from 1 on"),
    "layer 0": ({"layers": [0, 1]}, "the layers of the risk 'unsafe' must be numbers from 1 on"),
    "layers of text": ({"layers": ["1"]}, "the layers of the risk 'unsafe' must be numbers from 1 on"),
    "no list": ({"layers": 3}, "'layers' must be of type list"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_damaged_entry_is_refused_when_the_pack_is_loaded(tiny_pack: Path, tmp_path: Path, case: str) -> None:
    changes, message = BROKEN[case]
    with pytest.raises(PackError, match=message):
        load_pack(with_probe(tiny_pack, tmp_path / "pack", **changes))


def test_damaged_or_foreign_weights_are_refused(probed: Path) -> None:
    weights = probed / "unsafe" / LINEAR_FILE
    good = load_file(weights)

    def score() -> None:
        SQSDScorer(load_pack(probed).with_risk("unsafe")).score(CONVERSATIONS[:1])

    for tensors, message in (
        ({**good, "weight": good["weight"][:, :, :5]}, "needs .*: it was fitted on another model"),
        ({**good, "weight": good["weight"][:1]}, "does not hold finite weights for 2 layers"),
        ({**good, "weight": good["weight"] * np.nan}, "does not hold finite weights"),
        ({**good, "weight": good["weight"].astype(np.int8)}, "does not hold finite weights"),
        ({**good, "bias": np.zeros(2, np.float32)}, "does not hold finite weights"),
        ({"weight": good["weight"]}, "can't be read"),
    ):
        save_file({name: np.ascontiguousarray(each) for name, each in tensors.items()}, weights)
        with pytest.raises(PackError, match=message):
            score()
    weights.write_bytes(b"\0" * 20)
    with pytest.raises(PackError, match="can't be read"):
        score()
    weights.unlink()
    with pytest.raises(PackError, match=r"has the linear probe 'unsafe', but .* is missing"):
        load_pack(probed)


def test_a_layer_that_the_model_lacks_is_refused(tiny_pack: Path, tmp_path: Path) -> None:
    pack = load_pack(with_probe(tiny_pack, tmp_path / "pack", layers=[1, 99])).with_risk("unsafe")
    with pytest.raises(PackError, match=r"reads layer 99, but .* has 2: it was fitted on another model"):
        SQSDScorer(pack).score(CONVERSATIONS[:1])
