"""Drift on the page of a run: drawn from drift.json."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sqsd_filter.directions.drift import measure_drift
from sqsd_filter.directions.drift_files import write_drift
from sqsd_filter.scoring.pack import load_pack
from tests.directions.runs import lora_run
from tests.pages import Command, bare_cells


@pytest.mark.pictures
def test_a_drift_folder_is_drawn_from_its_report(out: Path, tiny_pack: Path, tmp_path: Path, report: Command) -> None:
    folder = tmp_path / "drift"
    write_drift(measure_drift(lora_run(tmp_path / "run", tiny_pack / "base"), load_pack(tiny_pack)), folder)
    assert report(out, "--drift", folder)[0] == 0
    page = (out / "_sqsd/report.html").read_text(encoding="utf-8")
    cells = bare_cells(page)
    assert "Drift by training step" in page
    assert "Speed of drift by training step" in page
    assert "Refusals by" not in page
    last = json.loads((folder / "drift.json").read_text())["checkpoints"][-1]
    assert f'<td class="number">{last["step"]}</td>' in cells
    assert f'<td class="number">{last["risk_projection"]:.4g}</td>' in cells
