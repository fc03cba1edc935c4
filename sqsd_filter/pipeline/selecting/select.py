"""`select`: a scored dataset of the `datasets` library, stored or streamed, cut into kept, dropped and errors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sqsd_filter.corpus.conversation import SCORED
from sqsd_filter.corpus.spool import as_it_is, format_of, stored, with_types_of
from sqsd_filter.errors import InputError, UsageError
from sqsd_filter.pipeline.meaning import Meaning
from sqsd_filter.pipeline.selecting.selection import ABOVE_REFERENCE, DROPPED, ERROR, KEPT, Cut, cut_rows
from sqsd_filter.scoring.pack import OWN_RISK, load_pack

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict

D = TypeVar("D", "Dataset", "DatasetDict", "IterableDataset", "IterableDatasetDict")
Columns: TypeAlias = tuple[str, str]  # of the risk and of the status
FATES = (KEPT, DROPPED, ERROR)


def select(
    dataset: D,
    *,
    drop_top: str | float | None = None,
    drop_count: int | None = None,
    max_risk: float | None = None,
    keep_lowest: int | None = None,
    above_reference: str | float | None = None,
    pack: str | Path | None = None,
    risk: str | None = None,
    together: bool = False,
) -> tuple[D, D, D]:
    """Cut a scored dataset of any kind into (kept, dropped, errors) of that kind, each in row order.

    >>> from datasets import Dataset
    >>> scored = Dataset.from_dict({"sqsd_risk": [0.2, 0.9, None], "sqsd_status": ["scored", "scored", "no_answer"]})
    >>> kept, dropped, errors = select(scored, drop_top="50%")
    >>> kept["sqsd_risk"][:], dropped["sqsd_risk"][:], errors["sqsd_status"][:]
    ([0.2], [0.9], ['no_answer'])

    Each split of a dict is cut on its own, or all of them `together` at one risk. `above_reference` drops the rows that
    are riskier than this share of the benign reference rows of `pack`, the pack that gave the scores. `risk` names the
    column sqsd_<risk> to cut by, that of a linear probe beside the pack's own risk; the default is sqsd_risk, or with
    `above_reference` the risk at which the pack makes such a cut. A stream that is cut so or at `max_risk` stays a
    stream, which each of the three parts reads again. Any other cut depends on all risks: then the stream is read here,
    once, into a file in the cache of `datasets`, which is deleted when this process ends.

    Raises `InputError` where the score columns are missing or hold no scores, and `UsageError` unless exactly one valid
    cut is given.
    """
    cut = Cut.of(drop_top, drop_count, max_risk, keep_lowest, above_reference)
    if cut.kind == ABOVE_REFERENCE:
        cut, risk = _placed(cut, pack, risk)
    columns = ("sqsd_risk" if risk in (None, OWN_RISK) else f"sqsd_{risk}", "sqsd_status")
    if not isinstance(dataset, dict):
        return _cut([dataset], cut, columns)[0]
    splits: list[Any] = list(dataset.values())
    parts = _cut(splits, cut, columns) if together else [_cut([split], cut, columns)[0] for split in splits]
    kept, dropped, errors = (
        type(dataset)({name: part[fate] for name, part in zip(dataset, parts, strict=True)}) for fate in FATES
    )
    return kept, dropped, errors


def _placed(cut: Cut, pack: str | Path | None, risk: str | None) -> tuple[Cut, str | None]:
    """The cut by the pack's reference with its threshold, and the risk that it takes. Raises `UsageError`."""
    if pack is None:
        return Meaning.of_scores(None, None, None).place(cut), risk
    known = load_pack(pack)
    chosen = known.for_reference if risk is None else known.with_risk(risk)
    return Meaning.of_pack(chosen).place(cut), chosen.risk


def _cut(splits: Sequence[Any], cut: Cut, columns: Columns) -> list[tuple[Any, Any, Any]]:
    """The three parts of each split, one cut through all of them."""
    from datasets import Dataset, IterableDataset

    for split in splits:
        if not isinstance(split, Dataset | IterableDataset):
            raise UsageError(f"select cuts what datasets has loaded, not {type(split).__name__}.")
    if cut.limit is not None and all(isinstance(split, IterableDataset) for split in splits):
        return [_cut_stream(split, cut, columns) for split in splits]  # a row's fate depends on no other row
    check = partial(_check, columns)
    tables = [stored(split, check) if isinstance(split, IterableDataset) else split for split in splits]
    risks = [_risks_of(table, columns) for table in tables]
    fates = cut_rows(
        np.concatenate([np.zeros(0), *(risk for risk, _ in risks)]),
        np.concatenate([np.zeros(0, dtype=bool), *(scored for _, scored in risks)]),
        cut,
    ).fate
    parts, start = [], 0
    for split, table in zip(splits, tables, strict=True):
        own = fates[start : start + len(table)]
        kept, dropped, errors = (table.select(np.flatnonzero(own == fate)) for fate in FATES)
        if table is not split:
            kept, dropped, errors = (_streamed(part, format_of(split)) for part in (kept, dropped, errors))
        parts.append((kept, dropped, errors))
        start += len(table)
    return parts


def _cut_stream(stream: IterableDataset, cut: Cut, columns: Columns) -> tuple[Any, Any, Any]:
    """The parts of a stream as streams."""
    bare = as_it_is(stream).cast(None)  # with types, `filter` would encode and decode values, and round tensors' risks
    parts = [bare.filter(partial(_have_fate, fate, cut, columns), batched=True) for fate in FATES]
    kept, dropped, errors = (with_types_of(stream, part) for part in parts)
    return kept, dropped, errors


def _have_fate(fate: int, cut: Cut, columns: Columns, batch: pa.Table | Mapping[str, list[Any]]) -> list[bool]:
    _check(columns, batch.column_names if isinstance(batch, pa.Table) else batch)
    mask: list[bool] = (cut_rows(*_risks(batch, columns), cut).fate == fate).tolist()
    return mask


def _streamed(part: Dataset, form: str | None) -> IterableDataset:
    return part.to_iterable_dataset(num_shards=min(1, len(part))).with_format(form)  # a shard can't be empty


def _risks_of(dataset: Dataset, columns: Columns) -> tuple[np.ndarray, np.ndarray]:
    if not len(dataset):  # `map` adds no columns to an empty dataset
        return np.zeros(0), np.zeros(0, dtype=bool)
    _check(columns, dataset.column_names)
    return _risks(dataset.select_columns(list(columns)).with_format("arrow")[:], columns)


def _risks(rows: pa.Table | Mapping[str, list[Any]], columns: Columns) -> tuple[np.ndarray, np.ndarray]:
    """The risk of each row (n,) float64, and whether it has one (n,) bool. Raises `InputError`."""
    try:
        risks, statuses = (pa.table({name: rows[name]})[name] for name in columns)
        risk = risks.cast(pa.float64()).to_numpy()
        scored = pc.equal(statuses.cast(pa.string()), SCORED).fill_null(False)
    except pa.ArrowException as problem:
        raise InputError(
            f"{' and '.join(columns)} hold no scores ({problem}): remove these columns and score with SQSDScorer."
        ) from problem
    return risk, scored.to_numpy() & np.isfinite(risk)


def _check(columns: Columns, names: Iterable[str]) -> None:
    if missing := [name for name in columns if name not in names]:
        raise InputError(f"The dataset has no column {' and no '.join(missing)}: score it first with SQSDScorer.")
