"""filter.sbatch, run with programs of Slurm that only note how they are called."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.recipes.scripts import RECIPES

FAKES = {
    "hostname": "echo 10.0.0.1 fe80::1",
    "openssl": "echo secret",
    "scontrol": 'echo "scontrol $*" >> "$CALLS"',
    "squeue": "date -d +1hour +%FT%T",
    "srun": 'echo "srun $*" >> "$CALLS"; exit "$STATUS"',
}


@pytest.mark.parametrize(
    ("status", "report", "code"),
    [(0, '"status": "ok"', 0), (0, '"status": "failed"', 1), (3, "", 3), (124, "", 124)],
    ids=["done", "ray did not start", "failed", "out of time"],
)
def test_a_job_ends_as_its_filter_does_and_is_requeued_when_out_of_time(
    status: int, report: str, code: int, tmp_path: Path
) -> None:
    programs, dest, calls = tmp_path / "bin", tmp_path / "out", tmp_path / "calls"
    programs.mkdir()
    for name, body in FAKES.items():
        (programs / name).write_text(f"#!/bin/sh\n{body}\n")
        (programs / name).chmod(0o755)
    (dest / "_sqsd").mkdir(parents=True)
    (dest / "_sqsd" / "report.json").write_text(report)
    job = {"SLURM_JOB_ID": "7", "SLURM_CPUS_PER_TASK": "16", "SLURM_NNODES": "4"}
    fakes = {"PATH": f"{programs}:{os.environ['PATH']}", "CALLS": str(calls), "STATUS": str(status)}
    command = ["bash", str(RECIPES / "slurm" / "filter.sbatch"), "/corpus/*.jsonl", str(dest)]
    assert subprocess.run(command, env={**os.environ, **job, **fakes}, check=False).returncode == code
    srun, *after = calls.read_text().splitlines()
    assert "ray symmetric-run --address 10.0.0.1:6379 --min-nodes 4 --num-cpus=16 -- timeout --signal=TERM 3" in srun
    assert f"sqsd-filter /corpus/*.jsonl {dest} --drop-top 5pct --engine ray" in srun
    assert after == (["scontrol requeue 7"] if status == 124 else [])
