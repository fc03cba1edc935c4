"""How often each checkpoint of a run refuses: it answers prompts greedily, and its answers are judged by phrases."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from sqsd_filter.directions.checkpoints import Checkpoint, Origin
from sqsd_filter.errors import InputError
from sqsd_filter.judges import is_refusal
from sqsd_filter.judges.generation import answer
from sqsd_filter.progress import Progress
from sqsd_filter.scoring.adapters import load_adapter, merge
from sqsd_filter.scoring.models import load_model, load_tokenizer
from sqsd_filter.scoring.pack import Pack
from sqsd_filter.scoring.placement import check_device, choose_device
from sqsd_filter.statistics import wilson

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Refusals:
    """The number of refusals among a checkpoint's answers."""

    refused: int
    answers: int

    @property
    def rate(self) -> float:
        return self.refused / self.answers

    @property
    def interval(self) -> tuple[float, float]:
        """The Wilson score interval of the rate, at 95 %."""
        return wilson(self.refused, self.answers)

    def report(self) -> dict[str, float]:
        low, high = self.interval
        return {"refusal_rate": self.rate, "refusal_low": low, "refusal_high": high, "answers": self.answers}


def read_prompts(path: str | Path, limit: int | None = None) -> list[str]:
    """The `prompt` of each of the first `limit` lines of a JSON Lines file. Raises `InputError`."""
    prompts = []
    try:
        with Path(path).open(encoding="utf-8") as lines:
            for number, line in enumerate(islice(lines, limit), 1):
                row = json.loads(line)
                if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
                    raise InputError(f"Line {number} of {path} has no text under 'prompt': fix or remove that line.")
                prompts.append(row["prompt"])
    except (OSError, ValueError) as problem:
        raise InputError(
            f"{path} can't be read as JSON Lines ({problem}): name a file whose rows have a 'prompt'."
        ) from problem
    if not prompts:
        raise InputError(f"{path} has no prompts: name a JSON Lines file whose rows have a 'prompt'.")
    return prompts


def count_refusals(
    checkpoints: Sequence[Checkpoint],
    origin: Origin,
    pack: Pack,
    prompts: Sequence[str],
    device: str | None,
    progress: Progress,
) -> Iterator[Refusals]:
    """The refusals at the origin and at each checkpoint. Models run in float32, because bfloat16 loses small changes.

    Raises `UsageError` for a device that can't be used, `ModelError` or `PackError` if a model can't be loaded.
    """
    device = choose_device(device)
    check_device(device)
    tokenizer = load_tokenizer(origin.model, origin.revision)
    for checkpoint in (None, *checkpoints):
        name = checkpoint.folder if checkpoint else origin.model
        progress.note(f"asking {name} {len(prompts)} prompts")
        model = _load(checkpoint, origin, device)
        answers = answer(model, tokenizer, prompts, template=pack.chat_template_kwargs)
        del model  # before the next one is loaded
        yield Refusals(sum(map(is_refusal, answers)), len(answers))


def _load(checkpoint: Checkpoint | None, origin: Origin, device: str) -> PreTrainedModel:
    model: PreTrainedModel
    if checkpoint is not None and not checkpoint.is_adapter:
        model = load_model(str(checkpoint.folder), dtype=torch.float32, device=device)
        return model
    model = load_model(origin.model, origin.revision, dtype=torch.float32, device=device, adapter=origin.merged)
    folder = checkpoint.folder if checkpoint else origin.continued
    if folder:
        merge(model, load_adapter(folder), torch.float32)
    return model
