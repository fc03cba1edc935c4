"""The types of the columns: each holds its values exactly, and files with different ones are joined or refused."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sqsd_filter.corpus.json_schema import is_json_text, to_table
from sqsd_filter.corpus.sources import Corpus, Row
from sqsd_filter.errors import InputError
from tests.corpora import open_corpus
from tests.corpus.source_files import exact, jsonl, peek, values, write

datasets.disable_progress_bars()


def parse_if_json(corpus: Corpus, folder: Path) -> list[dict[str, Any]]:
    """What `load_dataset` makes of the corpus's chunks as parquet, JSON text decoded by its mark."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    with pq.ParquetWriter(folder / "train.parquet", corpus.schema) as writer:
        for chunk in corpus.chunks(rows=7):
            chunk.table.validate(full=True)
            writer.write_table(chunk.table)
    dataset = datasets.load_dataset(str(folder), split="train", cache_dir=str(folder / "cache"))
    stored = pq.read_schema(folder / "train.parquet")
    return [{field.name: decoded(row[field.name], field) for field in stored} for row in dataset]


def decoded(value: Any, field: pa.Field) -> Any:
    if value is None:
        return None
    if is_json_text(field):
        return json.loads(value)
    if pa.types.is_list(field.type):
        return [decoded(item, field.type.value_field) for item in value]
    if pa.types.is_struct(field.type):
        return {child.name: decoded(value[child.name], child) for child in field.type}
    return value


@pytest.mark.parametrize(
    ("column", "kind"),
    [
        (["007", None], pa.string()),
        ([None, None], pa.string()),
        ([1, -(2**63)], pa.int64()),
        ([1, 2**64 - 1], pa.uint64()),
        ([0.3, math.nan, 1e-300], pa.float64()),
        ([[], None], pa.list_(pa.string())),
        ([{"a": None}], pa.struct([("a", pa.string())])),
        ([[{"role": "u", "content": ""}], []], pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))),
        ([7, "7", None, "null", '"7"'], pa.json_()),
        ([1, 0.3], pa.json_()),
        ([1, True], pa.json_()),
        ([{}, None], pa.json_()),
        ([{"\0": "a"}], pa.json_()),
        ([[[None, False, 0], None], [[{"k": None}], [{"k": 7}]]], pa.list_(pa.json_())),
        ([{"a": None}, {}, {"a": 1, "b": {"c": [0.1]}}], pa.json_()),
        ([[{"role": "u"}, {"role": "a", "tool_calls": None}]], pa.list_(pa.json_())),
        ([{"a": 1, "b": 2}, {"b": "x", "a": 1}], pa.struct([("a", pa.int64()), ("b", pa.json_())])),
        ([2**70, 1], "JSON text"),
        ([{"a": 1}, {"b": 2**70}], "JSON text"),
        (["x", math.inf], "JSON text"),
        ([1e-300, "x"], "JSON text"),
        ([1, 1e-300], pa.float64()),
    ],
    ids=str,
)
def test_a_column_gets_the_type_that_datasets_reads_back_exactly(column: list[Any], kind: Any, tmp_path: Path) -> None:
    rows = [{"first": "a", "x": value} for value in column]
    corpus = open_corpus([write(tmp_path / "a.jsonl", jsonl(rows))])
    field = corpus.schema.field("x")
    assert is_json_text(field) if kind == "JSON text" else field.type == kind
    back = [row["x"] for row in parse_if_json(corpus, tmp_path / "out")]
    if kind == pa.float64():
        assert repr(back) == repr([None if value is None else float(value) for value in column])
    else:
        assert exact(back) == exact(column)
    assert exact(values(corpus)) == exact(rows)
    written = open_corpus([str(tmp_path / "out" / "train.parquet")])
    assert exact([row["x"] for row in values(written) if row]) == exact(back)


def test_deep_nesting_survives_the_depth_limit_of_parquet(tmp_path: Path) -> None:
    value: Any = 0.7
    for level in range(190):
        value = [value] if level % 2 else {"k": value}
    corpus = open_corpus([write(tmp_path / "a.jsonl", jsonl([{"x": value}]))])
    assert exact(parse_if_json(corpus, tmp_path / "out")) == exact([{"x": value}])


words = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)
numbers = st.integers(-(2**66), 2**66) | st.floats(-1e9, 1e9).filter(lambda x: x == 0 or abs(x) > 1e-6)
plain = st.none() | st.booleans() | st.integers(-9, 9) | numbers | words | st.sampled_from(["007", "1", "null", "{}"])
nested = st.recursive(plain, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3))
uniform = st.one_of(
    st.lists(st.fixed_dictionaries({"role": words, "content": words | st.none()}) | st.none(), max_size=3) | st.none(),
    st.fixed_dictionaries({"a": st.lists(st.integers(0, 9), max_size=2), "b": nested}),
)
any_row = st.fixed_dictionaries({}, optional={"m": uniform, "a": nested, "": plain})


@settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck))
@given(rows=st.lists(any_row, min_size=1, max_size=9))
def test_any_json_rows_come_back_from_datasets_as_they_were(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    corpus = open_corpus([write(tmp_path / "a.jsonl", jsonl(rows))])
    assert exact(values(corpus)) == exact(rows)
    if corpus.schema.names:
        expected = [{name: row.get(name) for name in corpus.schema.names} for row in rows]
        assert exact(parse_if_json(corpus, tmp_path / "out")) == exact(expected)


FEATURES = datasets.Features(
    {
        "label": datasets.ClassLabel(names=["no", "yes"]),
        "when": datasets.Value("timestamp[ms]"),
        "nested": {"ids": datasets.List(datasets.Value("int8")), "text": datasets.Value("large_string")},
        "tools": datasets.List(datasets.Json()),
        "picture": datasets.Image(),
    }
)
FEATURED = [
    {
        "label": i % 2,
        "when": datetime(2024, 1, 1 + i),
        "nested": {"ids": [i], "text": "x"},
        "tools": [{"name": "f"}, {"n": i}],
        "picture": {"bytes": b"not an image", "path": None},
    }
    for i in range(20)
]


def featured() -> datasets.Dataset:
    return datasets.Dataset(datasets.table.InMemoryTable(to_table(FEATURED, FEATURES.arrow_schema)))


def test_a_saved_dataset_keeps_its_features_and_its_indices(tmp_path: Path) -> None:
    featured().select(range(19, -1, -2)).save_to_disk(str(tmp_path / "saved"))
    corpus = open_corpus([str(tmp_path / "saved")])
    assert datasets.Features.from_arrow_schema(corpus.schema) == FEATURES
    assert values(corpus) == FEATURED[::-2]
    assert [row.value for row in corpus.read(3, 5, columns=["label", "tools"])] == [
        {"label": row["label"], "tools": row["tools"]} for row in FEATURED[::-2][3:5]
    ]
    [chunk] = corpus.chunks()
    assert chunk.table.schema.equals(corpus.schema, check_metadata=True)


def test_parquet_keeps_its_schema_and_metadata(tmp_path: Path) -> None:
    featured().to_parquet(str(tmp_path / "a.parquet"))
    corpus = open_corpus([str(tmp_path / "a.parquet")])
    assert corpus.schema.equals(pq.read_schema(tmp_path / "a.parquet"), check_metadata=True)
    assert datasets.Features.from_arrow_schema(corpus.schema) == FEATURES
    assert values(corpus) == FEATURED
    assert [row.value for row in corpus.read(0, 2, columns=["label"])] == [{"label": 0}, {"label": 1}]


def table_file(path: Path, **columns: Any) -> str:
    pq.write_table(pa.table(columns), path)
    return str(path)


def test_tables_that_differ_in_order_and_width_are_one_corpus(tmp_path: Path) -> None:
    a = table_file(tmp_path / "a.parquet", n=pa.array([1], pa.int8()), t=pa.array(["x"]), s=pa.array([{"p": 1}]))
    b = table_file(
        tmp_path / "b.parquet",
        t=pa.array(["y"], pa.large_string()),
        n=pa.array([2**40]),
        s=pa.array([{"q": 2, "p": 1}]),
    )
    corpus = open_corpus([a, b])
    [chunk] = corpus.chunks()
    assert chunk.table.to_pylist() == [
        {"n": 1, "t": "x", "s": {"p": 1, "q": None}},
        {"n": 2**40, "t": "y", "s": {"p": 1, "q": 2}},
    ]
    assert (chunk.files, chunk.lines) == ([a, b], [1, 1])


def test_json_joins_a_table_where_no_value_changes(tmp_path: Path) -> None:
    a = table_file(tmp_path / "a.parquet", messages=pa.array([[{"role": "u", "content": "hi"}]]), n=pa.array([0.5]))
    b = write(tmp_path / "b.jsonl", b'{"messages": [], "n": null, "tag": 3}\nbroken\n')
    [chunk] = open_corpus([a, b]).chunks()
    assert chunk.table.to_pylist() == [
        {"messages": [{"role": "u", "content": "hi"}], "n": 0.5, "tag": None},
        {"messages": [], "n": None, "tag": 3},
        {"messages": None, "n": None, "tag": None},
    ]
    assert chunk.raws == [None, b'{"messages": [], "n": null, "tag": 3}', b"broken"]


def conflicts(tmp: Path) -> Iterator[list[str]]:
    number = table_file(tmp / "int.parquet", x=pa.array([1]))
    for name, column in [("float", pa.array([1.0])), ("string", pa.array(["1"])), ("when", pa.array([datetime.now()]))]:
        yield [number, table_file(tmp / f"{name}.parquet", x=column)]
    yield [number, write(tmp / "a.jsonl", b'{"x": "1"}\n')]
    yield [
        table_file(tmp / "text.parquet", x=pa.array(["1"])),
        write(tmp / "big.jsonl", b'{"x": Infinity}\n{"x": "a"}'),
    ]
    for names in (["no", "yes"], ["yes", "no"]):
        features = datasets.Features({"x": datasets.ClassLabel(names=names)})
        datasets.Dataset.from_dict({"x": [0]}, features=features).to_parquet(str(tmp / f"{names[0]}.parquet"))
    yield [str(tmp / "no.parquet"), str(tmp / "yes.parquet")]


def test_columns_that_no_type_holds_are_refused_with_both_files(tmp_path: Path) -> None:
    for a, b in conflicts(tmp_path):
        with pytest.raises(InputError, match=f"Column 'x' of {a} and of {b}"):
            open_corpus([a, b])


BEYOND_PYTHON: dict[str, pa.Array] = {
    "year 33658": pa.array([10**12], pa.timestamp("s")),
    "date": pa.array([10**8], pa.date32()),
    "duration": pa.array([2**62], pa.duration("s")),
    "time zone": pa.array([1], pa.timestamp("us", "Mars/Phobos")),
    "bytes": pa.Array.from_buffers(pa.string(), 1, [None, pa.array(["ab"]).buffers()[1], pa.py_buffer(b"\xff\xfe")]),
}


@pytest.mark.parametrize("column", BEYOND_PYTHON.values(), ids=BEYOND_PYTHON)
def test_values_that_python_does_not_have_pass_by_unread(column: pa.Array, tmp_path: Path) -> None:
    path = table_file(tmp_path / "a.parquet", x=column, text=pa.array(["ok"]))
    assert peek([path]) == [{"x": None, "text": "ok"}]
    rows: list[Row] = []
    corpus = open_corpus([path], visit=rows.append, columns=["text"])
    assert [row.value for row in rows] == [{"text": "ok"}]
    [chunk] = corpus.chunks()
    assert chunk.table.column("x").equals(pq.read_table(path).column("x"))
    with pytest.raises(InputError, match=r"^Column 'x' of .*a\.parquet holds a value that can't be read"):
        values(corpus)


def test_a_label_column_that_meets_plain_numbers_loses_only_its_names(tmp_path: Path) -> None:
    features = datasets.Features({"label": datasets.ClassLabel(names=["no", "yes"]), "x": datasets.Json()})
    labelled = datasets.Dataset.from_dict({"label": [1], "x": [{"a": 1}]}, features=features)
    labelled.to_parquet(str(tmp_path / "a.parquet"))
    corpus = open_corpus(
        [str(tmp_path / "a.parquet"), write(tmp_path / "b.jsonl", b'{"label": 0, "x": 1}\n{"x": [0.3]}')]
    )
    assert datasets.Features.from_arrow_schema(corpus.schema)["label"] == datasets.Value("int64")
    assert parse_if_json(corpus, tmp_path / "out") == [
        {"label": 1, "x": {"a": 1}},
        {"label": 0, "x": 1},
        {"label": None, "x": [0.3]},
    ]
