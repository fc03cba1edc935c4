"""Columns and keys that look as if they changed what is learned, and are not read: named once, or an error."""

from __future__ import annotations

import json
from typing import Any

import pytest

from sqsd_filter.corpus.row_formats import Columns
from sqsd_filter.corpus.unread import Unread
from sqsd_filter.errors import InputError
from tests.tiny import chat

TURNS = chat("q", "a")


def names(rows: list[dict[str, Any]], **columns: Any) -> list[tuple[str, str, int]]:
    unread = Unread(Columns(**columns).choose(rows))
    for line, row in enumerate(rows, 1):
        unread.see(row, "a.jsonl", line)
    return sorted((name["name"], name["kind"], name["line"]) for name in unread.found)


def test_a_column_with_a_meaning_to_a_trainer_is_named_with_its_first_row() -> None:
    rows = [{"messages": TURNS, "id": k, "weight": 2 if k else None, "prompt": "q"} for k in range(3)]
    assert names(rows) == [("prompt", "column", 1), ("weight", "column", 2)]


@pytest.mark.parametrize("nothing", [None, "", [], "[]", float("nan")])
def test_a_column_without_values_is_not_named(nothing: object) -> None:
    assert names([{"messages": TURNS, "documents": nothing}]) == []


def test_what_is_read_is_not_named() -> None:
    row = {"prompt": "q", "chosen": "a", "rejected": "b", "system": "s", "tools": [{"name": "f"}], "images": ["x"]}
    assert names([row]) == []


def test_columns_beside_those_that_the_user_names_are_named() -> None:
    row = {"query": "q", "response": "a", "system": "s", "history": [["o", "p"]]}
    assert names([row], prompt="query", answer="response") == [("history", "column", 1), ("system", "column", 1)]


@pytest.mark.parametrize("write", [lambda turns: turns, json.dumps, repr], ids=["list", "json", "python"])
def test_a_key_of_a_turn_is_named(write: Any) -> None:
    rows = [{"messages": write(TURNS)}, {"messages": write([{**TURNS[0], "documents": ["d"]}, TURNS[1]])}]
    assert names(rows) == [("documents", "key", 2)]


def test_a_note_says_where_and_what_it_means() -> None:
    unread = Unread(Columns().choose([row := {"messages": TURNS, "weight": 2}]))
    unread.see(row, "a.jsonl", 7)
    unread.see(row, "a.jsonl", 8)
    (note,) = unread.notes()
    assert note.startswith("not read: column 'weight' (a.jsonl, line 7); ")


def test_strict_makes_it_an_error() -> None:
    row = {"messages": TURNS, "weight": 2}
    columns = Columns(strict=True)
    with pytest.raises(InputError, match=r"column 'weight' \(a.jsonl, line 7\) may change what is learned.*--strict"):
        Unread(columns.choose([row]), columns.strict).see(row, "a.jsonl", 7)
