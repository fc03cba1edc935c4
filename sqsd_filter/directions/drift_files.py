"""The files that `drift` writes: tables of the checkpoints and of their modules, the report, and the picture."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sqsd_filter.errors import DestinationExists
from sqsd_filter.pictures import COLOURS, MARKERS, picture
from sqsd_filter.storage.folder import write_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from sqsd_filter.directions.drift import Drift
    from sqsd_filter.scoring.pack import Pack

REPORT = "drift.json"
Points = Sequence[Mapping[str, Any]]  # the checkpoints of a report
Panel = Callable[["Axes", Points, Sequence[int]], None]


def check_folder(out: Path, run: Path, pack: Pack) -> None:
    """Raise `DestinationExists` if `out` is a file, or has the report on another run or pack."""
    if out.exists() and not out.is_dir():
        raise DestinationExists(f"{out} is a file: name a folder.")
    report = out / REPORT
    if not report.exists():
        return
    try:
        earlier = json.loads(report.read_text(encoding="utf-8"))
        same_run = Path(earlier["run"]).resolve() == run.resolve()
        same = same_run and earlier["pack"]["fingerprint"] == pack.fingerprint
    except (ValueError, KeyError, TypeError):
        same = False
    if not same:
        raise DestinationExists(f"{report} is about another run or pack: name another folder or remove it.")


def write_drift(drift: Drift, out: Path) -> None:
    """Write drift.csv, modules.csv, drift.json and drift.png to the folder `out`, replacing earlier ones."""
    out.mkdir(parents=True, exist_ok=True)
    report = drift.report()
    texts = {
        "drift.csv": _csv(rows(drift)),
        "modules.csv": _csv(module_rows(drift)),
        REPORT: json.dumps(report, indent=1) + "\n",
    }
    for name, text in texts.items():
        write_text(out / name, text)
    shown = panels(report)
    with picture(out / "drift.png", 6 * len(shown), 5) as figure:
        draw(figure, report, shown)


def rows(drift: Drift) -> list[dict[str, Any]]:
    """A row per checkpoint and direction."""
    return [
        {"step": point.step, "checkpoint": point.name, "direction": name}
        | along.totals()
        | {"risk_projection": point.risk_projection}
        | (point.refusals.report() if point.refusals else {})
        for point in drift.points
        for name, along in point.along.items()
    ]


def module_rows(drift: Drift) -> Iterator[dict[str, Any]]:
    """A row per checkpoint, direction and module."""
    for point in drift.points:
        for name, along in point.along.items():
            figures = zip(along.modules, along.projections_m.tolist(), along.cosines_m.tolist(), strict=True)
            for module, projection, cosine in figures:
                yield {
                    **{"step": point.step, "direction": name, "module": module},
                    **{"projection": projection, "cosine": cosine},
                }


def _csv(rows: Iterable[dict[str, Any]]) -> str:
    first, *others = rows
    text = io.StringIO()
    writer = csv.DictWriter(text, list(first), lineterminator="\n")
    writer.writeheader()
    writer.writerows([first, *others])
    return text.getvalue()


def panels(report: Mapping[str, Any]) -> list[Panel]:
    """The panels of a report: the projections, their speed, and the refusals if they were counted."""
    return [_projections, _speed, *([_refusals] if "refusal_rate" in report["checkpoints"][0] else [])]


def draw(figure: Figure, report: Mapping[str, Any], shown: Sequence[Panel]) -> None:
    """Draw these panels of a report side by side, by training step."""
    for axes, panel in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
        panel(axes, report["checkpoints"], [point["step"] for point in report["checkpoints"]])
        axes.set_xlabel("training step (updates)", fontsize=12)
        axes.axhline(0, color="0.8", linewidth=0.8, zorder=0)
        axes.set_xlim(left=0)
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=len(labels), fontsize=12, frameon=False)


def _styled(points: Points) -> Iterator[tuple[str, dict[str, Any], list[float]]]:
    """Each direction's name, line style and projections."""
    for k, name in enumerate(points[0]["directions"]):
        values = [point["directions"][name]["projection"] for point in points]
        yield name, {"color": COLOURS[k % len(COLOURS)], "marker": MARKERS[k % len(MARKERS)], "markersize": 4}, values


def _projections(axes: Axes, points: Points, steps: Sequence[int]) -> None:
    for name, look, values in _styled(points):
        axes.plot(steps, values, label=name, **look)
    axes.set_ylabel(r"projection of $\theta_t - \theta_0$ (unit of the weights)", fontsize=12)


def _speed(axes: Axes, points: Points, steps: Sequence[int]) -> None:
    """Mean speed from each checkpoint to the next, drawn between them."""
    for name, look, values in _styled(points):
        speed = np.diff(values) / np.diff(steps)
        axes.stairs(speed, steps, baseline=None, color=look["color"], linewidth=1.5, label=name)
    axes.set_ylabel("speed of drift (projection per step)", fontsize=12)


def _refusals(axes: Axes, points: Points, steps: Sequence[int]) -> None:
    rates, low, high = ([100 * point[f"refusal_{name}"] for point in points] for name in ("rate", "low", "high"))
    axes.fill_between(steps, low, high, color="black", alpha=0.15, linewidth=0, label="95 % Wilson interval")
    axes.plot(steps, rates, color="black", marker="o", markersize=4, label="refusals")
    axes.set_ylim(-2, 102)
    axes.set_ylabel(f"refusals of {points[0]['answers']} prompts (%)", fontsize=12)
