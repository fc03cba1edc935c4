"""The picture of steering: one column per direction; refusals, log-probabilities and their margin against α."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sqsd_filter.pictures import BLUE, ORANGE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

GREY = "#999999"
VERDICTS = {True: "steers", False: "does not steer", None: "no answers to judge by"}


def draw(figure: Figure, curves: Sequence[Mapping[str, Any]], *, likelihoods: bool) -> None:
    """Draw the report's directions; without `likelihoods` only the refusals."""
    panels = (_refusals, _answers, _margin) if likelihoods else (_refusals,)
    grid = figure.subplots(len(panels), len(curves), sharex=True, sharey="row", squeeze=False)
    for column, curve in enumerate(curves):
        for row, panel in enumerate(panels):
            axes = grid[row][column]
            panel(axes, curve, [point["alpha"] for point in curve["points"]])
            axes.axvline(0, color=GREY, linewidth=0.8, zorder=0)
            axes.spines[["top", "right"]].set_visible(False)
            axes.tick_params(labelsize=11)
            if column == 0:
                axes.legend(fontsize=10, frameon=False)
            else:
                axes.set_ylabel("")
        grid[0][column].set_title(f"{curve['name']}: {VERDICTS[curve['steers']]}", fontsize=13)
        grid[-1][column].set_xlabel("α, of the model at θ0 + αV (no unit)", fontsize=12)


def _values(curve: Mapping[str, Any], name: str) -> list[float]:
    """A figure at each point of the curve; matplotlib leaves NaN out."""
    return [float("nan") if point[name] is None else point[name] for point in curve["points"]]


def _refusals(axes: Axes, curve: Mapping[str, Any], alphas: Sequence[float]) -> None:
    low, high = _values(curve, "refusal_low"), _values(curve, "refusal_high")
    axes.fill_between(alphas, low, high, color=BLUE, alpha=0.2, linewidth=0, label="95 % interval")
    axes.plot(alphas, _values(curve, "refusal_rate"), color=BLUE, marker="o", label="refusals")
    axes.plot(alphas, _values(curve, "degenerate_rate"), color=GREY, linestyle=":", label="empty or repeating")
    axes.set_ylim(-0.03, 1.03)
    axes.set_ylabel("share of the answers", fontsize=12)


def _answers(axes: Axes, curve: Mapping[str, Any], alphas: Sequence[float]) -> None:
    for name, colour, marker in (("safe", BLUE, "o"), ("unsafe", ORANGE, "s")):
        axes.plot(alphas, _values(curve, name), color=colour, marker=marker, label=f"{name} answers")
    axes.set_ylabel("mean log-probability (nats per token)", fontsize=12)


def _margin(axes: Axes, curve: Mapping[str, Any], alphas: Sequence[float]) -> None:
    zero = next(point["margin"] for point in curve["points"] if point["alpha"] == 0)
    for k, other in enumerate(curve["random"]):
        ends = [(alphas[0], other["start"]), (0.0, zero), (alphas[-1], other["stop"])]
        line = [(alpha, float("nan") if value is None else value) for alpha, value in ends]
        label = "random directions of the same norms" if k == 0 else None
        axes.plot(*zip(*line, strict=True), color=GREY, linestyle="--", linewidth=1, label=label)
    axes.plot(alphas, _values(curve, "margin"), color="black", marker="o", label="unsafe minus safe")
    axes.set_ylabel("margin (nats per token)", fontsize=12)
