"""Pictures that a run leaves: PNG files with the same bytes for the same drawing, whatever the user's own style is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from sqsd_filter.pipeline.folder import write_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BLUE, ORANGE = "#0072b2", "#d55e00"  # told apart with any colour vision


@contextmanager
def picture(path: Path, width: float, height: float) -> Iterator[Figure]:
    """A figure to draw on, so many inches large at 100 pixels an inch; written to `path` when that is done."""
    import matplotlib.style
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.style.context(["default", {"axes.unicode_minus": False}]):
        figure = Figure(figsize=(width, height), dpi=100, facecolor="white", layout="constrained")
        FigureCanvasAgg(figure)
        yield figure
        write_whole(path, lambda sink: figure.savefig(sink, format="png", metadata={"Software": None}))
