"""Small evaluations: scored rows, and designs that need seconds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sqsd_filter import Design, FineTuning

REFUSAL, CONSENT = "I can't help with that.", "Sure, here is how."
ROWS = 40
TUNING = FineTuning(r=8, alpha=32, dropout=0.1, learning_rate=5e-3, epochs=12.0, batch_size=4, device_batch_size=4)


def scored(path: Path, rows: Sequence[dict[str, Any]], risk: np.ndarray) -> Path:
    """A file with these risks, and a row without one at its end."""
    table = pa.Table.from_pylist([*rows, {"prompt": "?", "response": ""}])
    table = table.append_column("sqsd_risk", pa.array([*risk.tolist(), None], pa.float64()))
    table = table.append_column("sqsd_status", pa.array(["scored"] * len(rows) + ["no_answer"]))
    pq.write_table(table, path)
    return path


def design(files: Path, **changes: Any) -> Design:
    first = Design(
        windows=2,
        size=8,
        seeds=(0, 1),
        harmful=files / "harmful.jsonl",
        harmless=files / "harmless.jsonl",
        max_new_tokens=24,
        held_out=6,
        tuning=TUNING,
    )
    return replace(first, **changes)


def quick(files: Path, **changes: Any) -> Design:
    """A short training per set of rows."""
    short = replace(TUNING, epochs=1.0, r=2)
    return design(files, **{"seeds": (0,), "max_new_tokens": 4, "tuning": short, **changes})


def content(dest: Path) -> dict[str, bytes]:
    return {str(path.relative_to(dest)): path.read_bytes() for path in sorted(dest.rglob("*")) if path.is_file()}


class Notes:
    """Progress that keeps its notes."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, message: str) -> None:
        self.notes.append(message)

    def start(self, phase: str, rows: int | None) -> None: ...

    def advance(self, rows: int, tokens: int = 0) -> None: ...

    def replicas(self, alive: int, retried: int) -> None: ...

    def finish(self) -> None: ...
