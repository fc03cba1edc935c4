"""Questions with known answers: which answers are right."""

from __future__ import annotations

from pathlib import Path

import pytest

from sqsd_filter.errors import InputError
from sqsd_filter.evaluation.questions import is_right, read_questions
from tests.corpora import write_jsonl


@pytest.mark.parametrize(
    ("answer", "known", "right"),
    [
        ("48 / 2 = 24. She sold 72 clips.", "48 / 2 = 24\n#### 72", True),
        ("It is 72, not 73.", "#### 72", False),
        ("$1,234.50", "#### 1234.5", True),
        ("So 10-5 = 5", "#### 5", True),
        ("It is -5.", "#### 5", False),
        ("5kg", "#### 5", True),
        ("Seventy-two", "#### 72", False),
        ("Open QA.", "open qa", True),
        ("open qa or closed qa", "open qa", False),
        ("", "open qa", False),
    ],
)
def test_the_last_number_has_to_be_right_or_else_all_words(answer: str, known: str, right: bool) -> None:
    assert is_right(answer, known) is right


def test_questions_are_read_with_their_answers(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "q.jsonl", [{"prompt": f"{k}?", "answer": f"{k}"} for k in range(3)])
    assert read_questions(path, 2) == [("0?", "0"), ("1?", "1")]
    for wrong in ({"prompt": "?"}, {"prompt": "?", "answer": 5}, {"prompt": "?", "answer": " ."}):
        write_jsonl(path, [{"prompt": "1?", "answer": "1"}, wrong])
        with pytest.raises(InputError, match=r"Line 2 of .* has no text under 'answer'"):
            read_questions(path)
    with pytest.raises(InputError, match="no prompts"):
        read_questions(write_jsonl(path, []))
