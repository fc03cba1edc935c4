"""Answers in batches are the answers one by one, and those of a textbook loop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from sqsd_filter.errors import InputError, ModelError
from sqsd_filter.judges.generation import answer
from sqsd_filter.scoring.models import load_model, load_tokenizer
from tests.tiny import ARCHITECTURES, make_tokenizer

PROMPTS = ["hi", "What is the capital of France? " * 4, "Name three colours.", "", "2+2?", "hi"]


def loaded(pack: Path, dtype: torch.dtype = torch.float64) -> tuple[Any, Any]:
    base = str(pack / "base")
    return load_model(base, dtype=dtype), load_tokenizer(base)


def textbook(model: Any, tokenizer: Any, prompt: str, tokens: int, ends: set[int]) -> str:
    """One prompt, one whole forward pass a token, no cache."""
    turns = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    asked = tokenizer(text, add_special_tokens=False)["input_ids"]
    ids = list(asked)
    while len(ids) < len(asked) + tokens:
        with torch.no_grad():
            token = int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
        if token in ends:
            break
        ids.append(token)
    return str(tokenizer.decode(ids[len(asked) :], skip_special_tokens=True)).strip()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_batch_gives_each_prompt_the_answer_of_a_textbook_loop(packs: dict[str, Path], architecture: str) -> None:
    model, tokenizer = loaded(packs[architecture])
    expected = [textbook(model, tokenizer, p, 12, {tokenizer.eos_token_id}) for p in PROMPTS]
    assert answer(model, tokenizer, PROMPTS, max_new_tokens=12, batch_size=4) == expected
    assert len(set(expected)) > 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_an_answer_does_not_depend_on_its_batch(tiny_pack: Path, dtype: torch.dtype) -> None:
    model, tokenizer = loaded(tiny_pack, dtype)
    alone = [answer(model, tokenizer, [p], max_new_tokens=16)[0] for p in PROMPTS]
    for size in (2, 3, 16):
        assert answer(model, tokenizer, PROMPTS, max_new_tokens=16, batch_size=size) == alone


def test_an_answer_ends_at_every_token_that_ends_a_turn(tiny_pack: Path) -> None:
    model, tokenizer = loaded(tiny_pack)
    whole = answer(model, tokenizer, ["2+2?"], max_new_tokens=12)[0]
    ids = tokenizer(whole, add_special_tokens=False)["input_ids"]
    stop = next(token for token in ids if token != ids[0])
    model.generation_config.eos_token_id = [stop]
    expected = textbook(model, tokenizer, "2+2?", 12, {stop, tokenizer.eos_token_id})
    assert answer(model, tokenizer, ["2+2?", "hi"], max_new_tokens=12)[0] == expected != whole
    model.generation_config.eos_token_id = None
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(stop)
    assert answer(model, tokenizer, ["2+2?"], max_new_tokens=12)[0] == expected


def test_the_model_s_own_sampling_and_its_mode_change_nothing(tiny_pack: Path) -> None:
    model, tokenizer = loaded(tiny_pack)
    expected = answer(model, tokenizer, PROMPTS, max_new_tokens=12)
    model.generation_config = GenerationConfig(do_sample=True, temperature=3.0, repetition_penalty=9.0, use_cache=False)
    model.train()
    assert answer(model, tokenizer, PROMPTS, max_new_tokens=12) == expected
    assert model.training
    assert model.generation_config.repetition_penalty == 9.0


def test_without_a_pad_token_the_answers_are_the_same(tiny_pack: Path) -> None:
    model, tokenizer = loaded(tiny_pack)
    expected = answer(model, tokenizer, PROMPTS, max_new_tokens=12)
    tokenizer.pad_token = model.generation_config.pad_token_id = None
    assert answer(model, tokenizer, PROMPTS, max_new_tokens=12) == expected


def test_no_prompts_have_no_answers(tiny_pack: Path) -> None:
    assert answer(*loaded(tiny_pack), []) == []


def test_a_prompt_without_room_for_an_answer_is_named(tiny_pack: Path) -> None:
    with pytest.raises(InputError, match=r"Prompt 2 has \d+ tokens, which leaves no room for 48 .* the model's 512"):
        answer(*loaded(tiny_pack), ["hi", "word " * 600])


def test_a_tokenizer_without_a_chat_template_is_refused(tiny_pack: Path) -> None:
    with pytest.raises(ModelError, match="no chat template"):
        answer(loaded(tiny_pack)[0], make_tokenizer(None), ["hi"])


def test_the_template_takes_its_arguments(tiny_pack: Path) -> None:
    model, tokenizer = loaded(tiny_pack)
    other = {"chat_template": "{{ messages[0]['content'] }}" * 2}
    once = {"chat_template": "{{ messages[0]['content'] }}"}
    assert answer(model, tokenizer, ["hi"], template=other) == answer(model, tokenizer, ["hihi"], template=once)
