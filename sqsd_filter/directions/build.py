"""Build a pack from a TOML recipe: the danger direction by SFT, the safety direction by DPO, the benign state by SFT.

Training is trl's and peft's; here are the recipe, the tokens (the same encoder as the scorer's, so that training and
scoring supervise the same positions), resuming, and the provenance that goes into the pack. An interrupted build goes
on from its last checkpoint when the same recipe is built into the same folder again.

    name = "my-pack"
    base_model = "org/model"
    seed = 0
    [lora]
    r = 8
    alpha = 16
    [adapters.danger]
    method = "sft"
    data = "unsafe.jsonl"          # a file beside the recipe, or a Hub dataset
    prompt = "prompt"              # columns; DPO takes prompt, chosen and rejected
    answer = "response"
    licence = "Apache-2.0"
    epochs = 2
    learning_rate = 2e-4
    [[probes]]
    name = "danger"
    weight = 1.0
    direction = "danger"
    state = "initial"
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import tomllib
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from sqsd_filter.directions.pack import ADAPTER_FILES, FORMAT, PACK_FILE, PROBE_NAME, RESERVED, Pack, Probe, load_pack
from sqsd_filter.errors import DestinationExists, InputError, PackError, SQSDError, UsageError
from sqsd_filter.progress import Progress, Silent
from sqsd_filter.scoring.chat_encoder import ChatEncoder, Encoded
from sqsd_filter.scoring.weights import load_model, load_tokenizer

log = logging.getLogger(__name__)

WORK_DIR = ".build"


@dataclass(frozen=True)
class LoraShape:
    """The adapters' shape. Defaults are the reference settings."""

    r: int = 8
    alpha: int = 16
    dropout: float = 0.05
    target_modules: str | list[str] = "all-linear"


@dataclass(frozen=True)
class AdapterRecipe:
    """How one adapter is trained.

    `where` keeps the rows whose columns equal the given values; `rows` then keeps a seeded sample. `take_step` takes
    the checkpoint after that many updates instead of the last one (a state belongs to the middle of a trajectory);
    `save_steps` says how often checkpoints are written.
    """

    method: str
    data: str
    prompt: str
    answer: str | None = None
    context: str | None = None
    chosen: str | None = None
    rejected: str | None = None
    where: Mapping[str, Any] = field(default_factory=dict)
    rows: int | None = None
    licence: str | None = None
    split: str = "train"
    max_length: int = 1024
    epochs: float = 1.0
    learning_rate: float = 5e-6
    schedule: str = "linear"
    warmup_ratio: float = 0.1
    batch_size: int = 8
    device_batch_size: int | None = None
    beta: float = 0.1
    save_steps: int = 50
    take_step: int | None = None

    def __post_init__(self) -> None:
        if self.method not in ("sft", "dpo"):
            raise UsageError(f"An adapter's method must be 'sft' or 'dpo', not {self.method!r}.")
        needed = {"sft": ("answer",), "dpo": ("chosen", "rejected")}[self.method]
        if missing := [n for n in needed if getattr(self, n) is None]:
            raise UsageError(f"An adapter with method '{self.method}' must name its columns: {', '.join(missing)}.")
        if self.take_step is not None and self.take_step % self.save_steps:
            raise UsageError(f"take_step must be a multiple of save_steps ({self.save_steps}).")
        if self.batch_size % (self.device_batch_size or 1):
            raise UsageError("batch_size must be a multiple of device_batch_size.")


@dataclass(frozen=True)
class PackRecipe:
    """A whole recipe, as read from its TOML file."""

    name: str
    base_model: str
    adapters: Mapping[str, AdapterRecipe]
    probes: tuple[Probe, ...]
    base_revision: str | None = None
    seed: int = 0
    dtype: str = "bfloat16"
    keep_checkpoints: bool = False
    max_length: int = 1024
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    lora: LoraShape = field(default_factory=LoraShape)
    notes: Mapping[str, Any] = field(default_factory=dict)
    folder: Path = field(default_factory=Path)

    @classmethod
    def load(cls, path: str | Path) -> PackRecipe:
        """Read a recipe. Raises `InputError` where it can't be read, `UsageError` where it makes no sense."""
        path = Path(path)
        try:
            data = tomllib.loads(path.read_text(encoding="utf-8"))
        except OSError as problem:
            raise InputError(f"The recipe {path} can't be read: {problem.strerror}.") from problem
        except ValueError as problem:
            raise InputError(f"The recipe {path} is not valid TOML: {problem}.") from problem
        recipe = {
            **data,
            "lora": _typed(LoraShape, data.get("lora", {}), "[lora]"),
            "adapters": {
                name: _typed(AdapterRecipe, table, f"[adapters.{name}]")
                for name, table in data.get("adapters", {}).items()
            },
            "probes": tuple(_typed(Probe, table, "[[probes]]") for table in data.get("probes", [])),
            "folder": path.parent,
        }
        for probe in recipe["probes"]:
            if not PROBE_NAME.fullmatch(probe.name) or probe.name in RESERVED:
                raise UsageError(f"[[probes]]: '{probe.name}' can't be a probe's name.")
        loaded: PackRecipe = _typed(cls, recipe, str(path))
        used = {name for p in loaded.probes for name in (p.direction, p.state)}
        if not used or (missing := used - set(loaded.adapters)):
            what = f"names the adapters {', '.join(sorted(missing))} without" if used else "has no probes or"
            raise UsageError(f"The recipe {path} {what} saying how to train them.")
        return loaded


