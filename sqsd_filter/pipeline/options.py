"""The options of a run beside its cut: how rows are scored, and how they are written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from sqsd_filter.corpus.row_formats import Columns
from sqsd_filter.errors import UsageError
from sqsd_filter.pipeline.publishing.hub import PushTo
from sqsd_filter.pipeline.selecting.policy import Policy
from sqsd_filter.pipeline.selecting.selection import ABOVE_REFERENCE, Cut
from sqsd_filter.pipeline.stage.engines import Engine
from sqsd_filter.pipeline.writing.one_file import FileForm
from sqsd_filter.pipeline.writing.writers import JSON_AS, SHARD_SIZE, Output, bytes_of, check_json_as
from sqsd_filter.scoring.scorer import SQSD, BatchedScorer, SQSDScorer

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict

    RowSource: TypeAlias = str | Path | Dataset | DatasetDict | IterableDataset | IterableDatasetDict
    Sources: TypeAlias = RowSource | Sequence[RowSource]


@dataclass(frozen=True)
class Scoring:
    """How rows are read and scored.

    pack: Name, folder or Hub id of the direction pack; ignored if there is a `scorer`.
    scorer: Scores the rows instead of `SQSDScorer(pack)`; `make_scorer` makes those of other methods.
    engine: Where the rows are scored; None for this process.
    columns: The columns with the conversation; None to detect the format.
    limit: Read the first `limit` rows only.
    streaming: Read files of the Hub at each pass instead of keeping them in its cache.
    score_store: Folder or URL of scores that several runs share.
    max_error_rate: Raise `RowErrorBudgetExceeded` if a larger share of the rows can't be scored.
    explain: For this many of the riskiest rows (at most 1,000), write to explained.json which layers, module types and
        answer tokens carry the risk. That file holds text of rows and is never published.
    """

    pack: str | Path = "smollm2-135m"
    scorer: BatchedScorer | None = None
    engine: Engine | None = None
    columns: Columns | None = None
    limit: int | None = None
    streaming: bool = False
    score_store: str | Path | None = None
    max_error_rate: str | float = 0.5
    explain: int | None = None

    def __post_init__(self) -> None:
        """Raise `UsageError` where the name of a thing is given for the thing."""
        for name, maker in (
            ("scorer", "make_scorer(...)"),
            ("engine", "choose_engine(...)"),
            ("columns", "Columns(...)"),
        ):
            value = getattr(self, name)
            if isinstance(value, str | Mapping):
                raise UsageError(f"{name} is {value!r}: give an object such as {maker} makes.")

    @cached_property
    def chosen_scorer(self) -> BatchedScorer:
        return self.scorer or SQSDScorer(self.pack)

    def of_cut(self, cut: Cut) -> Scoring:
        """The same with the scorer of the risk that the cut takes: one by reference rows takes `Pack.for_reference`."""
        scorer = self.chosen_scorer
        pack = scorer.pack.for_reference
        if cut.kind != ABOVE_REFERENCE or scorer.name != SQSD or pack is scorer.pack:
            return self
        return replace(self, scorer=scorer.with_pack(pack))


@dataclass(frozen=True)
class Writing:
    """How rows are written. Raises `UsageError` for values that make no sense.

    to: parquet, arrow, jsonl or json; None for what the name of the destination says, or parquet in a folder.
    shard_size: A file ends when it has about this size, as 500MB or a number of bytes. It does not cut a destination
        that is one file.
    with_scores: Add the scores to lines of jsonl and json; files of the other formats always hold them.
    rows_column: Add the column sqsd_row to kept rows, too: file and line of the row in the input.
    json_as: A column of parquet or arrow whose values have no common type holds json, which `datasets` decodes from
        version 4.7 on, or text.
    percentile: Add the column sqsd_percentile, the share (0 to 100) of the pack's benign reference rows with a lower
        risk.
    on_error: Rows that can't be scored go to errors (quarantine), are kept (keep), or fail the run (fail).
    push: A dataset repository of the Hub that gets the finished result.
    overwrite: Replace what the destination holds, once the new run is complete.
    """

    to: str | None = None
    shard_size: str | int = SHARD_SIZE
    with_scores: bool = False
    rows_column: bool = False
    json_as: str = JSON_AS[0]
    percentile: bool = False
    on_error: str = "quarantine"
    push: PushTo | None = None
    overwrite: bool = False

    def __post_init__(self) -> None:
        Policy.of(self.on_error, "100%")
        if self.to is not None:
            self.output(None)
        else:  # the destination's name will say the format, and what fits it
            check_json_as(self.json_as)
            if self.shard_size != SHARD_SIZE:  # to read it takes an import of seconds
                bytes_of(self.shard_size)

    def output(self, form: FileForm | None) -> Output:
        """How rows are written to a file of this form, or to a folder. Raises `UsageError`."""
        return Output.of(
            self.to,
            self.shard_size,
            self.with_scores,
            rows_column=self.rows_column,
            json_as=self.json_as,
            form=form,
        )
