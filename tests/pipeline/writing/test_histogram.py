"""The picture of the risks: every scored row in it once, the same bytes for the same rows, and fit to be looked at."""

from __future__ import annotations

import tracemalloc
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import matplotlib
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from sqsd_filter.pipeline.report import Report, RunFigures
from sqsd_filter.pipeline.selecting.selection import DROPPED, ERROR, KEPT, Cut, cut_rows
from sqsd_filter.pipeline.summary import QUANTILES
from sqsd_filter.pipeline.writing import histogram
from sqsd_filter.pipeline.writing.histogram import MOST_BARS, bar_edges, count_bars, count_rows, write_histogram
from sqsd_filter.scoring.reference_rows import Reference, ReferenceRecord, summarise_rows

BLUE, ORANGE = (0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00)
REFERENCE = {"benign": np.linspace(-3, -0.5, 300), "unsafe": np.linspace(1, 4, 50)}
NORMAL = np.random.default_rng(0).normal(-0.3, 0.2, 1000)

pytestmark = pytest.mark.pictures


def quantiles(risk: np.ndarray) -> dict[str, float]:
    with np.errstate(over="ignore"):  # between risks that are further apart than floats reach
        return {f"{q}%": float(np.quantile(risk, q / 100)) for q in QUANTILES} if len(risk) else {}


def draw(path: Path, risk: np.ndarray, **changes: Any) -> np.ndarray:
    """The picture (500, 1200, 4) of rows that lost their riskiest 5 %, in a run whose report differs by these."""
    scored = np.isfinite(risk)
    selection = cut_rows(risk, scored, changes.pop("cut", Cut.of(drop_top="5%")))
    figures = {"risk_quantiles": quantiles(risk[scored]), "threshold": selection.threshold, "rows": {"kept": 0}}
    report = cast("Report", figures | changes)  # as much of it as a picture needs
    write_histogram(path, count_bars(risk, scored, selection.fate, report), report)
    return np.asarray(Image.open(path))


def area(picture: np.ndarray, colour: tuple[int, int, int]) -> int:
    """How many pixels have this colour, but for the legend's at the top."""
    return int((picture[60:, :, :3] == colour).all(axis=2).sum())


# ---------------------------------------------------------------------------------------------- counting


risks = st.floats(-1e6, 1e6) | st.sampled_from([0.0, 1.0])


@given(st.lists(st.tuples(risks, st.sampled_from([KEPT, DROPPED, ERROR])), min_size=1, max_size=40))
def test_every_scored_row_is_counted_once_where_it_belongs(rows: list[tuple[float, int]]) -> None:
    risk, fate = np.array([r for r, _ in rows]), np.array([f for _, f in rows])
    scored = fate != ERROR
    edges = bar_edges(MOST_BARS, quantiles(risk[scored]), None)
    counts = count_rows(edges, risk, scored, fate)
    for code, row_counts in zip((KEPT, DROPPED), counts.tolist(), strict=True):
        own = [r for r, f in rows if f == code]
        inside = [sum(low <= r < high for r in own) for low, high in pairwise(edges)]
        assert row_counts == [sum(r < edges[0] for r in own), *inside, sum(r >= edges[-1] for r in own)]


def test_rows_are_counted_block_by_block_in_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(histogram, "BLOCK", 10_000)
    risk = np.random.default_rng(0).normal(size=1_000_003)
    fate = (risk > 1).astype(np.uint8)
    edges, scored = bar_edges(MOST_BARS, quantiles(risk), 1.0), np.ones(len(risk), bool)
    tracemalloc.start()
    counts = count_rows(edges, risk, scored, fate)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert counts.sum(axis=1).tolist() == [(fate == KEPT).sum(), (fate == DROPPED).sum()]
    assert peak < 1_000_000  # a copy of the risks would be eight times that


# ---------------------------------------------------------------------------------------------- limits

finite = st.floats(allow_nan=False, allow_infinity=False)


@given(st.lists(finite, max_size=20), st.none() | finite)
def test_the_bars_have_an_equal_positive_width_whatever_the_risks(risks: list[float], cut: float | None) -> None:
    widths = np.diff(bar_edges(MOST_BARS, quantiles(np.array(risks)), cut))
    assert len(widths) == MOST_BARS
    assert np.isfinite(widths).all()
    assert widths.min() > 0
    assert widths.max() <= 1.001 * widths.min()


def test_all_risks_are_inside_where_none_is_far_from_the_others() -> None:
    for cut in (None, 0.0):
        edges = bar_edges(MOST_BARS, quantiles(NORMAL), cut)
        assert edges[0] <= NORMAL.min() < edges[1]
        assert edges[-2] <= NORMAL.max() < edges[-1]


@given(st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=40), st.floats(0, 1))
def test_no_bar_has_rows_of_both_sides_of_the_cut(risks: list[float], share: float) -> None:
    risk = np.array(risks)
    selection = cut_rows(risk, np.ones(len(risk), bool), Cut.of(max_risk=float(np.quantile(risk, share))))
    if selection.threshold is None:
        return
    edges = bar_edges(MOST_BARS, quantiles(risk), selection.threshold)
    kept, dropped = count_rows(edges, risk, np.ones(len(risk), bool), selection.fate)
    assert selection.threshold in edges
    assert not ((kept > 0) & (dropped > 0)).any()


