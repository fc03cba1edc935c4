"""A stream of `datasets` read once into a file, where its rows are dear and all of them must be seen before the first
can go on.
"""

from __future__ import annotations

import atexit
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from sqsd_filter.errors import InputError, SQSDError

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

ROWS = 1000  # in memory at a time


def format_of(stream: IterableDataset) -> str | None:
    """The format that its rows come in. This and what it consists of can't be asked for by public names."""
    return stream._formatting and stream._formatting.format_type


def as_it_is(stream: IterableDataset) -> IterableDataset:
    """The stream with its values as they are: in Arrow where it consists of that, else in plain rows, whose images and
    audio are left encoded where they are known as such."""
    plain = stream.decode(False) if stream.features else stream
    return plain.with_format("arrow" if stream._ex_iterable.iter_arrow else None)


def with_types_of(stream: IterableDataset, part: IterableDataset) -> IterableDataset:
    """What was made of `as_it_is`, in the stream's format, its images and audio decoded as the stream does it."""
    part = part.with_format(None).cast(stream.features)
    pool = getattr(stream._ex_iterable, "decoding_pool", None)  # `load_dataset` decodes what is remote in threads
    if pool is not None:
        part = part.decode(num_threads=pool.max_workers)
    return part.with_format(format_of(stream))


def stored(
    stream: IterableDataset, check: Callable[[list[str]], None] = lambda _: None, folder: Path | None = None
) -> Dataset:
    """The rows of a stream in a file in `folder`, or in the cache of `datasets` until this process ends.

    `check` is told the columns as soon as they are known, and may raise. Raises `InputError` where the values of a
    column have types that don't go together, `SQSDError` where the disk refuses.
    """
    from datasets import Dataset, config

    features, cache = stream.features, Path(folder or config.HF_DATASETS_CACHE)
    with _disk(cache):
        cache.mkdir(parents=True, exist_ok=True)
        if folder is None:
            folder = Path(tempfile.mkdtemp(prefix="sqsd-select-", dir=cache))
            atexit.register(shutil.rmtree, folder, ignore_errors=True)
    files = _Files(folder, features and features.arrow_schema)
    for table in _tables(stream):
        check(table.column_names)
        with _disk(cache):
            files.add(table)
    with _disk(cache):
        files.close()
        path = files.joined()
    return Dataset.from_file(str(path)) if path else Dataset.from_dict({})


def _tables(stream: IterableDataset) -> Iterator[pa.Table]:
    """Its rows in Arrow; where `datasets` does not know their types, these are told by their values."""
    from datasets import Dataset

    plain, features = as_it_is(stream), stream.features
    if format_of(plain):
        yield from plain.iter(ROWS)
        return
    rows = iter(plain)
    while some := list(islice(rows, ROWS)):
        names = features or dict.fromkeys(name for row in some for name in row)
        with _types():
            columns = {name: [row.get(name) for row in some] for name in names}
            dataset = Dataset.from_dict(columns, features=features)
        yield dataset.with_format("arrow")[:].cast(dataset.features.arrow_schema)


class _Files:
    """Tables in Arrow files: a new one whenever the types must grow, because a column had only nulls before."""

    def __init__(self, folder: Path, schema: pa.Schema | None) -> None:
        """`schema` are the types, where they are known."""
        self._folder, self._schema, self._known = folder, schema, schema is not None
        self._paths: list[Path] = []
        self._writer: Any = None

    def add(self, table: pa.Table) -> None:
        from datasets.table import table_cast

        with _types():
            schema = self._schema if self._known else _union(self._schema, table.schema)
            table = table_cast(table, schema)
        if self._writer is None or schema != self._schema:
            self.close()
            self._schema = schema
            self._paths.append(self._folder / f"{len(self._paths)}.arrow")
            self._writer = pa.ipc.new_stream(str(self._paths[-1]), schema)
        self._writer.write_table(table)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()

    def joined(self) -> Path | None:
        """All rows in one file; None where there were neither rows nor types."""
        if self._schema is None:
            return None
        if len(self._paths) == 1:
            return self._paths[0]
        whole = _Files(self._folder / "all", self._schema)
        whole._folder.mkdir()
        whole.add(self._schema.empty_table())
        for path in self._paths:
            with pa.memory_map(str(path)) as file, pa.ipc.open_stream(file) as batches:
                for batch in batches:
                    whole.add(pa.Table.from_batches([batch]))
            path.unlink()
        whole.close()
        return whole._paths[0]


def _union(known: pa.Schema | None, new: pa.Schema) -> pa.Schema:
    """The types that hold both, with the features that `datasets` put beside the known ones."""
    from datasets import Features

    if known is None:
        return Features.from_arrow_schema(new).arrow_schema
    both = pa.unify_schemas([known, new], promote_options="permissive")
    return Features.from_arrow_schema(both.with_metadata(known.metadata)).arrow_schema


@contextmanager
def _types() -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OverflowError, TypeError) as problem:
        raise InputError(
            f"The rows of the stream have values in one column whose types don't go together ({problem}): name the "
            "columns' types in map(..., features=)."
        ) from problem


@contextmanager
def _disk(cache: Path) -> Iterator[None]:
    try:
        yield
    except OSError as problem:
        raise SQSDError(
            f"The rows of the stream can't be stored in {cache} ({problem}): make room there, or set HF_DATASETS_CACHE "
            "to another folder."
        ) from problem
