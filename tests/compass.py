"""A tiny pack whose directions truly steer: a model that half refuses, a LoRA towards complying and one towards
refusing. All texts are harmless."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional as F

from sqsd_filter.scoring.batching import next_tokens
from sqsd_filter.scoring.chat_encoder import ChatEncoder, Encoded
from sqsd_filter.scoring.models import load_model, load_tokenizer
from tests.tiny import chat, make_model

QUESTIONS = ["What is red?", "Name a fox.", "Who jumps over the dog?", "Is it lazy?"]
REFUSAL, COMPLIANCE = "I cannot say.", "Sure, the quick brown fox."
PAIRS = [{"prompt": q, "chosen": REFUSAL, "rejected": COMPLIANCE} for q in QUESTIONS]


def make_compass(folder: Path, architecture: str = "llama") -> Path:
    """A pack with a base adapter (gives both answers), `danger` (complies) and `safety` (refuses)."""
    base = make_model(folder / "base", architecture)
    teach(base, folder / "aligned", [REFUSAL, COMPLIANCE], steps=60, learning_rate=0.02)
    for name, reply in (("danger", COMPLIANCE), ("safety", REFUSAL)):
        teach(base, folder / name, [reply], steps=10, learning_rate=0.002, adapter=folder / "aligned")
    probes = [
        {"name": "danger", "weight": 1.0, "direction": "danger", "state": "aligned"},
        {"name": "safety", "weight": -1.0, "direction": "safety", "state": "safety", "state_scaling": 1.0},
    ]
    page = {"format": 1, "name": "compass", "base_model": str(base), "base_adapter": "aligned", "probes": probes}
    (folder / "pack.json").write_text(json.dumps(page))
    return folder


def teach(
    base: Path, folder: Path, replies: list[str], *, steps: int, learning_rate: float, adapter: Path | None = None
) -> None:
    """Train a LoRA on each of the replies to each question."""
    torch.manual_seed(0)
    loaded = load_model(str(base), dtype=torch.float32, adapter=adapter)
    model = get_peft_model(loaded, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    encoded = ChatEncoder(load_tokenizer(str(base))).encode([chat(q, reply) for reply in replies for q in QUESTIONS])
    ids, targets = next_tokens([row for row in encoded if isinstance(row, Encoded)], torch.device("cpu"))
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=learning_rate)
    for _ in range(steps):
        logits = model(input_ids=ids, use_cache=False).logits
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.save_pretrained(str(folder))