def test_reference_rows_are_inside_and_as_many_as_they_are() -> None:
    risk = np.linspace(-1, 0, 40)
    pools = (summarise_rows(kind, kind, "0", {"risk": values}) for kind, values in REFERENCE.items())
    reference = Reference("p", cast("ReferenceRecord", {"settings": {}, "corpora": list(pools)}))
    report = cast("RunFigures", {"risk_quantiles": quantiles(risk), "threshold": None})
    bars = count_bars(risk, np.ones(40, bool), np.zeros(40, np.uint8), report, reference)
    edges = np.array(bars["edges"])
    for kind, values in REFERENCE.items():
        expected, _ = np.histogram(values, edges)
        assert bars["reference"][kind] == pytest.approx((expected / len(values)).tolist())
        assert sum(bars["reference"][kind]) > 0.95


def test_one_far_risk_does_not_squeeze_the_others_unless_the_cut_is_there() -> None:
    risk = np.append(NORMAL, 1e6)
    assert bar_edges(MOST_BARS, quantiles(risk), 0.1)[-1] < 2
    assert bar_edges(MOST_BARS, quantiles(risk), 1e6)[-1] > 1e6


def test_where_most_risks_are_the_same_the_others_are_seen() -> None:
    risk = np.array([0.5] * 970 + [0.9] * 30)
    edges = bar_edges(MOST_BARS, quantiles(risk), None)
    assert edges[0] <= 0.5
    assert edges[-1] > 0.9


def test_a_single_risk_is_in_the_middle() -> None:
    for risk in (0.25, 0.0, -3.0, 1e300):
        edges = bar_edges(MOST_BARS, quantiles(np.full(9, risk)), risk)
        counts = count_rows(edges, np.full(9, min(risk, 1e100)), np.ones(9, bool), np.zeros(9))[0]
        assert counts[31:33].sum() == 9


# ---------------------------------------------------------------------------------------------- the picture


def test_it_is_opaque_and_as_large_as_it_says(tmp_path: Path) -> None:
    picture = draw(tmp_path / "a.png", NORMAL)
    assert picture.shape == (500, 1200, 4)
    assert (picture[..., 3] == 255).all()
    assert (picture[:3] == 255).all()  # white, on a dark page too


def test_the_same_rows_give_the_same_bytes_whatever_the_users_own_style(tmp_path: Path) -> None:
    draw(tmp_path / "a.png", NORMAL)
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "black", "savefig.dpi": 50}):
        draw(tmp_path / "b.png", NORMAL)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert b"Software" not in (tmp_path / "a.png").read_bytes()


def test_areas_are_as_the_rows(tmp_path: Path) -> None:
    picture = draw(tmp_path / "a.png", NORMAL, cut=Cut.of(drop_top="30%"), threshold=None)
    assert area(picture, ORANGE) / (area(picture, BLUE) + area(picture, ORANGE)) == pytest.approx(0.3, abs=0.02)


def line(picture: np.ndarray) -> list[int]:
    """The columns in which black dashes go from top to bottom: not of an axis, which has no gaps."""
    black = (picture[40:440, 100:, :3] == 0).all(axis=2).sum(axis=0)
    return (100 + np.flatnonzero((black > 150) & (black < 350))).tolist()


def test_a_cut_is_a_line_between_kept_and_dropped(tmp_path: Path) -> None:
    picture = draw(tmp_path / "a.png", NORMAL)
    [*columns] = line(picture)
    where = (picture[60:, :, :3] == ORANGE).all(axis=2).any(axis=0)
    assert columns
    assert abs(columns[0] - np.flatnonzero(where)[0]) < 20


def test_without_one_cut_there_is_no_line(tmp_path: Path) -> None:
    whole = draw(tmp_path / "a.png", NORMAL, cut=Cut.of(drop_count=0))
    assert line(whole) == []
    assert area(whole, ORANGE) == 0
    assert area(whole, BLUE) > 10_000
    groups = draw(tmp_path / "b.png", NORMAL, groups={"column": "c", "groups": []})
    assert line(groups) == []
    assert area(groups, ORANGE) > 0


def test_weighted_rows_have_the_line_of_their_formula(tmp_path: Path) -> None:
    picture = draw(tmp_path / "a.png", NORMAL, cut=Cut.of(drop_count=0), weights={"threshold": -0.3})
    assert line(picture)
    assert area(picture, ORANGE) == 0


@pytest.mark.parametrize(
    "risk",
    [[np.nan] * 3, [0.25], [0.0] * 60, [-1.7e308, 0.0, 5e-324, 1.7e308], [*NORMAL[:59], 1e6]],
    ids=["none", "one", "equal", "extreme", "outlier"],
)
def test_any_risks_can_be_drawn(risk: list[float], tmp_path: Path) -> None:
    picture = draw(tmp_path / "a.png", np.array(risk))
    assert picture.shape == (500, 1200, 4)
    assert (area(picture, BLUE) + area(picture, ORANGE) > 100) == bool(np.isfinite(risk).any())
