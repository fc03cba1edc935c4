"""Rows to measure a pack on: read, encoded, and checked to be enough."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass

import numpy as np

from sqsd_filter.corpus.addresses import Opener, Source, expand, peek
from sqsd_filter.corpus.conversation import Message, RowError
from sqsd_filter.corpus.row_formats import Columns, RowFormat
from sqsd_filter.corpus.sources import Corpus, Row
from sqsd_filter.errors import InputError, UsageError
from sqsd_filter.scoring.chat_encoder import Encoded, cut_answer
from sqsd_filter.scoring.scorer import SQSDScorer

FEWEST_ROWS = 8
TOO_SHORT = "too_short"  # the answer has fewer tokens than all answers are cut to
Conversations = Sequence[Sequence[Message] | RowError]


@dataclass(frozen=True)
class Sample:
    """Rows that are spread evenly over sources, and the format that they are read in."""

    rows: list[Row]
    form: RowFormat
    corpus: Corpus
    sources: Sequence[Source]

    @property
    def conversations(self) -> Conversations:
        return [self.form.parse(row.value, row.problem) for row in self.rows]


def read_sample(
    source: str,
    sample: int,
    columns: Columns | None = None,
    *,
    column: str | None = None,
    limit: int | None = None,
    streaming: bool = False,
) -> Sample:
    """`sample` rows spread evenly over the source, or over its first `limit` rows, with a further `column`.

    Raises `InputError` if the source can't be read, `UsageError` if it lacks the column.
    """
    with closing(Opener(streaming=streaming)) as opener:
        sources = opener.open(expand([source]))
        form = (columns or Columns()).choose(peek(sources))
        corpus = Corpus.scan(sources, form=form, limit=limit)
        if column is not None and column not in corpus.schema.names:
            raise UsageError(f"--positive names '{column}', but {source} has {', '.join(corpus.schema.names)}.")
        wanted = set(np.linspace(0, corpus.n_rows - 1, min(sample, corpus.n_rows)).astype(int).tolist())
        rows = [row for row in corpus.read(0, corpus.n_rows) if row.index in wanted]
    return Sample(rows, form, corpus, sources)


def read_rows(source: str, sample: int, positive: str | None) -> tuple[Conversations, list[bool] | None]:
    """The conversations of `sample` rows spread evenly over the source, and which of them are positive.

    `positive` is COLUMN=VALUE, or None for no marks. Raises `UsageError` if it is neither, `InputError` if the source
    can't be read.
    """
    column, separator, value = (positive or "").partition("=")
    if positive is not None and not separator:
        raise UsageError(f"--positive must be COLUMN=VALUE, not '{positive}'.")
    sampled = read_sample(source, sample, column=None if positive is None else column)
    if positive is None:
        return sampled.conversations, None
    cells = [(row.value or {}).get(column) for row in sampled.rows]
    return sampled.conversations, [(cell if isinstance(cell, str) else json.dumps(cell)) == value for cell in cells]


def usable(
    scorer: SQSDScorer,
    conversations: Conversations,
    positive: Sequence[bool] | None = None,
    answer_tokens: int | None = None,
) -> tuple[dict[int, Encoded], Counter[str]]:
    """The rows that can be measured, by number, and the reasons of the others. No model is loaded.

    Raises `InputError` if fewer than `FEWEST_ROWS` are left, or if `positive` is true of all of them or of none.
    """
    reasons = Counter(row.status for row in conversations if isinstance(row, RowError))
    turns = {k: list(row) for k, row in enumerate(conversations) if not isinstance(row, RowError)}
    rows: dict[int, Encoded] = {}
    for k, row in zip(turns, scorer.encoder.encode(list(turns.values())), strict=True):
        if isinstance(row, RowError):
            reasons[row.status] += 1
        elif row.answer.sum() < (answer_tokens or 1):
            reasons[TOO_SHORT] += 1
        else:
            rows[k] = cut_answer(row, answer_tokens)
    check_rows(rows, conversations, positive, reasons)
    return rows, reasons


def check_rows(
    numbers: Collection[int], of: Conversations, positive: Sequence[bool] | None, reasons: Mapping[str, int]
) -> np.ndarray | None:
    """Which of the rows with these numbers are positive (n,), None without marks.

    Raises `InputError` if there are too few rows, or only rows of one kind.
    """
    if len(numbers) < FEWEST_ROWS:
        why = ", ".join(f"{count} {status}" for status, count in sorted(reasons.items()))
        raise InputError(
            f"Only {len(numbers)} of {len(of)} rows can be measured{f' ({why})' if why else ''}: give at least "
            f"{FEWEST_ROWS} usable rows, better 64."
        )
    if positive is None:
        return None
    marks_n = np.array([positive[k] for k in numbers])
    if marks_n.all() == marks_n.any():
        which = "All" if marks_n.all() else "None"
        raise InputError(f"{which} of the {len(marks_n)} rows are positive: give rows of both kinds.")
    return marks_n
