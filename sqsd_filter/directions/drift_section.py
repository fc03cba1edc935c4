"""The section of a run's page on the drift of a fine-tuning run."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from sqsd_filter.directions.drift_files import REPORT, draw, panels
from sqsd_filter.pipeline.page.parts import Plot, Section, Table, read_left


def drift_section(folder: Path) -> Section:
    """The section on a folder that `drift --out` left. Raises `InputError`."""
    with read_left(folder / REPORT, "sqsd-filter drift --out") as report:
        titles = {"drift": "Drift", "speed": "Speed of drift", "drift-refusals": "Refusals"}
        plots = [
            Plot(name, f"{title} by training step", partial(draw, report=report, shown=[panel]), height=4.6)
            for (name, title), panel in zip(titles.items(), panels(report), strict=False)
        ]
        names = list(report["checkpoints"][0]["directions"])
        rows = [
            [
                str(point["step"]),
                *(f"{point['directions'][name]['projection']:.4g}" for name in names),
                f"{point['risk_projection']:.4g}",
            ]
            for point in report["checkpoints"]
        ]
        words = [f"The change of the weights in {report['run']} along the directions of {report['pack']['name']}."]
        table = Table([":step", *(f":{name}" for name in names), ":risk"], rows)
        return Section("drift", "Drift", words, plots=plots, tables=[table]).drawn()
