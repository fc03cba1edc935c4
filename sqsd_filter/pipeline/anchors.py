"""The anchors: conversations that some scorers compare rows with, read in the same way as rows."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

from sqsd_filter.corpus.addresses import Opener, expand, peek
from sqsd_filter.corpus.conversation import BAD_JSON, Message, RowError
from sqsd_filter.corpus.row_formats import Columns
from sqsd_filter.corpus.sources import Corpus, Row
from sqsd_filter.errors import InputError


def read_anchors(source: str | Path) -> list[list[Message]]:
    """All conversations of a source, in order; the format of its rows is detected.

    Raises `InputError`, also for a single row that can't be read: these files are small and chosen by hand.
    """
    anchors: list[list[Message]] = []
    with closing(Opener()) as opener:
        sources = opener.open(expand([source]))
        try:
            form = Columns().choose(peek(sources))
        except InputError as problem:
            raise InputError(
                f"The format of the anchors in {source} is not known: give each as 'messages', or as 'prompt' and "
                "'completion'."
            ) from problem

        def visit(row: Row) -> None:
            try:
                if row.value is None:
                    raise RowError(BAD_JSON, row.problem)
                anchors.append(form.conversation(row.value))
            except RowError as problem:
                why = problem.detail or problem.status
                raise InputError(f"{row.file}, line {row.line}: {why}. Fix the row or leave it out.") from problem

        Corpus.scan(sources, visit=visit, columns=form.columns)
    return anchors
