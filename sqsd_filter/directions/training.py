"""One adapter of a recipe, trained by trl and peft on the tokens that the scorer sees; checkpoints to resume from."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sqsd_filter.directions.pack import ADAPTER_FILES
from sqsd_filter.directions.recipe import AdapterRecipe, PackRecipe
from sqsd_filter.errors import InputError, PackError, UsageError
from sqsd_filter.progress import Progress
from sqsd_filter.scoring.chat_encoder import ChatEncoder, Encoded
from sqsd_filter.scoring.weights import load_model, load_tokenizer

log = logging.getLogger(__name__)

WORK_DIR = ".build"


def train(
    recipe: PackRecipe, name: str, rows: Any, source: Mapping[str, Any], target: Path, progress: Progress
) -> None:
    import torch
    from datasets.utils.logging import disable_progress_bar
    from peft import LoraConfig
    from transformers import PrinterCallback, set_seed

    disable_progress_bar()
    adapter = recipe.adapters[name]
    progress.note(f"training '{name}' by {adapter.method.upper()} on {adapter.data}")
    tokenizer = load_tokenizer(recipe.base_model, recipe.base_revision)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    cuda = torch.cuda.is_available()
    base = target / recipe.base_adapter if recipe.base_adapter not in (None, name) else None
    model = load_model(recipe.base_model, recipe.base_revision, dtype=getattr(torch, recipe.dtype), adapter=base)
    lora = LoraConfig(
        r=recipe.lora.r,
        lora_alpha=recipe.lora.alpha,
        lora_dropout=recipe.lora.dropout,
        target_modules=recipe.lora.target_modules,
        bias="none",
        task_type="CAUSAL_LM",
    )
    on_device = adapter.device_batch_size or (adapter.batch_size if cuda else 1)
    checkpoints = target / WORK_DIR / name
    arguments = {
        "output_dir": str(checkpoints),
        "num_train_epochs": adapter.epochs,
        "learning_rate": adapter.learning_rate,
        "lr_scheduler_type": adapter.schedule,
        "warmup_steps": adapter.warmup_ratio,  # a float below 1 is a share of all steps
        "per_device_train_batch_size": on_device,
        "gradient_accumulation_steps": adapter.batch_size // on_device,
        "max_length": adapter.max_length,
        "save_steps": adapter.save_steps,
        "logging_steps": 0.05,  # of all steps: about twenty losses
        "seed": recipe.seed,
        "use_cpu": not cuda,
        "bf16": False,  # the base is loaded in its dtype already; the adapters train in float32
        "gradient_checkpointing": cuda,
        "report_to": "none",
        "disable_tqdm": True,
    }
    set_seed(recipe.seed)
    if adapter.method == "sft":
        trainer = _sft(model, tokenizer, recipe, adapter, rows, lora, arguments)
    else:
        trainer = _dpo(model, tokenizer, recipe, adapter, rows, lora, arguments)
    trainer.remove_callback(PrinterCallback)  # what disable_tqdm puts in: every log entry to stdout
    trainer.add_callback(_told(progress, name, adapter.batch_size))
    whole = [p for p in checkpoints.glob("checkpoint-*") if _is_whole(p)]
    last = max(whole, key=lambda p: int(p.name.split("-")[1]), default=None)
    trainer.train(resume_from_checkpoint=str(last) if last else None)
    progress.finish()

    taken = checkpoints / "last"
    trainer.model.save_pretrained(taken)
    step = adapter.take_step if isinstance(adapter.take_step, int) else None
    if step is not None:
        taken = checkpoints / f"checkpoint-{step}"
        if not taken.is_dir():
            raise UsageError(
                f"Adapter '{name}' is trained for {trainer.state.global_step} steps: its take_step can't be {step}."
            )
    _publish(taken, target / name)
    losses = [{"step": e["step"], "loss": round(e["loss"], 4)} for e in trainer.state.log_history if "loss" in e]
    settings = {k: v for k, v in asdict(adapter).items() if v not in (None, {})}
    facts = {
        "data": source,
        "licence": adapter.licence,
        "rows": len(trainer.train_dataset),
        "steps": step or trainer.state.global_step,
        "settings": settings | {"lora": asdict(recipe.lora), "seed": recipe.seed, "dtype": recipe.dtype},
        "losses": losses,
    }
    write_json(target / name / "training.json", facts)


def take_checkpoint(target: Path, name: str, checkpoint: Path, step: int) -> None:
    """Publish this checkpoint of an adapter that is trained already, in the place of its last state."""
    _publish(checkpoint, target / name)
    record = target / name / "training.json"
    write_json(record, json.loads(record.read_text()) | {"steps": step})


def write_json(path: Path, value: Any) -> None:
    beside = path.with_name(f".{path.name}.tmp")
    beside.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    beside.replace(path)


def _is_whole(checkpoint: Path) -> bool:
    """Was the trainer's state, which it writes last, written to its end?"""
    try:
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True


