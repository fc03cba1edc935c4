"""Several packs' scores of the same rows, and the one risk on which they agree."""

from __future__ import annotations

import json
import math
import shutil
from fractions import Fraction
from itertools import permutations
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from sqsd_filter import Cut, Scoring, SQSDScorer, Writing, filter_dataset, score_dataset, select_dataset
from sqsd_filter.cli.main import cli
from sqsd_filter.corpus.row_formats import Columns
from sqsd_filter.errors import DestinationExists, InputError, UsageError
from sqsd_filter.pipeline.report import CONFIGS
from sqsd_filter.pipeline.rules import CONSENSUS
from tests.corpora import ids_of, make_rows, read_report, rows_of, write_jsonl
from tests.tiny import make_pack

Risks = list[float | None]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def scored_file(name: str, risks: Risks, **columns: list[Any]) -> str:
    """A file as `score` leaves it; None is a row that could not be scored."""
    rows = make_rows(len(risks))
    for row, risk in zip(rows, risks, strict=True):
        row |= {"sqsd_risk": risk, "sqsd_status": "nonfinite" if risk is None else "scored"}
    table = pa.Table.from_pylist(rows)
    for column, values in columns.items():
        table = table.set_column(table.column_names.index(column), column, pa.array(values))
    pq.write_table(table, name)
    return name


def textbook_rank(values: list[float], value: float) -> float:
    """Its mean rank in ascending order, from 1, counted by hand."""
    below, level = sum(v < value for v in values), sum(v == value for v in values)
    return below + (level + 1) / 2


def textbook(packs: list[Risks], rule: str) -> Risks:
    whole = [k for k in range(len(packs[0])) if all(pack[k] is not None for pack in packs)]
    combined: Risks = [None] * len(packs[0])
    scores = [{k: risk for k, risk in enumerate(pack) if k in whole and risk is not None} for pack in packs]
    for k in whole:
        ranks = [Fraction(textbook_rank(list(risks.values()), risks[k])) / len(whole) for risks in scores]
        combined[k] = float(max(ranks) if rule == "max" else sum(ranks) / len(ranks))
    return combined


def all_rows(dest: str) -> list[dict[str, Any]]:
    return sorted((row for config in CONFIGS for row in rows_of(Path(dest), config)), key=lambda row: row["id"])


A: Risks = [0.5, 0.1, 0.9, 0.5, None, 0.5, -0.2, 0.3]
B: Risks = [10.0, 30.0, 20.0, 50.0, 40.0, 0.0, None, 20.0]
C: Risks = [-1.0, -1.0, -3.0, -2.0, -1.0, -5.0, -4.0, -2.0]


@pytest.mark.parametrize("rule", CONSENSUS)
def test_the_risk_is_what_the_rule_says_whatever_the_order_of_the_packs(rule: str, folder: Path) -> None:
    packs = {scored_file(f"{name}.parquet", risks): risks for name, risks in (("1", A), ("2", B), ("3", C))}
    expected = textbook([A, B, C], rule)
    combined = []
    for number, (first, *others) in enumerate(permutations(packs)):
        select_dataset(
            first, f"out{number}", Cut.of(drop_count=2), Writing(on_error="keep"), scores=others, consensus=rule
        )
        rows = all_rows(f"out{number}")
        combined.append([row["sqsd_risk"] for row in rows])
        for letter, name in zip("abc", (first, *others), strict=True):
            assert [row[f"sqsd_risk_{letter}"] for row in rows] == packs[name]
    assert all(risks == expected for risks in combined)
    riskiest = sorted((-risk, k) for k, risk in enumerate(expected) if risk is not None)[:2]
    assert ids_of(Path("out0"), "dropped") == sorted(k for _, k in riskiest)


@pytest.mark.parametrize("rule", CONSENSUS)
def test_a_pack_agrees_with_itself(rule: str, folder: Path) -> None:
    scored_file("a.parquet", A)
    scored_file("again.parquet", A)
    select_dataset("a.parquet", "alone", Cut.of(drop_top="30%"))
    report = select_dataset("a.parquet", "both", Cut.of(drop_top="30%"), scores=["again.parquet"], consensus=rule)
    for config in CONFIGS:
        assert ids_of(Path("both"), config) == ids_of(Path("alone"), config)
    assert report["ties"] == read_report(Path("alone"))["ties"]
    assert [row["sqsd_risk"] for row in all_rows("both") if row.get("sqsd_risk") is not None] == pytest.approx(
        [rank / 7 for rank in (5, 2, 7, 5, 5, 1, 3)]
    )


