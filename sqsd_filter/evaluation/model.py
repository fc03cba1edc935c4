"""The aligned model of a pack: fine-tuned on a set of rows, asked prompts, and its loss on held-out rows.

Each step loads the model anew, so that a run does not depend on what was done in the process before it. The trained
LoRA is a side path there as in training, because merging it into bfloat16 weights would distort it.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from sqsd_filter.directions.offset import offset
from sqsd_filter.directions.training import Course, fine_tune, losses
from sqsd_filter.errors import SQSDError, UsageError, option
from sqsd_filter.evaluation.settings import FineTuning
from sqsd_filter.judges.generation import answer, as_asked, as_turns, check_room
from sqsd_filter.judges.likelihood import log_probabilities
from sqsd_filter.progress import Progress
from sqsd_filter.scoring.adapters import load_adapter
from sqsd_filter.scoring.batching import is_out_of_memory
from sqsd_filter.scoring.chat_encoder import ChatEncoder, Encoded
from sqsd_filter.scoring.models import load_model, load_tokenizer, longest_input
from sqsd_filter.scoring.pack import Pack
from sqsd_filter.scoring.placement import check_device, choose_device

Answering = Callable[[Path | None, Sequence[str], int], list[str]]  # with which LoRA, what is asked, how many tokens
KEPT_CHECKPOINTS = 2  # the last one may be half written


@dataclass(frozen=True)
class Subject:
    """The model under evaluation, and how it is fine-tuned."""

    pack: Pack
    tuning: FineTuning
    device: str
    tokenizer: Any
    encoder: ChatEncoder

    @classmethod
    def of(cls, pack: Pack, tuning: FineTuning, device: str | None) -> Subject:
        """Raises `UsageError` for a device or schedule that can't be used, `ModelError`, `SQSDError` without the extra
        `train`."""
        if any(find_spec(name) is None for name in ("peft", "trl")):
            raise SQSDError("Evaluating needs trl and peft: pip install 'sqsd-filter[train]'.")
        from transformers import SchedulerType

        if tuning.schedule not in (schedules := [each.value for each in SchedulerType]):
            raise UsageError(f"{option('schedule')} must be one of {', '.join(schedules)}, not {tuning.schedule}.")
        device = choose_device(device)
        if device not in ("cpu", "cuda", "cuda:0"):
            raise UsageError(f"Fine-tuning can't be on '{device}': choose a GPU by CUDA_VISIBLE_DEVICES, or cpu.")
        check_device(device)
        tokenizer = load_tokenizer(pack.base_model, pack.base_revision)
        encoder = ChatEncoder(tokenizer, tuning.max_length, pack.chat_template_kwargs)
        return cls(pack, tuning, device, tokenizer, encoder)

    @property
    def device_name(self) -> str:
        """What the device is, for a report."""
        return self.device if self.device == "cpu" else torch.cuda.get_device_name(self.device)

    def _load(self) -> Any:
        dtype = getattr(torch, self.tuning.dtype)
        pack = self.pack
        return load_model(
            pack.base_model, pack.base_revision, dtype=dtype, device=self.device, adapter=pack.base_folder
        )

    def fine_tune(
        self, name: str, rows: Sequence[Encoded], seed: int, checkpoints: Path, target: Path, progress: Progress
    ) -> dict[str, Any]:
        """Train a LoRA on the rows' answers and write it to `target`, going on from the last of the `checkpoints`.

        Returns the record of the training.
        """
        course = Course(name, self.tuning.recipe, self.tuning.lora, seed, checkpoints, KEPT_CHECKPOINTS)
        try:
            trainer = fine_tune(course, self._load(), self.tokenizer, rows, progress)
        except Exception as problem:
            if is_out_of_memory(problem):
                batch = self.tuning.device_batch_size
                raise SQSDError(
                    f"The memory of {self.device_name} is too small for {batch} rows at a time: "
                    f"start again with a lower {option('device_batch_size')}, which changes no update."
                ) from problem
            if isinstance(problem, ValueError) and "arget module" in str(problem):  # peft, before anything is trained
                name = self.tuning.target_modules
                raise UsageError(f"{option('target_modules')} {name} names no layer of the model.") from problem
            raise
        trainer.model.save_pretrained(target)
        record = {"rows": len(rows), "seed": seed, "steps": trainer.state.global_step, "losses": losses(trainer)}
        del trainer
        free_memory()
        return record | {"settings": asdict(self.tuning)}

    @contextmanager
    def tuned(self, adapter: Path | None) -> Iterator[Any]:
        """The model with this LoRA on it, or as it is."""
        model = self._load()
        with offset(model, load_adapter(adapter), 1.0) if adapter else nullcontext():
            yield model

    def save(self, target: Path) -> None:
        """Write the aligned model as a folder of its own."""
        self._load().save_pretrained(target)
        self.tokenizer.save_pretrained(target)

    def longest(self, prompts: Sequence[str], max_new_tokens: int) -> int:
        """How many tokens a prompt and its answer have at most. Raises `InputError` for a prompt that leaves no room
        for an answer."""
        pack = self.pack
        asked = as_asked(self.tokenizer, as_turns(prompts), pack.chat_template_kwargs)
        check_room(asked, longest_input(pack.base_model, pack.base_revision), max_new_tokens)
        return max(map(len, asked)) + max_new_tokens

    def answers(self, adapter: Path | None, prompts: Sequence[str], max_new_tokens: int) -> list[str]:
        """Those of the model with this LoRA on it, or as it is."""
        template = self.pack.chat_template_kwargs
        with self.tuned(adapter) as model:
            return answer(model, self.tokenizer, prompts, max_new_tokens=max_new_tokens, template=template)


def held_out_loss(model: Any, rows: Sequence[Encoded]) -> float | None:
    """The mean over the rows of their answers' mean loss (nats a token); None where it overflows."""
    loss = -float(log_probabilities(model, rows).mean())
    return loss if math.isfinite(loss) else None


def free_memory() -> None:
    """Give back the memory of a model that nobody uses."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
