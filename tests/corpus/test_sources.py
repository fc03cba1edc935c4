"""The corpus reader: whatever is in a row comes back as it was, and every line ends up as exactly one row."""

import gzip
import json
import math
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sqsd_filter.corpus import addresses, text_formats
from sqsd_filter.corpus.addresses import Opener, Source, expand
from sqsd_filter.corpus.files import LocalFile
from sqsd_filter.corpus.json_schema import is_json_text, to_table
from sqsd_filter.corpus.sources import Corpus, Row
from sqsd_filter.corpus.text_formats import JsonArray, Window
from sqsd_filter.errors import InputError
from tests.corpora import open_corpus

datasets.disable_progress_bars()

ROWS: list[dict[str, Any]] = [
    {"id": i, "messages": [{"role": "user", "content": f"é\u2028 {i}"}, {"role": "assistant", "content": "ok\n" * i}]}
    for i in range(1300)
]


def jsonl(rows: list[Any]) -> bytes:
    return b"".join(json.dumps(row, ensure_ascii=i % 2 == 0).encode() + b"\n" for i, row in enumerate(rows))


def write(path: Path, data: bytes) -> str:
    path.write_bytes(data)
    return str(path)


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> str:
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=200)
    return str(path)


def save(path: Path, rows: list[dict[str, Any]]) -> str:
    datasets.Dataset.from_list(rows).save_to_disk(str(path))
    return str(path)


def opened(*sources: Any) -> list[Source]:
    return Opener().open(expand(sources))


def peek(sources: list[str], n: int = 1000) -> list[dict[str, Any]]:
    return addresses.peek(opened(*sources), n)


def values(corpus: Corpus) -> list[dict[str, Any] | None]:
    return [row.value for row in corpus.read(0, corpus.n_rows)]


def exact(value: Any) -> str:
    """A text that tells 1 from 1.0 and from True, and NaN equal to itself."""
    return json.dumps(value, sort_keys=True)


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


FORMATS: dict[str, Callable[[Path], str]] = {
    "jsonl": lambda tmp: write(tmp / "a.jsonl", jsonl(ROWS)),
    "ndjson": lambda tmp: write(tmp / "a.ndjson", jsonl(ROWS)),
    "jsonl.gz": lambda tmp: write(tmp / "a.jsonl.gz", gzip.compress(jsonl(ROWS[:9])) + gzip.compress(jsonl(ROWS[9:]))),
    "jsonl.zst": lambda tmp: write(
        tmp / "a.jsonl.zst", zstandard.compress(jsonl(ROWS[:9])) + zstandard.compress(jsonl(ROWS[9:]))
    ),
    "json array": lambda tmp: write(tmp / "a.json", json.dumps(ROWS).encode()),
    "pretty json array": lambda tmp: write(
        tmp / "a.json", b"\xef\xbb\xbf" + json.dumps(ROWS, indent=2, ensure_ascii=False).encode() + b"\n"
    ),
    "gzipped json array": lambda tmp: write(tmp / "a.json.gz", gzip.compress(json.dumps(ROWS).encode())),
    "json that holds lines": lambda tmp: write(tmp / "a.json", jsonl(ROWS)),
    "parquet": lambda tmp: write_parquet(tmp / "a.parquet", ROWS),
    "saved dataset": lambda tmp: save(tmp / "saved", ROWS),
}


@pytest.mark.parametrize("make", FORMATS.values(), ids=FORMATS.keys())
def test_every_format_gives_the_same_rows_from_any_point(make: Callable[[Path], str], tmp_path: Path) -> None:
    path = make(tmp_path)
    visited: list[Row] = []
    corpus = pickle.loads(pickle.dumps(open_corpus([path], visit=visited.append)))
    whole = list(corpus.read(0, corpus.n_rows))
    assert [row.value for row in whole] == ROWS
    assert whole == visited
    assert [row.index for row in whole] == list(range(len(ROWS)))
    assert {row.file for row in whole} == {path}
    assert [row.line for row in whole] == list(range(1, len(ROWS) + 1))
    for start, stop in [(0, 1), (511, 514), (512, 512), (1024, 1300), (700, 5000), (1300, 1301), (3, 700)]:
        assert list(corpus.read(start, stop)) == whole[start:stop]
    assert [row for chunk in corpus.chunks(300) for row in chunk.table.to_pylist()] == ROWS
    assert peek([path], 10) == ROWS[:10]


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".csv.gz"])
def test_csv_values_stay_the_strings_they_are(suffix: str, tmp_path: Path) -> None:
    delimiter = "\t" if "tsv" in suffix else ","
    text = "\ufeffid,text,n\r\n" + "".join(f'{i},"a, ""b""\r\nline {i}",007\r\n' for i in range(600))
    data = text.replace(",", delimiter).encode()
    path = write(tmp_path / f"a{suffix}", gzip.compress(data) if suffix.endswith("gz") else data)
    corpus = open_corpus([path])
    whole = list(corpus.read(0, 600))
    assert whole[599].value == {"id": "599", "text": f'a{delimiter} "b"\r\nline 599', "n": "007"}
    assert whole[599].line == 2 + 2 * 599
    assert list(corpus.read(550, 560)) == whole[550:560]
    assert corpus.schema == pa.schema([("id", pa.string()), ("text", pa.string()), ("n", pa.string())])


