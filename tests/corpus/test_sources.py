"""The corpus reader: every format gives the same rows, from any point, and says where each one stood."""

from __future__ import annotations

import gzip
import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pytest
import zstandard

from sqsd_filter.corpus import text_formats
from sqsd_filter.corpus.addresses import expand
from sqsd_filter.corpus.files import LocalFile
from sqsd_filter.corpus.sources import Row
from sqsd_filter.corpus.text_formats import JsonArray, Window
from sqsd_filter.errors import InputError
from tests.corpora import open_corpus
from tests.corpus.source_files import ROWS, jsonl, opened, peek, values, write, write_parquet

datasets.disable_progress_bars()


def save(path: Path, rows: list[dict[str, Any]]) -> str:
    datasets.Dataset.from_list(rows).save_to_disk(str(path))
    return str(path)


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


OBJECT = 13  # lines of a row in the indented array
LINES: dict[str, Callable[[Row], int]] = {  # where a row stands, if it is not on a line of its own
    "json array": lambda row: 1,
    "gzipped json array": lambda row: 1,
    "pretty json array": lambda row: 2 + OBJECT * row.index,
}


def line_of_its_own(row: Row) -> int:
    return row.index + 1


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_rows_from_any_point(name: str, tmp_path: Path) -> None:
    path, line_of = FORMATS[name](tmp_path), LINES.get(name, line_of_its_own)
    visited: list[Row] = []
    corpus = pickle.loads(pickle.dumps(open_corpus([path], visit=visited.append)))
    whole = list(corpus.read(0, corpus.n_rows))
    assert [row.value for row in whole] == ROWS
    assert whole == visited
    assert [row.index for row in whole] == list(range(len(ROWS)))
    assert {row.file for row in whole} == {path}
    assert [row.line for row in whole] == [line_of(row) for row in whole]
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


def test_chunks_gather_small_files_and_split_large_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [write(tmp_path / f"{i:02}.jsonl", jsonl(ROWS[i : i + 1])) for i in range(20)]
    corpus = open_corpus(paths)
    assert [(chunk.start, chunk.table.num_rows) for chunk in corpus.chunks(8)] == [(0, 8), (8, 8), (16, 4)]
    monkeypatch.setattr("sqsd_filter.corpus.sources.BATCH_BYTES", 1000)
    sizes = [chunk.table.num_rows for chunk in open_corpus([write(tmp_path / "a.jsonl", jsonl(ROWS))]).chunks()]
    assert sum(sizes) == len(ROWS)
    assert max(sizes) < 20


def test_importing_the_module_imports_no_heavy_library() -> None:
    heavy = "{'datasets', 'pandas', 'torch', 'zstandard'}"
    code = f"import sys, sqsd_filter.corpus.sources; print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
