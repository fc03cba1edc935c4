"""Weights instead of a cut: the formula to its last digits, and the column that runs leave."""

from __future__ import annotations

import math
from decimal import Decimal, localcontext
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sqsd_filter import Scoring, SQSDScorer, filter_dataset, score_dataset, select_dataset
from sqsd_filter.errors import DestinationExists
from sqsd_filter.pipeline.selecting.groups import Groups
from sqsd_filter.pipeline.selecting.selection import ERROR, FORMULA, KEPT, Cut, cut_rows, weigh
from tests.corpora import make_rows, rows_of, split_file, write_jsonl

datasets.disable_progress_bars()

LARGEST = 1.7976931348623157e308

# ---------------------------------------------------------------------------------------------- the formula


def quantile(ordered: list[Decimal], share: Decimal) -> Decimal:
    at = share * (len(ordered) - 1)
    low = int(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (at - low) * (ordered[high] - ordered[low])


def steps(risks: list[float], threshold: float) -> list[float]:
    """The weights at a scale of 0."""
    return [{-1: 1.0, 0: 0.5, 1: 0.0}[(risk > threshold) - (risk < threshold)] for risk in risks]


def exact(risks: list[float], threshold: float) -> tuple[list[float], float]:
    """Weights and scale in 60 digits."""
    with localcontext() as context:
        context.prec, context.Emin, context.Emax = 60, -(10**12), 10**12
        ordered = sorted(map(Decimal, risks))
        scale = (quantile(ordered, Decimal("0.75")) - quantile(ordered, Decimal("0.25"))) / 4
        if not scale:
            return steps(risks, threshold), 0.0
        z = [(Decimal(risk) - Decimal(threshold)) / scale for risk in risks]
        return [float(x < 0) if abs(x) > 10**6 else float(1 / (1 + x.exp())) for x in z], float(scale)


@settings(deadline=None)
@given(
    risks=st.lists(st.floats(-2, 2) | st.integers(-2, 2).map(float), min_size=1, max_size=30),
    at=st.integers(0, 29),
)
@example(risks=[0.25] * 9 + [1.0], at=0)
@example(risks=[0.25] * 9 + [1.0], at=9)
@example(risks=[0.0, 5e-324], at=0)  # a scale that no float is small enough for
@example(risks=[0.0, 5e-324], at=1)
@example(risks=[1.0, 1 + 2**-52, 1 + 2**-51], at=1)  # a scale of half a rounding step
def test_weights_follow_the_formula_as_in_sixty_digits(risks: list[float], at: int) -> None:
    threshold = risks[at % len(risks)]
    weights, scale = weigh(np.array(risks), threshold)
    assert scale is not None
    expected, exact_scale = exact(risks, threshold)
    assert scale == pytest.approx(exact_scale, rel=1e-12, abs=1e-16)
    if scale == 0:
        assert weights.tolist() == steps(risks, threshold)
    elif scale > 1e-3:  # below, the rounding of the risks themselves decides
        assert weights == pytest.approx(expected, rel=1e-9, abs=1e-300)
    assert weights[at % len(risks)] == 0.5


@settings(deadline=None)
@given(risks=st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=1, max_size=30), at=st.integers(0, 29))
@example(risks=[-LARGEST, LARGEST, -LARGEST, LARGEST], at=0)
@example(risks=[-LARGEST, 0.0, 5e-324, LARGEST], at=1)
def test_no_risk_is_too_large_to_be_weighted(risks: list[float], at: int) -> None:
    threshold = risks[at % len(risks)]
    with np.errstate(over="raise", invalid="raise", divide="raise"):
        weights, scale = weigh(np.array(risks), threshold)
    assert scale is not None
    assert math.isfinite(scale)
    assert scale >= 0
    assert ((weights >= 0) & (weights <= 1)).all()
    assert weights[at % len(risks)] == 0.5
    below, above = (np.array(risks) < threshold), (np.array(risks) > threshold)
    assert (weights[below] >= 0.5).all()
    assert (weights[above] <= 0.5).all()
    by_risk = weights[np.argsort(risks)]
    assert (np.diff(by_risk) <= 1e-15).all()


RISK = np.array([0.5, 0.1, 0.9, 0.5, np.nan, 0.3, -0.2])
SCORED = np.isfinite(RISK)


