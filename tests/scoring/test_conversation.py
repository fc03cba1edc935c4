"""Turns in the forms that rows hold them, and the keys of conversations."""

from __future__ import annotations

import pytest

from sqsd_filter.scoring.conversation import Message, conversation_key
from tests.tiny import chat


@pytest.mark.parametrize(
    "other",
    [chat("q", "a "), chat("q", "b"), chat("a", "q"), chat("q", "a", system="s"), chat("q", "a", "q"), chat("qa", "")],
    ids=["space", "answer", "swapped", "system", "longer", "moved-boundary"],
)
def test_different_conversations_have_different_keys(other: list[Message]) -> None:
    assert conversation_key(other) != conversation_key(chat("q", "a"))
