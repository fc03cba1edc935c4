"""What is noted of rows while they are written: the same as by looking at all of them, but little of it."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sqsd_filter.corpus.conversation import Message
from sqsd_filter.corpus.row_formats import RowFormat
from sqsd_filter.pipeline.page import notes
from sqsd_filter.pipeline.page.notes import MOST_TEXT, NoteTaker
from sqsd_filter.pipeline.scores.scored import PerModule
from sqsd_filter.pipeline.selecting.selection import KEPT
from tests.corpora import by_hand, make_rows, open_corpus, write_jsonl
from tests.pages import noted


def textbook(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's correlation of values that are all different."""
    return float(np.corrcoef(np.argsort(np.argsort(a)), np.argsort(np.argsort(b)))[0, 1])


def test_the_correlation_with_length_is_spearmans(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    lengths, risk = random.permutation(100) + 1, random.normal(size=100)
    rows = [{"instruction": "a" * 7, "output": "é" * n} for n in lengths]
    _, taken = noted(tmp_path, rows, risk=risk)
    answers = taken["lengths"]
    assert answers is not None
    assert answers["spearman"] == pytest.approx(textbook(risk, lengths))
    assert answers["rows"] == 100
    assert [(n, r) for n, r, _ in answers["points"]] == [*zip(lengths, risk, strict=True)]
    assert [dropped for _, _, dropped in answers["points"]].count(True) == 2
    by_length = np.argsort(lengths).reshape(10, 10)
    for band, rows_of_band in zip(answers["bands"], by_length, strict=True):
        expected = [np.median(lengths[rows_of_band]), *np.quantile(risk[rows_of_band], [0.25, 0.5, 0.75])]
        assert band == pytest.approx(expected)


def test_no_more_conversations_are_made_than_are_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []

    class Counting(RowFormat):
        def conversation(self, row: Any) -> list[Message]:
            made.append(row)
            return super().conversation(row)

    for name, most in (("MOST_LENGTHS", 64), ("MOST_POINTS", 10), ("MOST_ROWS", 5)):
        monkeypatch.setattr(notes, name, most)
    form = Counting("alpaca", prompt="instruction", answer="output")
    _, taken = noted(tmp_path, make_rows(5000), form=form)
    assert len(made) <= 64 + 5
    assert taken["lengths"] is not None
    assert taken["lengths"]["rows"] >= 64
    assert len(taken["lengths"]["points"]) <= 10
    assert [row["row"] for row in taken["riskiest"]] == [4999, 4998, 4997, 4996, 4995]
    assert noted(tmp_path, make_rows(5000), form=form)[1] == taken  # the same rows every time


def test_rows_are_noted_with_their_origin_their_probes_and_the_head_of_their_text(tmp_path: Path) -> None:
    rows = [{"instruction": "short", "output": "b"}, {"instruction": "a" * (MOST_TEXT + 3), "output": "c"}]
    _, taken = noted(tmp_path, rows, drop_count=1)
    first, second = taken["riskiest"]
    assert (first["row"], first["file"], first["line"], first["dropped"]) == (1, str(tmp_path / "in.jsonl"), 2, True)
    assert first["prompt"] == {"text": "a" * MOST_TEXT, "more": 3}
    assert first["answer"] == {"text": "c", "more": 0}
    assert first["probes"] == {"danger": pytest.approx(1 / 7), "safety": 0.1}
    assert (second["prompt"]["more"], second["dropped"]) == (0, False)


def test_a_conversation_shows_who_says_what_and_all_that_is_supervised(tmp_path: Path) -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello?"},
        {"role": "assistant", "content": "One."},
        {"role": "user", "content": "And?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
    ]
    _, taken = noted(tmp_path, [{"messages": turns}], form=RowFormat("messages", messages="messages"))
    assert taken["riskiest"][0]["prompt"]["text"] == "system: Be brief.\n\nuser: Hello?\n\nuser: And?"
    assert taken["riskiest"][0]["answer"]["text"].startswith("One.\n\n[{")
    assert "add" in taken["riskiest"][0]["answer"]["text"]


@pytest.mark.parametrize("known", [True, False], ids=["known", "guessed"])
def test_the_form_of_rows_is_guessed_where_it_is_not_known(tmp_path: Path, known: bool) -> None:
    form = RowFormat("alpaca", prompt="instruction", answer="output") if known else None
    _, taken = noted(tmp_path, make_rows(8), form=form)
    assert taken["riskiest"][0]["answer"]["text"] == "It is 7."
    assert taken["lengths"] is not None
    assert taken["lengths"]["rows"] == 8


def test_rows_of_no_known_form_are_shown_as_they_are(tmp_path: Path) -> None:
    _, taken = noted(tmp_path, [{"a": "é", "b": 1}], form=None)
    assert taken["lengths"] is None
    assert taken["riskiest"][0]["prompt"]["text"] == '{"a": "é", "b": 1}'


def test_the_first_rows_of_each_error_are_named(tmp_path: Path) -> None:
    report, taken = noted(tmp_path, [*make_rows(3), *[b"{"] * 5])
    assert report["unscored"] == {"no_answer": 5}  # as `by_hand` calls it
    assert [each["line"] for each in taken["errors"]["no_answer"]] == [4, 5, 6]
    assert all(each["why"] for each in taken["errors"]["no_answer"])


def test_the_heat_map_has_the_plain_means(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notes, "BLOCK", 3500)
    monkeypatch.setattr(notes, "MOST_ROWS", 4)
    n = 10_000
    corpus = open_corpus([write_jsonl(tmp_path / "in.jsonl", make_rows(n))])
    cosines = np.random.default_rng(0).normal(size=(n, 200)).astype(np.float32)
    cosines[3] = np.nan
    scored, _ = by_hand(corpus, [KEPT] * n, [3])
    modules = {"danger": PerModule([f"model.layers.{k}.mlp.up_proj" for k in range(200)], cosines)}
    scored = replace(scored, modules=modules)
    taker = NoteTaker(scored, None)
    tracemalloc.start()
    means = taker.means(modules["danger"])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < cosines.nbytes / 4  # no copy
    assert means["places"] == [(k, "mlp.up_proj") for k in range(200)]
    exact = cosines.astype(np.float64)
    assert means["all"] == pytest.approx(np.nanmean(exact, axis=0))
    assert means["riskiest"] == pytest.approx(exact[-4:].mean(axis=0))


@pytest.mark.parametrize("form", [None, RowFormat("alpaca", prompt="instruction", answer="output")])
def test_rows_with_nothing_but_scores_are_shown_empty(tmp_path: Path, form: RowFormat | None) -> None:
    rows = [{"sqsd_risk": 0.5, "sqsd_status": "scored"}, {"sqsd_risk": 0.7, "sqsd_status": "scored"}]
    _, taken = noted(tmp_path, rows, form=form, drop_count=1)
    assert [(row["row"], row["prompt"]["text"]) for row in taken["riskiest"]] == [(1, "{}"), (0, "{}")]
