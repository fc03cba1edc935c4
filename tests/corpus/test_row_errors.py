"""The rows without a conversation: known after one scan, and in bounded memory."""

from __future__ import annotations

import pickle
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sqsd_filter.corpus import row_errors
from sqsd_filter.corpus.conversation import Conversation, RowError
from sqsd_filter.corpus.row_errors import RowErrors
from sqsd_filter.corpus.row_formats import RowFormat
from sqsd_filter.corpus.sources import Row
from tests.corpora import open_corpus, write_jsonl

PAIRS = RowFormat("alpaca", prompt="instruction", answer="output")
ROWS: list[dict[str, Any]] = [
    {"id": 0, "instruction": "q", "output": "a"},
    {"id": 1, "instruction": "q", "output": ""},
    {"id": 2, "instruction": None, "output": "a"},
    {"id": 3, "instruction": "q", "output": "b"},
]


class Counting(RowFormat):
    """A format that counts how often each row is parsed."""

    parsed: ClassVar[Counter[int]] = Counter()

    def conversation(self, row: Mapping[str, Any]) -> Conversation:
        self.parsed[row["id"]] += 1
        return super().conversation(row)


def test_a_scan_parses_each_row_once_and_export_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Counting, "parsed", Counter())
    rows = [*ROWS, {"id": "four", "instruction": "q", "output": None}]  # its id fits no column of numbers
    write_jsonl(tmp_path / "a.jsonl", rows)
    visited: list[Row] = []
    form = Counting("alpaca", prompt="instruction", answer="output")
    corpus = open_corpus([tmp_path / "a.jsonl"], form=form, visit=visited.append)
    (chunk,) = corpus.chunks()
    assert chunk.scorable["id"].to_pylist() == [0, None, None, 3, None]
    assert set(Counting.parsed.values()) == {1}
    assert [isinstance(row.conversation, RowError) for row in visited] == [False, True, True, False, True]
    assert [corpus.errors.reason(row) for row in range(5)] == [
        None,
        "column 'output' is empty or missing",
        "column 'instruction' is empty or missing",
        None,
        "column 'output' is empty or missing",
    ]


def test_rows_of_a_table_are_parsed_where_they_are_visited(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    corpus = open_corpus([tmp_path / "a.parquet"], form=PAIRS, visit=lambda row: None, columns=PAIRS.columns)
    assert corpus.errors.within(0, 4) == {1, 2}
    assert open_corpus([tmp_path / "a.parquet"], form=PAIRS).errors.within(0, 4) == set()


def test_unreadable_rows_have_their_own_problem(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", [ROWS[0], b"{", ROWS[1]])
    visited: list[Row] = []
    corpus = open_corpus([tmp_path / "a.jsonl"], form=PAIRS, visit=visited.append)
    assert corpus.errors.within(0, 3) == {2}
    assert isinstance(visited[1].conversation, RowError)
    assert visited[1].conversation.status == "bad_json"
    assert visited[1].conversation.detail == visited[1].problem


def test_reasons_take_a_bounded_room_and_survive_pickling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_errors, "MOST_TEXT", 10)
    errors = RowErrors()
    for row, reason in [(2, "four"), (5, "too long for it"), (7, "four"), (8, "three2"), (9, "x")]:
        errors.add(row, reason)
    for each in (errors, pickle.loads(pickle.dumps(errors))):
        assert [each.reason(row) for row in (1, 2, 5, 7, 8, 9, 10)] == [
            None,
            "four",
            None,
            "four",
            "three2",
            None,
            None,
        ]
        assert each.within(5, 9) == {5, 7, 8}
