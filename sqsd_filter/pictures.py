"""Pictures: PNG files and parts of a page, the same bytes for the same drawing, whatever the user's own style is."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from sqsd_filter.storage.folder import write_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BLUE, ORANGE = "#0072b2", "#d55e00"  # told apart with any colour vision, as all of these
COLOURS = (ORANGE, BLUE, "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
MARKERS = "os^Dv*"


@contextmanager
def picture(path: Path, width: float, height: float) -> Iterator[Figure]:
    """A figure to draw on, so many inches large at 100 pixels an inch; written to `path` when that is done."""
    with _figure(width, height) as figure:
        figure.set_facecolor("white")
        yield figure
        write_whole(path, lambda sink: figure.savefig(sink, format="png", metadata={"Software": None}))


def as_svg(draw: Callable[[Figure], None], width: float, height: float, name: str, alt: str) -> str:
    """What `draw` draws, so many inches large, as an element of an HTML page that is as wide as it may be.

    What is black has the colour of the text there, what is white that of the page, `--page`, so that one picture does
    in a light and in a dark one. `name` keeps the elements of several pictures of one page apart.
    """
    import matplotlib

    content = io.StringIO()
    with _figure(width, height) as figure, matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        draw(figure)
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(content, format="svg", metadata=nothing, transparent=True)
    _, size, drawn = re.split(r"<svg[^>]* (viewBox=\"[^\"]*\")[^>]*>", content.getvalue(), maxsplit=1)
    drawn = re.sub(r" id=\"[a-z]+(?:[.\d]*_\d+)+\"", "", drawn)  # numbered groups, which nothing refers to
    drawn = re.sub(r"\n\s*", "\n", drawn).replace("#000000", "currentColor").replace("#ffffff", "var(--page)")
    return f'<svg {size} fill="currentColor" role="img" aria-label="{escape(alt)}">{drawn.rstrip()}'


def plain(text: str) -> str:
    """The text as matplotlib shows it as it is: no formula in it, and one line."""
    return "".join(c if c.isprintable() else " " for c in text).replace("$", r"\$")


@contextmanager
def _figure(width: float, height: float) -> Iterator[Figure]:
    import matplotlib.style
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.style.context(["default", {"axes.unicode_minus": False}]):
        figure = Figure(figsize=(width, height), dpi=100, layout="constrained")
        FigureCanvasAgg(figure)
        yield figure
