"""Rows for tests of the scorer as a step of `datasets`, and a Python of its own to run scripts in."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from datasets import Dataset

from tests.tiny import CONVERSATIONS, chat

ROOT = Path(__file__).parents[2]
UNSCORABLE: list[Any] = [None, chat("no answer?", " "), chat("x " * 400, "too long")]
TURNS = [*CONVERSATIONS[:3], *UNSCORABLE, *CONVERSATIONS[3:]]


def rows(turns: list[Any] = TURNS) -> Dataset:
    """With numbers that the formats of arrays and tensors would round."""
    return Dataset.from_list([{"id": 2**53 + k, "third": k + 1 / 3, "messages": t} for k, t in enumerate(turns)])


def run_script(*arguments: str | Path, **environment: str) -> str:
    """What a Python of its own prints. Where it does not end, it goes with all of its processes."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    command = [sys.executable, *map(str, arguments)]
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        try:
            printed, _ = process.communicate(timeout=120)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    assert process.returncode == 0
    return printed
