"""The script that fine-tunes on Dolly and logs the drift, on a tiny model and made-up rows."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from sqsd_filter.directions.drift import measure_drift
from sqsd_filter.scoring.pack import load_pack
from tests.corpora import write_jsonl
from tests.recipes.scripts import load_script

ROWS = [
    {"instruction": f"Count to {k}.", "context": "Slowly." if k % 2 else "", "response": " ".join(map(str, range(k)))}
    for k in range(1, 19)
]


def test_the_trainer_s_log_has_the_drift_of_each_checkpoint(
    compass: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a pack with a base adapter, on which the run starts."""
    rows, run = write_jsonl(tmp_path / "dolly.jsonl", ROWS), tmp_path / "run"
    sizes = ["--skip", "2", "--epochs", "1", "--every", "1", "--max-length", "64"]
    monkeypatch.setattr(sys, "argv", ["dolly.py", str(rows), str(run), "--pack", str(compass), *sizes])
    load_script("drift/dolly.py", monkeypatch).main()
    measured = {point.step: point.risk_projection for point in measure_drift(run, load_pack(compass)).points}
    assert set(measured) == {0, 1, 2}  # 16 rows, of which 8 are one update
    state = json.loads((run / "checkpoint-2" / "trainer_state.json").read_text())
    logged = {entry["step"]: entry["sqsd/risk_projection"] for entry in state["log_history"]}
    assert logged == pytest.approx({step: measured[step] for step in (1, 2)}, rel=1e-3)
    assert logged[1] != logged[2]


def test_a_row_is_trained_on_its_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    conversation = load_script("drift/dolly.py", monkeypatch).conversation
    assert conversation(ROWS[0]) == {
        "prompt": [{"role": "user", "content": "Count to 1.\nSlowly."}],
        "completion": [{"role": "assistant", "content": "0"}],
    }
