"""Training of one adapter, by trl and peft, on the tokens that the scorer sees, and resumed from checkpoints.

Several processes share every batch, so that an update uses the same rows as in one process.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from sqsd_filter.corpus.conversation import Message
from sqsd_filter.directions import processes
from sqsd_filter.directions.adapter_folder import write_adapter
from sqsd_filter.directions.data import TrainingData, prompt_and_reply
from sqsd_filter.directions.recipe import SENSITIVE, AdapterRecipe, LoraShape, PackRecipe
from sqsd_filter.errors import PackError, UsageError
from sqsd_filter.progress import Progress
from sqsd_filter.scoring.chat_encoder import ChatEncoder, Encoded
from sqsd_filter.scoring.models import load_in_4bit, load_model, load_tokenizer
from sqsd_filter.scoring.pack import ADAPTER_FILES
from sqsd_filter.storage.folder import write_json

if TYPE_CHECKING:
    import torch
    from peft import LoraConfig
    from transformers import (
        PreTrainedModel,
        PreTrainedTokenizerBase,
        Trainer,
        TrainerCallback,
        TrainerControl,
        TrainerState,
        TrainingArguments,
    )
    from trl import SFTTrainer

C = TypeVar("C", bound="TrainingArguments")

WORK_DIR = ".build"


@dataclass(frozen=True)
class Course:
    """How an adapter is trained, independent of its rows.

    The trainer writes to the folder `checkpoints` and keeps the last `keep` of them, or all if None.
    """

    name: str
    adapter: AdapterRecipe
    lora: LoraShape
    seed: int
    checkpoints: Path
    keep: int | None = None


def train(recipe: PackRecipe, name: str, data: TrainingData, target: Path, progress: Progress) -> None:
    """Train one adapter of the recipe, and write it with its record into the pack's folder `target`."""
    adapter = recipe.adapters[name]
    progress.note(f"training '{name}' by {adapter.method.upper()} on {adapter.data}")
    tokenizer = load_tokenizer(recipe.base_model, recipe.base_revision)
    model = _base(recipe, name, target)
    trainer: Trainer
    course = Course(name, adapter, recipe.lora, recipe.seed, target / WORK_DIR / name)
    if adapter.method == "sft":
        rows = _encoded(tokenizer, recipe.chat_template_kwargs, adapter, data)
        trainer = fine_tune(course, model, tokenizer, rows, progress)
    else:
        trainer = _prefer(course, model, tokenizer, data, recipe.chat_template_kwargs, progress)

    taken = course.checkpoints / "last"
    if processes.is_first():
        save_adapter(trainer, taken)
    processes.wait()
    if isinstance(adapter.take_step, int):
        taken = course.checkpoints / f"checkpoint-{adapter.take_step}"
    if processes.is_first():
        _publish(taken, target / name)
        write_json(target / name / "training.json", _facts(recipe, adapter, data, trainer))
    processes.wait()


def save_adapter(trainer: Trainer, folder: Path) -> None:
    """Save the LoRA that was trained."""
    from peft import PeftModel

    assert isinstance(trainer.model, PeftModel)
    trainer.model.save_pretrained(str(folder))


