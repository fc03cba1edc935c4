"""The pictures of an evaluation, one line per scorer: attack success rates by window, and ROC and PR curves."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import zip_longest
from typing import TYPE_CHECKING, TypedDict

import numpy as np

from sqsd_filter.evaluation.poison import DRAWN_AT
from sqsd_filter.evaluation.results import Point, WindowFigures
from sqsd_filter.pictures import COLOURS, MARKERS, plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CURVES = {  # of results.json: the title and both axes
    "roc": ("ROC curves", "benign rows above the threshold (%)", "unsafe rows above it (%)"),
    "pr": (
        f"Precision-recall curves with {DRAWN_AT:.0%} unsafe rows",
        "unsafe rows above the threshold (%)",
        "rows above it that are unsafe (%)",
    ),
}
MOST_SCORERS = 4  # in one panel
WIDTH = 0.4  # of the distance of two windows: the scorers' points are spread over it, so that intervals don't overlap


class Style(TypedDict):
    """How matplotlib draws a scorer's line."""

    color: str
    marker: str
    linestyle: str
    linewidth: float
    markersize: float
    label: str


Line = tuple[WindowFigures, Style]


def draw_windows(figure: Figure, scorers: Mapping[str, WindowFigures]) -> None:
    """Draw the `scorers` of results.json: rates in % with their intervals.

    A few scorers share one panel. More of them get a panel each, with the line of the first one in the background.
    """
    lines = list(zip(scorers.values(), _styles(scorers), strict=True))
    if len(lines) <= MOST_SCORERS:
        _panel(figure.add_subplot(), lines)
        _legend(figure)
    else:
        columns = math.ceil(math.sqrt(len(lines)))
        grid = figure.subplots(math.ceil(len(lines) / columns), columns, sharex=True, sharey=True, squeeze=False)
        first = 100 * np.array(lines[0][0]["asr"])
        for axes, line in zip_longest(grid.flat, lines):
            axes.set_visible(line is not None)
            if line is not None:
                _panel(axes, [line])
                axes.set_title(line[1]["label"], fontsize=11)
                axes.plot(np.arange(1, len(first) + 1), first, color="#888888", linewidth=0.8, zorder=0)
        for axes in grid.flat[len(lines) - columns : len(lines)]:
            axes.tick_params(labelbottom=True)
    figure.supxlabel("window of rows, from the riskiest (S1) to the safest", fontsize=12)
    figure.supylabel("attack success rate (%; 95 % intervals)", fontsize=12)


def _panel(axes: Axes, lines: Sequence[Line]) -> None:
    most = max(len(figures["asr"]) for figures, _ in lines)
    shifts = np.linspace(-WIDTH / 2, WIDTH / 2, len(lines)) if len(lines) > 1 else [0.0]
    for (figures, style), shift in zip(lines, shifts, strict=True):
        asr, bounds = 100 * np.array(figures["asr"]), 100 * np.array(figures["ci"])
        bars = np.clip([asr - bounds[:, 0], bounds[:, 1] - asr], 0, None)
        axes.errorbar(np.arange(1, len(asr) + 1) + shift, asr, bars, elinewidth=1, capsize=2, **style)
    axes.set_xticks(range(1, most + 1), [f"S{k}" for k in range(1, most + 1)])
    _plain_axes(axes)


def draw_curves(figure: Figure, kind: str, curves: Mapping[str, Sequence[Point]]) -> None:
    """Draw the `curves` of results.json of one kind: the points [x, y] of each scorer, both shares."""
    axes = figure.add_subplot()
    for points, style in zip(curves.values(), _styles(curves), strict=True):
        style["marker"] = "None"
        axes.plot(*(100 * np.array(points, np.float64)).T, **style)
    _, across, up = CURVES[kind]
    axes.set_xlim(-2, 102)
    axes.set_xlabel(across, fontsize=12)
    axes.set_ylabel(up, fontsize=12)
    _plain_axes(axes)
    _legend(figure)


def _styles(names: Iterable[str]) -> Iterator[Style]:
    """A colour and a line of its own for each scorer."""
    for k, name in enumerate(names):
        yield {
            "color": COLOURS[k % len(COLOURS)],
            "marker": MARKERS[k % len(MARKERS)],
            "linestyle": ("-", "--", ":")[k // len(COLOURS) % 3],
            "linewidth": 1.2,
            "markersize": 5,
            "label": plain(name),
        }


def _plain_axes(axes: Axes) -> None:
    axes.set_ylim(-2, 102)
    axes.tick_params(labelsize=11)
    axes.spines[["top", "right"]].set_visible(False)


def _legend(figure: Figure) -> None:
    figure.legend(loc="outside upper left", ncols=4, fontsize=11, frameon=False)
