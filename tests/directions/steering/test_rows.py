"""Which rows a direction is tried on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from sqsd_filter.directions.steering.rows import TrialColumns, read_trials
from sqsd_filter.errors import InputError
from sqsd_filter.scoring.chat_encoder import ChatEncoder
from tests.corpora import write_jsonl
from tests.tiny import make_tokenizer

ROWS: list[dict[str, Any]] = [
    {"prompt": "a", "chosen": "no", "rejected": "yes"},
    {"prompt": "b", "chosen": "no"},
    {"prompt": "c", "chosen": " ", "rejected": "yes"},
    {"prompt": "d", "chosen": "never", "rejected": "always"},
]


def test_a_row_without_both_answers_is_a_prompt_alone(tmp_path: Path) -> None:
    trials = read_trials(write_jsonl(tmp_path / "rows.jsonl", ROWS), TrialColumns())
    assert trials.prompts == ["a", "b", "c", "d"]
    assert [(p.prompt, p.safe, p.unsafe) for p in trials.pairs] == [("a", "no", "yes"), ("d", "never", "always")]
    assert trials.source["pairs"] == 2
    assert trials.source["files"][0]["file"] == "rows.jsonl"  # no path of this machine


def test_other_columns_are_named_and_the_first_rows_taken(tmp_path: Path) -> None:
    renamed = [{"q": r["prompt"], "good": r.get("chosen"), "bad": r.get("rejected")} for r in ROWS]
    Dataset.from_list(renamed).to_parquet(tmp_path / "rows.parquet")
    trials = read_trials(tmp_path / "rows.parquet", TrialColumns("q", "good", "bad"), limit=3)
    assert trials.prompts == ["a", "b", "c"]
    assert len(trials.pairs) == 1


@pytest.mark.parametrize(
    ("lines", "columns", "why"),
    [
        ([{"q": "a"}], {}, r"no column 'prompt' \(they have 'q'\): name the right one with --prompt-column"),
        (ROWS, {"safe": "good"}, "no column 'good' .*--safe-column"),
        (ROWS, {"unsafe": "bad"}, "no column 'bad' .*--unsafe-column"),
        ([{"prompt": "a"}, {"prompt": " "}], {}, "rows.jsonl, line 2: the column 'prompt' is empty"),
        ([{"prompt": "a"}, {"prompt": ["a"]}], {}, "rows.jsonl, line 2: the column 'prompt' holds list, not text"),
        ([{"prompt": "a", "chosen": 1, "rejected": "b"}], {}, "line 1: the column 'chosen' holds int"),
    ],
)
def test_rows_that_can_t_be_used_are_named(
    tmp_path: Path, lines: list[dict[str, Any]], columns: dict[str, str], why: str
) -> None:
    with pytest.raises(InputError, match=why):
        read_trials(write_jsonl(tmp_path / "rows.jsonl", lines), TrialColumns(**columns))


def test_an_unreadable_line_and_an_empty_file_are_named(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a"}\nnot json\n')
    with pytest.raises(InputError, match=r"rows.jsonl, line 2: "):
        read_trials(tmp_path / "rows.jsonl", TrialColumns())
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(InputError, match=r"empty.jsonl has no rows"):
        read_trials(tmp_path / "empty.jsonl", TrialColumns())


def test_an_answer_that_does_not_fit_is_named(tmp_path: Path) -> None:
    trials = read_trials(write_jsonl(tmp_path / "rows.jsonl", [{**ROWS[0], "prompt": "a" * 99}]), TrialColumns())
    with pytest.raises(InputError, match=r"rows.jsonl, line 1: the prompt leaves no room for an answer in 20 tokens"):
        trials.encoded(ChatEncoder(make_tokenizer(), 20))
