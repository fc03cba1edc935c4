"""The pictures of an evaluation, a line a scorer: the attack success rate by window, and curves of what is found."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
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
WIDTH = 0.4  # of a window's place, over which the scorers' points are spread, so that intervals are told apart


def draw_windows(figure: Figure, scorers: Mapping[str, Mapping[str, Any]]) -> None:
    """Draw the `scorers` of results.json: rates in % with their intervals."""
    axes, most = figure.add_subplot(), max(len(found["asr"]) for found in scorers.values())
    shifts = np.linspace(-WIDTH / 2, WIDTH / 2, len(scorers)) if len(scorers) > 1 else [0.0]
    for (found, look), shift in zip(_looks(scorers), shifts, strict=True):
        asr, ends = 100 * np.array(found["asr"]), 100 * np.array(found["ci"])
        beyond = np.clip([asr - ends[:, 0], ends[:, 1] - asr], 0, None)
        axes.errorbar(np.arange(1, len(asr) + 1) + shift, asr, beyond, elinewidth=1, capsize=2, **look)
    axes.set_xticks(range(1, most + 1), [f"S{k}" for k in range(1, most + 1)])
    axes.set_xlabel("window of rows, from the riskiest (S1) to the safest", fontsize=12)
    axes.set_ylabel("attack success rate (%; 95 % intervals)", fontsize=12)
    _finish(figure, axes)


def draw_curves(figure: Figure, kind: str, curves: Mapping[str, Any]) -> None:
    """Draw the `curves` of results.json of one kind: each scorer's points [x, y], both shares."""
    axes = figure.add_subplot()
    for points, look in _looks(curves):
        axes.plot(*(100 * np.array(points, np.float64)).T, **{**look, "marker": None})
    _, across, up = CURVES[kind]
    axes.set_xlim(-2, 102)
    axes.set_xlabel(across, fontsize=12)
    axes.set_ylabel(up, fontsize=12)
    _finish(figure, axes)


def _looks(scorers: Mapping[str, Any]) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Each scorer's figures with a colour and a line of its own."""
    for k, (name, found) in enumerate(scorers.items()):
        line = ("-", "--", ":")[k // len(COLOURS) % 3]
        look = {"color": COLOURS[k % len(COLOURS)], "marker": MARKERS[k % len(MARKERS)], "linestyle": line}
        yield found, {**look, "linewidth": 1.2, "markersize": 5, "label": plain(name)}


def _finish(figure: Figure, axes: Axes) -> None:
    axes.set_ylim(-2, 102)
    axes.tick_params(labelsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper left", ncols=4, fontsize=11, frameon=False)