@pytest.mark.parametrize(
    ("how", "threshold"),
    [({"drop_top": "50%"}, 0.5), ({"drop_count": 1}, 0.9), ({"keep_lowest": 2}, 0.3), ({"max_risk": 0.4}, 0.4)],
    ids=str,
)
def test_the_threshold_is_the_cuts_own_and_no_row_is_dropped(how: dict[str, Any], threshold: float) -> None:
    selection = cut_rows(RISK, SCORED, Cut.of(**how, weights=True))
    assert selection.row_weights is not None
    expected, scale = weigh(RISK[SCORED], threshold)
    assert np.array_equal(selection.row_weights[SCORED], expected)
    assert np.isnan(selection.row_weights[~SCORED]).all()
    assert selection.fate.tolist() == [KEPT if s else ERROR for s in SCORED]
    [piece] = selection.pieces
    assert (piece.scored, piece.dropped, piece.ties, piece.threshold, piece.scale) == (6, 0, 0, threshold, scale)
    assert piece.total == pytest.approx(math.fsum(expected))
    assert selection.threshold is None


@pytest.mark.parametrize("how", [{"drop_count": 0}, {"keep_lowest": 6}, {"max_risk": 0.9}], ids=str)
def test_where_nothing_would_be_dropped_every_weight_is_one(how: dict[str, Any]) -> None:
    selection = cut_rows(RISK, SCORED, Cut.of(**how, weights=True))
    assert selection.row_weights is not None
    assert (selection.row_weights[SCORED] == 1).all()
    assert [(piece.threshold, piece.scale, piece.total) for piece in selection.pieces] == [(None, None, 6.0)]


@settings(deadline=None)
@given(codes=st.lists(st.integers(0, 3), min_size=1, max_size=40), seed=st.integers(0, 99), drop=st.integers(0, 40))
def test_groups_are_weighted_by_the_threshold_and_the_scale_of_their_own_rows(
    codes: list[int], seed: int, drop: int
) -> None:
    risk = np.random.default_rng(seed).normal(size=len(codes))
    groups = Groups(np.array(codes, dtype=np.int32), list("abcd"))
    everyone = np.ones(len(codes), dtype=bool)
    weighted = cut_rows(risk, everyone, Cut.of(drop_count=drop, per_group="g", weights=True), groups=groups)
    dropping = cut_rows(risk, everyone, Cut.of(drop_count=drop, per_group="g"), groups=groups)
    assert weighted.row_weights is not None
    assert weighted.spared == dropping.spared
    for piece, cut in zip(weighted.pieces, dropping.pieces, strict=True):
        inside = groups.codes == "abcd".index(str(piece.key["value"]))
        expected, scale = weigh(risk[inside], cut.threshold)
        assert np.array_equal(weighted.row_weights[inside], expected)
        assert (piece.key, piece.threshold, piece.scale) == (cut.key, cut.threshold, scale)


