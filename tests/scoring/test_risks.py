"""A pack with several risks: its own, and others one flag away, each with its probes, fingerprint and reference."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sqsd_filter import Cut, Writing, filter_dataset, select_dataset
from sqsd_filter.cli.main import cli
from sqsd_filter.directions.calibration import calibrate
from sqsd_filter.directions.inspection import inspect_pack
from sqsd_filter.errors import PackError, UsageError
from sqsd_filter.pipeline.stage.ray_engine import RayEngine
from sqsd_filter.scoring.pack import PACK_FILE, load_pack
from sqsd_filter.scoring.scorer import SQSDScorer
from tests.corpora import content, make_rows, read_report, rows_of, write_jsonl
from tests.tiny import CONVERSATIONS, make_adapter


@pytest.fixture
def both(tiny_pack: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A pack whose own risk is one probe, with the tiny pack's as the risk "paper"; rows are beside it."""
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "in.jsonl", make_rows(12))
    write_jsonl(tmp_path / "plain.jsonl", make_rows(60)[20:])
    folder = shutil.copytree(tiny_pack, tmp_path / "pack", ignore=shutil.ignore_patterns("base"))
    make_adapter(tiny_pack / "base", folder / "other", r=5, seed=7)
    own = [{"name": "danger", "weight": 1.0, "direction": "other", "state": "initial"}]
    rewrite(folder, probes=own, risks={"paper": {"probes": read(folder)["probes"]}})
    return folder


def read(folder: Path) -> dict[str, Any]:
    page: dict[str, Any] = json.loads((folder / PACK_FILE).read_text())
    return page


def rewrite(folder: Path, **fields: Any) -> None:
    (folder / PACK_FILE).write_text(json.dumps(read(folder) | fields))


def run(*arguments: str) -> None:
    cli.main(args=[*arguments], standalone_mode=False)


def test_another_risk_scores_as_a_pack_with_its_probes(both: Path, tiny_pack: Path) -> None:
    pack, alone = load_pack(both), load_pack(tiny_pack)
    paper = pack.with_risk("paper")
    assert (paper.fingerprint, paper.probes, paper.risk) == (alone.fingerprint, alone.probes, "paper")
    assert pack.fingerprint != paper.fingerprint
    assert np.array_equal(SQSDScorer(paper).score(CONVERSATIONS).risk, SQSDScorer(alone).score(CONVERSATIONS).risk)
    assert (SQSDScorer(pack).passes, SQSDScorer(paper).passes) == (1, 2)
    assert set(SQSDScorer(pack).score(CONVERSATIONS).probes) == {"danger"}


def test_other_risks_do_not_change_the_fingerprint(both: Path) -> None:
    before = load_pack(both).fingerprint
    rewrite(both, risks={})
    assert load_pack(both).fingerprint == before


def test_a_run_says_which_risk_it_is_wherever_it_is_looked_at(both: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("in.jsonl", "out", "--drop-count", "2", "--pack", str(both), "--risk", "paper")
    assert re.search(r"^  pack     tiny .*, risk: paper$", capsys.readouterr().out, re.MULTILINE)
    report = read_report(Path("out"))
    assert (report["pack"]["risk"], report["pack"]["weights"]) == ("paper", {"danger": 1.0, "safety": -1.0})
    assert "Of its risks this is `paper`." in Path("out/README.md").read_text()
    page = Path("out/_sqsd/report.html").read_text()
    assert "by its risk paper" in page
    assert "risk paper</th>" in page or "risk paper</td>" in page
    assert {"sqsd_risk", "sqsd_danger", "sqsd_safety"} <= set(rows_of(Path("out"), "kept")[0])
    run("in.jsonl", "own", "--drop-count", "2", "--pack", str(both))
    assert "risk:" not in capsys.readouterr().out.split("pack     ")[1].splitlines()[0]
    assert "risk" not in read_report(Path("own"))["pack"]
    assert "Of its risks" not in Path("own/README.md").read_text()
    assert "sqsd_safety" not in rows_of(Path("own"), "kept")[0]


def test_a_risk_that_the_pack_lacks_is_refused_with_those_it_has(both: Path, tiny_pack: Path) -> None:
    with pytest.raises(UsageError, match=r"^The pack tiny has no risk 'papre': it has sqsd, paper\.$"):
        load_pack(both).with_risk("papre")
    with pytest.raises(UsageError, match="it has sqsd"):
        load_pack(tiny_pack).with_risk("paper")


def test_parts_that_only_another_risk_has_are_named(both: Path) -> None:
    with pytest.raises(UsageError, match=r"^The pack tiny has no probe of safety: the risk 'paper' has one\.$"):
        load_pack(both).of_sign(-1)
    assert [p.name for p in load_pack(both).with_risk("paper").of_sign(-1).probes] == ["safety"]


def test_each_risk_has_a_reference_of_its_own(both: Path) -> None:
    run("pack", "calibrate", str(both), "--benign", "plain.jsonl", "--risk", "paper", "--quiet")
    page = read(both)
    assert "reference" not in page
    assert page["risks"]["paper"]["reference"]["settings"]["pack"] == load_pack(both).with_risk("paper").fingerprint
    calibrate(both, ["plain.jsonl"])
    own, paper = load_pack(both), load_pack(both).with_risk("paper")
    assert own.notes["reference"]["corpora"][0]["risks"] != paper.notes["reference"]["corpora"][0]["risks"]
    for pack, dest in ((own, "own"), (paper, "paper")):
        report = filter_dataset("in.jsonl", dest, above_reference="90%", scorer=SQSDScorer(pack))
        risks = np.array(pack.notes["reference"]["corpora"][0]["risks"])
        assert report["reference"]["threshold"] == risks[35]
        # another cut later finds the reference of the risk that gave the scores
        again = select_dataset(dest, f"{dest}-again", Cut.of(above_reference="50%"), Writing(percentile=True))
        assert again["reference"]["threshold"] == risks[19]


def test_inspect_shows_the_other_risks_and_each_in_full(both: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("pack", "inspect", str(both))
    shown = capsys.readouterr().out
    assert "risk 'paper' is +1 danger ('danger' at 'initial') -1 safety ('safety' at 'safety'): --risk paper" in shown
    assert inspect_pack(load_pack(both))["risks"]["paper"]["probes"][1]["weight"] == -1.0
    run("pack", "inspect", str(both), "--risk", "paper")
    assert "passes    2 per row" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("risks", "message"),
    [
        ([], "'risks' must be of type dict"),
        ({"paper": []}, "each of the risks must be an object"),
        ({"paper": {}}, "needs a list of probes"),
        ({"paper": {"probes": [{"name": "danger"}]}}, "lacks 'weight'"),
        (
            {"paper": {"probes": [{"name": "danger", "weight": 1, "direction": "gone", "state": "initial"}]}},
            "names the adapter 'gone', but .* is missing",
        ),
    ],
    ids=["list", "no object", "no probes", "probe", "adapter"],
)
def test_damaged_risks_are_refused_when_the_pack_is_loaded(both: Path, risks: Any, message: str) -> None:
    rewrite(both, risks=risks)
    with pytest.raises(PackError, match=message):
        load_pack(both)


@pytest.mark.slow
def test_replicas_score_another_risk_too(session: None, both: Path) -> None:
    scorer = SQSDScorer(load_pack(both).with_risk("paper"))
    for dest, engine in (("local", None), ("ray", RayEngine(1))):
        filter_dataset("in.jsonl", dest, drop_count=2, scorer=scorer, engine=engine)
    assert content(Path("ray")) == content(Path("local"))
