"""The options of a run: what is given for them by mistake."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest

from sqsd_filter import Cut, Scoring, Writing, score_dataset, select_dataset
from sqsd_filter.errors import UsageError


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: score_dataset("a.jsonl", "s.parquet", "pack"), "'pack' is not Scoring: give the options as Scor"),  # type: ignore[arg-type]
        (lambda: select_dataset("out", "other", "5%"), "'5%' is not Cut: give the options as Cut.of(drop_top="),  # type: ignore[arg-type]
        (lambda: select_dataset("out", "other", Cut.of("5%"), "jsonl"), "'jsonl' is not Writing: give the opt"),  # type: ignore[arg-type]
        (lambda: Scoring(scorer="length"), "scorer is 'length': give an object such as make_scorer(...) makes."),  # type: ignore[arg-type]
        (lambda: Scoring(engine="ray"), "engine is 'ray': give an object such as choose_engine(...) makes."),  # type: ignore[arg-type]
        (lambda: Scoring(columns={"answer": "a"}), "columns is {'answer': 'a'}: give an object such as Columns"),  # type: ignore[arg-type]
    ],
    ids=["scoring", "cut", "writing", "scorer", "engine", "columns"],
)
def test_another_thing_in_the_place_of_an_option_is_a_usage_error(call: Callable[[], object], sentence: str) -> None:
    with pytest.raises(UsageError, match=re.escape(sentence)):
        call()


@pytest.mark.parametrize("to", [None, "parquet", "jsonl"])
@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"json_as": "bogus"}, "can be written as json or text, not 'bogus'."),
        ({"shard_size": "xyz"}, "'xyz' is not a file size: write it like 100MB or 1GB."),
        ({"shard_size": 0}, "'0' is not a file size"),
        ({"on_error": "bogus"}, "bogus"),
    ],
    ids=str,
)
def test_what_makes_no_sense_in_any_format_is_refused_without_one(
    to: str | None, options: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(UsageError, match=re.escape(sentence)):
        Writing(to=to, **options)
