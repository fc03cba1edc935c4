"""One step of `datasets`' `map` or Ray Data's `map_batches`: a batch of rows in, their score columns out.

Only the columns that the row format names are read: images, audio or JSON in other columns are never decoded.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator, Mapping
from itertools import chain, islice
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import pyarrow as pa

from sqsd_filter.corpus.conversation import MEDIA, Message, RowError, is_turn
from sqsd_filter.corpus.json_schema import Shape, to_table, without_nulls
from sqsd_filter.corpus.spool import as_it_is
from sqsd_filter.corpus.table_formats import DatasetTable
from sqsd_filter.errors import UsageError

if TYPE_CHECKING:
    import pandas

    from sqsd_filter.corpus.row_formats import RowFormat
    from sqsd_filter.scoring.results import Scores

# The forms in which `datasets` and Ray Data hand over a batch: columns by name, an Arrow table, a data frame.
BatchData: TypeAlias = "Mapping[str, Any] | pa.Table | pandas.DataFrame"
Column = Any  # a list, an array, a tensor, an Arrow column, a series; or one value, where a single row came as a batch


class Batch:
    """The rows of a batch in any of its forms. A column is read once, when it is first used."""

    def __init__(self, given: BatchData) -> None:
        """Raises `UsageError` for anything but a batch."""
        self._given = given
        self._columns: dict[str, list[Any]] = {}
        if isinstance(given, pa.Table):
            self.names = given.column_names
        elif _is_lazy_row(given):
            raise _single_row()
        elif isinstance(given, Mapping) or _is_frame(given):
            self.names = list(given.keys())
        else:
            raise UsageError(
                f"SQSDScorer takes batches of rows with named columns, not {type(given).__name__}: call map with "
                "batched=True, without input_columns, in one of the formats None, arrow, numpy, pandas and torch."
            )
        # A batch of `datasets` keeps each value that was read and encodes it again. So values are read from a copy.
        self._source = copy.copy(given) if isinstance(given, Mapping) else given

    def column(self, name: str) -> list[Any]:
        """One value per row. Raises `UsageError` where the batch turns out to be a single row."""
        if name not in self._columns:
            stored = getattr(self._source, "pa_table", self._source)
            whole = isinstance(stored, pa.Table)
            # whether there is an image is known without decoding it
            values = stored[name].to_pylist() if whole and name in MEDIA else self._read(self._source[name])
            first = next((v for v in values if v is not None), None) if isinstance(values, list) else values
            if not isinstance(values, list) or (is_turn(first) and self._may_be_a_row()):
                raise _single_row()
            self._columns[name] = values
        return self._columns[name]

    def _may_be_a_row(self) -> bool:
        """Could this be a single row? Some column is not a list, lengths differ, or there is only one column."""
        if not isinstance(self._source, Mapping) or hasattr(self._source, "pa_table"):
            return False
        lengths = {_length(values) for values in self._source.values()}
        return len(lengths) > 1 or None in lengths or len(self.names) == 1

    def _read(self, values: Column) -> Column:
        if isinstance(self._source, pa.Table):
            if _of_objects(values.type):
                return _plain(values.to_pylist())
            from datasets import Features

            schema = pa.schema([pa.field("", values.type)])
            return Features.from_arrow_schema(schema).decode_column(values.to_pylist(), "")
        if _is_frame(self._source):
            return [None if gone else _plain(value) for value, gone in zip(values, values.isna(), strict=True)]
        return _plain(values)

    def __iter__(self) -> Iterator[Mapping[str, object]]:
        return (_Row(self, k) for k in range(self._count()))

    def _count(self) -> int:
        known = getattr(self._source, "pa_table", self._source)  # `datasets` would decode a column to count it
        if isinstance(known, pa.Table) or _is_frame(known):
            return len(known)
        if not self.names:
            return 0
        length = _length(known[self.names[0]])
        if length is None:
            raise _single_row()
        return length

    def conversations(self, form: RowFormat) -> tuple[list[list[Message]], dict[int, str]]:
        """The conversation of each row, which is empty where there is none, and by row number the reasons for that."""
        turns: list[list[Message]] = []
        reasons: dict[int, str] = {}
        for k, row in enumerate(self):
            try:
                turns.append(form.conversation(row))
            except RowError as problem:
                reasons[k] = problem.status
                turns.append([])
        return turns, reasons

    def with_scores(self, scores: Scores) -> BatchData:
        """The batch to return.

        `datasets` gets only the new columns, so that it leaves the others unchanged, but a whole table or data frame.
        Ray Data always gets the whole batch.
        """
        columns = scores.columns()
        if isinstance(self._given, pa.Table):
            table = self._given
            for name, values in columns.items():
                table = table.drop_columns(name) if name in table.column_names else table
                kind = pa.float64() if isinstance(values, np.ndarray) else pa.string()
                table = table.append_column(name, pa.array(values, kind, from_pandas=True))
            return table
        if _is_frame(self._given):
            from pandas import Series

            # of objects: the text type of pandas would be a large_string in Arrow
            frame: pandas.DataFrame = self._given
            status = Series(columns["sqsd_status"], index=frame.index, dtype=object)
            return _writable(frame.assign(**columns | {"sqsd_status": status}))
        if _from_ray(self._given):
            return {**self._given, **columns}
        return {name: _Floats(v) if isinstance(v, np.ndarray) else v for name, v in columns.items()}


def sample_of(dataset: object, rows: int = 1000) -> Iterator[Mapping[str, object]]:
    """The first rows of what `datasets` has loaded; of each split, if it has several. Raises `UsageError`."""
    from datasets import Dataset, IterableDataset

    if isinstance(dataset, Dataset):
        yield from DatasetTable("the dataset", dataset).glimpse(rows)
    elif isinstance(dataset, IterableDataset):
        yield from chain.from_iterable(Batch(batch) for batch in islice(as_it_is(dataset).iter(rows), 1))
    elif isinstance(dataset, dict):
        for split in dataset.values():
            yield from sample_of(split, rows)
    else:
        raise UsageError(f"A format is decided over what datasets has loaded, not over {type(dataset).__name__}.")


def _of_objects(kind: pa.DataType) -> bool:
    """Does the type hold any Python objects, as Ray Data has them where Arrow has no type for all values?"""
    return "PythonObject" in type(kind).__name__


def _writable(frame: pandas.DataFrame) -> pandas.DataFrame | pa.Table:
    """The data frame, or a table in its place where `datasets` could not write it: values that have no common type in
    Arrow are JSON there."""
    try:
        pa.Table.from_pandas(frame)
    except pa.ArrowException:
        shapes = {str(name): Shape() for name in frame.columns}
        columns = {name: Batch(frame).column(name) for name in shapes}
        for name, shape in shapes.items():
            for value in columns[name]:
                shape.see(value)
        schema = pa.schema([without_nulls(shape.field(name)) for name, shape in shapes.items()])
        rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        return to_table(rows, schema)
    return frame


class _Row(Mapping[str, object]):
    """Row k of a batch."""

    def __init__(self, batch: Batch, k: int) -> None:
        self._batch, self._k = batch, k

    def __getitem__(self, name: str) -> object:
        if name not in self._batch.names:
            raise KeyError(name)
        return self._batch.column(name)[self._k]

    def __iter__(self) -> Iterator[str]:
        return iter(self._batch.names)

    def __len__(self) -> int:
        return len(self._batch.names)


class _Floats(list[float | None]):
    """Floats, None for NaN, which become an Arrow column of floats even where all of them are None."""

    def __init__(self, values: np.ndarray) -> None:
        super().__init__(None if np.isnan(v) else v for v in values.tolist())

    def __arrow_array__(self, type: pa.DataType | None = None) -> pa.Array:
        return pa.array(list(self), type or pa.float64())


def _single_row() -> UsageError:
    return UsageError("SQSDScorer takes batches of rows, and this is a single row: call map with batched=True.")


def _length(values: Column) -> int | None:
    """The number of values of a column; None where it is a single value."""
    try:
        return None if isinstance(values, str | bytes | Mapping) else len(values)
    except TypeError:  # a number, say, or an array of one
        return None


def _plain(value: Column) -> Column:
    """The value with lists in place of arrays and tensors, at every level."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value


def _is_lazy_row(batch: object) -> bool:
    datasets = sys.modules.get("datasets.formatting.formatting")
    return datasets is not None and isinstance(batch, datasets.LazyRow)


def _is_frame(batch: object) -> bool:
    pandas = sys.modules.get("pandas")
    return pandas is not None and isinstance(batch, pandas.DataFrame)


def _from_ray(batch: Mapping[str, Any]) -> bool:
    """Did Ray Data make this batch? `datasets` may also give arrays, but hardly in a Ray task."""
    ray = sys.modules.get("ray")
    return (
        ray is not None
        and ray.is_initialized()
        and ray.get_runtime_context().worker.mode == ray.WORKER_MODE
        and isinstance(batch, dict)
        and all(isinstance(values, np.ndarray) for values in batch.values())
    )
