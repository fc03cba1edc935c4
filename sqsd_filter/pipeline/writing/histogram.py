"""The picture on card and page: a histogram of the risk, with the dropped rows in another colour, and behind it how the
pack's reference rows are spread."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, NotRequired, TypedDict

import numpy as np

from sqsd_filter.pictures import BLUE, ORANGE, PINK, picture, plain
from sqsd_filter.pipeline.report import Report, RunFigures, is_sqsd, risk_name
from sqsd_filter.pipeline.selecting.selection import DROPPED
from sqsd_filter.scoring.reference_rows import BENIGN, UNSAFE, Pool, Reference

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.container import BarContainer
    from matplotlib.figure import Figure

MOST_BARS = 61  # odd, so that one is in the middle
BARS = 31  # at least, where reference rows are behind them
BLOCK = 2**20  # rows that are counted at a time
KINDS = {BENIGN: "benign reference", UNSAFE: "known unsafe answers"}
FAR = 1e100  # beyond it, sums in the drawing overflow


class Bars(TypedDict):
    """The bars of the histogram, as `bar_edges` and `count_rows` give them, fit for JSON. `reference` has the share of
    the reference rows of each kind in each bar."""

    edges: list[float]
    counts: list[list[int]]
    reference: NotRequired[dict[str, list[float]]]


def count_bars(
    risk: np.ndarray, scored: np.ndarray, fate: np.ndarray, report: RunFigures, reference: Reference | None = None
) -> Bars:
    """The bars of `risk` (n,) of the rows that are `scored` (n,) bool, with the `DROPPED` ones of `fate` (n,) apart.

    The report's quantiles, and those of the reference, give the limits.
    """
    bars = min(MOST_BARS, max(2 * math.isqrt(int(scored.sum())) + 1, BARS if reference else 0))
    pools: dict[str, Pool] = {}
    if reference is not None:
        pools = {BENIGN: reference.benign, UNSAFE: reference.unsafe} if reference.unsafe else {BENIGN: reference.benign}
    behind = [pool.quantile(Fraction(share, 100)) for pool in pools.values() for share in (1, 99)]
    edges = bar_edges(bars, report["risk_quantiles"], _cut(report), behind)
    counted: Bars = {"edges": edges.tolist(), "counts": count_rows(edges, risk, scored, fate).tolist()}
    if pools:
        counted["reference"] = {kind: (np.diff(pool.below(edges)) / pool.rows).tolist() for kind, pool in pools.items()}
    return counted


def write_histogram(path: Path, bars: Bars, report: Report) -> None:
    """Draw what was counted as a PNG of 1200 × 500 pixels: the same bytes for the same rows."""
    with picture(path, 12, 5) as figure:
        draw_histogram(figure, bars, report)


def _cut(report: RunFigures) -> float | None:
    """The risk at which a line is drawn, if it is the same for all rows."""
    if report.get("groups"):
        return None
    weights = report.get("weights")
    return weights["threshold"] if weights else report["threshold"]


def bar_edges(bars: int, quantiles: Mapping[str, float], cut: float | None, behind: Sequence[float] = ()) -> np.ndarray:
    """The `bars` + 1 edges of the bars: from the lowest to the highest risk, without outliers, which would squeeze the
    rest. Outliers are further from the middle 90 % of risks, and from the cut, than this range is wide. If the middle
    90 % are all equal, it is the middle 98 %, or all. The risks `behind` are inside, too. The cut is an edge, so that
    no bar has rows of both sides.
    """
    least, most = quantiles.get("0%", 0.0), quantiles.get("100%", 0.0)
    low = high = least
    for lower, upper in (("5%", "95%"), ("1%", "99%"), ("0%", "100%")):
        if quantiles and low == high:
            low, high = quantiles[lower], quantiles[upper]
    width = high - low
    if cut is not None:
        low, high = min(low, cut), max(high, cut)
    ends = [min([max(least, low - width), *behind]), max([min(most, high + width), *behind])]
    start, stop = np.clip(ends, -FAR, FAR).tolist()
    size = max(abs(start), abs(stop), 1e-3)
    if stop - start < 1e-9 * size:  # all risks are equal: they get the bar in the middle
        start, stop = start - size / 10, stop + size / 10
    if cut is None or not start <= cut <= stop or bars == 1:
        return np.linspace(start, np.nextafter(stop, np.inf), bars + 1)
    step = (stop - start) / (bars - 1)
    below = math.ceil((cut - start) / step)
    edges: np.ndarray = cut + (np.arange(bars + 1) - below) * step
    return edges


def count_rows(edges: np.ndarray, risk: np.ndarray, scored: np.ndarray, fate: np.ndarray) -> np.ndarray:
    """(2, bars + 2): the number of kept and of dropped rows below the first edge, in each bar, and above the last."""
    counts = np.zeros(2 * (len(edges) + 1), np.int64)
    for start in range(0, len(risk), BLOCK):
        block = slice(start, start + BLOCK)
        where = scored[block]
        bar = np.searchsorted(edges, risk[block][where], side="right")
        bar += (len(edges) + 1) * (fate[block][where] == DROPPED)
        counts += np.bincount(bar, minlength=len(counts))
    return counts.reshape(2, -1)


def draw_histogram(figure: Figure, bars: Bars, report: Report) -> None:
    """Bars of kept rows with the dropped ones on top, and the cut as a line, unless each group has its own. Reference
    rows are drawn as if there were as many of each kind as the bars have rows."""
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter

    edges, counts, cut = np.array(bars["edges"]), np.array(bars["counts"]), _cut(report)
    if report.get("weights"):
        names = ("kept, weighted by risk", "", "threshold of the weights")
    else:
        names = ("kept" if "kept" in report["rows"] else "scored", "dropped", "cut")
    axes, wide = figure.add_subplot(), figure.get_figwidth() > 9
    width = edges[1] - edges[0]
    left = np.concatenate([edges[:-1], [edges[-1] + width, edges[0] - 2 * width]])  # the two bars of outliers come last
    floor = np.zeros(len(left), np.int64)
    legend: list[Artist | BarContainer] = []
    for rows, colour, name in zip(np.roll(counts, -1, axis=1), (BLUE, ORANGE), names, strict=False):
        if total := int(rows.sum()):
            label = f"{name}: {total:,} row{'s' * (total != 1)}"
            drawn = axes.bar(left, rows, width, floor, align="edge", color=colour, ec="white", lw=0.3, label=label)
            legend.append(drawn)
            for outliers in drawn[-2:]:
                outliers.set_hatch("//")
        floor += rows
    most = floor.max()
    for kind, shares in bars.get("reference", {}).items():
        heights = np.array(shares) * floor.sum()
        most = max(most, heights.max())
        colour = "black" if kind == BENIGN else PINK
        axes.stairs(heights, edges, fill=True, color=colour, alpha=0.15, zorder=0)
        label = f"{KINDS[kind]}{', rescaled' if wide else ''}"
        legend.append(axes.stairs(heights, edges, color=colour, lw=1.5, alpha=0.8, label=label))
    if cut is not None:
        legend.append(axes.axvline(cut, color="black", linestyle="--", label=f"{names[2]}: risk {cut:.4g}"))
    above, below = floor[-2:].tolist()
    note = [f"{below:,} below {edges[0]:.3g}"] * (below > 0)
    note += [f"{above:,} above {edges[-1]:.3g}"] * (above > 0)
    axes.set_title(f"rows outside, hatched: {', '.join(note)}" if note else "", loc="right", fontsize=11)
    axes.set_title("" if legend else "No row has a risk.", loc="left", fontsize=13)
    axes.set_xlim(edges[0] - (3 if below else 1) * width, edges[-1] + (3 if above else 1) * width)
    axes.set_ylim(0, 1.05 * max(1, most))
    unit = "no unit; " if is_sqsd(report) else ""
    axes.set_xlabel(f"{plain(risk_name(report))} ({unit}higher is riskier)", fontsize=13)
    axes.set_ylabel("rows", fontsize=13)
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10], integer=True))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.tick_params(labelsize=12)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(
        handles=legend,
        loc="outside upper left",
        ncols=3 if wide else 2 if len(legend) > 3 else 1,
        fontsize=13,
        columnspacing=1.2,
        frameon=False,
    )
