"""Pictures as PNG files and as SVG in a page: the same drawing gives the same bytes, whatever the user's own style."""

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

BLUE, ORANGE, PINK = "#0072b2", "#d55e00", "#cc79a7"  # these can be distinguished with any colour vision
COLOURS = (ORANGE, BLUE, "#009e73", PINK, "#e69f00", "#56b4e9")
_ON_PAGE = {"#000000": "currentColor", "#ffffff": "var(--page)", BLUE: "var(--blue)", ORANGE: "var(--orange)"}
MARKERS = "os^Dv*"


@contextmanager
def picture(path: Path, width: float, height: float) -> Iterator[Figure]:
    """A figure to draw on, `width` × `height` inches at 100 pixels per inch; it is written to `path` afterwards."""
    with _figure(width, height) as figure:
        figure.set_facecolor("white")
        yield figure
        write_whole(path, lambda sink: figure.savefig(sink, format="png", metadata={"Software": None}))


def as_svg(draw: Callable[[Figure], None], width: float, height: float, name: str, alt: str) -> str:
    """The SVG element, for an HTML page, of what `draw` draws on a figure of `width` × `height` inches.

    It scales to the width of its container. Black becomes the colour of the page's text, white that of the page, and
    blue and orange those that the page has for them (`--page`, `--blue`, `--orange`), so that one picture serves a
    light and a dark page. `name` must differ between the pictures of a page.
    """
    import matplotlib

    content = io.StringIO()
    with _figure(width, height) as figure, matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        draw(figure)
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(content, format="svg", metadata=nothing, transparent=True)
    _, size, drawn = re.split(r"<svg[^>]* (viewBox=\"[^\"]*\")[^>]*>", content.getvalue(), maxsplit=1)
    drawn = re.sub(r" id=\"[a-z]+(?:[.\d]*_\d+)+\"", "", drawn)  # numbered groups, which nothing refers to
    drawn = re.sub(r"\n\s*", "\n", drawn)
    for colour, own in _ON_PAGE.items():
        drawn = drawn.replace(colour, own)
    return f'<svg {size} fill="currentColor" role="img" aria-label="{escape(alt)}">{drawn.rstrip()}'


def plain(text: str) -> str:
    """The text so that matplotlib shows it literally: without formulas, on one line."""
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
