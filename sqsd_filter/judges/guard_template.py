"""The chat template of a guard, which asks whether the last answer of a conversation is safe or unsafe."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from sqsd_filter.errors import JudgeError, first_line
from sqsd_filter.judges.dialogue import ASSISTANT, USER, Said
from sqsd_filter.judges.generation import Turn, rendered

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Content = Callable[[str], object]  # from a text to the `content` of a turn


def content_of(tokenizer: PreTrainedTokenizerBase, name: str) -> Content:
    """How the chat template takes a turn's content: the text itself, or a list of parts.

    Raises `JudgeError` if it shows neither."""
    causes, marks = [], ("[[question]]", "[[answer]]")
    said = [Said(role, mark) for role, mark in zip((USER, ASSISTANT), marks, strict=True)]
    for content in (str, _parts):
        try:
            text = rendered(tokenizer, as_turns(said, content))
        except Exception as problem:  # Jinja templates raise what they like
            causes.append(first_line(problem))
            continue
        if all(mark in text for mark in marks):
            return content
        causes.append("it leaves one of them out")
    raise JudgeError(
        f"The chat template of {name} does not show a question with its answer ({causes[0]}): name a chat guard such "
        "as Llama-Guard-3."
    )


def as_turns(dialogue: Sequence[Said], content: Content) -> list[Turn]:
    """A dialogue as the template takes it."""
    return [{"role": said.role, "content": content(said.text)} for said in dialogue]


def _parts(text: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text}]
