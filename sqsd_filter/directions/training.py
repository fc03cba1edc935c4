"""One adapter of a recipe, trained by trl and peft on the tokens that the scorer sees; checkpoints to resume from.

Of several processes each has a share of every batch, so that an update is made of the same rows as in one process.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

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

WORK_DIR = ".build"


@dataclass(frozen=True)
class Course:
    """How an adapter is trained, whatever its rows are and wherever they come from. The trainer's checkpoints go to
    the folder `checkpoints`; the last `keep` of them stay, None for all."""

    name: str
    adapter: AdapterRecipe
    lora: LoraShape
    seed: int
    checkpoints: Path
    keep: int | None = None


def train(recipe: PackRecipe, name: str, data: TrainingData, target: Path, progress: Progress) -> None:
    """Train one adapter of the recipe and put it, with its record, into the pack's folder `target`."""
    adapter = recipe.adapters[name]
    progress.note(f"training '{name}' by {adapter.method.upper()} on {adapter.data}")
    tokenizer = load_tokenizer(recipe.base_model, recipe.base_revision)
    model = _base(recipe, name, target)
    course = Course(name, adapter, recipe.lora, recipe.seed, target / WORK_DIR / name)
    if adapter.method == "sft":
        rows = _encoded(tokenizer, recipe.chat_template_kwargs, adapter, data)
        trainer = fine_tune(course, model, tokenizer, rows, progress)
    else:
        trainer = _prefer(course, model, tokenizer, data, recipe.chat_template_kwargs, progress)

    taken = course.checkpoints / "last"
    if processes.is_first():
        trainer.model.save_pretrained(taken)
    processes.wait()
    if isinstance(adapter.take_step, int):
        taken = course.checkpoints / f"checkpoint-{adapter.take_step}"
    if processes.is_first():
        _publish(taken, target / name)
        write_json(target / name / "training.json", _facts(recipe, adapter, data, trainer))
    processes.wait()


def fine_tune(course: Course, model: Any, tokenizer: Any, rows: Sequence[Encoded], progress: Progress) -> Any:
    """SFT on the rows' answers: the trainer with a trained LoRA on `model`. It goes on from the last checkpoint."""
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
        args=_alone(SFTConfig(**arguments)),
        train_dataset=Dataset.from_list(examples),
        processing_class=tokenizer,
        peft_config=_lora(course.lora),
    )
    return _run(course, trainer, progress)


def _prefer(
    course: Course, model: Any, tokenizer: Any, data: TrainingData, template: Mapping[str, Any], progress: Progress
) -> Any:
    """DPO: the chosen answers before the rejected ones."""
    from datasets import Dataset, load_from_disk
    from trl import DPOConfig, DPOTrainer

    arguments = _prepare(course, model, tokenizer)
    rows: list[dict[str, Any]] = []
    for chosen, rejected in data.examples:
        prompt, better = prompt_and_reply(chosen)
        _, worse = prompt_and_reply(rejected)
        row = {"prompt": _plain(prompt), "chosen": _plain(better), "rejected": _plain(worse)}
        rows.append(row | ({"chat_template_kwargs": kwargs} if (kwargs := dict(template)) else {}))
    stored = course.checkpoints / "pairs"  # beside which trl keeps the base's log-probabilities for all
    if processes.is_first() and not (stored.is_dir() and load_from_disk(stored).to_list() == rows):
        shutil.rmtree(stored, ignore_errors=True)
        with _renamed(stored) as beside:
            Dataset.from_list(rows).save_to_disk(beside)
    processes.wait()
    trainer = DPOTrainer(
        model=model,
        args=_alone(DPOConfig(**arguments, beta=course.adapter.beta, precompute_ref_log_probs=True)),
        train_dataset=load_from_disk(stored),
        processing_class=tokenizer,
        peft_config=_lora(course.lora),
    )
    return _run(course, trainer, progress)


def _prepare(course: Course, model: Any, tokenizer: Any) -> dict[str, Any]:
    """What all trainers are told, on the device where the model is; random numbers begin with the seed."""
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
            "start fewer, or change it."
        )
    share = adapter.batch_size // count
    on_device = math.gcd(share, adapter.device_batch_size or (share if cuda else 1))
    set_seed(course.seed)
    return {
        "output_dir": str(course.checkpoints),
        "num_train_epochs": adapter.epochs,
        "learning_rate": adapter.learning_rate,
        "lr_scheduler_type": adapter.schedule,
        "warmup_steps": adapter.warmup_ratio,  # a float below 1 is a share of all steps
        "per_device_train_batch_size": on_device,
        "gradient_accumulation_steps": share // on_device,
        "max_length": adapter.max_length,
        "save_steps": adapter.save_steps,
        "save_total_limit": course.keep,
        "logging_steps": 0.05,  # of all steps: about twenty losses
        "seed": course.seed,
        "use_cpu": not cuda,
        "bf16": False,  # the base is loaded in its dtype already; the adapters train in float32
        "gradient_checkpointing": cuda,
        "ddp_find_unused_parameters": False,
        "report_to": "none",
        "disable_tqdm": True,
    }


def _lora(shape: LoraShape) -> Any:
    from peft import LoraConfig

    return LoraConfig(
        r=shape.r,
        lora_alpha=shape.alpha,
        lora_dropout=shape.dropout,
        target_modules=shape.target_modules,
        bias="none",
        task_type="CAUSAL_LM",
    )


