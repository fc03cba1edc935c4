"""The column sqsd_row: where a row comes from, on every dropped row and error, and on kept rows on request."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sqsd_filter import Cut, Writing, select_dataset
from sqsd_filter.errors import DestinationExists, InputError
from sqsd_filter.pipeline.report import FinishedReport
from tests.corpora import ids_of, rows_of, write_jsonl

FORMATS = ("parquet", "arrow", "jsonl", "json")
# with a blank line, a line that is no JSON, and a row without a score
LINES: list[dict[str, Any] | bytes] = [
    {"id": 1, "sqsd_risk": 0.5, "sqsd_status": "scored"},
    b"",
    {"id": 3, "sqsd_risk": 0.9, "sqsd_status": "scored"},
    b"broken",
    {"id": 5, "sqsd_risk": None, "sqsd_status": "no_answer"},
    {"id": 6, "sqsd_risk": 0.1, "sqsd_status": "scored"},
]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "in.jsonl", LINES)
    return tmp_path


def cut(source: Any = "in.jsonl", dest: str = "out", **writing: Any) -> FinishedReport:
    return select_dataset(source, dest, Cut.of(drop_count=1), Writing(**writing))


def found(report: FinishedReport, config: str, dest: str = "out") -> list[dict[str, Any]]:
    """The rows of a config, whatever their format."""
    rows: list[dict[str, Any]] = []
    for file in report["files"]:
        path = Path(dest, file["path"])
        if file["config"] != config:
            continue
        if report["to"] == "parquet":
            rows += pq.read_table(path).to_pylist()
        elif report["to"] == "arrow":
            with pa.memory_map(str(path)) as source:
                rows += pa.ipc.open_stream(source).read_all().to_pylist()
        elif report["to"] == "json":
            rows += json.loads(path.read_bytes())
        else:
            rows += [json.loads(line) for line in path.read_bytes().splitlines() if line != b"broken"]
    return rows


@pytest.mark.parametrize("asked", [False, True])
@pytest.mark.parametrize("to", FORMATS)
def test_rows_say_which_line_of_which_file_they_were(to: str, asked: bool, folder: Path) -> None:
    report = cut(to=to, rows_column=asked)
    kept, dropped, errors = (found(report, config) for config in ("kept", "dropped", "errors"))
    assert [row["sqsd_row"] for row in dropped] == ["in.jsonl:3"]
    unreadable = ["in.jsonl:4"] if to != "jsonl" else []  # there it is the line itself
    assert [row["sqsd_row"] for row in errors] == [*unreadable, "in.jsonl:5"]
    assert [row.get("sqsd_row") for row in kept] == (["in.jsonl:1", "in.jsonl:6"] if asked else [None] * 2)
    assert all(("sqsd_row" in row) == asked for row in kept)
    assert report.get("rows_column", False) == asked
    card = Path("out/README.md").read_text().lower()
    assert ("everywhere" in card) == asked
    assert "`sqsd_row`" in card


def test_kept_lines_stay_the_inputs_own_unless_asked(folder: Path) -> None:
    cut(to="jsonl")
    lines = Path("in.jsonl").read_bytes().splitlines(True)
    assert Path("out/data/train-00000-of-00001.jsonl").read_bytes() == lines[0] + lines[5]
    cut(dest="named.jsonl", rows_column=True)
    named = [line[:-2] + b', "sqsd_row": "in.jsonl:%d"}\n' % k for k, line in ((1, lines[0]), (6, lines[5]))]
    assert Path("named.jsonl").read_bytes() == b"".join(named)


@pytest.mark.parametrize("to", FORMATS)
def test_a_row_that_says_where_it_comes_from_goes_on_to_say_so(to: str, folder: Path) -> None:
    first = cut(to=to, rows_column=True, with_scores=to.startswith("json"))
    paths = [f"out/{file['path']}" for file in first["files"] if file["config"] == "kept"]
    again = cut(paths, "again", to=to, rows_column=True)
    assert [row["sqsd_row"] for row in found(again, "dropped", "again")] == ["in.jsonl:1"]
    assert [row["sqsd_row"] for row in found(again, "kept", "again")] == ["in.jsonl:6"]


def test_rows_of_tables_are_counted_from_one_and_several_files_told_apart(folder: Path) -> None:
    rows = [{"id": k, "sqsd_risk": float(k), "sqsd_status": "scored"} for k in range(3)]
    for name in ("a", "b"):
        pq.write_table(pa.Table.from_pylist(rows), f"{name}.parquet")
    select_dataset(["a.parquet", "b.parquet"], "out", Cut.of(max_risk=0.5), Writing())
    assert [row["sqsd_row"] for row in rows_of(Path("out"), "dropped")] == [
        f"{name}.parquet:{k}" for name in ("a", "b") for k in (2, 3)
    ]
    assert ids_of(Path("out"), "dropped") == [1, 2, 1, 2]


@pytest.mark.parametrize(
    "kind",
    [pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())],
    ids=["large_string", "string_view", "dictionary"],
)
@pytest.mark.parametrize("to", FORMATS)
def test_text_of_any_type_says_where_a_row_comes_from(kind: pa.DataType, to: str, folder: Path) -> None:
    scores = {"sqsd_risk": [0.0, 1.0, 2.0], "sqsd_status": ["scored"] * 3}
    pq.write_table(pa.table({"sqsd_row": pa.array(["b:8", "b:9", None]).cast(kind), **scores}), "a.parquet")
    report = select_dataset("a.parquet", "out", Cut.of(drop_count=2), Writing(to=to))
    assert [row["sqsd_row"] for row in found(report, "dropped")] == ["b:9", "a.parquet:3"]


@pytest.mark.parametrize("to", FORMATS)
def test_a_column_of_that_name_that_holds_no_text_is_refused(to: str, folder: Path) -> None:
    rows = [{"id": k, "sqsd_row": 7, "sqsd_risk": float(k), "sqsd_status": "scored"} for k in range(2)]
    pq.write_table(pa.Table.from_pylist(rows), "a.parquet")
    with pytest.raises(InputError, match=r"Column 'sqsd_row' holds int64, and the file and line .*: rename yours\."):
        cut("a.parquet", to=to)
    assert not Path("out").exists()


def test_rows_with_and_without_the_column_are_two_runs_and_those_without_are_as_before(folder: Path) -> None:
    cut()
    assert not {"rows_column", "json_as", "compression"} & json.loads(Path("out/_sqsd/run.json").read_text()).keys()
    with pytest.raises(DestinationExists, match="rows_column: None there, True here"):
        cut(rows_column=True)
