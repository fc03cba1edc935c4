"""The drift in the trainer's log is the one that `drift` finds in the run's checkpoints."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainerCallback, TrainerState, TrainingArguments
from trl import SFTConfig, SFTTrainer

from sqsd_filter import DriftCallback
from sqsd_filter.directions.drift import Drift, measure_drift
from sqsd_filter.errors import PackError, UsageError
from sqsd_filter.scoring.models import load_model
from sqsd_filter.scoring.pack import load_pack
from tests.corpora import make_rows
from tests.tiny import make_adapter, make_pack

SETTINGS: dict[str, Any] = {
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-2,
    "max_steps": 6,
    "save_steps": 2,
    "logging_steps": 1,
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "disable_tqdm": True,
    "seed": 0,
}
LORA: dict[str, Any] = {"r": 3, "lora_alpha": 12, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


def lora_model(base: Path) -> Any:
    torch.manual_seed(0)
    return get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(**LORA))


def trainer_on(model: Any, base: Path, run: Path, **changes: Any) -> Trainer:
    """transformers' trainer, on token ids."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    ids = [tokenizer(f"{row['instruction']} {row['output']}")["input_ids"][:12] for row in make_rows(16)]
    data = Dataset.from_list([{"input_ids": row, "labels": row} for row in ids if len(row) == 12])
    callbacks = changes.pop("callbacks", None)
    arguments = TrainingArguments(str(run), **{**SETTINGS, **changes})
    return Trainer(model, arguments, train_dataset=data, callbacks=callbacks)


def sft_trainer(base: Path, run: Path, **changes: Any) -> SFTTrainer:
    """trl's trainer, on conversations, with an adapter of its own making."""
    rows = [
        {
            "prompt": [{"role": "user", "content": row["instruction"]}],
            "completion": [{"role": "assistant", "content": row["output"]}],
        }
        for row in make_rows(16)
    ]
    return SFTTrainer(
        str(base),
        args=SFTConfig(str(run), **{**SETTINGS, **changes}),
        train_dataset=Dataset.from_list(rows),
        peft_config=LoraConfig(**LORA),
    )


def logged(state: TrainerState) -> dict[int, dict[str, float]]:
    """The drift in a trainer's history, by step."""
    found: dict[int, dict[str, float]] = {}
    for entry in state.log_history:
        if figures := {key: value for key, value in entry.items() if key.startswith("sqsd/")}:
            step = int(entry["step"])
            assert step not in found
            found[step] = figures
    return found


def expected(drift: Drift, keys: tuple[str, ...] = ("projection", "cosine", "cosine_sum", "norm")) -> dict[int, Any]:
    return {
        point.step: pytest.approx(
            {f"sqsd/{name}_{key}": along.totals()[key] for name, along in point.along.items() for key in keys}
            | {"sqsd/risk_projection": point.risk_projection},
            rel=1e-5,
            abs=1e-8,
        )
        for point in drift.points[1:]
    }


def at_checkpoints(trainer: Trainer) -> dict[int, dict[str, float]]:
    return {step: figures for step, figures in logged(trainer.state).items() if step % SETTINGS["save_steps"] == 0}


# ---------------------------------------------------------------------------------------------- the same figures


def test_trl_logs_the_drift_of_an_adapter(tiny_pack: Path, tmp_path: Path) -> None:
    trainer = sft_trainer(tiny_pack / "base", tmp_path / "run", gradient_checkpointing=True)
    DriftCallback(tiny_pack).attach(trainer)
    trainer.train()
    assert list(logged(trainer.state)) == [1, 2, 3, 4, 5, 6]
    assert at_checkpoints(trainer) == expected(measure_drift(tmp_path / "run", load_pack(tiny_pack)))
    assert logged(trainer.state)[6]["sqsd/danger_norm"] > 0.01


def test_transformers_logs_the_drift_of_an_adapter_that_goes_on_being_trained(tiny_pack: Path, tmp_path: Path) -> None:
    base, start = tiny_pack / "base", make_adapter(tiny_pack / "base", tmp_path / "start", r=3, lora_dropout=0.0)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), start, is_trainable=True)
    trainer = trainer_on(model, base, tmp_path / "run")
    DriftCallback(tiny_pack).attach(trainer)
    trainer.train()
    drift = measure_drift(tmp_path / "run", load_pack(tiny_pack), base=str(start))
    assert at_checkpoints(trainer) == expected(drift)
    assert measure_drift(tmp_path / "run", load_pack(tiny_pack)).points[3].along["danger"].totals() != (
        drift.points[3].along["danger"].totals()
    )


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_full_fine_tuning_logs_the_projections(packs: dict[str, Path], architecture: str, tmp_path: Path) -> None:
    pack = packs[architecture]
    model = AutoModelForCausalLM.from_pretrained(pack / "base")
    trainer = trainer_on(model, pack / "base", tmp_path / "run", gradient_checkpointing=True)
    DriftCallback(pack).attach(trainer)
    trainer.train()
    assert at_checkpoints(trainer) == expected(measure_drift(tmp_path / "run", load_pack(pack)), ("projection",))


