"""The aligned model of a pack: fine-tune it on a set of rows, ask it prompts, and measure its loss on held-out rows.

Each step loads the model again, so that a run does not depend on what the process did before. The trained LoRA stays a
side path, as in training, because merging it into bfloat16 weights would distort it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from sqsd_filter.directions.offset import offset
from sqsd_filter.directions.training import Course, fine_tune, losses, save_adapter
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
from sqsd_filter.scoring.placement import check_device, choose_device, release_memory

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Answers prompts: (LoRA folder or None for the model without one, prompts, maximum of new tokens) -> answers.
Answerer = Callable[[Path | None, Sequence[str], int], list[str]]
KEPT_CHECKPOINTS = 2  # the last one may be half written


@dataclass(frozen=True)
class Subject:
    """The model under evaluation, and how it is fine-tuned."""

    pack: Pack
    tuning: FineTuning
    device: str
    tokenizer: PreTrainedTokenizerBase
    encoder: ChatEncoder

    @classmethod
    def of(cls, pack: Pack, tuning: FineTuning, device: str | None) -> Subject:
        """Raises `UsageError` for a device or schedule that can't be used, `ModelError`, and `SQSDError` without the
        extra `train`."""
        if any(find_spec(name) is None for name in ("peft", "trl")):
            raise SQSDError("Evaluating needs trl and peft: pip install 'sqsd-filter[train]'.")
        from transformers import SchedulerType

        if tuning.schedule not in (schedules := [each.value for each in SchedulerType]):
            raise UsageError(f"{option('schedule')} must be one of {', '.join(schedules)}, not {tuning.schedule}.")
        device = choose_device(device)
        if device not in ("cpu", "cuda", "cuda:0"):
            raise UsageError(
                f"Fine-tuning can't run on '{device}': use cpu or cuda, and choose one GPU with CUDA_VISIBLE_DEVICES."
            )
        check_device(device)
        tokenizer = load_tokenizer(pack.base_model, pack.base_revision)
        encoder = ChatEncoder(tokenizer, tuning.max_length, pack.chat_template_kwargs, folds_system=True)
        return cls(pack, tuning, device, tokenizer, encoder)

    @property
    def device_name(self) -> str:
        """The device's name, for a report."""
        return self.device if self.device == "cpu" else torch.cuda.get_device_name(self.device)

    def _load(self) -> PreTrainedModel:
        pack, dtype = self.pack, getattr(torch, self.tuning.dtype)
        model: PreTrainedModel = load_model(
            pack.base_model, pack.base_revision, dtype=dtype, device=self.device, adapter=pack.base_folder
        )
        return model

    def fine_tune(
        self, name: str, rows: Sequence[Encoded], seed: int, checkpoints: Path, target: Path, progress: Progress
    ) -> dict[str, object]:
        """Train a LoRA on the rows' answers and write it to `target`. Resumes from the last of the `checkpoints`.

        Returns a record of the training.
        """
        course = Course(name, self.tuning.recipe, self.tuning.lora, seed, checkpoints, KEPT_CHECKPOINTS)
        try:
            trainer = fine_tune(course, self._load(), self.tokenizer, rows, progress)
        except Exception as problem:
            if is_out_of_memory(problem):
                batch = self.tuning.device_batch_size
                raise SQSDError(
                    f"The memory of {self.device_name} is too small for {batch} rows at a time: start again with a "
                    f"smaller {option('device_batch_size')}, which does not change the updates."
                ) from problem
            if isinstance(problem, ValueError) and "arget module" in str(problem):  # peft, before anything is trained
                modules = self.tuning.target_modules
                raise UsageError(
                    f"{option('target_modules')} {modules} names no layer of the model: name its linear layers, or use "
                    "all-linear."
                ) from problem
            raise
        save_adapter(trainer, target)
        record = {"rows": len(rows), "seed": seed, "steps": trainer.state.global_step, "losses": losses(trainer)}
        del trainer
        release_memory()
        return record | {"settings": asdict(self.tuning)}

    @contextmanager
    def tuned(self, adapter: Path | None) -> Iterator[PreTrainedModel]:
        """The model with this LoRA, or without any."""
        model = self._load()
        with offset(model, load_adapter(adapter), 1.0) if adapter else nullcontext():
            yield model

    def save(self, target: Path) -> None:
        """Write the aligned model as a folder of its own."""
        self._load().save_pretrained(target)
        self.tokenizer.save_pretrained(target)

    def longest(self, prompts: Sequence[str], max_new_tokens: int) -> int:
        """The largest number of tokens of a prompt with its answer. Raises `InputError` for a prompt that leaves no
        room for an answer."""
        pack = self.pack
        asked = as_asked(self.tokenizer, as_turns(prompts), pack.chat_template_kwargs)
        check_room(asked, longest_input(pack.base_model, pack.base_revision), max_new_tokens)
        return max(map(len, asked)) + max_new_tokens

    def answers(self, adapter: Path | None, prompts: Sequence[str], max_new_tokens: int) -> list[str]:
        """The answers of the model with this LoRA, or without any."""
        template = self.pack.chat_template_kwargs
        with self.tuned(adapter) as model:
            return answer(model, self.tokenizer, prompts, max_new_tokens=max_new_tokens, template=template)


def held_out_loss(model: PreTrainedModel, rows: Sequence[Encoded]) -> float | None:
    """The mean over the rows of each answer's mean loss (nats per token); None where it overflows."""
    loss = -float(log_probabilities(model, rows).mean())
    return loss if math.isfinite(loss) else None