def test_a_row_that_a_pack_could_not_score_has_no_risk_and_the_status_of_the_first_such_pack(folder: Path) -> None:
    statuses = ["scored"] * 6 + ["no_answer", "scored"]
    scored_file("a.parquet", A)
    scored_file("b.parquet", B, sqsd_status=statuses)
    report = select_dataset("a.parquet", "out", Cut.of(drop_count=1), scores=["b.parquet"], consensus="max")
    assert {row["id"]: row["sqsd_status"] for row in rows_of(Path("out"), "errors")} == {4: "nonfinite", 6: "no_answer"}
    assert report["unscored"] == {"nonfinite": 1, "no_answer": 1}
    assert report["rows"]["reused"] == 6
    assert math.isclose(report["risk_quantiles"]["100%"], 1.0)


def test_runs_and_scored_files_of_two_packs_go_together(folder: Path, tiny_pack: Path) -> None:
    rows = [*make_rows(12), {"id": 12, "instruction": "?", "output": ""}]
    write_jsonl(folder / "in.jsonl", rows)
    other = SQSDScorer(make_pack(folder / "other", name="other", ranks=(3, 3, 3)))
    filter_dataset("in.jsonl", "run", drop_count=0, scorer=SQSDScorer(tiny_pack))
    score_dataset("in.jsonl", "other.parquet", Scoring(scorer=other))
    filter_dataset("in.jsonl", "another", drop_count=0, scorer=other)
    cut = Cut.of(drop_count=3, per_group="id")
    report = select_dataset("run", "out", cut, scores=["other.parquet"], consensus="mean-rank")
    select_dataset("run", "same", cut, scores=["another"], consensus="mean-rank")
    assert [pack["column"] for pack in report["consensus"]["packs"]] == ["sqsd_risk_tiny", "sqsd_risk_other"]
    pack = report["consensus"]["packs"][1]["pack"]
    assert pack is not None
    assert pack["fingerprint"] == other.pack.fingerprint
    assert report["unscored"] == {"no_answer": 1}
    assert "pack" not in report
    rows = all_rows("out")
    assert rows == all_rows("same")
    assert rows[12]["sqsd_reason"] == "column 'output' is empty or missing"
    theirs = {row["id"]: row["sqsd_risk"] for row in pq.read_table("other.parquet").to_pylist()}
    mine = {row["id"]: row["sqsd_risk"] for row in all_rows("run") if "sqsd_risk" in row}
    expected = textbook([[mine[k] for k in range(12)], [theirs[k] for k in range(12)]], "mean-rank")
    assert [row["sqsd_risk"] for row in rows[:12]] == pytest.approx(expected)
    assert [row["sqsd_risk_other"] for row in rows[:12]] == [theirs[k] for k in range(12)]
    assert "sqsd_danger" not in rows[0]
    card = Path("out/README.md").read_text()
    assert "mean of the row's ranks" in card
    assert "`sqsd_risk_other`" in card
    assert other.pack.fingerprint in card


def test_other_scores_or_another_rule_are_another_run(folder: Path) -> None:
    for name, risks in (("a", A), ("b", B), ("c", C)):
        scored_file(f"{name}.parquet", risks)
    cut = Cut.of(drop_count=1)
    how: dict[str, Any] = {"scores": ["b.parquet"], "consensus": "max"}
    select_dataset("a.parquet", "out", cut, **how)
    assert select_dataset("a.parquet", "out", cut, **how)["already_done"]
    for change in ({"consensus": "mean-rank"}, {"scores": ["c.parquet"]}, {"scores": ["b.parquet", "c.parquet"]}):
        with pytest.raises(DestinationExists, match=r"another run \((consensus|scores)"):
            select_dataset("a.parquet", "out", cut, **{**how, **change})
    scored_file("b.parquet", C)
    with pytest.raises(DestinationExists, match=r"another run \(scores"):
        select_dataset("a.parquet", "out", cut, **how)