def _run(course: Course, trainer: Any, progress: Progress) -> Any:
    """Let the trainer train, from its last whole checkpoint if there is one."""
    from transformers import PrinterCallback

    _in_float32(trainer.model)
    trainer.remove_callback(PrinterCallback)  # what disable_tqdm puts in: every log entry to stdout
    trainer.add_callback(_told(progress, course.name, course.adapter))
    whole = [p for p in course.checkpoints.glob("checkpoint-*") if _is_whole(p)]
    last = max(whole, key=lambda p: int(p.name.split("-")[1]), default=None)
    trainer.train(resume_from_checkpoint=str(last) if last else None)
    progress.finish()
    return trainer


def _base(recipe: PackRecipe, name: str, target: Path) -> Any:
    """The base model where this process trains on it: in the recipe's dtype or 4 bits, and with the base adapter merged
    unless that is what is to be trained."""
    import torch

    dtype, device = getattr(torch, recipe.dtype), processes.device()
    adapter = target / recipe.base_adapter if recipe.base_adapter not in (None, name) else None
    if recipe.quantization is None:
        return load_model(recipe.base_model, recipe.base_revision, dtype=dtype, device=device, adapter=adapter)
    base, revision = recipe.base_model, recipe.base_revision
    if adapter is not None:  # nothing can be merged into weights of 4 bits
        merged = target / WORK_DIR / "base"
        if processes.is_first() and not merged.is_dir():
            with _renamed(merged) as beside:
                load_model(base, revision, dtype=dtype, adapter=adapter).save_pretrained(beside)
        processes.wait()
        base, revision = str(merged), None
    return load_in_4bit(base, revision, dtype=dtype, device=device)


def _in_float32(model: Any) -> None:
    """Train the adapters in float32: trl makes those on a base in 4 bits bfloat16, which is too coarse for updates of a
    learning rate like 5e-6."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def _facts(recipe: PackRecipe, adapter: AdapterRecipe, data: TrainingData, trainer: Any) -> dict[str, Any]:
    """The provenance of a trained adapter."""
    settings = {k: v for k, v in asdict(adapter).items() if v not in (None, {})}
    how = {"lora": asdict(recipe.lora), "seed": recipe.seed, "dtype": recipe.dtype}
    how |= {"quantization": recipe.quantization} if recipe.quantization else {}
    return {
        "data": data.source,
        "licence": data.licence,
        "rows": len(trainer.train_dataset),
        "left_out": dict(data.left_out),
        "steps": trainer.state.global_step if adapter.take_step in (None, SENSITIVE) else adapter.take_step,
        "settings": settings | how,
        "losses": losses(trainer),
    }


def losses(trainer: Any) -> list[dict[str, Any]]:
    """The training loss (nats a token) after about every twentieth of the updates."""
    return [{"step": e["step"], "loss": round(e["loss"], 4)} for e in trainer.state.log_history if "loss" in e]


def take_checkpoint(target: Path, name: str, checkpoint: Path, step: int) -> None:
    """Publish this checkpoint of an adapter that is trained already, in the place of its last state."""
    _publish(checkpoint, target / name)
    record = target / name / "training.json"
    write_json(record, json.loads(record.read_text()) | {"steps": step})


@contextmanager
def _renamed(folder: Path) -> Iterator[Path]:
    """A neighbour to write into, which then becomes `folder`: that is whole or not there."""
    beside = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(beside, ignore_errors=True)
    yield beside
    beside.rename(folder)


def _is_whole(checkpoint: Path) -> bool:
    """Was the trainer's state, which it writes last, written to its end?"""
    try:
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True


def _told(progress: Progress, name: str, adapter: AdapterRecipe) -> Any:
    """A callback that tells `progress` of every update. It raises `UsageError`, before the first one, where there will
    be none of the number that is to be taken."""
    from transformers import TrainerCallback

    step, batch_size = adapter.take_step, adapter.batch_size

    class Told(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if isinstance(step, int) and step > state.max_steps:
                raise UsageError(
                    f"Adapter '{name}' is trained for {state.max_steps} steps: its take_step can't be {step}."
                )
            progress.start(f"training {name}", (state.max_steps - state.global_step) * batch_size)

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            progress.advance(batch_size)

    return Told()


def _publish(trained: Path, target: Path) -> None:
    """Copy an adapter into the pack in bfloat16."""
    import torch
    from safetensors.torch import load_file

    config_file, weights_file = ADAPTER_FILES
    tensors = load_file(trained / weights_file)
    config = json.loads((trained / config_file).read_text(encoding="utf-8"))
    write_adapter(target, config, {name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()})


def _encoded(tokenizer: Any, template: Mapping[str, Any], adapter: AdapterRecipe, data: TrainingData) -> list[Encoded]:
    """The examples as the model sees them; those that it can't see are counted in `data`. Raises `PackError`."""
    encoder = ChatEncoder(tokenizer, adapter.max_length, template)
    rows = []
    for encoded in encoder.encode([conversation for (conversation,) in data.examples]):
        if isinstance(encoded, Encoded):
            rows.append(encoded)
        else:
            data.left_out[encoded.status] += 1
    if not rows:
        raise PackError(f"No row of {adapter.data} has an answer within {adapter.max_length} tokens.")
    return rows


def _alone(config: Any) -> Any:
    """The same for a trainer that has what this process sees of GPUs as one device: it would copy the model to each of
    them, and multiply the batch."""
    config._n_gpu = min(config.n_gpu, 1)
    return config


def _plain(turns: list[Message]) -> list[dict[str, str]]:
    return [{"role": turn["role"], "content": turn["content"]} for turn in turns]