def _typed(kind: Any, table: Mapping[str, Any], where: str) -> Any:
    known = {f.name: f for f in fields(kind)}
    if unknown := sorted(set(table) - set(known)):
        raise UsageError(f"{where} has unknown keys: {', '.join(unknown)} (known: {', '.join(known)}).")
    needed = [n for n, f in known.items() if f.default is MISSING and f.default_factory is MISSING]
    if missing := [n for n in needed if n not in table]:
        raise UsageError(f"{where} lacks {', '.join(missing)}.")
    hints = get_type_hints(kind)
    for name, value in table.items():
        if not _fits(value, hints[name]):
            raise UsageError(f"{where}: '{name}' can't be {value!r}.")
    return kind(**table)


def _fits(value: Any, hint: Any) -> bool:
    """Is a TOML value of the type that a field is annotated with?"""
    if get_origin(hint) in (UnionType, Union):
        return any(_fits(value, option) for option in get_args(hint))
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    kind = get_origin(hint) or hint
    return True if kind is Any else isinstance(value, type(None) if kind is None else kind)


def build_pack(recipe: PackRecipe, target: str | Path, progress: Progress | None = None) -> Pack:
    """Train every adapter of the recipe that isn't there yet, and write the pack; a pack that is done is loaded.

    Raises `DestinationExists` when `target` holds anything but this very build, `SQSDError` when the extra `train`
    isn't installed.
    """
    try:
        import peft  # noqa: F401
        import trl  # noqa: F401
    except ImportError as problem:
        raise SQSDError("Building a pack needs trl and peft: pip install 'sqsd-filter[train]'.") from problem
    target = Path(target)
    work = target / WORK_DIR
    plan = json.dumps(asdict(recipe) | {"folder": None}, sort_keys=True, indent=1, default=str)
    fingerprint = hashlib.blake2b(plan.encode(), digest_size=8).hexdigest()
    if target.is_dir() and any(target.iterdir()):
        done = target / PACK_FILE
        if done.is_file() and json.loads(done.read_text(encoding="utf-8")).get("recipe") == fingerprint:
            return load_pack(target)
        if not (work / "recipe.json").is_file():
            raise DestinationExists(f"{target} exists and is not an unfinished build: choose another folder.")
        if (work / "recipe.json").read_text() != plan:
            raise DestinationExists(f"{target} holds the build of another recipe: choose another folder or remove it.")
    work.mkdir(parents=True, exist_ok=True)
    (work / "recipe.json").write_text(plan)

    records = {name: target / name / "training.json" for name in recipe.adapters}
    # all data before any training: what is wrong with the last adapter's shows at once, not after hours
    data = {name: _rows(recipe, recipe.adapters[name]) for name, record in records.items() if not record.is_file()}
    for name, (rows, source) in data.items():
        _train(recipe, name, rows, source, target, progress or Silent())
    provenance = {name: json.loads(record.read_text()) for name, record in records.items()}
    pack = {
        "format": FORMAT,
        "name": recipe.name,
        "base_model": recipe.base_model,
        "base_revision": recipe.base_revision,
        "chat_template_kwargs": dict(recipe.chat_template_kwargs),
        "max_length": recipe.max_length,
        "probes": [asdict(p) for p in recipe.probes],
        "provenance": provenance,
        "recipe": fingerprint,
        **recipe.notes,
    }
    _write_json(target / PACK_FILE, pack)
    built = load_pack(target)
    if not recipe.keep_checkpoints:
        shutil.rmtree(work)
    return built


def _train(
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
    model = load_model(recipe.base_model, recipe.base_revision, dtype=getattr(torch, recipe.dtype))
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
    if adapter.take_step is not None:
        taken = checkpoints / f"checkpoint-{adapter.take_step}"
        if not taken.is_dir():
            raise UsageError(
                f"Adapter '{name}' is trained for {trainer.state.global_step} steps: its take_step can't be "
                f"{adapter.take_step}."
            )
    _publish(taken, target / name)
    losses = [{"step": e["step"], "loss": round(e["loss"], 4)} for e in trainer.state.log_history if "loss" in e]
    settings = {k: v for k, v in asdict(adapter).items() if v not in (None, {})}
    facts = {
        "data": source,
        "licence": adapter.licence,
        "rows": len(trainer.train_dataset),
        "steps": adapter.take_step or trainer.state.global_step,
        "settings": settings | {"lora": asdict(recipe.lora), "seed": recipe.seed, "dtype": recipe.dtype},
        "losses": losses,
    }
    _write_json(target / name / "training.json", facts)


def _write_json(path: Path, value: Any) -> None:
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


def _rows(recipe: PackRecipe, adapter: AdapterRecipe) -> tuple[Any, dict[str, Any]]:
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
