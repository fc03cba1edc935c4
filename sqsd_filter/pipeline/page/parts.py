"""What a page is made of: sections with plots and tables. Every room draws its own sections with these."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import UndefinedError

from sqsd_filter.errors import InputError
from sqsd_filter.pictures import as_svg

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTH, HEIGHT = 6.4, 4.0  # inches of a picture whose text is readable on a phone


@dataclass(frozen=True)
class Plot:
    """A picture of `width` × `height` inches. `name` is the name of its file, `alt` says what it shows."""

    name: str
    alt: str
    draw: Callable[[Figure], None]
    width: float = WIDTH
    height: float = HEIGHT

    @cached_property
    def svg(self) -> str:
        return as_svg(self.draw, self.width, self.height, self.name, self.alt)


@dataclass(frozen=True)
class Table:
    """A table; columns whose name begins with a colon hold numbers."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]

    @property
    def stacks(self) -> bool:
        """Is it too wide for a phone, where each row then becomes a list?"""
        texts = sum(not name.startswith(":") for name in self.head)
        return len(self.head) > 5 or (len(self.head) > 3 and texts > 1)


@dataclass(frozen=True)
class Section:
    """A heading, a highlighted warning, sentences, pictures and tables. A `folded` one shows its heading only, until
    the reader opens it; `hint` is what stands beside the heading."""

    id: str
    title: str
    words: Sequence[str] = ()
    warning: str = ""
    plots: Sequence[Plot] = ()
    tables: Sequence[Table] = ()
    folded: bool = False
    hint: str = ""

    def drawn(self) -> Section:
        """This section, with its plots drawn now: an error in them is then one of the data that they show."""
        for plot in self.plots:
            _ = plot.svg
        return self


@contextmanager
def read_left(path: Path, command: str) -> Iterator[Any]:
    """The JSON file that `command` left, for the body to look into.

    Raises `InputError` when the file can't be read, or when the body finds that it is not such a file.
    """
    try:
        with sensible(f"{path} is damaged, or not what '{command}' left", "make it again, or name another"):
            yield json.loads(path.read_text(encoding="utf-8"))
    except OSError as problem:
        raise InputError(f"{path} can't be read ({problem.strerror}): name what '{command}' left.") from problem


@contextmanager
def sensible(cause: str, fix: str) -> Iterator[None]:
    """Raise `InputError` where the body finds that JSON does not have the keys or types it should have."""
    try:
        yield
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, UndefinedError) as problem:
        why = f"it has no {problem}" if isinstance(problem, KeyError) else str(problem)
        raise InputError(f"{cause} ({why}): {fix}.") from problem
