"""An ordinary fine-tune of a pack's model on harmless rows with trl, and its drift in the trainer's log.

    python dolly.py ../packs/smollm2-135m/data/initial.jsonl RUN --pack PACK
    sqsd-filter drift RUN --pack PACK --refusals ../packs/smollm2-135m/data/harmful.jsonl --limit 60 --out small

The rows are Dolly's without the first 360 of the file. Neither direction was trained on them, nor was the adapter that
teaches the model to refuse. The pack's benign state may have seen some, but drift does not use it.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

from sqsd_filter import DriftCallback, load_pack
from sqsd_filter.scoring.models import load_model, load_tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows", type=Path, help="JSON Lines with instruction, context and response")
    parser.add_argument("out", type=Path, help="the trainer's output folder")
    parser.add_argument("--pack", required=True)
    parser.add_argument("--skip", type=int, default=360, help="rows to leave out at the start of the file")
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--epochs", type=float, default=2.0)
    parser.add_argument("--max-length", type=int, default=128, help="tokens per row")
    parser.add_argument("--every", type=int, default=10, help="updates between checkpoints, and between log entries")
    options = parser.parse_args()
    pack = load_pack(options.pack)
    model = load_model(pack.base_model, pack.base_revision, dtype=torch.bfloat16, adapter=pack.base_folder)
    lines = options.rows.read_text(encoding="utf-8").rstrip("\n").split("\n")[options.skip :]
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=str(options.out),
            num_train_epochs=options.epochs,
            learning_rate=options.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=0.1,
            per_device_train_batch_size=8,
            max_length=options.max_length,
            save_steps=options.every,
            save_only_model=True,
            logging_steps=options.every,
            bf16=False,
            gradient_checkpointing=False,
            use_cpu=not torch.cuda.is_available(),
            report_to="none",
            seed=0,
        ),
        train_dataset=Dataset.from_list([conversation(json.loads(line)) for line in lines]),
        processing_class=load_tokenizer(pack.base_model, pack.base_revision),
        peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    DriftCallback(pack).attach(trainer)
    trainer.train()


def conversation(row: dict[str, str]) -> dict[str, list[dict[str, str]]]:
    """A row in the form for which trl trains on the answer only."""
    asked = "\n".join(filter(None, [row["instruction"], row["context"]]))
    return {
        "prompt": [{"role": "user", "content": asked}],
        "completion": [{"role": "assistant", "content": row["response"]}],
    }


if __name__ == "__main__":
    main()