def fine_tune(
    course: Course,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Encoded],
    progress: Progress,
) -> SFTTrainer:
    """SFT on the rows' answers, resumed from the last checkpoint: the trainer with the trained LoRA on `model`."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    arguments = _prepare(course, model, tokenizer)
    examples = []
    for row in rows:
        ids = row.ids.tolist()
        labels = [token if learned else -100 for token, learned in zip(ids, row.answer, strict=True)]
        examples.append({"input_ids": ids, "labels": labels})
    trainer = SFTTrainer(
        model=model,
        args=_on_one_device(SFTConfig(**arguments)),
        train_dataset=Dataset.from_list(examples),
        processing_class=tokenizer,
        peft_config=_lora(course.lora),
    )
    _run(course, trainer, progress)
    return trainer


def _prefer(
    course: Course,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: TrainingData,
    template: Mapping[str, Any],
    progress: Progress,
) -> Trainer:
    """DPO: prefer the chosen answers to the rejected ones."""
    from datasets import Dataset, load_from_disk
    from trl import DPOConfig, DPOTrainer

    arguments = _prepare(course, model, tokenizer)
    rows: list[dict[str, Any]] = []
    for chosen, rejected in data.examples:
        prompt, better = prompt_and_reply(chosen)
        _, worse = prompt_and_reply(rejected)
        row = {"prompt": _plain(prompt), "chosen": _plain(better), "rejected": _plain(worse)}
        rows.append(row | ({"chat_template_kwargs": kwargs} if (kwargs := dict(template)) else {}))
    stored = course.checkpoints / "pairs"  # beside it trl keeps the log-probabilities of the base model
    if processes.is_first() and not (stored.is_dir() and load_from_disk(stored).to_list() == rows):
        shutil.rmtree(stored, ignore_errors=True)
        with _renamed(stored) as beside:
            Dataset.from_list(rows).save_to_disk(beside)
    processes.wait()
    trainer = DPOTrainer(
        model=model,
        args=_on_one_device(DPOConfig(**arguments, beta=course.adapter.beta, precompute_ref_log_probs=True)),
        train_dataset=load_from_disk(stored),
        processing_class=tokenizer,
        peft_config=_lora(course.lora),
    )
    _run(course, trainer, progress)
    return trainer


def _prepare(course: Course, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The arguments that all trainers share, for the device the model is on. Sets the random seed."""
    from datasets.utils.logging import disable_progress_bar
    from transformers import set_seed

    disable_progress_bar()
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    adapter, count = course.adapter, processes.count()
    cuda = next(model.parameters()).is_cuda
    if adapter.batch_size % count:
        raise UsageError(
            f"Adapter '{course.name}' has a batch_size of {adapter.batch_size}, which {count} processes can't share: "
            "start fewer processes, or change it to a multiple."
        )
    share = adapter.batch_size // count
    on_device = math.gcd(share, adapter.device_batch_size or (share if cuda else 1))
    set_seed(course.seed)
    return {
        "output_dir": str(course.checkpoints),
        "num_train_epochs": adapter.epochs,
        "learning_rate": adapter.learning_rate,
        "lr_scheduler_type": adapter.schedule,
        "warmup_steps": adapter.warmup_ratio,  # below 1, a share of all steps
        "per_device_train_batch_size": on_device,
        "gradient_accumulation_steps": share // on_device,
        "max_length": adapter.max_length,
        "save_steps": adapter.save_steps,
        "save_total_limit": course.keep,
        "logging_steps": 0.05,  # a share of all steps: about twenty losses
        "seed": course.seed,
        "use_cpu": not cuda,
        "bf16": False,  # the base model is already in its dtype; the adapters train in float32
        "gradient_checkpointing": cuda,
        "ddp_find_unused_parameters": False,
        "report_to": "none",
        "disable_tqdm": True,
    }


def _lora(shape: LoraShape) -> LoraConfig:
    from peft import LoraConfig

    return LoraConfig(
        r=shape.r,
        lora_alpha=shape.alpha,
        lora_dropout=shape.dropout,
        target_modules=shape.target_modules,
        bias="none",
        task_type="CAUSAL_LM",
    )


def _run(course: Course, trainer: Trainer, progress: Progress) -> None:
    """Train from the last complete checkpoint, or from the start if there is none."""
    from transformers import PrinterCallback

    assert trainer.model is not None
    make_trainable_float32(trainer.model)
    trainer.remove_callback(PrinterCallback)  # disable_tqdm adds it: it prints every log entry to stdout
    trainer.add_callback(_reporting(progress, course.name, course.adapter))
    whole = [p for p in course.checkpoints.glob("checkpoint-*") if _is_whole(p)]
    last = max(whole, key=lambda p: int(p.name.split("-")[1]), default=None)
    trainer.train(resume_from_checkpoint=str(last) if last else None)
    progress.finish()


def _base(recipe: PackRecipe, name: str, target: Path) -> PreTrainedModel:
    """The base model on this process's device, in the recipe's dtype or in 4 bits.

    The base adapter is merged into it, unless `name` is the base adapter itself."""
    import torch

    dtype, device = getattr(torch, recipe.dtype), processes.device()
    adapter = target / recipe.base_adapter if recipe.base_adapter not in (None, name) else None
    model: PreTrainedModel
    if recipe.quantization is None:
        model = load_model(recipe.base_model, recipe.base_revision, dtype=dtype, device=device, adapter=adapter)
        return model
    base, revision = recipe.base_model, recipe.base_revision
    if adapter is not None:  # an adapter can't be merged into weights of 4 bits
        merged = target / WORK_DIR / "base"
        if processes.is_first() and not merged.is_dir():
            with _renamed(merged) as beside:
                load_model(base, revision, dtype=dtype, adapter=adapter).save_pretrained(beside)
        processes.wait()
        base, revision = str(merged), None
    model = load_in_4bit(base, revision, dtype=dtype, device=device)
    return model


