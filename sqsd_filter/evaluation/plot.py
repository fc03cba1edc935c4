"""The pictures of an evaluation, a line a scorer: the attack success rate by window, and curves of what is found."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

import numpy as np

from sqsd_filter.evaluation.poison import DRAWN_AT
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
FEW = 4  # scorers' windows in one panel
WIDTH = 0.4  # of a window's place, over which the scorers' points are spread, so that intervals are told apart


def draw_windows(figure: Figure, scorers: Mapping[str, Mapping[str, Any]]) -> None:
    """Draw the `scorers` of results.json: rates in % with their intervals, of a few in one panel, of more in a panel
    each, where the line of the first one is behind the others."""
    drawn = list(_looks(scorers))
    if len(drawn) <= FEW:
        _panel(figure.add_subplot(), drawn)
        _legend(figure)
    else:
        columns = math.ceil(math.sqrt(len(drawn)))
        grid = figure.subplots(math.ceil(len(drawn) / columns), columns, sharex=True, sharey=True, squeeze=False)
        first = 100 * np.array(drawn[0][0]["asr"])
        for axes, one in zip_longest(grid.flat, drawn):
            axes.set_visible(one is not None)
            if one is not None:
                _panel(axes, [one])
                axes.set_title(one[1]["label"], fontsize=11)
                axes.plot(np.arange(1, len(first) + 1), first, color="#888888", linewidth=0.8, zorder=0)
        for axes in grid.flat[len(drawn) - columns : len(drawn)]:
            axes.tick_params(labelbottom=True)
    figure.supxlabel("window of rows, from the riskiest (S1) to the safest", fontsize=12)
    figure.supylabel("attack success rate (%; 95 % intervals)", fontsize=12)


def _panel(axes: Axes, shown: Sequence[tuple[Any, dict[str, Any]]]) -> None:
    most = max(len(found["asr"]) for found, _ in shown)
    shifts = np.linspace(-WIDTH / 2, WIDTH / 2, len(shown)) if len(shown) > 1 else [0.0]
    for (found, look), shift in zip(shown, shifts, strict=True):
        asr, ends = 100 * np.array(found["asr"]), 100 * np.array(found["ci"])
        beyond = np.clip([asr - ends[:, 0], ends[:, 1] - asr], 0, None)
        axes.errorbar(np.arange(1, len(asr) + 1) + shift, asr, beyond, elinewidth=1, capsize=2, **look)
    axes.set_xticks(range(1, most + 1), [f"S{k}" for k in range(1, most + 1)])
    _plain_axes(axes)


def draw_curves(figure: Figure, kind: str, curves: Mapping[str, Any]) -> None:
    """Draw the `curves` of results.json of one kind: each scorer's points [x, y], both shares."""
    axes = figure.add_subplot()
    for points, look in _looks(curves):
        axes.plot(*(100 * np.array(points, np.float64)).T, **{**look, "marker": None})
    _, across, up = CURVES[kind]
    axes.set_xlim(-2, 102)
    axes.set_xlabel(across, fontsize=12)
    axes.set_ylabel(up, fontsize=12)
    _plain_axes(axes)
    _legend(figure)


def _looks(scorers: Mapping[str, Any]) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Each scorer's figures with a colour and a line of its own."""
    for k, (name, found) in enumerate(scorers.items()):
        line = ("-", "--", ":")[k // len(COLOURS) % 3]
        look = {"color": COLOURS[k % len(COLOURS)], "marker": MARKERS[k % len(MARKERS)], "linestyle": line}
        yield found, {**look, "linewidth": 1.2, "markersize": 5, "label": plain(name)}


def _plain_axes(axes: Axes) -> None:
    axes.set_ylim(-2, 102)
    axes.tick_params(labelsize=11)
    axes.spines[["top", "right"]].set_visible(False)


def _legend(figure: Figure) -> None:
    figure.legend(loc="outside upper left", ncols=4, fontsize=11, frameon=False)