# ---------------------------------------------------------------------------------------------- whole runs


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in; in.jsonl has 40 rows of two kinds, a broken line and a row without an answer."""
    monkeypatch.chdir(tmp_path)
    rows: list[dict[str, Any] | bytes] = [{**row, "kind": "ab"[row["id"] % 2]} for row in make_rows(40)]
    write_jsonl(tmp_path / "in.jsonl", [*rows, b"broken", {"id": 41, "instruction": "q", "kind": "a"}])
    return tmp_path


def weights_of(dest: str) -> list[float | None]:
    return [row["sqsd_weight"] for row in rows_of(Path(dest), "kept")]


def test_every_scored_row_is_kept_with_its_weight(folder: Path, scorer: SQSDScorer) -> None:
    report = filter_dataset("in.jsonl", "out", drop_top="10%", weights=True, scorer=scorer)
    dropping = filter_dataset("in.jsonl", "dropping", drop_top="10%", scorer=scorer)
    assert [report["rows"][name] for name in ("kept", "dropped", "errors")] == [40, 0, 2]
    assert (report["cut"], report["threshold"], report["ties"]) == ("drop-top 10%, weights", None, 0)
    kept = rows_of(Path("out"), "kept")
    assert [row["id"] for row in kept] == list(range(40))
    assert list(kept[0])[-2:] == ["sqsd_status", "sqsd_weight"]
    expected, scale = weigh(np.array([row["sqsd_risk"] for row in kept]), dropping["threshold"])
    assert weights_of("out") == expected.tolist()
    weights = report["weights"]
    total = pytest.approx(math.fsum(expected))
    assert dict(weights) == {"formula": FORMULA, "threshold": dropping["threshold"], "scale": scale, "sum": total}
    assert [w < 0.5 for w in expected].count(True) == 3
    assert 0.5 in expected
    for split in ("dropped", "errors"):
        assert ("sqsd_weight" in pq.read_schema(split_file(Path("out"), split)).names) == (split == "dropped")
    loaded = datasets.load_dataset("out", split="train", cache_dir=str(folder / "cache"))
    assert loaded.features["sqsd_weight"] == datasets.Value("float64")
    assert "weights" not in dropping


def test_the_formula_of_the_report_is_the_one_that_is_computed(folder: Path, scorer: SQSDScorer) -> None:
    report = filter_dataset("in.jsonl", "out", drop_top="10%", weights=True, scorer=scorer)
    names = {"exp": math.exp, "threshold": report["weights"]["threshold"], "scale": report["weights"]["scale"]}
    for row in rows_of(Path("out"), "kept"):
        computed = eval(report["weights"]["formula"], {**names, "risk": row["sqsd_risk"]})
        assert row["sqsd_weight"] == pytest.approx(computed)


def test_rows_that_are_kept_without_a_score_have_no_weight(folder: Path, scorer: SQSDScorer) -> None:
    report = filter_dataset("in.jsonl", "out", drop_top="10%", weights=True, on_error="keep", scorer=scorer)
    assert [report["rows"][name] for name in ("kept", "dropped", "errors")] == [41, 0, 1]
    weights = weights_of("out")
    assert weights[40] is None
    assert None not in weights[:40]
    assert report["weights"]["sum"] == pytest.approx(math.fsum(w for w in weights if w is not None))


def test_groups_report_their_own_weights(folder: Path, scorer: SQSDScorer) -> None:
    report = filter_dataset("in.jsonl", "out", drop_top="10%", weights=True, per_group="kind", scorer=scorer)
    assert report["cut"] == 'drop-top 10%, per-group "kind", weights'
    kept = rows_of(Path("out"), "kept")
    for group in report["groups"]["groups"]:
        inside = [row for row in kept if row["kind"] == group["value"]]
        risks = sorted(row["sqsd_risk"] for row in inside)
        expected, scale = weigh(np.array([row["sqsd_risk"] for row in inside]), risks[-2])
        assert [row["sqsd_weight"] for row in inside] == expected.tolist()
        assert group.pop("sum") == pytest.approx(math.fsum(expected))
        figures = {"scored": 20, "dropped": 0, "threshold": risks[-2], "scale": scale}
        assert group == {"value": inside[0]["kind"], **figures}
    total = pytest.approx(math.fsum(w for w in weights_of("out") if w is not None))
    assert dict(report["weights"]) == {"formula": FORMULA, "threshold": None, "scale": None, "sum": total}


@pytest.mark.parametrize("source", ["run", "scored.parquet"])
def test_weights_from_scores_equal_those_of_a_run(source: str, folder: Path, scorer: SQSDScorer) -> None:
    filter_dataset("in.jsonl", "run", drop_count=0, scorer=scorer)
    score_dataset("in.jsonl", "scored.parquet", Scoring(scorer=scorer))
    filtered = filter_dataset("in.jsonl", "filtered", drop_count=5, weights=True, scorer=scorer)
    selected = select_dataset(source, "selected", Cut.of(drop_count=5, weights=True))
    assert selected["weights"] == filtered["weights"]
    ours, theirs = (pq.read_table(split_file(Path(name), "kept")) for name in ("selected", "filtered"))
    assert ours.column_names == theirs.column_names
    assert ours.to_pylist() == theirs.to_pylist()


def test_weights_of_an_earlier_run_make_way(folder: Path, scorer: SQSDScorer) -> None:
    filter_dataset("in.jsonl", "first", drop_count=5, weights=True, scorer=scorer)
    earlier = str(split_file(Path("first"), "kept"))
    columns = ["id", "instruction", "output", "kind", "sqsd_risk", "sqsd_danger", "sqsd_safety", "sqsd_status"]
    filter_dataset(earlier, "filtered", drop_count=1, scorer=scorer)
    score_dataset(earlier, "scored.parquet", Scoring(scorer=scorer))
    select_dataset(earlier, "selected", Cut.of(drop_count=1))
    for path in (split_file(Path("filtered"), "kept"), Path("scored.parquet"), split_file(Path("selected"), "kept")):
        assert pq.read_schema(path).names == columns
    filter_dataset(earlier, "again", drop_count=1, weights=True, scorer=scorer)
    select_dataset(earlier, "reselected", Cut.of(drop_count=1, weights=True))
    for name in ("again", "reselected"):
        assert pq.read_schema(split_file(Path(name), "kept")).names == [*columns, "sqsd_weight"]
        assert weights_of(name) != weights_of("first")
    assert weights_of("again") == weights_of("reselected")


def test_a_weight_that_no_run_gave_is_the_users(folder: Path, scorer: SQSDScorer) -> None:
    table = pa.Table.from_pylist([{**row, "sqsd_weight": 0.5} for row in make_rows(5)])
    pq.write_table(table, "mine.parquet")
    filter_dataset("mine.parquet", "out", drop_count=1, scorer=scorer)
    assert weights_of("out") == [0.5] * 4


def test_weights_are_another_run(folder: Path, scorer: SQSDScorer) -> None:
    filter_dataset("in.jsonl", "out", drop_count=5, scorer=scorer)
    with pytest.raises(DestinationExists, match="cut: drop-count 5 there, drop-count 5, weights here"):
        filter_dataset("in.jsonl", "out", drop_count=5, weights=True, scorer=scorer)
