"""Rows on their way out: odd lines, reasons, refused columns, and splits with files of their own."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sqsd_filter.corpus.sources import Corpus
from sqsd_filter.errors import InputError
from sqsd_filter.pipeline.writing.export import FATES, check_columns
from sqsd_filter.pipeline.writing.writers import Output
from tests.corpora import FOLDERS, open_corpus, saved
from tests.pipeline.writing.made_up_exports import SCORES, export, paths, raw_lines

datasets.disable_progress_bars()
pytestmark = pytest.mark.usefixtures("small_chunks")


def read_back(paths: list[Path]) -> list[dict[str, Any] | None]:
    """What our own reader makes of files."""
    corpus = open_corpus([str(path) for path in paths])
    return [row.value for row in corpus.read(0, corpus.n_rows)]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def written(name: str, content: bytes | list[Any], **options: Any) -> Corpus:
    if not isinstance(content, bytes):
        content = b"".join(json.dumps(row).encode() + b"\n" for row in content)
    Path(name).write_bytes(content)
    return open_corpus([name], **options)


def test_a_byte_order_mark_is_no_part_of_a_line(folder: Path) -> None:
    corpus = written("in.jsonl", b'\xef\xbb\xbf{"a": 1}\n{"a": 2}\n')
    report = export(corpus, [1, 0], folder, "jsonl")
    assert raw_lines(folder, report, "dropped") == [b'{"a": 1, "sqsd_row": "in.jsonl:1"}']


def test_compressed_lines_come_out_plain(folder: Path) -> None:
    import gzip

    corpus = written("in.jsonl.gz", gzip.compress(b'{"a":1}\r\n{"a" : 1e0}'))
    assert raw_lines(folder, export(corpus, [0, 0], folder, "jsonl"), "kept") == [b'{"a":1}\r', b'{"a" : 1e0}']


def test_a_kept_row_without_a_score_has_null_for_one(folder: Path) -> None:
    corpus = written("in.jsonl", [{"a": 1}, {"a": 2}])
    report = export(corpus, [0, 0], folder, "jsonl", with_scores=True, unscored=[1])
    assert raw_lines(folder, report, "kept")[1] == (
        b'{"a": 2, "sqsd_risk": null, "sqsd_danger": null, "sqsd_safety": null, "sqsd_status": "no_answer"}'
    )


def test_rows_of_other_sources_are_lines_without_the_columns_of_an_earlier_run(folder: Path) -> None:
    earlier = {"sqsd_risk": 9.0, "sqsd_status": "scored", "sqsd_reason": "", "sqsd_raw": b"\xff"}
    pq.write_table(pa.Table.from_pylist([{"a": 1, **earlier, "b": 2}] * 2), "in.parquet")
    corpus = open_corpus(["in.parquet"])
    report = export(corpus, [0, 1], folder / "plain", "jsonl")
    assert raw_lines(folder / "plain", report, "kept") == [b'{"a": 1, "b": 2}']
    report = export(corpus, [0, 1], folder / "scored", "jsonl", with_scores=True)
    assert list(json.loads(raw_lines(folder / "scored", report, "dropped")[0])) == ["a", "b", *SCORES, "sqsd_row"]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        (
            "in.csv",
            b'a,b\n1,2\nx,y,z\n"1\n",2,3\n',
            [b"x,y,z", b'{"sqsd_raw": "\\"1\\n\\",2,3", "sqsd_row": "in.csv:4"}'],
        ),
        (
            "in.json",
            b'[{"a": 1}, [1,\n2], {"a": 1,\n"a": 2}]',
            [
                b'{"sqsd_raw": "[1,\\n2]", "sqsd_row": "in.json:1"}',
                b'{"sqsd_raw": "{\\"a\\": 1,\\n\\"a\\": 2}", "sqsd_row": "in.json:2"}',
            ],
        ),
        ("in.csv", b'a,b\n1,2\nx\n\xff"\n', [b"x", b'\xff"']),
        (
            "in.csv",
            b'a,b\n1,2\n"\n\xff",1\n,\n',
            [
                b'{"sqsd_raw": "\\"\\n\\udcff\\",1", "sqsd_row": "in.csv:3"}',
                b'{"a": "", "b": "", "sqsd_row": "in.csv:5"}',
            ],
        ),
    ],
    ids=["csv", "array", "not UTF-8", "not UTF-8 over two lines"],
)
def test_records_that_could_not_be_read_are_one_line_each(
    name: str, content: bytes, expected: list[bytes], folder: Path
) -> None:
    corpus = written(name, content)
    report = export(corpus, [0, 2, 2], folder, "jsonl")
    assert raw_lines(folder, report, "errors") == expected
    assert len((folder / "_sqsd/reasons.jsonl").read_bytes().splitlines()) == 2


def test_reasons_say_what_is_wrong_with_each_line_of_errors(folder: Path) -> None:
    corpus = written("in.jsonl", b'{"a": 1}\nbroken\n{"a": 2}\n')
    report = export(corpus, [0, 2, 2], folder, "jsonl", 1)
    assert report["extra_files"] == ["_sqsd/reasons.jsonl"]
    assert [json.loads(line) for line in (folder / "_sqsd/reasons.jsonl").read_bytes().splitlines()] == [
        {
            "file": "in.jsonl",
            "line": 2,
            "status": "no_answer",
            "reason": "not JSON: Expecting value at column 1",
        },
        {"file": "in.jsonl", "line": 3, "status": "no_answer", "reason": ""},
    ]


def test_a_column_that_can_not_be_written_is_named_but_not_one_that_an_earlier_run_left(folder: Path) -> None:
    for column, refused in (("mine", True), ("sqsd_raw", False)):
        pq.write_table(pa.table({"sqsd_risk": [0.1], "sqsd_status": ["scored"], column: [b"\xff"]}), "in.parquet")
        corpus = open_corpus(["in.parquet"])
        check_columns(corpus, Output("parquet", 1, False))
        if refused:
            with pytest.raises(InputError, match="Column 'mine' holds binary, which can't be written to jsonl"):
                check_columns(corpus, Output("jsonl", 1, False))
        else:
            check_columns(corpus, Output("jsonl", 1, False))


# ---------------------------------------------------------------------------------------------- splits


def split_corpus(folder: Path) -> Corpus:
    """Rows of train, test, train and a split without rows."""
    sources = []
    for k, n in enumerate((4, 3, 2, 0)):
        source = folder / f"{k}.jsonl"
        source.write_bytes(b"".join(b'{"a": %d}\n' % (10 * k + i) for i in range(n)))
        sources.append(str(source))
    corpus = open_corpus(sources)
    names = ("train", "test", "train", "nothing")
    parts = [dataclasses.replace(part, split=name) for part, name in zip(corpus.parts, names, strict=True)]
    return dataclasses.replace(corpus, parts=parts)


@pytest.mark.parametrize("to", ["parquet", "arrow", "jsonl"])
def test_each_split_has_files_of_its_own(to: str, folder: Path) -> None:
    fates = [0, 1, 0, 0, 0, 2, 0, 1, 0]
    report = export(split_corpus(folder), fates, folder / "out", to)
    assert [(f["config"], f["split"]) for f in report["files"] if f["rows"] == 0] == [
        ("kept", "nothing"),
        ("dropped", "test"),
        ("dropped", "nothing"),
        ("errors", "train"),
        ("errors", "nothing"),
    ]
    values = {}
    for config in FATES:
        for split in ("train", "test", "nothing"):
            files = paths(folder / "out", report, config, split)
            stem = folder / "out" / FOLDERS[config] / split
            assert all(str(path).startswith(f"{stem}-0000") for path in files)
            if to == "arrow":
                values[config, split] = saved(folder / "out", config)[split]["a"][:]
            elif to == "parquet":
                values[config, split] = pq.read_table(files)["a"].to_pylist()
            else:
                values[config, split] = [row["a"] for row in read_back(files)]  # type: ignore[index]
    assert values == {
        ("kept", "train"): [0, 2, 3, 21],
        ("kept", "test"): [10, 12],
        ("kept", "nothing"): [],
        ("dropped", "train"): [1, 20],
        ("dropped", "test"): [],
        ("dropped", "nothing"): [],
        ("errors", "train"): [],
        ("errors", "test"): [11],
        ("errors", "nothing"): [],
    }
