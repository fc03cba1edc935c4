"""Arrow's types that `datasets` reads or merges: views of text, and shards that differ harmlessly."""

from __future__ import annotations

from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sqsd_filter.errors import InputError
from tests.corpora import open_corpus
from tests.corpus.source_files import peek, values


def write_arrow(path: Path, **columns: pa.Array) -> str:
    table = pa.table(columns)
    with pa.ipc.new_file(path, table.schema) as file:
        file.write_table(table)
    return str(path)


def test_views_of_text_are_read_as_text(tmp_path: Path) -> None:
    nested = pa.array([[{"role": "user"}]], pa.list_(pa.struct([("role", pa.string_view())])))
    path = write_arrow(
        tmp_path / "a.arrow",
        q=pa.array(["é"], pa.string_view()),
        raw=pa.array([b"x"], pa.binary_view()),
        turns=nested,
    )
    corpus = open_corpus([path])
    assert corpus.schema.types == [pa.string(), pa.binary(), pa.list_(pa.struct([("role", pa.string())]))]
    assert values(corpus) == peek([path]) == [{"q": "é", "raw": b"x", "turns": [{"role": "user"}]}]
    assert [row.value for row in corpus.read(0, 1, ["q"])] == [{"q": "é"}]


@pytest.mark.parametrize("inside", [False, True])
def test_views_of_lists_are_refused_before_anything_is_scored(inside: bool, tmp_path: Path) -> None:
    views = pa.array([["x"]], pa.list_view(pa.string()))
    column = pa.StructArray.from_arrays([views], ["a"]) if inside else views
    with pytest.raises(InputError, match=r"Column 'turns' of .*a.arrow is of the type .*list_view.*cast it"):
        open_corpus([write_arrow(tmp_path / "a.arrow", turns=column)])


NOON = datetime(2024, 1, 1, 12, tzinfo=UTC)
PAIRS: dict[str, tuple[pa.Array, pa.Array, pa.DataType, list[Any]]] = {  # two shards, their type, and the values
    "dictionary": (
        pa.array(["a"]).dictionary_encode(),
        pa.array(["b"], pa.large_string()),
        pa.large_string(),
        ["a", "b"],
    ),
    "dictionaries": (
        pa.array(["a"], pa.dictionary(pa.int8(), pa.string())),
        pa.array(["b"], pa.dictionary(pa.int32(), pa.string())),
        pa.string(),
        ["a", "b"],
    ),
    "decimals": (
        pa.array([Decimal("1.25")], pa.decimal128(7, 2)),
        pa.array([Decimal("123.256")], pa.decimal128(8, 3)),
        pa.decimal128(8, 3),
        [Decimal("1.250"), Decimal("123.256")],
    ),
    "long-decimals": (
        pa.array([Decimal("0.5")], pa.decimal128(38, 30)),
        pa.array([Decimal(10**20)], pa.decimal128(30, 0)),
        pa.decimal256(60, 30),
        [Decimal("0.5"), Decimal(10**20)],
    ),
    "times": (
        pa.array([NOON], pa.timestamp("us", "UTC")),
        pa.array([NOON], pa.timestamp("ns", "UTC")),
        pa.timestamp("ns", "UTC"),
        [NOON, NOON],
    ),
}


@pytest.mark.parametrize(("one", "other", "kind", "expected"), PAIRS.values(), ids=PAIRS)
@pytest.mark.parametrize("turned", [False, True])
def test_shards_whose_types_differ_harmlessly_are_one_column(
    one: pa.Array, other: pa.Array, kind: pa.DataType, expected: list[Any], turned: bool, tmp_path: Path
) -> None:
    paths = [str(tmp_path / name) for name in ("a.parquet", "b.parquet")]
    for path, column in zip(paths, [other, one] if turned else [one, other], strict=True):
        pq.write_table(pa.table({"c": column}), path)
    corpus = open_corpus(paths)
    assert corpus.schema.field("c").type == kind
    [chunk] = corpus.chunks()
    assert chunk.table["c"].to_pylist() == (expected[::-1] if turned else expected)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (pa.array([NOON], pa.timestamp("us", "UTC")), pa.array([datetime(2024, 1, 1)], pa.timestamp("us"))),
        (pa.array(["a"]).dictionary_encode(), pa.array([1])),
        (pa.array([Decimal(1)], pa.decimal128(38, 0)), pa.array([Decimal("0.1")], pa.decimal256(70, 60))),
    ],
    ids=["zones", "dictionary-of-text-and-numbers", "digits"],
)
def test_types_that_would_change_values_are_still_refused(one: pa.Array, other: pa.Array, tmp_path: Path) -> None:
    paths = [str(tmp_path / name) for name in ("a.parquet", "b.parquet")]
    for path, column in zip(paths, [one, other], strict=True):
        pq.write_table(pa.table({"c": column}), path)
    with pytest.raises(InputError, match="can't be one column without changing values"):
        open_corpus(paths)


def test_a_time_that_nanoseconds_cannot_hold_is_an_input_error(tmp_path: Path) -> None:
    paths = [str(tmp_path / name) for name in ("a.parquet", "b.parquet")]
    pq.write_table(pa.table({"c": pa.array([datetime(1500, 1, 1)], pa.timestamp("us"))}), paths[0])
    pq.write_table(pa.table({"c": pa.array([datetime(2024, 1, 1)], pa.timestamp("ns"))}), paths[1])
    with pytest.raises(InputError, match=r"Column 'c' .*timestamp\[ns\] can't hold"):
        list(open_corpus(paths).chunks())
