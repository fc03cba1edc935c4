"""One scan of a run's inputs, and the scores of their rows: known scores are looked up, an engine computes the rest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path

import numpy as np

from sqsd_filter.corpus.addresses import Source, peek
from sqsd_filter.corpus.long_rows import LONGEST_ROW, longest_row
from sqsd_filter.corpus.row_formats import Columns, RowFormat
from sqsd_filter.corpus.row_reading import LABELS
from sqsd_filter.corpus.sources import Corpus, InputFile, Row
from sqsd_filter.corpus.unread import COLUMNS, Unread
from sqsd_filter.errors import InputError, SQSDError
from sqsd_filter.pipeline.scores.keys import KEYS
from sqsd_filter.pipeline.scores.scored import Scored, from_store
from sqsd_filter.pipeline.scores.sharing import Sharing
from sqsd_filter.pipeline.scores.store import ScoreStore
from sqsd_filter.pipeline.selecting.groups import GroupIndex, Groups
from sqsd_filter.pipeline.stage.engines import Engine
from sqsd_filter.pipeline.stage.shards import Index, plan
from sqsd_filter.progress import Progress
from sqsd_filter.scoring.scorer import BatchedScorer
from sqsd_filter.storage.folder import Folder


class Scan:
    """The inputs after one scan: rows counted, keyed and grouped, files hashed, the row format chosen."""

    def __init__(
        self,
        sources: Sequence[Source],
        columns: Columns,
        limit: int | None,
        progress: Progress,
        per_group: str | None = None,
    ) -> None:
        self.specs = [source.spec for source in sources if source.spec is not None]
        self.form = columns.choose(peek(sources))
        self.limit, self.progress = limit, progress
        progress.note(f"reading rows as {self.form}")
        if self.form.label is not None and self.form.labels != LABELS[-1]:
            progress.note(
                f"scoring the rows whose '{self.form.label}' is {self.form.labels}; choose others with --labels"
            )
        progress.start("reading", None)
        self.index, self.unread = Index(self.form), Unread(self.form, columns.strict)
        self.corpus, self.groups = read_once(
            sources, self._visit, [*self.form.columns, *COLUMNS], per_group, progress, limit=limit, form=self.form
        )
        progress.finish()
        for note in [*self.unread.notes(), *_blank(self.corpus.inputs)]:
            progress.note(note)

    def _visit(self, row: Row) -> None:
        self.index.visit(row)
        if row.value is not None:
            self.unread.see(row.value, row.file, row.line)

    def identity(self) -> dict[str, object]:
        known = {
            "sources": self.specs,
            "inputs": self.corpus.inputs,
            "row_format": self.form.facts,
            "limit": self.limit,
        }
        longest = longest_row()
        return known if longest == LONGEST_ROW else {**known, "longest_row": longest}

    def score(
        self,
        home: Path,
        scorer: BatchedScorer,
        engine: Engine,
        *,
        old_home: Path | None = None,
        shared: Folder | None = None,
    ) -> Scored:
        """Score, shard by shard, the rows without a score in `home`, its predecessor or the shared store; join all."""

        def store_in(where: Folder | Path) -> ScoreStore:
            return ScoreStore(where, scorer.settings(), scorer.values)

        self.progress.start("lookup", None)
        store, all_of = store_in(home / "scores"), self.index.conversations
        if old_home is not None:
            store.adopt(all_of.keys, store_in(old_home / "scores"))
        sharing = Sharing(store, store_in(shared) if shared is not None else None)
        settled = sharing.exchange(all_of.keys)
        wanted = np.sort(all_of.first[~settled])
        self.progress.start("scoring", len(wanted))
        shards = list(plan(self.corpus.n_rows, wanted))
        done = engine.score(self.corpus, self.form, scorer, shards, self.progress)
        with sharing, closing(done):
            for shard, keys, scores in done:
                if not np.array_equal(np.array(keys, dtype=KEYS), self.index.keys[shard.wanted]):
                    self.corpus.check()
                    raise SQSDError(f"The engine returned other rows than those of {shard.name}: report this as a bug.")
                store.append(shard.name, keys, scores)
                sharing.add(self.index.keys[shard.wanted])
        return from_store(self.corpus, self.index, store, scorer.weights, self.groups, scorer.modules)


def read_once(
    sources: Sequence[Source],
    visit: Callable[[Row], None],
    columns: Sequence[str],
    per_group: str | None,
    progress: Progress,
    *,
    limit: int | None = None,
    form: RowFormat | None = None,
) -> tuple[Corpus, Groups | None]:
    """Give every row of the inputs to `visit`, which needs these `columns`, and note its group.

    Raises `InputError` if there are no rows, or no groups.
    """
    grouping = GroupIndex(per_group)

    def see(row: Row) -> None:
        visit(row)
        grouping.visit(row)
        progress.advance(1)

    corpus = Corpus.scan(sources, limit=limit, visit=see, columns=[*columns, *grouping.columns], form=form)
    if corpus.n_rows == 0:
        raise InputError("The input has no rows.")
    return corpus, grouping.groups(corpus.schema.names)


def _blank(inputs: Sequence[InputFile]) -> list[str]:
    """A sentence about lines that are no rows, if there are any."""
    blank = {given["path"]: lines for given in inputs if (lines := given.get("blank_lines", 0))}
    return [f"{sum(blank.values())} blank lines are no rows (the first are in {next(iter(blank))})"] if blank else []


def as_list(sources: object) -> list[object]:
    """One source or several, as a list."""
    return list(sources) if isinstance(sources, list | tuple) else [sources]
