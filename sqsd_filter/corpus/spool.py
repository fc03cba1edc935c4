"""A stream of `datasets`, read once into a file: all its rows must be seen before the first can be passed on."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa

from sqsd_filter.errors import InputError, SQSDError

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset
    from datasets.iterable_dataset import _BaseExamplesIterable

ROWS = 1000  # in memory at a time


def format_of(stream: IterableDataset) -> str | None:
    """The format of its rows, which has no public name."""
    formatting = stream._formatting  # noqa: SLF001  # see above
    return str(formatting.format_type) if formatting and formatting.format_type else None


def as_it_is(stream: IterableDataset) -> IterableDataset:
    """The stream with its values unchanged: in Arrow if its source is, else in plain rows. Images and audio stay
    encoded if the features name them."""
    plain = stream.decode(False) if stream.features else stream
    return plain.with_format("arrow" if _examples(stream).iter_arrow else None)


def with_types_of(stream: IterableDataset, part: IterableDataset) -> IterableDataset:
    """`part`, made from `as_it_is(stream)`, in the stream's format, with images and audio decoded as there."""
    part = part.with_format(None).cast(stream.features)
    pool = getattr(_examples(stream), "decoding_pool", None)  # `load_dataset` decodes remote files in threads
    if pool is not None:
        part = part.decode(num_threads=pool.max_workers)
    return part.with_format(format_of(stream))


def _examples(stream: IterableDataset) -> _BaseExamplesIterable:
    """The source of its rows, which has no public name."""
    return stream._ex_iterable  # noqa: SLF001  # see above


def stored(
    stream: IterableDataset, check: Callable[[list[str]], None] = lambda _: None, folder: Path | None = None
) -> Dataset:
    """The rows of a stream in a file in `folder`, or in the cache of `datasets` until this process ends.

    `check` gets the columns as soon as they are known, and may raise. Raises `InputError` if the values of a column
    have types that don't go together, `SQSDError` if the disk refuses.
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
    """Its rows in Arrow; types that `datasets` does not know are inferred from the values."""
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
    """Tables in Arrow files: a new file whenever the types must grow, because a column had only nulls before."""

    def __init__(self, folder: Path, schema: pa.Schema | None) -> None:
        """`schema` are the types, if they are known."""
        self._folder, self._schema, self._known = folder, schema, schema is not None
        self._paths: list[Path] = []
        self._writer: pa.RecordBatchStreamWriter | None = None

    def add(self, table: pa.Table) -> None:
        from datasets.table import table_cast

        try:
            table.validate(full=True)
        except pa.ArrowException as problem:
            raise InputError(
                f"The rows of the stream come from damaged files ({problem}): fetch them again."
            ) from problem
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
        """All rows in one file; None if there were neither rows nor types."""
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
    """The types that hold both, with the features that `datasets` attached to the known ones."""
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
            f"The rows of the stream have values in one column whose types don't go together ({problem}): give the "
            "columns' types by map(..., features=)."
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
