"""A model answers prompts: greedily and in batches, with each answer the one that its prompt would get alone."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch

from sqsd_filter.errors import InputError, ModelError
from sqsd_filter.scoring.batching import retry_in_halves

# Whatever a model's own generation settings say, an answer is the likeliest token at each step.
_GREEDY = {
    **{"do_sample": False, "num_beams": 1, "temperature": 1.0, "top_p": 1.0, "top_k": 50},
    **{"repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "use_cache": True},
}


def answer(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 48,
    batch_size: int = 16,
    template: Mapping[str, Any] = {},
) -> list[str]:
    """The model's greedy answers to single questions, in their order and without special tokens.

    `template` are further arguments of the chat template. An answer ends at any token that the model's generation
    settings or its tokenizer name as an end, or after `max_new_tokens`. Dropout is off while it runs. Where the memory
    is too small for a batch, its halves are answered.

    Raises `InputError` for a prompt that leaves the model no room for an answer, `ModelError` where there is no chat
    template, or a prompt that can't be answered even alone.
    """
    asked = as_turns(prompts)
    return reply(model, tokenizer, asked, max_new_tokens=max_new_tokens, batch_size=batch_size, template=template)


def as_turns(prompts: Sequence[str]) -> list[list[dict[str, str]]]:
    """A conversation for each prompt, in which the user asks it."""
    return [[{"role": "user", "content": prompt}] for prompt in prompts]


def reply(
    model: Any,
    tokenizer: Any,
    conversations: Sequence[Sequence[Mapping[str, Any]]],
    *,
    max_new_tokens: int,
    batch_size: int = 16,
    template: Mapping[str, Any] = {},
) -> list[str]:
    """As `answer`, what the model says next in conversations of any turns."""
    asked = as_asked(tokenizer, conversations, template)
    room = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    check_room(asked, room, max_new_tokens)
    ends = ends_of(model.generation_config, tokenizer)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else min(ends, default=0)
    answers = [""] * len(asked)

    def generate(members: list[int]) -> None:
        ids, mask = _pad_left([asked[k] for k in members], pad)
        with torch.inference_mode():
            found = model.generate(
                input_ids=ids.to(model.device),
                attention_mask=mask.to(model.device),
                max_new_tokens=max_new_tokens,
                eos_token_id=sorted(ends) or None,
                pad_token_id=pad,
                **_GREEDY,
            )
        for k, new in zip(members, found[:, ids.shape[1] :].tolist(), strict=True):
            answers[k] = as_text(tokenizer, new, ends)

    def give_up(k: int, error: str) -> None:
        raise ModelError(f"The model can't answer prompt {k + 1}: {error or 'the memory is too small for it'}.")

    order = sorted(range(len(asked)), key=lambda k: -len(asked[k]))  # longest first: what fits once fits for good
    training = model.training
    model.eval()
    try:
        for at in range(0, len(order), batch_size):
            retry_in_halves(generate, order[at : at + batch_size], give_up)
    finally:
        model.train(training)
    return answers


def as_asked(
    tokenizer: Any, conversations: Sequence[Sequence[Mapping[str, Any]]], template: Mapping[str, Any]
) -> list[list[int]]:
    """The conversations as the chat template asks for what comes next."""
    if not (template.get("chat_template") or getattr(tokenizer, "chat_template", None)):
        raise ModelError("The tokenizer has no chat template: use an instruction-tuned model.")
    texts = [
        tokenizer.apply_chat_template(list(turns), tokenize=False, add_generation_prompt=True, **template)
        for turns in conversations
    ]
    return tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []


def check_room(asked: Sequence[Sequence[int]], room: int | None, max_new_tokens: int) -> None:
    """Raise `InputError` where a prompt and its answer don't fit into the model's `room` (None: no limit) of tokens."""
    longest = max(range(len(asked)), key=lambda k: len(asked[k]), default=None)
    if room is not None and longest is not None and len(asked[longest]) + max_new_tokens > room:
        raise InputError(
            f"Prompt {longest + 1} has {len(asked[longest])} tokens, which leaves no room for {max_new_tokens} more in "
            f"the model's {room}: leave it out or ask for shorter answers."
        )


def ends_of(settings: Any, tokenizer: Any) -> set[int]:
    """The tokens that end a turn, by a model's generation settings and its tokenizer."""
    own = settings.eos_token_id
    named = own if isinstance(own, list | tuple) else [own]
    return {int(token) for token in (*named, tokenizer.eos_token_id) if token is not None}


def as_text(tokenizer: Any, new: Sequence[int], ends: Collection[int]) -> str:
    """What the new tokens say, up to the first that ends a turn."""
    stop = next((n for n, token in enumerate(new) if token in ends), len(new))
    text: str = tokenizer.decode(new[:stop], skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text.strip()


def _pad_left(rows: Sequence[Sequence[int]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens (b, t) with the answers' places at the right end of all, and the mask (b, t) of those that are there."""
    width = max(map(len, rows))
    ids = torch.tensor([[pad] * (width - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return ids, mask
