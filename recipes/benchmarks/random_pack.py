"""Packs on models with random weights, for timings: what they score means nothing, what they cost does."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from sqsd_filter.scoring.pack import Pack, load_pack

TEMPLATE = (
    "{% for message in messages %}{{ '<|start|>' + message['role'] + '\n' + message['content'] + '<|end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"
)


def make_tokenizer(texts: Iterable[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on these texts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    specials = ["<|pad|>", "<|start|>", "<|end|>"]
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocabulary, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
        ),
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|pad|>")
    fast.chat_template = TEMPLATE
    return fast


def make_pack(folder: Path, tokenizer: PreTrainedTokenizerFast | None = None, **shape: int) -> Pack:
    """A pack with the usual two probes on a Llama of this shape (`transformers.LlamaConfig`'s arguments)."""
    torch.manual_seed(0)
    if tokenizer is not None:
        shape["vocab_size"] = len(tokenizer)
        tokenizer.save_pretrained(folder / "base")
    model = AutoModelForCausalLM.from_config(LlamaConfig(**shape))  # type: ignore[arg-type]
    model.save_pretrained(folder / "base")
    for name in ("direction", "state"):
        wrapped = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
        with torch.no_grad():
            for key, parameter in wrapped.named_parameters():
                if "lora_" in key:
                    parameter.copy_(torch.randn_like(parameter) * 0.01)
        wrapped.save_pretrained(str(folder / name))
        model = wrapped.unload()
    probes = [
        {"name": n, "weight": w, "direction": "direction", "state": "state", "state_scaling": s}
        for n, w, s in (("danger", 1.0, None), ("safety", -1.0, 1.0))
    ]
    page = {"format": 1, "name": "random", "base_model": str(folder / "base"), "probes": probes}
    (folder / "pack.json").write_text(json.dumps(page))
    return load_pack(folder)
