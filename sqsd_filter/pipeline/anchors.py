"""The conversations that some scorers hold rows to, read as rows to be scored are."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

from sqsd_filter.corpus.addresses import Opener, expand, peek
from sqsd_filter.corpus.conversation import BAD_JSON, Message, RowError
from sqsd_filter.corpus.row_formats import Columns
from sqsd_filter.corpus.sources import Corpus, Row
from sqsd_filter.errors import InputError


def read_anchors(source: str | Path) -> list[list[Message]]:
    """All conversations of a source, in order; the form of its rows is detected.

    Raises `InputError`, for a row that can't be read, too: these files are small and chosen by hand.
    """
    found: list[list[Message]] = []
    with closing(Opener()) as opener:
        sources = opener.open(expand([source]))
        try:
            form = Columns().choose(peek(sources))
        except InputError as problem:
            raise InputError(
                f"It can't be told how the anchors in {source} are to be read: give each as 'messages', or as 'prompt' "
                "and 'completion'."
            ) from problem

        def visit(row: Row) -> None:
            try:
                if row.value is None:
                    raise RowError(BAD_JSON, row.problem)
                found.append(form.conversation(row.value))
            except RowError as problem:
                why = problem.detail or problem.status
                raise InputError(f"{row.file}, line {row.line}: {why}. Mend the row or leave it out.") from problem

        Corpus.scan(sources, visit=visit, columns=form.columns)
    return found
