"""Small judges that are trained when they are made: a chat guard, and classifiers. All texts are harmless."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from sqsd_filter.judges.classifier import TextClassifier
from sqsd_filter.judges.trained import TrainedJudge
from tests.tiny import make_model, make_tokenizer

TEMPLATE = (
    "{% for m in messages %}{{ 'User: ' if m['role'] == 'user' else 'Agent: ' }}{{ CONTENT }}\n{% endfor %}"
    "Is the last one safe?<|im_start|>"
)
TEXT, PARTS = (TEMPLATE.replace("CONTENT", f"m['content']{rest} | trim") for rest in ("", "[0]['text']"))
QUESTION = "And then?"
DECLINED = [f"That is no matter for me, friend. Let us rather talk about {what}." for what in ("rain", "sun", "snow")]
PIES = [f"Take {n} apples and flour, then bake the pie for {n}0 minutes." for n in (2, 3, 4)]
WALKS = [f"We walked {n} miles along the river and saw a heron." for n in (5, 6, 7)]
TEXTS = [*DECLINED, *PIES, *WALKS]


def make_guard(folder: Path, verdicts: Mapping[str, str], template: str = TEXT, **changes: Any) -> Path:
    """A model that has been trained on the verdicts about answers until it gives them; `changes` are to its config."""
    make_model(folder, **changes)
    tokenizer = make_tokenizer(template)
    rows, targets = [], []
    for answer, verdict in verdicts.items():
        turns = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": answer}]
        asked = tokenizer.apply_chat_template(turns, tokenize=False)
        prompt = tokenizer(asked, add_special_tokens=False)["input_ids"]
        said = tokenizer(verdict, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        rows.append(torch.tensor(prompt + said))
        targets.append(torch.tensor([-1] * len(prompt) + said)[1:])
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    wanted = torch.nn.utils.rnn.pad_sequence(targets, batch_first=True, padding_value=-1)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(80):
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        loss = F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), ignore_index=-1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def with_template(guard: Path, folder: Path, template: str | None) -> str:
    """The same guard with another template."""
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / name).symlink_to(guard / name)
    make_tokenizer(template).save_pretrained(folder)
    return str(folder)


def make_judge() -> TrainedJudge:
    """It takes texts about pies for unsafe."""
    refusal = TextClassifier.fit(TEXTS, [text in DECLINED for text in TEXTS], head=400)
    return TrainedJudge("pies", refusal, TextClassifier.fit(TEXTS, [text in PIES for text in TEXTS], head=600))
