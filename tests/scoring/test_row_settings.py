"""What a row or a user sets about the chat template: its variables, and what becomes of a system prompt it refuses."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from sqsd_filter import SQSDScorer
from sqsd_filter.corpus.conversation import Message, RowError
from sqsd_filter.errors import UsageError
from sqsd_filter.scoring.chat_encoder import ChatEncoder
from tests.scoring.styles import STYLES, encode, status, supervised, text_of
from tests.tiny import chat, make_tokenizer

PERSONA = (
    "{% if persona is defined %}{{ '<|im_start|>system\\n' + persona + '<|im_end|>\\n' }}{% endif %}"
    "{% if broken is defined %}{{ raise_exception('broken') }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def with_settings(**settings: Any) -> list[Message]:
    return [{"role": "chat_template_kwargs", "content": settings}, *chat("q", "a")]


def test_a_row_gives_its_settings_to_the_template() -> None:
    encoder = ChatEncoder(make_tokenizer(PERSONA), template_kwargs={"persona": "the pack's"})
    for turns, persona in ((with_settings(persona="pirate"), "pirate"), (chat("q", "a"), "the pack's")):
        text = text_of(encoder, encode(encoder, turns).ids)
        assert text.startswith(f"<|im_start|>system\n{persona}<|im_end|>\n")
        assert supervised(encoder, turns) == ["a<|im_end|>"]


@pytest.mark.parametrize(
    "name", ["chat_template", "tokenize", "add_generation_prompt", "messages", "eos_token", "tools"]
)
def test_what_is_not_a_rows_to_set_makes_it_an_error(name: str) -> None:
    (problem,) = ChatEncoder(make_tokenizer(PERSONA)).encode([with_settings(**{name: "x"})])
    assert isinstance(problem, RowError)
    assert problem.status == "bad_row"
    assert f"'{name}', which is not a row's to set" in problem.detail


def test_settings_that_break_the_template_are_its_rows_error() -> None:
    assert status(ChatEncoder(make_tokenizer(PERSONA)), with_settings(broken=1)) == "template_error"


def test_a_system_prompt_that_the_template_refuses_joins_the_first_question(caplog: pytest.LogCaptureFixture) -> None:
    encoder = STYLES["gemma"].encoder()
    encoder.template.folds_system = True
    with caplog.at_level(logging.WARNING):
        for k in range(2):
            turns = chat(f"hi {k}", "hello", system="Be brief.")
            row = encode(encoder, turns)
            assert f"<start_of_turn>user\nBe brief.\n\nhi {k}<end_of_turn>" in text_of(encoder, row.ids)
            assert supervised(encoder, turns) == ["hello<end_of_turn>"]
    assert len(caplog.records) == 1


def test_other_templates_keep_their_system_turn() -> None:
    encoder = STYLES["chatml"].encoder()
    folding = ChatEncoder(encoder.tokenizer, folds_system=True)
    turns = chat("hi", "hello", system="Be brief.")
    assert encode(encoder, turns).ids.tolist() == encode(folding, turns).ids.tolist()


def test_what_becomes_of_system_prompts_is_a_setting_of_the_scorer(tiny_pack: Path) -> None:
    default, error = SQSDScorer(tiny_pack), SQSDScorer(tiny_pack, system="error")
    assert default.encoder.template.folds_system
    assert not error.encoder.template.folds_system
    assert "system" not in default.settings()  # stored scores stay valid
    assert error.settings() == {**default.settings(), "system": "error"}
    with pytest.raises(UsageError, match=r"system \(--system\) must be one of fold, error"):
        SQSDScorer(tiny_pack, system="drop")
