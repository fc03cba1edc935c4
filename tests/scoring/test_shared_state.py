"""Probes that share a state: one pass for all of them, as a pack says it or as the fast mode that is named as such."""

from __future__ import annotations

import copy
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from sqsd_filter import Cut, filter_dataset, select_dataset
from sqsd_filter.cli.main import cli
from sqsd_filter.errors import DestinationExists, UsageError
from sqsd_filter.pipeline.stage.ray_engine import RayEngine
from sqsd_filter.scoring.loss_gradient import LossGradient
from sqsd_filter.scoring.pack import Pack, load_pack
from sqsd_filter.scoring.reference import ReferenceScorer
from sqsd_filter.scoring.results import Scores
from sqsd_filter.scoring.scorer import SQSDScorer
from tests.corpora import content, make_rows, read_report, rows_of, write_jsonl
from tests.tiny import CONVERSATIONS, make_adapter, make_pack


def probe(name: str, weight: float, direction: str, state: str = "initial", scaling: float | None = None) -> Any:
    return {"name": name, "weight": weight, "direction": direction, "state": state, "state_scaling": scaling}


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory, tiny_pack: Path) -> Path:
    """Two danger and two safety probes, three of them at one state."""
    folder = tmp_path_factory.mktemp("four")
    probes = [
        probe("beaver", 0.75, "danger"),
        probe("aegis", 0.25, "other"),
        probe("early_safety", -0.5, "safety"),
        probe("safety", -0.5, "safety", "safety", 1.0),
    ]
    make_adapter(tiny_pack / "base", folder / "other", r=5, seed=7)
    return make_pack(folder, tiny_pack / "base", probes=probes)


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows of every backward pass, as they are made."""
    seen: list[int] = []
    real = LossGradient.backward

    def counted(self: LossGradient, ids_bt: torch.Tensor, targets_bt: torch.Tensor) -> None:
        seen.append(len(ids_bt))
        real(self, ids_bt, targets_bt)

    monkeypatch.setattr(LossGradient, "backward", counted)
    return seen


def gap(a: Scores, b: Scores) -> float:
    return max(
        float(np.abs(x - y).max()) for x, y in [(a.risk, b.risk), *((a.probes[n], b.probes[n]) for n in a.probes)]
    )


def passes_a_row(pack: Pack, passes: list[int]) -> float:
    scorer = SQSDScorer(pack)
    scorer.model  # noqa: B018  (tries a row of its own)
    passes.clear()
    scorer.score(CONVERSATIONS)
    return sum(passes) / len(CONVERSATIONS)


def test_a_state_costs_one_pass_however_many_probes_share_it(four: Path, tiny_pack: Path, passes: list[int]) -> None:
    assert passes_a_row(load_pack(tiny_pack), passes) == 2
    assert passes_a_row(load_pack(four), passes) == 2
    assert passes_a_row(load_pack(four).at_one_state("initial"), passes) == 1


def test_every_probe_has_a_column_and_the_risk_is_their_weighted_sum(four: Path) -> None:
    scores = SQSDScorer(four).score(CONVERSATIONS)
    columns = scores.columns()
    names = ["beaver", "aegis", "early_safety", "safety"]
    assert list(columns) == ["sqsd_risk", *(f"sqsd_{name}" for name in names), "sqsd_status"]
    weighted = np.sum(
        [w * scores.probes[name] for w, name in zip((0.75, 0.25, -0.5, -0.5), names, strict=True)], axis=0
    )
    assert np.allclose(scores.risk, weighted, rtol=0, atol=1e-12)
    assert gap(scores, ReferenceScorer(four).score(CONVERSATIONS)) <= 1e-4


@pytest.mark.parametrize("state", ["initial", "safety"])
@pytest.mark.parametrize("aligned", [False, True], ids=["plain", "aligned"])
def test_a_shared_state_agrees_with_the_dense_form(tmp_path: Path, tiny_pack: Path, state: str, aligned: bool) -> None:
    paper = load_pack(make_pack(tmp_path, tiny_pack / "base", aligned=aligned))
    shared = paper.at_one_state(state)
    scores = SQSDScorer(shared).score(CONVERSATIONS)
    assert gap(scores, ReferenceScorer(shared).score(CONVERSATIONS)) <= 1e-4
    own = SQSDScorer(paper).score(CONVERSATIONS)
    stays, moves = ("danger", "safety") if state == "initial" else ("safety", "danger")
    assert np.abs(scores.probes[stays] - own.probes[stays]).max() <= 1e-5
    assert np.abs(scores.probes[moves] - own.probes[moves]).max() > 1e-2


def test_a_shared_state_has_the_scaling_that_the_pack_gives_it(tiny_pack: Path) -> None:
    assert {p.at for p in load_pack(tiny_pack).at_one_state("safety").probes} == {("safety", 1.0)}
    assert {p.at for p in load_pack(tiny_pack).at_one_state("initial").probes} == {("initial", None)}


def test_what_is_no_state_of_the_pack_is_refused_with_those_that_are(tiny_pack: Path) -> None:
    with pytest.raises(UsageError, match="no gradients at 'danger': its states are initial, safety"):
        load_pack(tiny_pack).at_one_state("danger")


def test_a_shared_state_is_another_pack_to_stores_and_caches(tmp_path: Path, tiny_pack: Path) -> None:
    paper = load_pack(tiny_pack)
    shared = paper.at_one_state("initial")
    assert len({pack.fingerprint for pack in (paper, shared, paper.at_one_state("safety"))}) == 3
    assert SQSDScorer(shared).settings()["pack"] == shared.fingerprint
    written = make_pack(tmp_path, tiny_pack / "base", probes=[vars(p) for p in shared.probes])
    assert load_pack(written).fingerprint == shared.fingerprint  # the same scores, said in the file
    for same in (copy.deepcopy(SQSDScorer(shared)), pickle.loads(pickle.dumps(SQSDScorer(shared)))):
        assert same.pack == shared


def test_only_danger_and_safety_at_one_state_are_called_shared(four: Path, tiny_pack: Path, tmp_path: Path) -> None:
    assert [load_pack(p).shared_state for p in (four, tiny_pack)] == [None, None]
    assert load_pack(four).at_one_state("safety").shared_state == "safety"
    alone = make_pack(tmp_path / "alone", tiny_pack / "base", probes=[probe("danger", 1, "danger")])
    both = [probe("danger", 1, "danger"), probe("safety", -1, "safety")]
    dangers = [probe("beaver", 1, "danger"), probe("aegis", 0.5, "other"), probe("idle", 0, "safety")]
    make_adapter(tiny_pack / "base", tmp_path / "dangers" / "other")
    assert load_pack(alone).shared_state is None
    assert load_pack(make_pack(tmp_path / "dangers", tiny_pack / "base", probes=dangers)).shared_state is None
    assert load_pack(make_pack(tmp_path / "both", tiny_pack / "base", probes=both)).shared_state == "initial"
    scalings = [both[0], {**both[1], "state_scaling": 1.0}]
    assert load_pack(make_pack(tmp_path / "two", tiny_pack / "base", probes=scalings)).shared_state is None


# ---------------------------------------------------------------------------------------------- runs


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "in.jsonl", make_rows(12))
    return "in.jsonl"


def test_the_report_and_the_card_name_each_probe_and_its_weight(four: Path, source: str) -> None:
    report = filter_dataset(source, "out", drop_count=2, pack=four)
    assert report["pack"]["weights"] == {"beaver": 0.75, "aegis": 0.25, "early_safety": -0.5, "safety": -0.5}
    assert report["pack"]["shared_state"] is None
    card = Path("out/README.md").read_text()
    assert "+0.75 × `sqsd_beaver` +0.25 × `sqsd_aegis` -0.5 × `sqsd_early_safety` -0.5 × `sqsd_safety`" in card
    assert "Shared state" not in card
    for row in rows_of(Path("out"), "kept"):
        parts = (
            0.75 * row["sqsd_beaver"] + 0.25 * row["sqsd_aegis"] - 0.5 * (row["sqsd_early_safety"] + row["sqsd_safety"])
        )
        assert row["sqsd_risk"] == pytest.approx(parts, abs=1e-12)


def run(*arguments: str) -> None:
    cli.main(args=[*arguments], standalone_mode=False)


def test_a_run_at_a_shared_state_says_so_wherever_it_is_looked_at(
    tiny_pack: Path, source: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run(source, "fast", "--drop-count", "2", "--pack", str(tiny_pack), "--shared-state", "initial")
    assert re.search(r"^  pack     tiny .*, shared state: initial$", capsys.readouterr().out, re.MULTILINE)
    report, card = read_report(Path("fast")), Path("fast/README.md").read_text()
    shared = load_pack(tiny_pack).at_one_state("initial")
    assert (report["pack"]["shared_state"], report["pack"]["fingerprint"]) == ("initial", shared.fingerprint)
    assert report["settings"]["shared_state"] == {"value": "initial", "origin": "flag"}
    assert "Shared state: `initial`. All directions use this one state. In the paper each direction has its" in card
    assert "--shared-state initial" in card
    select_dataset("fast", "again", Cut.of(drop_count=3))
    assert "Shared state: `initial`" in Path("again/README.md").read_text()
    run("score", source, "fast.parquet", "--pack", str(tiny_pack), "--shared-state", "initial")
    found = {row["id"]: row["sqsd_risk"] for row in pq.read_table("fast.parquet").to_pylist()}
    assert found == {r["id"]: r["sqsd_risk"] for name in ("kept", "dropped") for r in rows_of(Path("fast"), name)}


def test_a_run_at_a_shared_state_is_not_taken_for_the_papers_form(tiny_pack: Path, source: str) -> None:
    cut: Any = {"drop_count": 2, "score_store": "store"}
    filter_dataset(source, "out", **cut, pack=tiny_pack)
    shared = SQSDScorer(load_pack(tiny_pack).at_one_state("initial"))
    with pytest.raises(DestinationExists):
        filter_dataset(source, "out", **cut, scorer=shared)
    report = filter_dataset(source, "fast", **cut, scorer=shared)
    assert (report["rows"]["scored"], report["rows"]["reused"]) == (12, 0)  # nothing from the store of the other form


@pytest.mark.slow
def test_replicas_score_at_the_shared_state_too(session: None, tiny_pack: Path, source: str) -> None:
    scorer = SQSDScorer(load_pack(tiny_pack).at_one_state("initial"))
    for dest, engine in (("local", None), ("ray", RayEngine(1))):
        filter_dataset(source, dest, drop_count=2, scorer=scorer, engine=engine)
    assert content(Path("ray")) == content(Path("local"))