def test_groups_and_weights_are_those_of_the_common_risk(folder: Path) -> None:
    scored_file("a.parquet", A)
    scored_file("b.parquet", B)
    how: dict[str, Any] = {"scores": ["b.parquet"], "consensus": "mean-rank"}
    kinds = select_dataset("a.parquet", "groups", Cut.of(drop_count=2, per_group="sqsd_status"), **how)
    assert [group["dropped"] for group in kinds["groups"]["groups"]][:1] == [2]
    weighted = select_dataset("a.parquet", "weighted", Cut.of(drop_count=2, weights=True), **how)
    expected = sorted(risk for risk in textbook([A, B], "mean-rank") if risk is not None)
    assert weighted["weights"]["threshold"] == pytest.approx(expected[-2])


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda rows: rows[:-1], r"a\.parquet \(8 rows\) and b\.parquet \(7\).*row 8, where one has an additional row"),
        (lambda rows: [*rows[:2], rows[3], rows[2], *rows[4:]], "row 3, where one has another conversation"),
        (lambda rows: [*rows[:7], {**rows[7], "output": "?"}], "row 8, where one has another conversation"),
    ],
    ids=["fewer", "in another order", "another answer"],
)
def test_scores_of_other_rows_are_refused(change: Any, complaint: str, folder: Path) -> None:
    scored_file("a.parquet", A)
    rows = pq.read_table(scored_file("b.parquet", B)).to_pylist()
    pq.write_table(pa.Table.from_pylist(change(rows)), "b.parquet")
    with pytest.raises(InputError, match=complaint):
        select_dataset("a.parquet", "out", Cut.of(drop_count=1), scores=["b.parquet"], consensus="max")


def test_files_that_nothing_is_known_of_are_read_as_the_first_pack_was(folder: Path, tiny_pack: Path) -> None:
    rows = [{"q": row["instruction"], "a": row["output"], "prompt": "", "response": row["id"]} for row in make_rows(6)]
    write_jsonl(folder / "in.jsonl", rows)
    scorer = SQSDScorer(tiny_pack, columns=Columns(prompt="q", answer="a"))
    for name in ("a.parquet", "b.parquet"):
        score_dataset("in.jsonl", name, Scoring(scorer=scorer))
    shutil.rmtree("b.parquet.sqsd")
    cut = Cut.of(drop_count=1)
    how: dict[str, Any] = {"scores": ["b.parquet"], "consensus": "max"}
    select_dataset("a.parquet", "out", cut, **how)
    table = pq.read_table("b.parquet")
    pq.write_table(table.set_column(table.column_names.index("a"), "a", pa.array(["?"] * 6)), "b.parquet")
    with pytest.raises(InputError, match="row 1, where one has another conversation"):
        select_dataset("a.parquet", "again", cut, **how)
    pq.write_table(table.drop_columns(["q", "prompt"]), "b.parquet")
    with pytest.raises(InputError, match=r"columns that were scored are not known: keep b\.parquet\.sqsd"):
        select_dataset("a.parquet", "again", cut, **how)


def test_a_rule_and_further_scores_go_together(folder: Path) -> None:
    scored_file("a.parquet", A)
    for how, complaint in (
        ({"scores": ["a.parquet"]}, "mean-rank or max"),
        ({"consensus": "max"}, "--scores"),
        ({"scores": ["a.parquet"], "consensus": "min"}, "mean-rank, max, not 'min'"),
        ({"scores": ["a.parquet"] * 26, "consensus": "max"}, "at most 26 packs"),
    ):
        with pytest.raises(UsageError, match=complaint):
            select_dataset("a.parquet", "out", Cut.of(drop_count=1), **how)
    write_jsonl(folder / "in.jsonl", make_rows(8))
    with pytest.raises(InputError, match=r"in\.jsonl has no columns sqsd_risk"):
        select_dataset("a.parquet", "out", Cut.of(drop_count=1), scores=["in.jsonl"], consensus="max")
    with pytest.raises(DestinationExists, match="would delete"):
        select_dataset(
            "a.parquet", ".", Cut.of(drop_count=1), Writing(overwrite=True), scores=["a.parquet"], consensus="max"
        )


def test_the_command_line_takes_several_scores(folder: Path) -> None:
    for name, risks in (("a", A), ("b", B), ("c", C)):
        scored_file(f"{name}.parquet", risks)
    line = ["select", "a.parquet", "out", "--scores", "b.parquet", "--scores", "c.parquet", "--consensus", "max"]
    run = CliRunner().invoke(cli, [*line, "--drop-count", "2"], catch_exceptions=False)
    assert "packs    max of the ranks by a.parquet, b.parquet, c.parquet" in run.output
    report = read_report(Path("out"))
    assert sorted(report["command"]) == sorted(["sqsd-filter", *line, "--drop-count", "2"])
    assert report["settings"]["scores"] == {"value": ["b.parquet", "c.parquet"], "origin": "flag"}
    wrong = CliRunner().invoke(cli, [*line[:-1], "min", "--drop-count", "2"])
    assert wrong.exit_code == 2
    assert all(f"'{rule}'" in wrong.output for rule in CONSENSUS)
    again = CliRunner().invoke(cli, [*report["command"][1:], "--json"], catch_exceptions=False)
    assert json.loads(again.stdout)["already_done"]
