"""What a run says of how it reads rows: in the report, on stderr, and in errors with the first row's own reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sqsd_filter import Columns, SQSDScorer, filter_dataset
from sqsd_filter.errors import InputError, RowErrorBudgetExceeded
from sqsd_filter.progress import Silent
from tests.corpora import make_rows, read_report, rows_of, write_jsonl


class Listener(Silent):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, message: str) -> None:
        self.notes.append(message)


def run(scorer: SQSDScorer, rows: list[Any], **settings: Any) -> tuple[Any, list[str]]:
    """The report of a run over these lines, and its notes."""
    listener = Listener()
    write_jsonl(Path("rows.jsonl"), rows)
    report = filter_dataset("rows.jsonl", "out", drop_count=1, scorer=scorer, progress=listener, **settings)
    return report, listener.notes


def test_a_column_that_is_not_read_is_in_the_notes_and_in_the_report(folder: Path, scorer: SQSDScorer) -> None:
    rows = [{**row, "weight": 2 if k > 3 else None} for k, row in enumerate(make_rows(12))]
    report, notes = run(scorer, rows)
    assert report["unread"] == [{"name": "weight", "kind": "column", "file": "rows.jsonl", "line": 5}]
    assert read_report(Path("out"))["unread"] == report["unread"]
    assert [note for note in notes if "not read" in note] == [
        "not read: column 'weight' (rows.jsonl, line 5); if a trainer reads it, these scores are not of what it learns"
    ]


def test_a_column_that_is_not_read_ends_a_strict_run_before_it_scores(folder: Path, scorer: SQSDScorer) -> None:
    rows = [{**row, "weight": 2} for row in make_rows(12)]
    with pytest.raises(InputError, match=r"column 'weight' \(rows.jsonl, line 1\) may change what is learned"):
        run(scorer, rows, columns=Columns(strict=True))
    assert not Path("out").exists()
    assert "unread" not in run(scorer, make_rows(12), columns=Columns(strict=True))[0]


def test_rows_that_are_not_wanted_are_set_apart_and_are_no_failure(folder: Path, scorer: SQSDScorer) -> None:
    rows = [{"prompt": f"q {k}", "completion": "a", "label": k < 2} for k in range(12)]
    report, notes = run(scorer, rows, max_error_rate="1%")
    assert report["rows"]["scored"] == 2
    assert report["unscored"] == {"unwanted": 10}
    assert [row["label"] for row in rows_of(Path("out"), "errors")] == [False] * 10
    assert "scoring the rows whose 'label' is true; choose others with --labels" in notes


def test_blank_lines_are_counted_in_the_report_and_said(folder: Path, scorer: SQSDScorer) -> None:
    rows = [line for row in make_rows(12) for line in (row, b"", b" ")]
    report, notes = run(scorer, rows)
    assert report["rows"]["total"] == 12
    assert report["inputs"][0]["blank_lines"] == 24
    assert "24 blank lines are no rows (the first are in rows.jsonl)" in notes


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ({"instruction": 5, "output": "x"}, r"column 'instruction' holds int, not text"),
        (b'{"instruction": "\xe9"}', r"not UTF-8: byte 18; convert the file to UTF-8"),
        ({"instruction": "far too long " * 200, "output": "x"}, "the prompt leaves no room"),
    ],
    ids=["bad-row", "bad-json", "too-long"],
)
def test_too_many_errors_quote_the_first_rows_own_reason(
    line: Any, reason: str, folder: Path, scorer: SQSDScorer
) -> None:
    with pytest.raises(RowErrorBudgetExceeded, match=rf"the first is rows\.jsonl, line 13 \({reason}"):
        run(scorer, [*make_rows(12), line], on_error="fail")
