"""What can't be read: a line becomes a row without a value that keeps its bytes, and a file is named with the place."""

from __future__ import annotations

import gzip
import math
from pathlib import Path
from typing import Any

import pytest
import zstandard

from sqsd_filter.errors import InputError
from tests.corpora import open_corpus
from tests.corpus.source_files import ROWS, exact, jsonl, opened, write, write_parquet


def test_bad_csv_records_are_unreadable_rows_with_their_bytes(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", b'a,b\n1,2\n1,2,3\n1\n\n\xff,2\n"x"y,2\n3,4\n')
    rows = list(open_corpus([path]).read(0, 99))
    assert [row.value for row in rows if row.value] == [{"a": "1", "b": "2"}, {"a": "3", "b": "4"}]
    assert [(row.line, row.raw) for row in rows if not row.value] == [
        (3, b"1,2,3"),
        (4, b"1"),
        (6, b"\xff,2"),
        (7, b'"x"y,2'),
    ]
    assert [row.problem for row in rows if not row.value][:3] == [
        "3 fields under a header of 2",
        "1 fields under a header of 2",
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


@pytest.mark.parametrize("content", ["{", "{}", '{"splits": []}', "[]", "\xff"])
def test_a_folder_of_no_splits_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "dataset_dict.json").write_text(content, encoding="latin-1")
    with pytest.raises(InputError, match=r"dataset_dict\.json names no splits"):
        opened(str(tmp_path))


def test_a_damaged_page_of_a_parquet_file_is_named(tmp_path: Path) -> None:
    path = Path(write_parquet(tmp_path / "a.parquet", ROWS))
    data = bytearray(path.read_bytes())
    data[4:80] = b"\xff" * 76
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"a\.parquet is truncated or corrupt"):
        list(open_corpus([str(path)]).chunks())
