"""Tiny random models, adapters and packs, made on the fly: the real architectures, a few thousand parameters each."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from sqsd_filter.corpus.conversation import Message
from sqsd_filter.scoring.chat_encoder import Encoded
from sqsd_filter.scoring.scorer import Scorer

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
_COMMON = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
_GQA = {**_COMMON, "num_key_value_heads": 2, "max_position_embeddings": 512}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **_GQA},
    "qwen3": {"model_type": "qwen3", **_GQA, "head_dim": 8},
    "gemma3": {
        "model_type": "gemma3_text",
        **_GQA,
        "head_dim": 8,
        "sliding_window": 16,
        "final_logit_softcapping": 5.0,
    },
    "mistral": {"model_type": "mistral", **_GQA, "sliding_window": 24},
    "phi3": {"model_type": "phi3", **_GQA, "pad_token_id": 0},
    "gpt2": {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512},
}
# Peculiar ones: a forward that goes round the backbone, a linear class of its own, experts beside a shared one.
PECULIAR: dict[str, dict[str, Any]] = {
    "opt": {
        "model_type": "opt",
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "ffn_dim": 48,
        "max_position_embeddings": 512,
        "word_embed_proj_dim": 32,
    },
    "falcon": {"model_type": "falcon", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
    "qwen2_moe": {
        "model_type": "qwen2_moe",
        **_GQA,
        "num_experts": 4,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 24,
        "num_experts_per_tok": 2,
    },
}


def make_tokenizer(template: str | None = CHATML) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer: every string can be encoded, and comes back."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(
        ["the quick brown fox jumps over the lazy dog and user assistant system"] * 4, trainer
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    fast.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    fast.chat_template = template
    return fast


def make_model(folder: Path, architecture: str = "llama", seed: int = 0, **changes: Any) -> Path:
    """A random model and its tokenizer, saved as transformers saves them; `changes` are to its config."""
    torch.manual_seed(seed)
    tokenizer = make_tokenizer()
    settings = {"initializer_range": 0.2, "tie_word_embeddings": False, **{**ARCHITECTURES, **PECULIAR}[architecture]}
    ends = {"bos_token_id": 0, "eos_token_id": tokenizer.eos_token_id}
    config = AutoConfig.for_model(**{**settings, **changes}, **ends, vocab_size=len(tokenizer))
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_adapter(
    model: Path, folder: Path, *, r: int = 4, alpha: int = 8, seed: int = 1, fresh: bool = False, **config: Any
) -> Path:
    """A PEFT LoRA folder with random A and B (B = 0 when `fresh`)."""
    torch.manual_seed(seed)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    settings = {"target_modules": "all-linear", "lora_dropout": 0.5, "task_type": "CAUSAL_LM", **config}
    wrapped = get_peft_model(base, LoraConfig(r=r, lora_alpha=alpha, **settings))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_A" in name or ("lora_B" in name and not fresh):
                parameter.copy_(torch.randn_like(parameter) * 0.1)
    wrapped.save_pretrained(str(folder))
    return folder


def make_pack(
    folder: Path,
    model: Path | None = None,
    *,
    architecture: str = "llama",
    ranks: Sequence[int] = (4, 6, 8),
    safety_scaling: float | None = 1.0,
    aligned: bool = False,
    **fields: Any,
) -> Path:
    """A pack with the usual probes on a tiny model: danger (first rank) at `initial` (second), safety (third); the
    model has a base adapter, if it is to be `aligned`."""
    folder.mkdir(parents=True, exist_ok=True)
    model = model or make_model(folder / "base", architecture)
    for seed, (name, rank) in enumerate(zip(("danger", "initial", "safety"), ranks, strict=True), 1):
        make_adapter(model, folder / name, r=rank, alpha=16, seed=seed)
    if aligned:
        fields["base_adapter"] = make_adapter(model, folder / "aligned", r=3, alpha=9, seed=4).name
    pack = {
        "format": 1,
        "name": "tiny",
        "base_model": str(model),
        "base_revision": None,
        "chat_template_kwargs": {},
        "max_length": 256,
        "probes": [
            {"name": "danger", "weight": 1.0, "direction": "danger", "state": "initial", "state_scaling": None},
            {
                "name": "safety",
                "weight": -1.0,
                "direction": "safety",
                "state": "safety",
                "state_scaling": safety_scaling,
            },
        ],
        **fields,
    }
    (folder / "pack.json").write_text(json.dumps(pack))
    return folder


def chat(*contents: str, system: str | None = None) -> list[Message]:
    """Turns from their contents, user first, then in alternation."""
    turns: list[Message] = [{"role": "system", "content": system}] if system else []
    return turns + [{"role": ("user", "assistant")[k % 2], "content": text} for k, text in enumerate(contents)]


def embedding_of(model: PreTrainedModel) -> torch.Tensor:
    """The embedding of each token, (vocabulary, hidden)."""
    embedding = model.get_input_embeddings()
    assert isinstance(embedding, torch.nn.Embedding)
    return embedding.weight


def encoded(scorer: Scorer, conversations: Sequence[Sequence[Message]]) -> list[Encoded]:
    """The tokens of conversations that can all be scored."""
    rows = [row for row in scorer.encoder.encode(conversations) if isinstance(row, Encoded)]
    assert len(rows) == len(conversations)
    return rows


CONVERSATIONS = [
    chat("What is the capital of France?", "Paris."),
    chat("Write a poem about the sea.", "The sea is wide,\nthe sea is deep,\nand while it sings the islands sleep."),
    chat("2+2?", "4", "and 3+3?", "It is 6, of course."),
    chat("hi", "a", system="You answer in one letter."),
    chat("Name three colours: " + "please " * 20, "red, green, blue"),
    chat("Count.", " ".join(str(k) for k in range(30))),
]
