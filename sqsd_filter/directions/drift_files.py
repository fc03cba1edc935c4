"""What `drift` leaves in a folder: tables of the checkpoints and of their modules, the report, and the picture."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from sqsd_filter.directions.drift import Drift
from sqsd_filter.directions.pack import Pack
from sqsd_filter.errors import DestinationExists
from sqsd_filter.pictures import picture
from sqsd_filter.pipeline.folder import write_whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

REPORT = "drift.json"
COLOURS = ("#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # told apart with any colour vision
MARKERS = "os^Dv*"


def check_folder(out: Path, run: Path, pack: Pack) -> None:
    """Raise `DestinationExists` where `out` is a file, or has the report on another run or pack."""
    if out.exists() and not out.is_dir():
        raise DestinationExists(f"{out} is a file: name a folder.")
    report = out / REPORT
    if not report.exists():
        return
    try:
        told = json.loads(report.read_text(encoding="utf-8"))
        same = Path(told["run"]).resolve() == run.resolve() and told["pack"]["fingerprint"] == pack.fingerprint
    except (ValueError, KeyError, TypeError):
        same = False
    if not same:
        raise DestinationExists(f"{report} is not about this run and pack: name another folder or remove it.")


def write_drift(drift: Drift, out: Path) -> None:
    """Write drift.csv, modules.csv, drift.json and drift.png to the folder `out`, in place of an earlier run's."""
    out.mkdir(parents=True, exist_ok=True)
    texts = {
        "drift.csv": _csv(rows(drift)),
        "modules.csv": _csv(module_rows(drift)),
        REPORT: json.dumps(drift.report(), indent=1) + "\n",
    }
    for name, text in texts.items():
        write_whole(out / name, partial(_write_text, text))
    panels = [_projections, _speed, *([_refusals] if drift.points[0].refusals else [])]
    with picture(out / "drift.png", 6 * len(panels), 5) as figure:
        _draw(figure, drift, panels)


def _write_text(text: str, sink: IO[bytes]) -> None:
    sink.write(text.encode())


def rows(drift: Drift) -> list[dict[str, Any]]:
    """A row for each checkpoint and direction."""
    return [
        {"step": point.step, "checkpoint": point.name, "direction": name}
        | along.totals()
        | {"risk_projection": point.risk_projection}
        | (point.refusals.report() if point.refusals else {})
        for point in drift.points
        for name, along in point.along.items()
    ]


def module_rows(drift: Drift) -> Iterator[dict[str, Any]]:
    """A row for each checkpoint, direction and module."""
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


def _draw(figure: Figure, drift: Drift, panels: Sequence[Any]) -> None:
    """The projections, how fast they change and, where they were counted, the refusals, by training step."""
    for axes, panel in zip(figure.subplots(1, len(panels)), panels, strict=True):
        panel(axes, drift, [point.step for point in drift.points])
        axes.set_xlabel("training step (updates)", fontsize=12)
        axes.axhline(0, color="0.8", linewidth=0.8, zorder=0)
        axes.set_xlim(left=0)
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=len(labels), fontsize=12, frameon=False)


def _styled(drift: Drift) -> Iterator[tuple[str, dict[str, Any], list[float]]]:
    """Each direction's name, look and projections."""
    for k, name in enumerate(drift.points[0].along):
        values = [point.along[name].totals()["projection"] for point in drift.points]
        yield name, {"color": COLOURS[k % len(COLOURS)], "marker": MARKERS[k % len(MARKERS)], "markersize": 4}, values


def _projections(axes: Axes, drift: Drift, steps: list[int]) -> None:
    for name, look, values in _styled(drift):
        axes.plot(steps, values, label=name, **look)
    axes.set_ylabel(r"projection of $\theta_t - \theta_0$ (unit of the weights)", fontsize=12)


def _speed(axes: Axes, drift: Drift, steps: list[int]) -> None:
    """Mean speed from each checkpoint to the next, drawn between them."""
    for _, look, values in _styled(drift):
        axes.stairs(np.diff(values) / np.diff(steps), steps, baseline=None, color=look["color"], linewidth=1.5)
    axes.set_ylabel("speed of drift (projection a step)", fontsize=12)


def _refusals(axes: Axes, drift: Drift, steps: list[int]) -> None:
    counted = [point.refusals for point in drift.points if point.refusals]
    rates = [100 * found.rate for found in counted]
    low, high = ([100 * found.interval[side] for found in counted] for side in (0, 1))
    axes.fill_between(steps, low, high, color="0.85", linewidth=0)
    axes.plot(steps, rates, color="black", marker="o", markersize=4)
    axes.set_ylim(-2, 102)
    axes.set_ylabel(f"refusals of {counted[0].answers} prompts (%, 95 % Wilson interval)", fontsize=12)
