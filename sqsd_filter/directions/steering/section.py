"""The section of a run's page on steering: a picture per direction."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from sqsd_filter.directions.steering.plot import VERDICTS, draw
from sqsd_filter.directions.steering.steer_files import REPORT
from sqsd_filter.pipeline.page.parts import Plot, Section, read_left


def steering_section(folder: Path) -> Section:
    """The section on a folder that `steer --out` left. Raises `InputError`."""
    with read_left(folder / REPORT, "sqsd-filter steer") as report:
        pairs, curves = report["settings"]["rows"]["pairs"] > 0, report["directions"]
        plots = [
            Plot(
                f"steer-{k}",
                f"Steering along {curve['name']}: {VERDICTS[curve['steers']]}",
                partial(draw, curves=[curve], likelihoods=pairs),
                height=10 if pairs else 4,
            )
            for k, curve in enumerate(curves)
        ]
        words = [f"The answers of the model of {report['pack']} when it is moved along each direction V, to θ0 + αV."]
        return Section("steering", "Steering", words, plots=plots).drawn()