def _told(progress: Progress, name: str, batch_size: int) -> Any:
    """A callback that tells `progress` of every update."""
    from transformers import TrainerCallback

    class Told(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            progress.start(f"training {name}", (state.max_steps - state.global_step) * batch_size)

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            progress.advance(batch_size)

    return Told()


def _publish(trained: Path, target: Path) -> None:
    """Copy an adapter into the pack in bfloat16, without the paths of the machine it was trained on."""
    import torch
    from safetensors.torch import load_file, save_file

    config_file, weights_file = ADAPTER_FILES
    target.mkdir(parents=True, exist_ok=True)
    config = json.loads((trained / config_file).read_text())
    config["base_model_name_or_path"] = None
    if not isinstance(config["target_modules"], str):  # else a pattern
        config["target_modules"] = sorted(config["target_modules"])
    (target / config_file).write_text(json.dumps(config, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    tensors = load_file(trained / weights_file)
    save_file({k: v.to(torch.bfloat16) for k, v in sorted(tensors.items())}, target / weights_file)


def _sft(
    model: Any, tokenizer: Any, recipe: PackRecipe, adapter: AdapterRecipe, rows: Any, lora: Any, arguments: dict
) -> Any:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    encoder = ChatEncoder(tokenizer, adapter.max_length, recipe.chat_template_kwargs)
    encoded = encoder.encode([_turns(row, adapter, str(adapter.answer)) for row in rows])
    usable = [e for e in encoded if isinstance(e, Encoded)]
    log.info("%d of %d rows have an answer that fits", len(usable), len(encoded))
    data = Dataset.from_list(
        [
            {
                "input_ids": e.ids.tolist(),
                "labels": [i if m else -100 for i, m in zip(e.ids.tolist(), e.answer, strict=True)],
            }
            for e in usable
        ]
    )
    return SFTTrainer(
        model=model, args=SFTConfig(**arguments), train_dataset=data, processing_class=tokenizer, peft_config=lora
    )


def _dpo(
    model: Any, tokenizer: Any, recipe: PackRecipe, adapter: AdapterRecipe, rows: Any, lora: Any, arguments: dict
) -> Any:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    data = Dataset.from_list(
        [
            {
                "prompt": _turns(row, adapter, str(adapter.chosen))[:1],
                "chosen": [{"role": "assistant", "content": row[adapter.chosen]}],
                "rejected": [{"role": "assistant", "content": row[adapter.rejected]}],
                "chat_template_kwargs": dict(recipe.chat_template_kwargs),
            }
            for row in rows
        ]
    )
    if not recipe.chat_template_kwargs:
        data = data.remove_columns("chat_template_kwargs")
    config = DPOConfig(**arguments, beta=adapter.beta, precompute_ref_log_probs=True)
    return DPOTrainer(model=model, args=config, train_dataset=data, processing_class=tokenizer, peft_config=lora)


def _turns(row: Mapping[str, Any], adapter: AdapterRecipe, answer: str) -> list[dict[str, str]]:
    prompt = row[adapter.prompt]
    if adapter.context and row[adapter.context]:
        prompt = f"{prompt}\n{row[adapter.context]}"
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": row[answer]}]


def read_rows(recipe: PackRecipe, adapter: AdapterRecipe) -> tuple[Any, dict[str, Any]]:
    """The recipe's rows of one adapter's data, and where they came from."""
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError

    file = recipe.folder / adapter.data
    if file.is_file():
        kind = {".csv": "csv", ".parquet": "parquet"}.get(file.suffix, "json")
        try:
            data = load_dataset(kind, data_files=str(file), split="train")
        except DatasetGenerationError as problem:
            raise InputError(f"{file} can't be read ({problem.__cause__ or problem}): mend it.") from problem
        with file.open("rb") as stream:
            source = {"file": file.name, "sha256": hashlib.file_digest(stream, "sha256").hexdigest()}
    else:
        try:
            data = load_dataset(adapter.data, split=adapter.split)
        except (OSError, ValueError) as problem:
            raise InputError(
                f"The data '{adapter.data}' is no file beside the recipe and can't be had from the Hub ({problem})."
            ) from problem
        source = {"dataset": adapter.data, "split": adapter.split}
    columns = [adapter.prompt, adapter.context, adapter.answer, adapter.chosen, adapter.rejected, *adapter.where]
    if missing := [c for c in columns if c is not None and c not in data.column_names]:
        raise InputError(
            f"{adapter.data} lacks the columns {', '.join(missing)}; it has {', '.join(data.column_names)}."
        )
    for column, value in adapter.where.items():
        data = data.filter(lambda row, c=column, v=value: row[c] == v)
    if adapter.rows is not None and len(data) > adapter.rows:
        data = data.shuffle(seed=recipe.seed).select(range(adapter.rows))
    texts = [c for c in (adapter.prompt, adapter.answer, adapter.chosen, adapter.rejected) if c is not None]
    for column in texts:
        odd = next((k for k, value in enumerate(data[column][:]) if not isinstance(value, str)), None)
        if odd is not None:
            raise InputError(f"{adapter.data} has no text in the column '{column}' of row {odd + 1}: leave it out.")
    if not len(data):
        raise PackError(f"No row of {adapter.data} is left for training.")
    return data, source
