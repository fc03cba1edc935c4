"""What a risk means, wherever one is shown: in the summary, on card and page, in the report, and as a column."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
from datasets import load_from_disk
from hypothesis import given
from hypothesis import strategies as st

from sqsd_filter import Cut, Scoring, Writing, filter_dataset, score_dataset, select_dataset
from sqsd_filter.errors import DestinationExists, UsageError
from sqsd_filter.pipeline.meaning import Meaning, false_alarms, marks, rank
from sqsd_filter.pipeline.report import ReferenceFigures
from tests.commands import one_sentence
from tests.corpora import make_rows, rows_of, split_file, write_jsonl
from tests.references import calibrated, make_reference

datasets.disable_progress_bars()

Command = Callable[..., tuple[int, str, str]]
BENIGN = [[k / 100 for k in range(-100, 50)], [k / 50 for k in range(-50, 25)]]
UNSAFE = [[k / 50 for k in range(-20, 80)]]
ALL = np.concatenate(BENIGN)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "in.jsonl", [*make_rows(40), {"id": 40, "instruction": "?", "output": ""}])
    return tmp_path


@pytest.fixture
def pack(tiny_pack: Path, folder: Path) -> Path:
    return calibrated(tiny_pack, folder / "pack", BENIGN, UNSAFE)


def percentile_of(risk: float | None) -> float | None:
    """By hand, from all rows."""
    return None if risk is None else 100 * float((risk > ALL).mean())


def figures_of(rows: int, unsafe: bool = False) -> ReferenceFigures:
    figures: ReferenceFigures = {"benign": {"rows": rows, "corpora": {"a": rows}, "quantiles": {}}}
    if unsafe:
        figures["unsafe"] = {"rows": 100, "corpora": {"u": 100}, "quantiles": {"50%": 50.31}}
    return figures


# ---------------------------------------------------------------------------------------------- words


def test_a_risk_in_words() -> None:
    figures = figures_of(300, unsafe=True)
    figures["median"] = {"risk": 17.84, "percentile": 40.9}
    assert marks(figures) == {
        "median": "17.8: above 40 % of the benign reference rows; half of the known unsafe answers score above 50.3"
    }
    figures["cut"] = {"risk": 36.6156, "percentile": 97.0}
    assert marks(figures) == {
        "cut": "36.6: above 97 % of the benign reference rows; half of the known unsafe answers score above 50.3",
        "median": "17.8: above 40 % of the benign reference rows",
    }
    assert marks({"mismatch": "no"}) == {}


@pytest.mark.parametrize(
    ("percentile", "words"),
    [
        (100.0, "above all of the 3,000 benign reference rows"),
        (0.0, "above none of the 3,000 benign reference rows"),
        (97.99, "above 97 % of the benign reference rows"),
        (99.96, "above 99.96 % of the benign reference rows"),
        (99.58, "above 99.5 % of the benign reference rows"),
        (0.59, "above 0.5 % of the benign reference rows"),
        (100 / 3000, "above 0.03 % of the benign reference rows"),
        (0.004, "above less than 0.01 % of the benign rows"),
    ],
)
def test_a_share_is_rounded_down_and_all_means_all(percentile: float, words: str) -> None:
    assert rank(percentile, figures_of(3000)) == words


@given(below=st.integers(1, 499), rows=st.integers(500, 100_000))
def test_words_never_say_more_than_is_true(below: int, rows: int) -> None:
    for count in (below, rows - below):
        said = re.search(r"above ([0-9.]+) %", rank(100 * count / rows, figures_of(rows)))
        assert said is None or float(said[1]) <= 100 * count / rows + 1e-9
        assert said is None or float(said[1]) > 0


def test_an_estimate_in_words() -> None:
    figures = figures_of(300)
    assert false_alarms(figures, 3) == ""
    figures["planted"] = None
    assert "can't tell" in false_alarms(figures, 3)
    interval = {"estimate": 11.7, "low": 8.0, "high": 17.0}
    figures["planted"] = {
        "benign_above": 0.01,
        "unsafe_above": 0.5,
        "share": {"estimate": 0.1, "low": 0.0, "high": 0.2},
        "false_alarms": interval,  # type: ignore[typeddict-item]  # an Interval
        "remaining": {"estimate": 2.9, "low": 0.0, "high": 9.0},
    }
    assert false_alarms(figures, 57) == (
        "Of the 57 dropped rows, about 12 (8 to 17) are false alarms, and about 3 (0 to 9) rows of the known unsafe "
        "kind remain, if the others are like the reference."
    )
    assert false_alarms(figures, 0).startswith("No row is dropped; about 3 (0 to 9) rows")


def test_percentiles_are_shares_of_rows() -> None:
    meaning = Meaning(make_reference(BENIGN))
    risks = np.array([-9.0, -1.0, 0.0, 0.24, 0.25, 0.49, 0.5, math.nan])
    expected = [percentile_of(float(risk)) for risk in risks[:-1]]
    assert meaning.percentiles(risks)[:-1].tolist() == pytest.approx(expected)
    assert np.isnan(meaning.percentiles(risks)[-1])


# ---------------------------------------------------------------------------------------------- the column


@pytest.mark.parametrize("to", ["parquet", "arrow", "jsonl"])
def test_rows_have_their_percentile_on_request(pack: Path, to: str) -> None:
    score_dataset("in.jsonl", "all.parquet", Scoring(pack=pack))
    known = dict(zip(*(pq.read_table("all.parquet")[name].to_pylist() for name in ("id", "sqsd_risk")), strict=True))
    filter_dataset("in.jsonl", "out", drop_top="10%", pack=pack, to=to, percentile=True, on_error="keep")
    kept: list[dict[str, Any]]
    if to == "jsonl":
        kept = [json.loads(line) for line in Path("out/data/train-00000-of-00001.jsonl").read_text().splitlines()]
        assert "sqsd_risk" not in kept[0]
    else:
        kept = list(load_from_disk("out")["train"]) if to == "arrow" else rows_of(Path("out"), "kept")
    assert len(kept) == 37
    for row in kept:
        assert row["sqsd_percentile"] == (
            None if known[row["id"]] is None else pytest.approx(percentile_of(known[row["id"]]))
        )
    assert kept[-1]["sqsd_percentile"] is None
    assert "percentile" in Path("out/README.md").read_text()


@pytest.mark.parametrize("source", ["all.parquet", "run"])
def test_existing_scores_get_percentiles_without_a_model(pack: Path, source: str) -> None:
    score_dataset("in.jsonl", "all.parquet", Scoring(pack=pack), percentile=True)
    filter_dataset("in.jsonl", "run", drop_count=0, pack=pack)
    select_dataset(source, "out", Cut.of(drop_count=3), Writing(percentile=True))
    for split in ("kept", "dropped"):
        rows = rows_of(Path("out"), split)
        assert [row["sqsd_percentile"] for row in rows] == pytest.approx(
            [percentile_of(row["sqsd_risk"]) for row in rows]
        )
    assert "sqsd_percentile" not in pq.read_schema(split_file(Path("out"), "errors")).names


def test_a_column_of_percentiles_belongs_to_the_scores(pack: Path, tiny_pack: Path) -> None:
    score_dataset("in.jsonl", "all.parquet", Scoring(pack=pack), percentile=True)
    assert pq.read_schema("all.parquet").names[-6:-4] == ["sqsd_status", "sqsd_percentile"]
    select_dataset("all.parquet", "same", Cut.of(drop_count=3))
    assert "sqsd_percentile" in pq.read_schema(split_file(Path("same"), "kept")).names
    filter_dataset("all.parquet", "anew", drop_count=3, pack=tiny_pack)
    assert "sqsd_percentile" not in pq.read_schema(split_file(Path("anew"), "kept")).names


def test_percentiles_of_another_reference_are_another_run(pack: Path) -> None:
    how: dict[str, Any] = {"drop_count": 2, "pack": pack}
    filter_dataset("in.jsonl", "out", **how, percentile=True)
    assert filter_dataset("in.jsonl", "out", **how, percentile=True)["already_done"]
    calibrated(pack, pack, BENIGN[:1])
    for other in (True, False):
        with pytest.raises(DestinationExists):
            filter_dataset("in.jsonl", "out", **how, percentile=other)


def test_percentiles_need_a_reference(tiny_pack: Path, folder: Path, command: Command) -> None:
    with pytest.raises(UsageError, match="has no reference rows"):
        filter_dataset("in.jsonl", "out", drop_count=1, pack=tiny_pack, percentile=True)
    with pytest.raises(UsageError, match="has no reference rows"):
        score_dataset("in.jsonl", "out.parquet", Scoring(pack=tiny_pack), percentile=True)
    assert {path.name for path in folder.iterdir()} == {"in.jsonl"}
    code, _, err = command("in.jsonl", "out", "--drop-top", "5%", "--percentile", "--pack", str(tiny_pack))
    assert code == 2
    one_sentence(err)


# ---------------------------------------------------------------------------------------------- where it is said


def test_the_summary_card_and_page_say_what_the_risks_mean(
    pack: Path, command: Command, report: Callable[..., tuple[int, str, str]]
) -> None:
    code, out, _ = command("in.jsonl", "out", "--drop-top", "10%", "--pack", "pack")
    assert code == 0
    figures = json.loads(Path("out/_sqsd/report.json").read_text())["reference"]
    kept, dropped = rows_of(Path("out"), "kept"), rows_of(Path("out"), "dropped")
    lowest = min(row["sqsd_risk"] for row in dropped)
    assert figures["cut"] == {"risk": lowest, "percentile": pytest.approx(percentile_of(lowest))}
    median = float(np.median([row["sqsd_risk"] for row in kept + dropped]))
    assert figures["median"]["percentile"] == pytest.approx(percentile_of(median))
    assert figures["benign"]["corpora"] == {"benign-0": 150, "benign-1": 75}
    words = marks(figures)
    assert f"  cut      {words['cut']}\n  median   {words['median']}\n" in out
    assert "half of the known unsafe answers score above 0.58" in words["cut"]
    card = Path("out/README.md").read_text()
    assert f"The cut is at the risk {words['cut']}. The median risk is {words['median']}." in card
    assert "225 benign rows (benign-0 150, benign-1 75) and 100 known unsafe answers (unsafe-0 100)" in card
    page = Path("out/_sqsd/report.html").read_text()
    assert words["cut"] in page
    riskiest = sorted((row["sqsd_risk"] for row in kept + dropped), reverse=True)
    said = re.findall(r">risk (\S+)</span>.*?</b> it is (above .*? rows)", page, re.DOTALL)
    expected = [(f"{risk:.4g}", rank(100 * float((risk > ALL).mean()), figures)) for risk in riskiest]
    assert said == expected
    code, _, _ = report("out")
    assert code == 0
    assert Path("out/_sqsd/report.html").read_text() == page


def test_a_score_file_and_a_run_in_groups_say_it_too(pack: Path, command: Command) -> None:
    _, out, _ = command("score", "in.jsonl", "all.parquet", "--pack", "pack", "--percentile")
    assert re.search(r"\n  median   \S+: above \d+ % of the benign .*; half of the known unsafe", out)
    assert out.splitlines()[-1].endswith("%.")
    assert "  cut  " not in out
    _, out, _ = command("select", "all.parquet", "out", "--drop-top", "10%", "--per-group", "id")
    assert "  median   " in out
    assert "  cut  " not in out
    _, out, _ = command("select", "all.parquet", "out2", "--drop-top", "10%", "--weights")
    assert "\n  cut      " in out


def test_without_a_reference_nothing_is_said(tiny_pack: Path, folder: Path, command: Command) -> None:
    _, out, _ = command("in.jsonl", "out", "--drop-top", "10%", "--pack", str(tiny_pack))
    everything = out + (folder / "out/README.md").read_text() + (folder / "out/_sqsd/report.html").read_text()
    assert "benign" not in everything
    assert ", above" not in everything