def test_bad_csv_records_are_unreadable_rows_with_their_bytes(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", b'a,b\n1,2\n1,2,3\n1\n\n\xff,2\n"x"y,2\n3,4\n5,"never\nclosed\n')
    rows = list(open_corpus([path]).read(0, 99))
    assert [row.value for row in rows if row.value] == [{"a": "1", "b": "2"}, {"a": "3", "b": "4"}]
    assert [(row.line, row.raw) for row in rows if not row.value] == [
        (3, b"1,2,3"),
        (4, b"1"),
        (5, b""),
        (6, b"\xff,2"),
        (7, b'"x"y,2'),
        (9, b'5,"never\nclosed'),
    ]
    assert [row.problem for row in rows if not row.value][:4] == [
        "3 fields under a header of 2",
        "1 fields under a header of 2",
        "blank line",
        "not UTF-8: byte 1",
    ]


def test_a_csv_with_two_columns_of_one_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="two columns named 'a'"):
        open_corpus([write(tmp_path / "a.csv", b"a,a\n1,2\n")])


NASTY: list[tuple[bytes, Any]] = [
    (b'\xef\xbb\xbf{"x": "bom"}', {"x": "bom"}),
    (b'{"x": 1}\r', {"x": 1}),
    ('{"x": "a\u2028b\u0085c"}'.encode(), {"x": "a\u2028b\u0085c"}),
    (b'{"x": 1180591620717411303424}', {"x": 2**70}),
    (b'{"x": "007"}', {"x": "007"}),
    (b'{"x": "2024-01-01T00:00:00Z"}', {"x": "2024-01-01T00:00:00Z"}),
    (b'{"x": "\\ud83d\\ude00"}', {"x": "\U0001f600"}),
    (b'{"x": 1, "x": 2}', "'x' stands twice in one object"),
    (b'{"x": [{"\xc3\xa9": 1, "y": 2, "\xc3\xa9": 1}]}', "'\\xe9' stands twice in one object"),
    (b'{"x": [-1e400]}', "a number too large for a float"),
    (b'{"x": 1e308}', {"x": 1e308}),
    (b'{"x": NaN}', {"x": math.nan}),
    (b"", "blank line"),
    (b"  \r", "blank line"),
    (b'{"x": "a" "b"}', "not JSON: Expecting ',' delimiter at column 11"),
    (b'{"x": "\xff"}', "not UTF-8: byte 8"),
    (b'{"x": [{"y": "\\uD800"}]}', "lone surrogate in 'x'"),
    (b'{"\\udfff": 1}', "lone surrogate in '\\udfff'"),
    (b'{"x\\u0000": 1}', "NUL in a column name"),
    (b"[1]", "not an object"),
    (b"null", "not an object"),
    (b'{"x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested deeper than 200 levels"),
    (b'{"x": ' + b"[" * 300 + b"]" * 300 + b"}", "nested deeper than 200 levels"),
    (b'{"x": "' + b"[" * 300 + b'"}', {"x": "[" * 300}),
    (b'{"x": ' + b"1" * 5000 + b"}", "an integer of more than 4300 digits"),
]


@pytest.mark.parametrize("ending", [b"\n", b""], ids=["final newline", "no final newline"])
def test_each_line_is_a_row_readable_or_with_its_own_bytes(ending: bytes, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", b"\n".join(line for line, _ in NASTY) + ending)
    corpus = open_corpus([path])
    rows = list(corpus.read(0, 99))
    assert len(rows) == len(NASTY)
    for number, (row, (line, expected)) in enumerate(zip(rows, NASTY, strict=True), 1):
        assert row.line == number
        if isinstance(expected, str):
            assert (row.value, row.problem, row.raw) == (None, expected, line)
        else:
            assert (exact(row.value), row.problem, row.raw) == (exact(expected), "", None)
    [chunk] = corpus.chunks()
    assert chunk.raws == [line.removeprefix(b"\xef\xbb\xbf") for line, _ in NASTY]
    assert [problem != "" for problem in chunk.problems] == [isinstance(expected, str) for _, expected in NASTY]
    assert chunk.table.column("x").is_null().to_pylist() == [isinstance(expected, str) for _, expected in NASTY]


def test_array_elements_that_cannot_be_rows_are_unreadable_rows(tmp_path: Path) -> None:
    elements = [line.strip() for line, _ in NASTY[1:] if line.strip() and b'"a" "b"' not in line]
    path = write(tmp_path / "a.json", b"[\n" + b" ,\n ".join(elements) + b"\n]")
    expected = [outcome for line, outcome in NASTY[1:] if line.strip() in elements]
    rows = list(open_corpus([path]).read(0, 99))
    assert [exact(row.value) if row.value else row.problem.split(":")[0] for row in rows] == [
        outcome.split(":")[0] if isinstance(outcome, str) else exact(outcome) for outcome in expected
    ]
    assert all(row.raw == element for row, element in zip(rows, elements, strict=True) if row.value is None)


def test_an_array_is_decoded_within_a_window_of_a_few_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_formats, "BLOCK", 64)
    rows = [{"x": i, "text": "é" * (i % 50)} for i in range(500)] + [{"text": "long " * 10_000}, {"x": -1}]
    path = Path(write(tmp_path / "a.json", json.dumps(rows, ensure_ascii=False).encode()))
    seen: list[int] = []
    grow = Window.grow

    def spy(self: Window) -> bool:
        more = grow(self)
        seen.append(len(self.text))
        return more

    monkeypatch.setattr(Window, "grow", spy)
    records = JsonArray(LocalFile(path)).records()
    assert [value for _, _, value, _, _ in [next(records) for _ in range(500)]] == rows[:500]
    assert max(seen) < 4 * 64
    assert [value for _, _, value, _, _ in records] == rows[500:]
    assert len([size for size in seen if size > 1000]) < 20  # it doubles: the long row is not decoded block by block


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.json", b'[{"a": 1}, {"a": 2]', "element 2 at byte 11"),
        ("a.json", b'[{"a": 1}, {"a": ', "element 2"),
        ("a.json", b'[{"a": 1} {"a": 2}]', "Expecting ',' or '\\]'"),
        ("a.json", b'[{"a": 1},]', "Expecting value"),
        ("a.json", b'[{"a": 1}', "Expecting ',' or '\\]'"),
        ("a.json", b'[{"a": 1}] [', "Extra data"),
        ("a.json", b'{\n "data": [\n  {"a": 1}\n ]\n}\n', "single JSON object"),
        ("a.jsonl.gz", gzip.compress(jsonl(ROWS))[:-9], "a.jsonl.gz is truncated.* at byte"),
        ("a.jsonl.gz", gzip.compress(jsonl(ROWS))[:200] + b"garbage" * 99, "a.jsonl.gz is corrupt.*between bytes 0"),
        ("a.jsonl.zst", zstandard.compress(jsonl(ROWS))[:-9], "a.jsonl.zst is truncated"),
        ("a.jsonl.zst", b"{}", "a.jsonl.zst is corrupt"),
        ("a.parquet", b"PAR1 nothing", "a.parquet is truncated or corrupt"),
        ("a.txt", b"", "a.txt has no extension that names its format"),
    ],
)
def test_broken_files_are_named_with_the_place(name: str, data: bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        open_corpus([write(tmp_path / name, data)])


@pytest.mark.parametrize("data", [b'{"a": 1}', b'\xef\xbb\xbf{"a": 1}\n', b'\n{"a": 1}\n\n'], ids=str)
def test_a_json_file_may_hold_a_single_line(data: bytes, tmp_path: Path) -> None:
    rows = [row.value for row in open_corpus([write(tmp_path / "a.json", data)]).read(0, 9)]
    assert [row for row in rows if row] == [{"a": 1}]


def test_the_first_readable_row_is_found_however_far_down(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", b"\n" * 2500 + b"broken\n" * 2500 + jsonl(ROWS[:20]))
    assert peek([path], 10) == ROWS[:10]


def test_empty_files_have_no_rows(tmp_path: Path) -> None:
    paths = [write(tmp_path / name, data) for name, data in [("a.jsonl", b""), ("b.json", b" [ ] \n"), ("c.csv", b"")]]
    corpus = open_corpus(paths)
    assert (corpus.n_rows, list(corpus.chunks()), values(corpus), peek(paths)) == (0, [], [], [])


def test_rows_without_a_single_column_still_count(tmp_path: Path) -> None:
    paths = [write(tmp_path / "a.jsonl", b"{}\nbroken\n"), write(tmp_path / "b.jsonl", b"{}\n")]
    corpus = open_corpus(paths)
    assert (corpus.n_rows, corpus.schema.names) == (3, [])
    assert [(chunk.start, chunk.table.num_rows, chunk.lines) for chunk in corpus.chunks()] == [
        (0, 2, [1, 2]),
        (2, 1, [1]),
    ]
    assert values(corpus) == [{}, None, {}]


def test_globs_are_sorted_and_an_existing_path_wins_over_its_glob_reading(tmp_path: Path) -> None:
    for name in ["b1.jsonl", "b2.jsonl", "b[1].jsonl"]:
        write(tmp_path / name, json.dumps({"from": name}).encode())
    assert [Path(path).name for path in expand([f"{tmp_path}/b?.jsonl"])] == ["b1.jsonl", "b2.jsonl"]
    assert [Path(path).name for path in expand([f"{tmp_path}/b[1].jsonl"])] == ["b[1].jsonl"]
    corpus = open_corpus([f"{tmp_path}/b2.jsonl", f"{tmp_path}/b?.jsonl"])
    assert values(corpus) == [{"from": "b2.jsonl"}, {"from": "b1.jsonl"}, {"from": "b2.jsonl"}]
    with pytest.raises(InputError, match="No file matches"):
        expand([f"{tmp_path}/c*.jsonl"])
    with pytest.raises(InputError, match="does not exist"):
        opened(f"{tmp_path}/c.jsonl")


def test_inputs_are_fingerprinted_and_a_limit_takes_the_first_rows(tmp_path: Path) -> None:
    paths = [write(tmp_path / "a.jsonl", jsonl(ROWS[:5])), write(tmp_path / "b.jsonl", b'{"other": 1}\n' * 5)]
    first, second = open_corpus(paths).inputs
    assert (first["path"], first["bytes"], first["rows"]) == (paths[0], len(jsonl(ROWS[:5])), 5)
    assert first["blake2b"] != second["blake2b"]
    limited = open_corpus(paths, limit=3)
    assert limited.n_rows == 3
    assert limited.schema.names == ["id", "messages"]
    assert values(limited) == ROWS[:3]
    assert open_corpus(paths, limit=7).n_rows == 7


def test_a_file_that_changed_since_the_scan_is_not_read(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", jsonl(ROWS[:5]))
    corpus = open_corpus([path])
    write(tmp_path / "a.jsonl", jsonl(ROWS[:6]))
    with pytest.raises(InputError, match="has changed"):
        list(corpus.read(0, 1))


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


@pytest.mark.parametrize("content", ["{", "{}", '{"splits": []}', "[]", "\xff"])
def test_a_folder_of_no_splits_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "dataset_dict.json").write_text(content, encoding="latin-1")
    with pytest.raises(InputError, match=r"dataset_dict\.json names no splits"):
        opened(str(tmp_path))


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


def test_chunks_gather_small_files_and_split_large_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [write(tmp_path / f"{i:02}.jsonl", jsonl(ROWS[i : i + 1])) for i in range(20)]
    corpus = open_corpus(paths)
    assert [(chunk.start, chunk.table.num_rows) for chunk in corpus.chunks(8)] == [(0, 8), (8, 8), (16, 4)]
    monkeypatch.setattr("sqsd_filter.corpus.sources.BATCH_BYTES", 1000)
    sizes = [chunk.table.num_rows for chunk in open_corpus([write(tmp_path / "a.jsonl", jsonl(ROWS))]).chunks()]
    assert sum(sizes) == len(ROWS)
    assert max(sizes) < 20


def test_a_damaged_page_of_a_parquet_file_is_named(tmp_path: Path) -> None:
    path = Path(write_parquet(tmp_path / "a.parquet", ROWS))
    data = bytearray(path.read_bytes())
    data[4:80] = b"\xff" * 76
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"a\.parquet is truncated or corrupt"):
        list(open_corpus([str(path)]).chunks())


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


@pytest.mark.parametrize("kind", [pa.string_view(), pa.list_(pa.string_view())], ids=str)
def test_columns_that_can_not_be_filtered_are_refused_at_once(kind: pa.DataType, tmp_path: Path) -> None:
    path = table_file(tmp_path / "a.parquet", text=pa.array(["ok"]), x=pa.nulls(1, kind))
    with pytest.raises(InputError, match=r"^Column 'x' of .*a\.parquet is of the type .*string_view"):
        open_corpus([path])


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


def test_importing_the_module_imports_no_heavy_library() -> None:
    heavy = "{'datasets', 'pandas', 'torch', 'zstandard'}"
    code = f"import sys, sqsd_filter.corpus.sources; print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
