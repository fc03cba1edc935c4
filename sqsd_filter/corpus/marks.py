"""Marks of what is learned: the keys by which trainers take a turn, or a part of it, out of the loss.

A turn is learned whole or not at all here. A mark that says anything else makes its row an error, never a guess.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sqsd_filter.corpus.statuses import BAD_ROW, RowError
from sqsd_filter.corpus.values import is_missing, parse_text

# OpenAI, axolotl, ms-swift, slime and others; a number scales the loss, so that only 0 and 1 mean no or yes
_LEARNED = ("weight", "train", "training", "train_on_turn", "loss", "loss_mask", "loss_scale", "loss_weight")
_HIDDEN = ("masked",)  # torchtune: true where the turn is not learned
_OF_ANY_TURN = ("train", "training", "train_on_turn")  # true in a question's turn, they teach the question
_DETAIL = "train_detail"  # axolotl: parts of the text, each with `train`
_OF_A_PART = ("train", "weight")  # axolotl: keys of a part of the content; the first one counts
TURN_MARKS = (*_LEARNED, *_HIDDEN, _DETAIL)


def is_learned(turn: Mapping[str, Any], content: object, where: str, *, answers: bool) -> bool:
    """Do the marks of a turn, which is an answer or not, and of the parts of its content leave it in the loss?

    Raises `RowError` with `bad_row` for a mark that is neither yes nor no, and for one that teaches a turn that is no
    answer.
    """
    parts = _marks_of_parts(content, where) if isinstance(content, list | tuple) else []
    if turn.keys().isdisjoint(TURN_MARKS) and not parts:
        return True
    marks = [(key, _yes_or_no(turn[key], key, where)) for key in _LEARNED if answers and not is_missing(turn.get(key))]
    marks += [(key, not _yes_or_no(turn[key], key, where)) for key in _HIDDEN if not is_missing(turn.get(key))]
    detail = parse_text(turn.get(_DETAIL))
    if not is_missing(detail):
        parts += [(_DETAIL, learned) for learned in _of_detail(detail, where)]
    if answers and len({learned for _, learned in parts}) > 1:
        key = parts[-1][0]
        raise RowError(
            BAD_ROW,
            f"{where} is learned in part by its {key}, which can't be scored: split the turn, or leave {key} out",
        )
    marks += parts
    if not answers:
        taught = [key for key in _OF_ANY_TURN if turn.get(key) is True]
        taught += [key for key, learned in parts if learned]
        if taught:
            raise RowError(
                BAD_ROW, f"{where} is to be learned by its {taught[0]}, but only an assistant's turns are scored"
            )
    return all(learned for _, learned in marks)


def _yes_or_no(value: object, key: str, where: str) -> bool:
    if isinstance(value, bool | int | float) and value in (0, 1):
        return bool(value)
    raise RowError(BAD_ROW, f"{where} has the {key} {value!r}; only 0 and 1 have a meaning")


def _of_detail(detail: object, where: str) -> list[bool]:
    parts: list[Any] = list(detail) if isinstance(detail, list | tuple) else [detail]
    if not all(isinstance(part, Mapping) and isinstance(part.get("train"), bool) for part in parts):
        raise RowError(BAD_ROW, f"{where} has a {_DETAIL} that is not a list of parts with train true or false")
    return [part["train"] for part in parts]


def _marks_of_parts(content: list[Any] | tuple[Any, ...], where: str) -> list[tuple[str, bool]]:
    """The mark of each part of the content, if any has one: a part without one is learned."""
    parts = [part if isinstance(part, Mapping) else {} for part in content]
    keys = [next((key for key in _OF_A_PART if not is_missing(part.get(key))), None) for part in parts]
    named = next((key for key in keys if key), None)
    if named is None:
        return []
    return [
        (named, _yes_or_no(part[key], key, f"a part of {where}") if key else True)
        for part, key in zip(parts, keys, strict=True)
    ]
