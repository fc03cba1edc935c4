"""Marks of what is learned: a turn is learned or not, and a row whose marks say anything else is an error."""

from __future__ import annotations

from typing import Any

import pytest

from sqsd_filter.corpus.conversation import RowError, read_turns
from sqsd_filter.corpus.row_formats import Columns
from tests.tiny import chat

OFF: list[dict[str, Any]] = [
    {"weight": 0},
    {"weight": 0.0},
    {"train": False},
    {"training": False},
    {"train_on_turn": False},
    {"loss": False},
    {"loss_mask": 0},
    {"loss_scale": 0.0},
    {"loss_weight": 0},
    {"masked": True},
    {"train_detail": [{"begin_offset": 0, "end_offset": 0, "train": False}]},
    {"weight": 1, "loss": False},
]
ON: list[dict[str, Any]] = [
    {"loss": True},
    {"loss_scale": 1.0},
    {"weight": None, "loss": None},
    {"loss": float("nan")},
    {"masked": False},
    {"train_detail": '[{"begin_offset": 0, "end_offset": 0, "train": true}]'},
]


@pytest.mark.parametrize("mark", OFF, ids=str)
def test_a_turn_that_is_marked_is_not_learned(mark: dict[str, Any]) -> None:
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", **mark}]
    assert read_turns(turns, "it") == [*chat("q"), {"role": "assistant", "content": "a", "weight": 0}]


@pytest.mark.parametrize("mark", ON, ids=str)
def test_a_mark_for_learning_changes_nothing(mark: dict[str, Any]) -> None:
    assert read_turns([{"role": "assistant", "content": "a", **mark}], "it") == [{"role": "assistant", "content": "a"}]


def of_parts(*marks: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"type": "text", "text": f" {k}", **mark} for k, mark in enumerate(marks)]


@pytest.mark.parametrize(
    ("marks", "learned"),
    [
        ([{}, {}], True),
        ([{"train": True}, {}], True),
        ([{"weight": None}, {"train": None}], True),
        ([{"weight": 0}, {"weight": 0.0}], False),
        ([{"train": False, "weight": 1}], False),
    ],
    ids=str,
)
def test_parts_that_are_marked_alike_mark_their_turn(marks: list[dict[str, Any]], learned: bool) -> None:
    content = of_parts(*marks)
    (turn,) = read_turns([{"role": "assistant", "content": content}], "it")
    assert turn == {"role": "assistant", "content": " 0 1"[: 2 * len(marks)]} | ({} if learned else {"weight": 0})


@pytest.mark.parametrize(
    ("role", "marks", "said"),
    [
        ("assistant", [{"weight": 0}, {"weight": 1}], "learned in part by its weight"),
        ("assistant", [{}, {"train": False}], "learned in part by its train, which"),
        ("assistant", [{"weight": 0.5}], "a part of turn 1 of it has the weight 0.5"),
        ("user", [{"train": True}], "to be learned by its train, but only"),
        ("user", [{"train": False}, {}], "to be learned by its train, but only"),
    ],
    ids=str,
)
def test_parts_that_are_learned_otherwise_make_the_row_an_error(
    role: str, marks: list[dict[str, Any]], said: str
) -> None:
    with pytest.raises(RowError, match=said) as problem:
        read_turns([{"role": role, "content": of_parts(*marks)}], "it")
    assert problem.value.status == "bad_row"


def test_parts_of_a_question_that_none_learns_change_nothing() -> None:
    (turn,) = read_turns([{"role": "user", "content": of_parts({"train": False}, {"weight": 0})}], "it")
    assert turn == {"role": "user", "content": " 0 1"}


PARTS = [{"begin_offset": 0, "end_offset": 3, "train": False}, {"begin_offset": 4, "end_offset": 9, "train": True}]
REFUSED: list[tuple[str, dict[str, Any], str]] = [  # the role, its mark, what is said
    ("assistant", {"loss_scale": 0.3}, "loss_scale 0.3"),
    ("assistant", {"loss_mask": [0, 1, 1]}, r"loss_mask \[0, 1, 1\]"),
    ("assistant", {"loss": "no"}, "loss 'no'"),
    ("assistant", {"train_detail": PARTS}, "learned in part by its train_detail"),
    ("assistant", {"train_detail": ["x"]}, "train_detail that is not a list"),
    ("user", {"train": True}, "to be learned by its train, but only"),
    ("user", {"train_detail": PARTS}, "to be learned by its train_detail"),
]


@pytest.mark.parametrize(("role", "mark", "said"), REFUSED, ids=str)
def test_a_mark_that_cannot_be_honoured_makes_the_row_an_error(role: str, mark: dict[str, Any], said: str) -> None:
    with pytest.raises(RowError, match=said) as problem:
        read_turns([{"role": role, "content": "a", **mark}], "it")
    assert problem.value.status == "bad_row"


def test_the_label_of_a_kto_row_decides_whether_it_is_learned() -> None:
    rows = [{"prompt": "q", "completion": "a", "label": label} for label in (True, False, None)]
    form = Columns().choose(rows)
    assert str(form) == "prompt-completion (prompt, completion, label)"
    assert form.conversation(rows[0]) == form.conversation(rows[2]) == chat("q", "a")
    with pytest.raises(RowError, match="'label' is false") as problem:
        form.conversation(rows[1])
    assert problem.value.status == "unwanted"
    assert Columns(labels="all").choose(rows).conversation(rows[1]) == chat("q", "a")
    unwanted = Columns(labels="false").choose(rows)
    assert unwanted.conversation(rows[1]) == chat("q", "a")
    with pytest.raises(RowError, match="'label' is true"):
        unwanted.conversation(rows[0])
    assert form.conversation({**rows[0], "label": "True"}) == chat("q", "a")  # as CSV has it
    with pytest.raises(RowError, match="'label' holds 'yes'"):
        form.conversation({**rows[0], "label": "yes"})


def test_the_tag_of_llamafactory_is_a_label_and_a_class_is_none() -> None:
    assert Columns().choose([{"conversations": chat("q", "a"), "kto_tag": False}]).label == "kto_tag"
    assert Columns().choose([{"question": "q", "answer": "a", "label": 1}]).label is None
    assert Columns().choose([{"prompt": "q", "chosen": "a", "rejected": "b", "label": True}]).label is None


def test_masks_of_tokens_beside_the_text_make_the_row_an_error() -> None:
    row = {"messages": chat("q", "a"), "loss_mask": [0, 1]}
    form = Columns().choose([row])
    with pytest.raises(RowError, match="'loss_mask' marks which tokens are learned"):
        form.conversation(row)
    assert form.conversation({**row, "loss_mask": None}) == chat("q", "a")


def test_roles_to_train_are_the_assistants_or_an_error() -> None:
    rows = [{"messages": chat("q", "a"), "roles_to_train": roles} for roles in (["gpt"], [], ["user", "assistant"])]
    form = Columns().choose(rows)
    assert form.conversation(rows[0]) == form.conversation(rows[1]) == chat("q", "a")
    with pytest.raises(RowError, match="'roles_to_train' has the role 'user'"):
        form.conversation(rows[2])
