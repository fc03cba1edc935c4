"""The two outputs of a run: rows that were cut, in a folder or a file, or all rows with their scores, in one file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from sqsd_filter.corpus.sources import Corpus
from sqsd_filter.errors import UsageError
from sqsd_filter.pipeline.meaning import Meaning
from sqsd_filter.pipeline.page.notes import Notes, NoteTaker, length_figures
from sqsd_filter.pipeline.report import Explained, OutputFacts, RunContent
from sqsd_filter.pipeline.scores.scored import Scored
from sqsd_filter.pipeline.selecting.groups import by_split
from sqsd_filter.pipeline.selecting.policy import Policy
from sqsd_filter.pipeline.selecting.selection import Cut, cut_rows
from sqsd_filter.pipeline.summary import summarise
from sqsd_filter.pipeline.writing.card import CARD_FILE, PICTURE_FILE
from sqsd_filter.pipeline.writing.export import check_columns, check_scorable_columns, export_scored, export_splits
from sqsd_filter.pipeline.writing.writers import Output
from sqsd_filter.progress import Progress
from sqsd_filter.storage.layout import Layout


class Export(Protocol):
    """Writes scored rows."""

    @property
    def per_group(self) -> str | None:
        """The column whose groups are cut apart."""

    def identity(self) -> dict[str, object]:
        """The settings that make it another run."""

    def check(self, corpus: Corpus) -> None:
        """Raise `InputError` for a column that can't be written, `UsageError` for splits that don't fit in a file."""

    def write(self, scored: Scored, layout: Layout, progress: Progress) -> tuple[RunContent, Notes]:
        """Write the rows; what report and page say of them. Raises `RowErrorBudgetExceeded`."""


@dataclass(frozen=True)
class CutRows:
    """Kept, dropped and error rows in a folder, or with `in_file` the kept ones in a file and the others beside it."""

    cut: Cut
    policy: Policy
    output: Output
    meaning: Meaning
    percentile: bool
    in_file: bool = False

    @property
    def per_group(self) -> str | None:
        return self.cut.per_group

    def identity(self) -> dict[str, object]:
        own = {"cut": str(self.cut), "on_error": self.policy.on_error, **self.output.identity()}
        return own | self.meaning.identity(self.cut, percentile=self.percentile)

    def check(self, corpus: Corpus) -> None:
        if self.in_file and len(corpus.splits) > 1:
            raise UsageError(
                f"The rows have the splits {', '.join(corpus.splits)}, which one file can't keep apart: name a folder "
                "as destination, or read one split, as SRC:SPLIT."
            )
        check_columns(corpus, self.output)

    def write(self, scored: Scored, layout: Layout, progress: Progress) -> tuple[RunContent, Notes]:
        self.policy.check(scored)
        splits = by_split(scored.corpus.parts) if self.cut.per_split else None
        selection = self.policy.apply(scored, cut_rows(scored.risk, scored.scored, self.cut, splits, scored.groups))
        progress.start("writing", scored.corpus.n_rows)
        taker = NoteTaker(scored, selection, self.meaning)
        percentile = self.meaning.percentiles(scored.risk) if self.percentile else None
        written = export_splits(scored, selection, layout, self.output, progress, taker.see, percentile=percentile)
        written["extra_files"] += [layout.own(PICTURE_FILE), CARD_FILE]  # the job writes them, from the whole report
        output = self.output
        facts = OutputFacts(to=output.to, shard_size=output.shard_size, with_scores=output.with_scores)
        if output.rows_column:
            facts["rows_column"] = True
        content: RunContent = {
            **summarise(scored, selection, self.cut, self.meaning),
            **_facts(facts, percentile),
            **written,
            **Explained(),
        }
        return _noted(content, taker)


@dataclass(frozen=True)
class AllRows:
    """All rows with their scores in one parquet file."""

    policy: Policy
    meaning: Meaning
    percentile: bool
    per_group: None = None

    def identity(self) -> dict[str, object]:
        return self.meaning.identity(None, percentile=self.percentile)

    def check(self, corpus: Corpus) -> None:
        check_scorable_columns(corpus)

    def write(self, scored: Scored, layout: Layout, progress: Progress) -> tuple[RunContent, Notes]:
        self.policy.check(scored)
        progress.start("writing", scored.corpus.n_rows)
        taker = NoteTaker(scored, None, self.meaning)
        percentile = self.meaning.percentiles(scored.risk) if self.percentile else None
        written = export_scored(scored, layout, progress, taker.see, percentile=percentile)
        content: RunContent = {
            **summarise(scored, None, None, self.meaning),
            **_facts(OutputFacts(to="parquet"), percentile),
            **written,
            **Explained(),
        }
        return _noted(content, taker)


def _noted(content: RunContent, taker: NoteTaker) -> tuple[RunContent, Notes]:
    """The content with what the notes say of lengths, for the card, and the notes."""
    notes = taker.notes(content)
    if (length := length_figures(notes)) is not None:
        content["length"] = length
    return content, notes


def _facts(output: OutputFacts, percentile: np.ndarray | None) -> OutputFacts:
    """The facts on the output, with the column of percentiles if there is one."""
    return output if percentile is None else {**output, "percentile": True}