def make_trainable_float32(model: torch.nn.Module) -> None:
    """Put the trainable parameters into float32. On a 4-bit base trl makes adapters bfloat16, which is too coarse for
    updates at a learning rate like 5e-6."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def _facts(recipe: PackRecipe, adapter: AdapterRecipe, data: TrainingData, trainer: Trainer) -> dict[str, Any]:
    """The provenance of a trained adapter."""
    settings = {k: v for k, v in asdict(adapter).items() if v not in (None, {})}
    how = {"lora": asdict(recipe.lora), "seed": recipe.seed, "dtype": recipe.dtype}
    how |= {"quantization": recipe.quantization} if recipe.quantization else {}
    return {
        "data": data.source,
        "licence": data.licence,
        "rows": len(cast("Sized", trainer.train_dataset)),
        "left_out": dict(data.left_out),
        "steps": trainer.state.global_step if adapter.take_step in (None, SENSITIVE) else adapter.take_step,
        "settings": settings | how,
        "losses": losses(trainer),
    }


def losses(trainer: Trainer) -> list[dict[str, Any]]:
    """The training loss (nats per token) about twenty times during the training."""
    return [{"step": e["step"], "loss": round(e["loss"], 4)} for e in trainer.state.log_history if "loss" in e]


def take_checkpoint(target: Path, name: str, checkpoint: Path, step: int) -> None:
    """Replace a trained adapter in the pack by this checkpoint of its training, which has `step` updates."""
    _publish(checkpoint, target / name)
    record = target / name / "training.json"
    write_json(record, json.loads(record.read_text()) | {"steps": step})


@contextmanager
def _renamed(folder: Path) -> Iterator[Path]:
    """A temporary folder to write into, which is then renamed to `folder`, so that it is complete or absent."""
    beside = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(beside, ignore_errors=True)
    yield beside
    beside.rename(folder)


def _is_whole(checkpoint: Path) -> bool:
    """Is the trainer's state, which it writes last, complete?"""
    try:
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True


def _reporting(progress: Progress, name: str, adapter: AdapterRecipe) -> TrainerCallback:
    """A callback that advances `progress` at every update.

    Before the first update it raises `UsageError` if the adapter's take_step lies after the last one."""
    from transformers import TrainerCallback

    step, batch_size = adapter.take_step, adapter.batch_size

    class Reporting(TrainerCallback):
        def on_train_begin(
            self,
            args: TrainingArguments,  # noqa: ARG002, the signature is the trainer's
            state: TrainerState,
            control: TrainerControl,  # noqa: ARG002
            **_: object,
        ) -> None:
            if isinstance(step, int) and step > state.max_steps:
                raise UsageError(
                    f"Adapter '{name}' is trained for {state.max_steps} steps: its take_step can't be {step}."
                )
            progress.start(f"training {name}", (state.max_steps - state.global_step) * batch_size)

        def on_step_end(
            self,
            args: TrainingArguments,  # noqa: ARG002
            state: TrainerState,  # noqa: ARG002
            control: TrainerControl,  # noqa: ARG002
            **_: object,
        ) -> None:
            progress.advance(batch_size)

    return Reporting()


def _publish(trained: Path, target: Path) -> None:
    """Copy an adapter into the pack in bfloat16."""
    import torch
    from safetensors.torch import load_file

    config_file, tensors_file = ADAPTER_FILES
    tensors = load_file(trained / tensors_file)
    config = json.loads((trained / config_file).read_text(encoding="utf-8"))
    write_adapter(target, config, {name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()})


def _encoded(
    tokenizer: PreTrainedTokenizerBase, template: Mapping[str, Any], adapter: AdapterRecipe, data: TrainingData
) -> list[Encoded]:
    """The examples as tokens. Those that can't be encoded are counted in `data`. Raises `PackError` if all are."""
    encoder = ChatEncoder(tokenizer, adapter.max_length, template, folds_system=True)
    rows = []
    for encoded in encoder.encode([conversation for (conversation,) in data.examples]):
        if isinstance(encoded, Encoded):
            rows.append(encoded)
        else:
            data.left_out[encoded.status] += 1
    if not rows:
        raise PackError(
            f"No row of {adapter.data} has an answer within {adapter.max_length} tokens: raise its max_length."
        )
    return rows


def _on_one_device(config: C) -> C:
    """The same configuration with at most one GPU. With more, the trainer would copy the model to each of them and
    multiply the batch."""
    config._n_gpu = min(config.n_gpu, 1)  # noqa: SLF001, transformers has no public setting for it
    return config


def _plain(turns: list[Message]) -> list[dict[str, str]]:
    return [{"role": turn["role"], "content": turn["content"]} for turn in turns]
