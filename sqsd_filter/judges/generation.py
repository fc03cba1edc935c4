"""A model's answers to prompts: greedy and in batches, each the same as its prompt would get alone."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch

from sqsd_filter.errors import InputError, ModelError
from sqsd_filter.scoring.batching import retry_in_halves

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

Turn = Mapping[str, object]  # role and content, as chat templates take them

# An answer takes the likeliest token at each step, whatever the model's own generation settings say.
_GREEDY = {
    **{"do_sample": False, "num_beams": 1, "temperature": 1.0, "top_p": 1.0, "top_k": 50},
    **{"repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "use_cache": True},
}


def answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 48,
    batch_size: int = 16,
    template: Mapping[str, object] = {},
) -> list[str]:
    """The model's greedy answers to single questions, in their order and without special tokens.

    `template` holds further arguments of the chat template. An answer ends at any token that the model's generation
    settings or its tokenizer name as an end, or after `max_new_tokens`. Dropout is off meanwhile. A batch that doesn't
    fit into memory is retried in halves.

    Raises `InputError` for a prompt that leaves no room for an answer, `ModelError` if there is no chat template, or
    for a prompt that can't be answered even alone.
    """
    turns = as_turns(prompts)
    return reply(model, tokenizer, turns, max_new_tokens=max_new_tokens, batch_size=batch_size, template=template)


def as_turns(prompts: Sequence[str]) -> list[list[dict[str, str]]]:
    """A conversation of one user turn for each prompt."""
    return [[{"role": "user", "content": prompt}] for prompt in prompts]


def reply(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Sequence[Turn]],
    *,
    max_new_tokens: int,
    batch_size: int = 16,
    template: Mapping[str, object] = {},
) -> list[str]:
    """The model's next turn in each conversation, as `answer` gives it."""
    asked = as_asked(tokenizer, conversations, template)
    room = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    check_room(asked, room, max_new_tokens)
    ends = ends_of(model.generation_config, tokenizer)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else min(ends, default=0)
    # transformers types `generate` for a protocol of its own, which none of its models satisfies
    next_ids: Callable[..., torch.Tensor] = cast(Any, model).generate
    answers = [""] * len(asked)

    def generate(members: list[int]) -> None:
        ids, mask = _pad_left([asked[k] for k in members], pad)
        with torch.inference_mode():
            ids_bt = next_ids(
                input_ids=ids.to(model.device),
                attention_mask=mask.to(model.device),
                max_new_tokens=max_new_tokens,
                eos_token_id=sorted(ends) or None,
                pad_token_id=pad,
                **_GREEDY,
            )
        for k, new in zip(members, ids_bt[:, ids.shape[1] :].tolist(), strict=True):
            answers[k] = as_text(tokenizer, new, ends)

    def give_up(k: int, error: str) -> None:
        raise ModelError(f"The model can't answer prompt {k + 1}: {error or 'it does not fit into memory'}.")

    order = sorted(range(len(asked)), key=lambda k: -len(asked[k]))  # longest first: if that fits, all do
    training = model.training
    model.eval()
    try:
        for at in range(0, len(order), batch_size):
            retry_in_halves(generate, order[at : at + batch_size], give_up)
    finally:
        model.train(training)
    return answers


def as_asked(
    tokenizer: PreTrainedTokenizerBase, conversations: Sequence[Sequence[Turn]], template: Mapping[str, object]
) -> list[list[int]]:
    """The tokens of each conversation up to where the next answer begins."""
    if not (template.get("chat_template") or getattr(tokenizer, "chat_template", None)):
        raise ModelError("The tokenizer has no chat template: use an instruction-tuned model.")
    texts = [rendered(tokenizer, turns, template) for turns in conversations]
    if not texts:
        return []
    ids: list[list[int]] = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return ids


def rendered(tokenizer: PreTrainedTokenizerBase, turns: Sequence[Turn], template: Mapping[str, object] = {}) -> str:
    """A conversation as text, up to where the next answer begins."""
    # the annotations of transformers allow only text as content, and more kinds of results
    render: Callable[..., str] = cast(Any, tokenizer).apply_chat_template
    return render(list(turns), tokenize=False, add_generation_prompt=True, **template)


def check_room(asked: Sequence[Sequence[int]], room: int | None, max_new_tokens: int) -> None:
    """Raise `InputError` if a prompt and its answer exceed `room`, the model's limit in tokens (None: no limit)."""
    longest = max(range(len(asked)), key=lambda k: len(asked[k]), default=None)
    if room is not None and longest is not None and len(asked[longest]) + max_new_tokens > room:
        raise InputError(
            f"Prompt {longest + 1} has {len(asked[longest])} tokens, which leaves no room for {max_new_tokens} more in "
            f"the model's {room}: leave it out or ask for shorter answers."
        )


def ends_of(settings: GenerationConfig, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The tokens that end a turn, by a model's generation settings and its tokenizer."""
    own = settings.eos_token_id
    named = own if isinstance(own, list | tuple) else [own]
    return {int(token) for token in (*named, tokenizer.eos_token_id) if token is not None}


def as_text(tokenizer: PreTrainedTokenizerBase, new: Sequence[int], ends: Collection[int]) -> str:
    """The text of the new tokens, up to the first one that ends a turn."""
    stop = next((n for n, token in enumerate(new) if token in ends), len(new))
    text = tokenizer.decode(list(new[:stop]), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return str(text).strip()


def _pad_left(rows: Sequence[Sequence[int]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens (b, t), padded on the left so that all rows end together, and their attention mask (b, t)."""
    width = max(map(len, rows))
    ids = torch.tensor([[pad] * (width - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return ids, mask
