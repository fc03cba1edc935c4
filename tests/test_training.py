"""What was filtered is trained on as it is: trl takes the written dataset, and can use its weight per row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from sqsd_filter import SQSDScorer, filter_dataset
from tests.corpora import write_jsonl
from tests.tiny import chat


def asked(k: int) -> str:
    return f"What is {k} plus {k}?"


ROWS: dict[str, list[dict[str, Any]]] = {
    "messages": [{"messages": chat(asked(k), f"It is {2 * k}.")} for k in range(20)],
    "prompt-completion": [
        {
            "prompt": [{"role": "user", "content": asked(k)}],
            "completion": [{"role": "assistant", "content": f"It is {2 * k}."}],
        }
        for k in range(20)
    ],
}


@pytest.fixture(scope="module")
def scorer(tiny_pack: Path) -> SQSDScorer:
    return SQSDScorer(tiny_pack)


@pytest.mark.parametrize("form", ROWS)
@pytest.mark.parametrize("to", ["parquet", "jsonl", "arrow"])
def test_trl_trains_on_what_was_kept(form: str, to: str, tmp_path: Path, scorer: SQSDScorer) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", ROWS[form])
    filter_dataset(source, tmp_path / "out", drop_top="20%", scorer=scorer, to=to)
    if to == "arrow":
        kept = datasets.load_from_disk(str(tmp_path / "out"))["train"]
    else:
        kept = datasets.load_dataset(str(tmp_path / "out"), split="train", cache_dir=str(tmp_path / "cache"))
    assert len(kept) == 16
    settings = SFTConfig(
        str(tmp_path / "trained"),
        max_steps=1,
        per_device_train_batch_size=4,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        bf16=False,
        disable_tqdm=True,
    )
    trainer = SFTTrainer(scorer.base_model, args=settings, train_dataset=kept)
    assert trainer.train().training_loss > 0
