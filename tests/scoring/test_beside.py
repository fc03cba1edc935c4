"""A linear probe beside a pack's own risk: one more column and forward pass, and a cut by either of the two."""

from __future__ import annotations

import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from datasets import Dataset

from sqsd_filter import select
from sqsd_filter.cli.main import cli
from sqsd_filter.directions.calibration import calibrate
from sqsd_filter.errors import PackError, UsageError
from sqsd_filter.pipeline.check import check_pack
from sqsd_filter.pipeline.stage.replica import pack_files_of
from sqsd_filter.scoring.baselines import make_scorer
from sqsd_filter.scoring.linear_probe import save_weights
from sqsd_filter.scoring.pack import PACK_FILE, load_pack
from sqsd_filter.scoring.scorer import SQSDScorer
from tests.commands import exit_code
from tests.corpora import make_rows, read_report, rows_of, write_jsonl
from tests.scoring.test_linear_probe import with_probe
from tests.tiny import ARCHITECTURES, CONVERSATIONS

BOTH = ["sqsd_risk", "sqsd_danger", "sqsd_safety", "sqsd_unsafe", "sqsd_status"]


def beside(pack: Path, names: Any = ("unsafe",), **fields: Any) -> Path:
    page = json.loads((pack / PACK_FILE).read_text())
    (pack / PACK_FILE).write_text(json.dumps(page | fields | {"beside": names}))
    return pack


def run(*arguments: object) -> None:
    cli.main(args=[*map(str, arguments)], standalone_mode=False)


