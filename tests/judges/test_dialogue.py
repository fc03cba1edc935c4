"""How judges read a row: two roles in turn, up to the last answer, cut at the end."""

from __future__ import annotations

import pytest

from sqsd_filter.corpus.conversation import Message, RowError
from sqsd_filter.judges.dialogue import Dialogue
from tests.tiny import chat, make_tokenizer

TOKENIZER = make_tokenizer()
CALL = {"type": "function", "function": {"name": "look", "arguments": {"at": "é"}}}
CALLED: list[Message] = [
    {"role": "tools", "content": [{"type": "function", "function": {"name": "look"}}]},
    *chat("What is there?", system="Be brief."),
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "a heron"},
    {"role": "assistant", "content": "A heron."},
]
UNLEARNED: Message = {"role": "assistant", "content": "b", "weight": 0}


def read(turns: list[Message], tokens: int = 10_000) -> list[tuple[str, str]]:
    return [(said.role, said.text) for said in Dialogue(turns, TOKENIZER).first(tokens)]


def pairs(*texts: str) -> list[tuple[str, str]]:
    return [(turn["role"], turn["content"]) for turn in chat(*texts)]


@pytest.mark.parametrize(
    ("turns", "expected"),
    [
        pytest.param(chat("q", " a\n"), pairs("q", " a\n"), id="one answer"),
        pytest.param(chat("q", "a", "r", "b", "s"), pairs("q", "a", "r", "b"), id="several"),
        pytest.param([*chat("q", "a", "r"), UNLEARNED], pairs("q", "a"), id="the last one is not learned"),
        pytest.param([*chat("q"), UNLEARNED, *chat("r", "c")], pairs("q", "b", "r", "c"), id="an earlier one is not"),
        pytest.param(chat("q", "a", system="s"), pairs("s\n\nq", "a"), id="system"),
        pytest.param([*chat(system="s"), *chat("", "a")], pairs("s", "a"), id="system alone"),
        pytest.param(
            CALLED,
            pairs("Be brief.\n\nWhat is there?", '{"name": "look", "arguments": {"at": "é"}}', "a heron", "A heron."),
            id="tools",
        ),
        pytest.param(
            [
                {"role": "chat_template_kwargs", "content": {"enable_thinking": True}},
                *chat("q"),
                {"role": "assistant", "content": "a", "reasoning_content": "r"},
            ],
            pairs("q", "a"),
            id="settings and reasoning",
        ),
    ],
)
def test_the_roles_take_turns_up_to_the_last_answer(turns: list[Message], expected: list[tuple[str, str]]) -> None:
    assert read(turns) == expected


def test_a_row_is_cut_after_a_number_of_tokens_to_the_last_answer_that_is_left() -> None:
    turns = chat("one?", "the fox é", "two?", "the dog")
    counts = [len(TOKENIZER(turn["content"])["input_ids"]) for turn in turns]
    assert len(Dialogue(turns, TOKENIZER)) == sum(counts)
    assert read(turns, sum(counts)) == pairs("one?", "the fox é", "two?", "the dog")
    shorter = read(turns, sum(counts) - 1)
    assert shorter[:3] == pairs("one?", "the fox é", "two?")
    assert "the dog".startswith(shorter[3][1]) != (shorter[3][1] == "the dog")
    for tokens in (sum(counts[:2]), sum(counts[:3])):
        assert read(turns, tokens) == pairs("one?", "the fox é")
    assert read(turns, sum(counts[:2]) - 1) == pairs("one?", "the fox ")  # half of a character is left out
    assert read(turns, counts[0]) == []
    assert read(turns, 0) == []


@pytest.mark.parametrize(
    ("turns", "status"),
    [
        (chat("q", " "), "no_answer"),
        ([], "no_answer"),
        (chat("q", "\ud83d"), "bad_row"),
        ([{"role": "assistant", "content": "a"}], "bad_row"),
    ],
    ids=["blank", "nothing", "not text", "nothing before"],
)
def test_rows_that_no_scorer_can_score_have_the_usual_status(turns: list[Message], status: str) -> None:
    with pytest.raises(RowError) as caught:
        read(turns)
    assert caught.value.status == status
