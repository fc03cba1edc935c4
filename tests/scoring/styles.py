"""Chat templates as found in the wild, and what is supervised of a conversation that they render."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from hypothesis import strategies as st
from tokenizers import processors

from sqsd_filter.corpus.conversation import Message, RowError
from sqsd_filter.scoring.chat_encoder import ChatEncoder, Encoded
from tests.tiny import CHATML, chat, make_tokenizer


@dataclass(frozen=True)
class Style:
    """A chat template as found in the wild, and what it is to make of an answer."""

    template: str
    special: tuple[str, ...] = ()
    bos: str | None = None
    eos: str = "<|im_end|>"
    end: str = "<|im_end|>"  # what is supervised after an answer
    trims: bool = False
    system: bool = True
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    def encoder(self, max_length: int = 1024) -> ChatEncoder:
        tokenizer = make_tokenizer(self.template)
        named = {"eos_token": self.eos} | ({"bos_token": self.bos} if self.bos else {})
        tokenizer.add_special_tokens({**named, "additional_special_tokens": ["<|im_start|>", *self.special]})
        if self.bos:  # as Llama's and Gemma's tokenizers do: they write a BOS unless told not to
            tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
                single=f"{self.bos} $A", special_tokens=[(self.bos, tokenizer.bos_token_id)]
            )
        return ChatEncoder(tokenizer, max_length, self.kwargs)


LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + "
    "m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set system = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}"
    "{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}{% for m in messages %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + (system if loop.first else '') + m['content'] | trim + "
    "' [/INST]' }}{% else %}{{ ' ' + m['content'] | trim + ' ' + eos_token }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for m in messages %}{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
# Reasoning is shown in the last turn only, and an empty block is put there where the answer has none.
QWEN3 = (
    "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m['role'] == 'user' %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{% set content = m['content'] %}{% if m['role'] != 'assistant' %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + content + '<|im_end|>\n' }}{% else %}{% set thought = '' %}"
    "{% if '</think>' in content %}"
    "{% set thought = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{% if loop.index0 > ns.last and (loop.last or thought) %}"
    "{{ '<|im_start|>assistant\n<think>\n' + thought + '\n</think>\n\n' + content.lstrip('\n') }}"
    "{% else %}{{ '<|im_start|>assistant\n' + content }}{% endif %}{{ '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{% endif %}"
)
MARKED = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ '<|im_start|>assistant\n' }}"
    "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
UNASKING = CHATML.split("{% if add_generation_prompt")[0]  # knows no generation prompt
PLAIN = (  # no token ends a turn here: the answer ends with the tokenizer's end of text
    "{% for m in messages %}{{ '### ' + m['role'] + ':\n' + m['content'] + '\n\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### assistant:\n' }}{% endif %}"
)
# A reasoning model's: earlier reasoning is dropped, and the generation prompt opens the block.
DROPPING = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %}"
    "{{ '<|assistant|>' + m['content'].split('</think>')[-1] + '<|end|>' }}"
    "{% else %}{{ '<|' + m['role'] + '|>' + m['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|><think>\n' }}{% endif %}"
)
HEADERS = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")

STYLES: dict[str, Style] = {
    "chatml": Style(CHATML),
    "llama3": Style(LLAMA3, HEADERS, bos="<|begin|>", eos="<|eot_id|>", end="<|eot_id|>", trims=True),
    "llama3-another-eos": Style(LLAMA3, HEADERS, bos="<|begin|>", eos="<|end|>", end="<|eot_id|>", trims=True),
    "llama2": Style(LLAMA2, bos="<s>", eos="</s>", end=" </s>", trims=True),
    "gemma": Style(
        GEMMA,
        ("<start_of_turn>", "<end_of_turn>"),
        bos="<bos>",
        eos="<eos>",
        end="<end_of_turn>",
        trims=True,
        system=False,
    ),
    "qwen3": Style(QWEN3),
    "qwen3-thinking-off": Style(QWEN3, kwargs={"enable_thinking": False}),
    "generation-markers": Style(MARKED),
    "no-generation-prompt": Style(UNASKING),
    "plain": Style(PLAIN),
    "drops-reasoning": Style(DROPPING, ("<|assistant|>", "<|end|>"), bos="<s>", eos="<|end|>", end="<|end|>"),
}
every_style = pytest.mark.parametrize("style", STYLES.values(), ids=STYLES)


def encode(encoder: ChatEncoder, turns: Sequence[Message]) -> Encoded:
    (row,) = encoder.encode([turns])
    assert isinstance(row, Encoded), row.detail
    return row


def status(encoder: ChatEncoder, turns: Sequence[Message]) -> str:
    (problem,) = encoder.encode([turns])
    assert isinstance(problem, RowError)
    return problem.status


def text_of(encoder: ChatEncoder, ids: np.ndarray) -> str:
    text = encoder.tokenizer.decode(ids.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text


def supervised(encoder: ChatEncoder, turns: Sequence[Message]) -> list[str]:
    """The text of each unbroken run of supervised tokens."""
    row = encode(encoder, turns)
    edges = np.flatnonzero(np.diff(np.concatenate(([0], row.answer, [0])))).reshape(-1, 2)
    return [text_of(encoder, row.ids[start:stop]) for start, stop in edges]


# ---------- any conversation at all

NASTY = [
    "<|im_end|>",
    "<|im_start|>assistant\n",
    "user",
    "assistant",
    "model",
    "\n",
    "  ",
    "👩‍👩‍👧",
    "é",
    "日本",
    "[/INST]",
    "\r\n",
]
texts = st.lists(
    st.sampled_from(NASTY) | st.text(st.characters(exclude_categories=["Cs"]), max_size=12), max_size=5
).map("".join)
conversations = st.builds(
    lambda system, pairs, trailing: [
        *([{"role": "system", "content": system}] if system is not None else []),
        *(turn for ask, reply in pairs for turn in chat(ask, reply)),
        *([{"role": "user", "content": trailing}] if trailing is not None else []),
    ],
    st.none() | texts,
    st.lists(st.tuples(texts, texts), min_size=1, max_size=4),
    st.none() | texts,
)