@pytest.fixture
def probed(tiny_pack: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A pack with the linear probe "unsafe" beside its own risk, and reference rows for the probe alone."""
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "in.jsonl", make_rows(12))
    write_jsonl(tmp_path / "plain.jsonl", make_rows(60)[20:])
    pack = beside(with_probe(tiny_pack, tmp_path / "pack"))
    calibrate(pack, ["plain.jsonl"], scorer=lambda: SQSDScorer(load_pack(pack).with_risk("unsafe")))
    return pack


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_values_are_those_of_each_risk_alone(packs: dict[str, Path], architecture: str, tmp_path: Path) -> None:
    pack = load_pack(beside(with_probe(packs[architecture], tmp_path / "pack")))
    own, unsafe = (SQSDScorer(pack.with_risk(name), dtype="float32") for name in ("sqsd", "unsafe"))
    both = SQSDScorer(pack, dtype="float32")
    assert (both.passes, both.weights["unsafe"]) == (own.passes + 1, 0.0)
    scores, alone, read = (scorer.score(CONVERSATIONS) for scorer in (both, own, unsafe))
    assert set(scores.status) == {"scored"}
    assert list(scores.probes) == [*alone.probes, "unsafe"]
    assert np.abs(scores.risk - alone.risk).max() < 1e-5
    assert np.abs(scores.probes["unsafe"] - read.risk).max() < 1e-4


def test_threads_do_not_mix_passes_at_a_state_with_those_at_none(probed: Path) -> None:
    scorer = SQSDScorer(probed)
    expected = scorer.score(CONVERSATIONS)
    with ThreadPoolExecutor(4) as pool:
        for scores in pool.map(lambda _: scorer.score(CONVERSATIONS), range(8)):
            for name, values in expected.probes.items():
                assert np.abs(scores.probes[name] - values).max() < 1e-6


def test_a_run_has_both_and_is_cut_by_the_own_risk(probed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("in.jsonl", "out", "--drop-count", 2, "--pack", probed)
    said = capsys.readouterr().out
    assert re.search(r"\d % of your rows lie above the benign 95 % of the risk unsafe; a clean corpus would have", said)
    rows = [*rows_of(Path("out"), "kept"), *rows_of(Path("out"), "dropped")]
    assert list(rows[0])[-5:] == BOTH
    assert all(row["sqsd_risk"] == row["sqsd_danger"] - row["sqsd_safety"] for row in rows)
    assert len({row["sqsd_unsafe"] for row in rows}) > 6
    report = read_report(Path("out"))
    assert report["pack"]["weights"] == {"danger": 1.0, "safety": -1.0, "unsafe": 0.0}
    assert set(report["pack"]["beside"]) == {"unsafe"}
    card = Path("out/README.md").read_text()
    assert "the pack's risk `unsafe`, a linear probe of hidden states" in card
    assert "+0 ×" not in card + Path("out/_sqsd/report.html").read_text()


def test_a_cut_by_the_reference_takes_the_probe_and_says_so(probed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("in.jsonl", "out", "--above-reference", "90%", "--pack", probed)
    assert (
        "a cut by reference rows takes the risk unsafe of the pack tiny; its own risk, sqsd, is not computed"
        in capsys.readouterr().err
    )
    report = read_report(Path("out"))
    assert (report["pack"]["risk"], report["pack"]["weights"]) == ("unsafe", {"unsafe": 1.0})
    assert exit_code("in.jsonl", "own", "--above-reference", "90%", "--pack", str(probed), "--risk", "sqsd") == 2
    assert "The pack tiny has no reference rows to compare with" in capsys.readouterr().err


def test_scored_rows_are_cut_by_either_risk_without_a_model(probed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("score", "in.jsonl", "scores.parquet", "--pack", probed)
    run("in.jsonl", "out", "--drop-count", 2, "--pack", probed)
    run("in.jsonl", "asked", "--drop-count", 3, "--pack", probed, "--risk", "unsafe")
    expected = sorted(row["id"] for row in rows_of(Path("asked"), "dropped"))
    for source, dest in (("scores.parquet", Path("of-a-file")), ("out", Path("of-a-run"))):
        run("select", source, dest, "--risk", "unsafe", "--drop-count", 3)
        rows = [*rows_of(dest, "kept"), *rows_of(dest, "dropped")]
        assert all(row["sqsd_risk"] == row["sqsd_unsafe"] for row in rows)
        assert sorted(row["id"] for row in rows_of(dest, "dropped")) == expected
        report = read_report(dest)
        assert report["pack"]["risk"] == "unsafe"
        assert report["pack"]["fingerprint"] == load_pack(probed).with_risk("unsafe").fingerprint
        assert report["reference"]["benign"]["rows"] == 40
        assert set(report["pack"]["beside"]) == {"sqsd"}
    run("select", "out", "placed", "--above-reference", "90%")
    level = read_report(Path("placed"))["reference"]["threshold"]
    risks = [row["sqsd_unsafe"] for row in [*rows_of(Path("out"), "kept"), *rows_of(Path("out"), "dropped")]]
    assert read_report(Path("placed"))["rows"]["dropped"] == sum(risk > level for risk in risks)
    capsys.readouterr()
    assert exit_code("select", "out", "other", "--risk", "harm", "--drop-count", "3") == 2
    assert "have no risk 'harm' but sqsd and unsafe" in capsys.readouterr().err


def test_a_cut_by_the_probe_keeps_what_a_scored_file_has(probed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("score", "in.jsonl", "scores.parquet", "--pack", probed, "--per-module")
    before = pq.read_table("scores.parquet").to_pylist()
    run("select", "scores.parquet", "out", "--above-reference", "90%")
    assert "of the risk sqsd" not in capsys.readouterr().out  # it has no reference
    after = {row["id"]: row for row in [*rows_of(Path("out"), "kept"), *rows_of(Path("out"), "dropped")]}
    assert len(after) == 12
    for row in before:
        same = after[row["id"]]
        assert same["sqsd_risk"] == row["sqsd_unsafe"]
        assert list(same)[: len(row)] == list(row)
        assert {**row, "sqsd_risk": 0} == {name: same[name] for name in row} | {"sqsd_risk": 0}
    run("select", "scores.parquet", "own", "--drop-count", 2)
    assert "lie above the benign 95 % of the risk unsafe" in capsys.readouterr().out


def test_scored_files_without_what_was_left_beside_are_cut_with_the_pack(
    probed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run("score", "in.jsonl", "scores.parquet", "--pack", probed)
    table = pq.read_table("scores.parquet")
    pq.write_table(table.slice(0, 6), "a.parquet")
    pq.write_table(table.slice(6), "b.parquet")
    run("select", "a.parquet", "b.parquet", "out", "--above-reference", "90%", "--pack", probed)
    level = read_report(Path("out"))["reference"]["threshold"]
    assert read_report(Path("out"))["rows"]["dropped"] == sum(risk > level for risk in table["sqsd_unsafe"].to_pylist())
    pq.write_table(table.drop(["sqsd_danger"]), "fewer.parquet")
    run("select", "fewer.parquet", "fewer", "--risk", "unsafe", "--drop-count", 3, "--pack", probed)
    assert read_report(Path("fewer"))["rows"]["dropped"] == 3
    pq.write_table(table.drop(["sqsd_unsafe"]), "none.parquet")
    assert exit_code("select", "none.parquet", "o", "--risk", "unsafe", "--drop-count", "3", "--pack", str(probed)) == 3
    assert "have no column sqsd_unsafe with the values of the risk 'unsafe'" in capsys.readouterr().err


def test_another_scorer_has_no_risk_of_the_pack(probed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("score", "in.jsonl", "length.parquet", "--pack", probed, "--scorer", "length")
    assert exit_code("select", "length.parquet", "out", "--risk", "sqsd", "--drop-count", "3") == 2
    assert "It is not known which risks the scores of length.parquet have" in capsys.readouterr().err


def test_a_finished_run_that_has_the_scores_of_a_cut_points_to_select(
    probed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run("in.jsonl", "out", "--drop-count", 2, "--pack", probed)
    assert exit_code("in.jsonl", "out", "--above-reference", "90%", "--pack", str(probed)) == 5
    assert "cut them into another destination with 'sqsd-filter select out OTHER'" in capsys.readouterr().err


def test_a_dry_run_times_what_the_cut_takes(probed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for cut, passes in (("--above-reference=90%", 1), ("--drop-count=2", 3)):
        run("in.jsonl", "out", cut, "--pack", probed, "--dry-run", "--json")
        assert json.loads(capsys.readouterr().out)["passes"] == passes


def test_figures_beside_are_of_the_probe_that_gave_the_values(probed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("in.jsonl", "out", "--drop-count", 2, "--pack", probed)
    assert "of the risk unsafe" in capsys.readouterr().out
    save_weights(probed / "unsafe", np.ones((2, 2, 64)), 0.0)
    run("select", "out", "again", "--drop-count", 3)
    assert "of the risk unsafe" not in capsys.readouterr().out


def test_datasets_are_cut_by_either_column(probed: Path) -> None:
    rows = Dataset.from_list(make_rows(12))
    scored = rows.map(SQSDScorer(probed), batched=True, batch_size=5)
    assert scored.column_names[-5:] == BOTH
    values = np.array(scored["sqsd_unsafe"][:])
    _, dropped, _ = select(scored, drop_count=3, risk="unsafe")
    assert sorted(dropped["sqsd_unsafe"][:]) == sorted(values)[-3:]
    level = json.loads((probed / PACK_FILE).read_text())["risks"]["unsafe"]["reference"]["corpora"][0]["risks"][35]
    _, above, _ = select(scored, above_reference="90%", pack=probed)
    assert len(above) == (values > level).sum()
    _, own, _ = select(scored, drop_count=3, risk="sqsd")
    assert own["id"][:] == select(scored, drop_count=3)[1]["id"][:]
    with pytest.raises(UsageError, match="no reference rows"):
        select(scored, above_reference="90%", pack=probed, risk="sqsd")


def test_two_replicas_give_the_same_bytes(probed: Path) -> None:
    for where in ("here", "there"):
        Path(where).mkdir()
    run("in.jsonl", "here/out", "--drop-count", 2, "--pack", probed)
    run("in.jsonl", "there/out", "--drop-count", 2, "--pack", probed, "--engine", "ray", "--replicas", 2)
    here, there = ([p.read_bytes() for p in Path(where).glob("out/data/*")] for where in ("here", "there"))
    assert here == there
    assert len(here) == 1


def test_another_node_gets_its_weights(probed: Path, tmp_path: Path) -> None:
    pack = load_pack(probed)
    for name, data in pack_files_of(pack).items():
        (tmp_path / "copy" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "copy" / name).write_bytes(data)
    assert pack.at(tmp_path / "copy").fingerprints == pack.fingerprints


def test_it_is_checked_against_the_dense_form(probed: Path) -> None:
    report = check_pack(scorer=SQSDScorer(probed))
    dense = next(each for each in report["comparisons"] if "dense" in each["name"])
    assert dense["difference"]["unsafe"] < 1e-4
    assert dense["ok"]


def test_cosines_per_module_stay_those_of_the_probes(probed: Path) -> None:
    run("score", "in.jsonl", "scores.parquet", "--pack", probed, "--per-module")
    for row in pq.read_table("scores.parquet").to_pylist():
        for probe in ("danger", "safety"):
            assert row[f"sqsd_{probe}"] == pytest.approx(sum(row[f"sqsd_{probe}_modules"]), abs=1e-5)


def test_what_it_is_computed_with_is_part_of_the_settings(probed: Path) -> None:
    pack = load_pack(probed)
    both, alone = SQSDScorer(pack), SQSDScorer(pack.with_risk("sqsd"))
    assert pack.fingerprint == alone.pack.fingerprint
    assert both.settings() == alone.settings() | {"beside": {"unsafe": pack.with_risk("unsafe").fingerprint}}


def test_scorers_of_one_part_leave_it_out(probed: Path) -> None:
    for name, values in (("danger", {"danger"}), ("length", {"length"})):
        scores = make_scorer(name, str(probed)).score(CONVERSATIONS[:3])
        assert set(scores.probes) == values


@pytest.mark.parametrize(
    ("names", "fields", "message"),
    [
        ("unsafe", {}, "'beside' must be a list of different linear probes \\(unsafe\\), not 'unsafe'"),
        (["harm"], {}, "not \\['harm'\\]"),
        (["unsafe", "unsafe"], {}, "different"),
        (["unsafe"], {"risks": {"sqsd": {"layers": [1]}}}, "a risk can't be called 'sqsd'"),
    ],
    ids=["no list", "unknown", "twice", "own name"],
)
def test_what_no_run_could_do_is_refused(probed: Path, names: Any, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(PackError, match=message):
        load_pack(beside(probed, names, **fields))


def test_a_value_can_not_have_two_meanings(probed: Path) -> None:
    page = json.loads((probed / PACK_FILE).read_text())
    page["probes"][0]["name"] = "unsafe"
    with pytest.raises(PackError, match="'unsafe' is the name of a probe and of a linear probe beside it: rename one"):
        load_pack(beside(probed, probes=page["probes"]))