@pytest.mark.parametrize("attached", [True, False])
@pytest.mark.parametrize("full", [True, False])
def test_a_resumed_training_still_counts_from_its_first_start(
    full: bool, attached: bool, tiny_pack: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = tiny_pack / "base"

    def trainer() -> tuple[Trainer, DriftCallback]:
        model = AutoModelForCausalLM.from_pretrained(base) if full else lora_model(base)
        callback = DriftCallback(tiny_pack)
        made = trainer_on(model, base, tmp_path / "run", callbacks=None if attached else [callback])
        return made, callback.attach(made) if attached else callback

    whole, _ = trainer()
    whole.train()
    for step in (4, 6):
        shutil.rmtree(tmp_path / "run" / f"checkpoint-{step}")
    resumed, _ = trainer()
    resumed.train(resume_from_checkpoint=True)
    assert logged(resumed.state) == {
        step: pytest.approx(figures, rel=1e-4) for step, figures in logged(whole.state).items()
    }
    assert caplog.text == ""


def test_a_callback_that_first_sees_a_resumed_training_says_where_it_counts_from(
    tiny_pack: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = tiny_pack / "base"
    trainer_on(lora_model(base), base, tmp_path / "run", max_steps=2).train()
    resumed = trainer_on(lora_model(base), base, tmp_path / "run")
    resumed.add_callback(DriftCallback(tiny_pack))
    resumed.train(resume_from_checkpoint=True)
    assert "the drift counts from step 2, where training was resumed" in caplog.text
    assert logged(resumed.state)[3]["sqsd/danger_norm"] < logged(resumed.state)[6]["sqsd/danger_norm"]


# ---------------------------------------------------------------------------------------------- when and to whom


class Reporter(TrainerCallback):
    """Sees what TensorBoard and the like would see."""

    def __init__(self) -> None:
        self.seen: list[dict[str, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        self.seen.append(dict(logs))


def test_attached_it_comes_before_those_that_report(tiny_pack: Path, tmp_path: Path) -> None:
    base, reporter = tiny_pack / "base", Reporter()
    trainer = trainer_on(lora_model(base), base, tmp_path / "run", callbacks=[reporter], logging_steps=4)
    DriftCallback(tiny_pack).attach(trainer)
    trainer.train()
    losses = [entry for entry in reporter.seen if "loss" in entry]
    assert [entry["sqsd/risk_projection"] for entry in losses] == [
        figures["sqsd/risk_projection"] for figures in logged(trainer.state).values()
    ]
    others = [entry for entry in reporter.seen if "loss" not in entry]
    assert len(losses) == 1
    assert others
    assert not any("sqsd/risk_projection" in entry for entry in others)


def test_a_callback_behind_those_that_report_is_warned_of(
    tiny_pack: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = tiny_pack / "base"
    trainer = trainer_on(lora_model(base), base, tmp_path / "run", callbacks=[DriftCallback(tiny_pack)], max_steps=1)
    trainer.args.report_to = ["wandb"]
    trainer.train()
    assert "wandb will not get the drift: use DriftCallback.attach(trainer)" in caplog.text


@pytest.mark.parametrize(("every", "steps"), [(2, [2, 4, 6]), (4, [4]), (None, [3, 6])])
def test_it_comes_with_the_trainers_log_or_every_so_often(
    every: int | None, steps: list[int], tiny_pack: Path, tmp_path: Path
) -> None:
    base = tiny_pack / "base"
    trainer = trainer_on(lora_model(base), base, tmp_path / "run", logging_steps=3)
    DriftCallback(tiny_pack, every=every).attach(trainer)
    trainer.train()
    assert list(logged(trainer.state)) == steps
    assert {entry["step"] for entry in trainer.state.log_history if "loss" in entry} == {3, 6, *steps}


def test_the_threshold_is_warned_of_once(tiny_pack: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    base = tiny_pack / "base"
    first = trainer_on(lora_model(base), base, tmp_path / "first")
    DriftCallback(tiny_pack).attach(first)
    first.train()
    risks = {step: figures["sqsd/risk_projection"] for step, figures in logged(first.state).items()}
    highest = max(risks.values())
    for threshold, expected in ((highest, []), (min(risks.values()) - 1e-9, [1])):
        caplog.clear()
        trainer = trainer_on(lora_model(base), base, tmp_path / "run")
        DriftCallback(tiny_pack, threshold=threshold).attach(trainer)
        trainer.train()
        warned = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING and "sqsd" in r.name]
        assert warned == [
            f"the model drifts towards danger: risk projection {risks[step]:.4g} at step {step}, above {threshold:.4g}"
            for step in expected
        ]


def test_only_the_main_process_measures_but_all_of_them_log(tiny_pack: Path, tmp_path: Path) -> None:
    base = tiny_pack / "base"
    trainer = trainer_on(lora_model(base), base, tmp_path / "run")
    trainer.state.is_world_process_zero = False
    callback, logs = DriftCallback(tiny_pack, every=3).attach(trainer), {"loss": 1.0}
    trainer.state.global_step = 3
    callback.on_step_end(trainer.args, trainer.state, trainer.control)
    assert trainer.control.should_log  # else the main process would wait for their losses
    callback.on_log(trainer.args, trainer.state, trainer.control, model=trainer.model, logs=logs)
    assert logs == {"loss": 1.0}


@pytest.fixture
def one_process_group(tmp_path: Path) -> Iterator[None]:
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_a_wrapped_model_is_read_like_the_bare_one(one_process_group: None, tiny_pack: Path, tmp_path: Path) -> None:
    base = tiny_pack / "base"
    trainer = trainer_on(lora_model(base), base, tmp_path / "run")
    callback = DriftCallback(tiny_pack).attach(trainer)
    trainer.train()
    bare, logs = logged(trainer.state)[6], {"loss": 1.0}
    trainer.state.global_step += 1
    wrapped = torch.nn.parallel.DistributedDataParallel(trainer.model)
    callback.on_log(trainer.args, trainer.state, trainer.control, model=wrapped, logs=logs)
    assert logs == {"loss": 1.0, **bare}


TWO_PROCESSES = """
import sys
from pathlib import Path
import torch
from sqsd_filter import DriftCallback
from tests.directions.test_callback import lora_model, trainer_on
pack, run = map(Path, sys.argv[1:])
trainer = trainer_on(lora_model(pack / "base"), pack / "base", run, logging_steps=100, ddp_backend="gloo")
DriftCallback(pack, every=2).attach(trainer)
trainer.train()
del trainer  # whose model holds the process group: its threads, which need the GIL, may abort a process that ends
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_train_and_the_main_one_logs(tiny_pack: Path, tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(TWO_PROCESSES)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    subprocess.run(
        [*launch, str(tmp_path / "script.py"), str(tiny_pack), str(tmp_path / "run")],
        check=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"},
        timeout=600,
    )
    state = TrainerState.load_from_json(str(tmp_path / "run" / "checkpoint-6" / "trainer_state.json"))
    drift = measure_drift(tmp_path / "run", load_pack(tiny_pack))
    assert logged(state) == expected(drift)


# ---------------------------------------------------------------------------------------------- errors


def test_a_model_of_another_architecture_is_refused_before_training(packs: dict[str, Path], tmp_path: Path) -> None:
    base = packs["gpt2"] / "base"
    with pytest.raises(PackError, match="trains no module of the pack"):
        DriftCallback(packs["llama"]).attach(trainer_on(lora_model(base), base, tmp_path / "run"))
    full = trainer_on(AutoModelForCausalLM.from_pretrained(base), base, tmp_path / "run")
    with pytest.raises(PackError, match=r"The model has no module 'model\.layers\.0"):
        DriftCallback(packs["llama"]).attach(full)


def test_other_adapters_than_plain_lora_are_refused(tiny_pack: Path, tmp_path: Path) -> None:
    base = tiny_pack / "base"
    dora = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(**LORA, use_dora=True))
    with pytest.raises(PackError, match="has an adapter that is not plain LoRA"):
        DriftCallback(tiny_pack).attach(trainer_on(dora, base, tmp_path / "run"))


def test_weights_in_shards_are_refused(one_process_group: None, tiny_pack: Path, tmp_path: Path) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    base = tiny_pack / "base"
    model = lora_model(base)
    trainer = trainer_on(model, base, tmp_path / "run")
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    with pytest.raises(UsageError, match="FSDP or ZeRO-3 has sharded them"):
        DriftCallback(tiny_pack).attach(trainer)


def test_senseless_settings_are_refused(tiny_pack: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="every must be at least 1"):
        DriftCallback(tiny_pack, every=0)
    with pytest.raises(PackError, match="There is no pack"):
        DriftCallback(tmp_path / "none")


def test_a_pack_on_an_aligned_model_is_watched_on_that_model(tmp_path: Path) -> None:
    pack = load_pack(make_pack(tmp_path / "pack", aligned=True))
    base = pack.path / "base"
    model = load_model(str(base), dtype=torch.float32, adapter=pack.base_folder).requires_grad_(True)
    trainer = trainer_on(model.train(), base, tmp_path / "run")
    DriftCallback(pack).attach(trainer)
    trainer.train()
    assert at_checkpoints(trainer) == expected(measure_drift(tmp_path / "run", pack), ("projection",))
