"""Scoring first and selecting later gives the same rows as filtering at once."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sqsd_filter import Cut, Scoring, SQSDScorer, Writing, filter_dataset, score_dataset, select_dataset
from sqsd_filter.errors import DestinationExists, InputError
from sqsd_filter.pipeline.report import CONFIGS
from tests.corpora import NASTY, REASONS, VALUES, ids_of, rows_of, split_file, write_jsonl


@pytest.fixture
def nasty(folder: Path, scorer: SQSDScorer) -> Path:
    """nasty.jsonl, filtered into `run` and scored into scored.parquet."""
    write_jsonl(folder / "nasty.jsonl", NASTY)
    filter_dataset("nasty.jsonl", "run", drop_count=1, scorer=scorer)
    score_dataset("nasty.jsonl", "scored.parquet", Scoring(scorer=scorer))
    return folder


def test_score_writes_every_row_in_order_with_its_columns(nasty: Path) -> None:
    table = pq.read_table("scored.parquet")
    scores = ["sqsd_risk", "sqsd_danger", "sqsd_safety", "sqsd_status"]
    assert table.column_names == [*VALUES[0], *scores, "sqsd_reason", "sqsd_file", "sqsd_line", "sqsd_raw"]
    assert table["id"].to_pylist() == [*range(6), *[None] * 4, *range(10, 16)]
    assert [r for r in table["sqsd_raw"].to_pylist() if r is not None] == NASTY[6:10]
    risk, status = table["sqsd_risk"].to_pylist(), table["sqsd_status"].to_pylist()
    assert all((r is not None) == (s == "scored") for r, s in zip(risk, status, strict=True))
    report = json.loads(Path("scored.parquet.sqsd/report.json").read_text())
    assert report["rows"]["total"] == 16
    assert "kept" not in report["rows"]
    assert report["unscored"] == REASONS


CUTS: list[dict[str, Any]] = [{"drop_top": "30%"}, {"drop_count": 3}, {"max_risk": 0.0}, {"keep_lowest": 2}]


@pytest.mark.parametrize("cut", CUTS, ids=str)
@pytest.mark.parametrize("source", ["run", "scored.parquet"])
def test_selecting_from_scores_equals_filtering_with_that_cut(
    source: str, cut: dict[str, Any], nasty: Path, scorer: SQSDScorer
) -> None:
    selected = select_dataset(source, "selected", Cut.of(**cut))
    filtered = filter_dataset("nasty.jsonl", "filtered", **cut, scorer=scorer)
    for key in ("threshold", "ties", "cut", "unscored", "risk_quantiles"):
        assert selected[key] == filtered[key]
    for config in CONFIGS:
        rows, others = (rows_of(Path(name), config) for name in ("selected", "filtered"))
        for row in [*rows, *others]:  # rows of a scored file are named by that file
            row["sqsd_row"] = row.get("sqsd_row", "").rpartition(":")[2]
        assert rows == others
        ours, theirs = (pq.read_table(split_file(Path(name), config)) for name in ("selected", "filtered"))
        assert source != "run" or ours.equals(theirs)  # a scored file has one schema for all of its rows


def test_scoring_a_scored_file_again_replaces_its_scores_and_nothing_else(nasty: Path, scorer: SQSDScorer) -> None:
    score_dataset("scored.parquet", "again.parquet", Scoring(max_error_rate="100%", scorer=scorer))
    first, again = pq.read_table("scored.parquet"), pq.read_table("again.parquet")
    assert again.column_names == first.column_names
    assert again.drop_columns(["sqsd_status"]).equals(first.drop_columns(["sqsd_status"]))


def test_a_score_that_is_not_finite_is_an_error_row(folder: Path) -> None:
    rows = [{"id": k, "sqsd_risk": r, "sqsd_status": "scored"} for k, r in enumerate([0.1, math.nan, 0.3])]
    pq.write_table(pa.Table.from_pylist(rows), "a.parquet")
    report = select_dataset("a.parquet", "out", Cut.of(drop_count=1))
    assert report["unscored"] == {"nonfinite": 1}
    assert [ids_of(Path("out"), config) for config in CONFIGS] == [[0], [2], [1]]


def test_rows_without_scores_cannot_be_selected_from(folder: Path) -> None:
    with pytest.raises(InputError, match=r"no columns sqsd_risk and sqsd_status \(line 1\): score it first"):
        select_dataset("in.jsonl", "out", Cut.of(drop_count=1))


def test_selecting_from_what_was_selected_or_from_half_a_run_says_what_to_do(nasty: Path, scorer: SQSDScorer) -> None:
    select_dataset("run", "selected", Cut.of(drop_count=1))
    with pytest.raises(InputError, match="was made by select"):
        select_dataset("selected", "again", Cut.of(drop_count=1))
    Path("run/_sqsd/report.json").unlink()
    with pytest.raises(InputError, match="holds an unfinished run"):
        select_dataset("run", "other", Cut.of(drop_count=1))


def test_selecting_from_a_run_works_from_any_folder(nasty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    select_dataset("run", "here", Cut.of(drop_count=3))
    (nasty / "deep" / "er").mkdir(parents=True)
    monkeypatch.chdir(nasty / "deep" / "er")
    report = select_dataset("../../run", "there", Cut.of(drop_count=3))
    assert [i["path"] for i in report["inputs"]] == ["../../nasty.jsonl"]
    assert rows_of(Path("there"), "kept") == rows_of(nasty / "here", "kept")
    theirs = [{**row, "sqsd_row": f"../../{row['sqsd_row']}"} for row in rows_of(nasty / "here", "dropped")]
    assert rows_of(Path("there"), "dropped") == theirs
    assert str(nasty) not in (nasty / "run/_sqsd/run.json").read_text()
    with pytest.raises(DestinationExists, match="holds the input"):
        select_dataset("../../run", "../..", Cut.of(drop_count=2), Writing(overwrite=True))


def test_selecting_from_a_run_whose_input_has_changed_is_refused(nasty: Path) -> None:
    write_jsonl(nasty / "nasty.jsonl", NASTY[1:])
    with pytest.raises(InputError, match="changed since it was scored"):
        select_dataset("run", "other", Cut.of(drop_count=1))


@pytest.mark.parametrize("source", ["run", "run/data/train-00000-of-00001.parquet", "scored.parquet"])
def test_nothing_is_ever_filtered_in_place(source: str, nasty: Path) -> None:
    dest = source.split("/")[0]
    before = {p: p.read_bytes() for p in nasty.rglob("*") if p.is_file()}
    with pytest.raises(DestinationExists, match="which --overwrite would delete"):
        select_dataset(source, dest, Cut.of(drop_count=3), Writing(overwrite=True))
    assert {p: p.read_bytes() for p in nasty.rglob("*") if p.is_file()} == before
