"""Steering on the page of a run: drawn from steer.json, and a damaged one is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.pages import Command

POINT = {"refusal_rate": 0.5, "refusal_low": 0.4, "refusal_high": 0.6, "degenerate_rate": 0}


@pytest.mark.pictures
def test_steering_is_drawn_with_a_picture_per_direction(out: Path, tmp_path: Path, report: Command) -> None:
    point = POINT | {"safe": None, "unsafe": -2.0, "margin": None}
    curve = {"points": [{"alpha": a, **point} for a in (-1, 0, 1)], "steers": False, "random": []}
    directions = [{"name": name, **curve} for name in ("danger", "safety")]
    steered = {"pack": "tiny", "settings": {"rows": {"pairs": 3}}, "directions": directions}
    (tmp_path / "steer.json").write_text(json.dumps(steered))
    code, stdout, _ = report(out, "--steering", tmp_path, "--json")
    assert code == 0
    assert [Path(path).stem for path in json.loads(stdout)["plots"]][2:] == ["steer-0", "steer-1"]
    assert "Steering along safety: does not steer" in (out / "_sqsd/report.html").read_text(encoding="utf-8")


def test_a_file_that_cannot_be_drawn_is_named_without_assertions_too(tmp_path: Path) -> None:
    curve = {"name": "danger", "points": [POINT | {"alpha": "wide"}], "steers": False, "random": []}
    steered = {"pack": "tiny", "settings": {"rows": {"pairs": 0}}, "directions": [curve, curve | {"points": None}]}
    (tmp_path / "steer.json").write_text(json.dumps(steered))
    script = f"""
from pathlib import Path
from sqsd_filter.directions.steering.section import steering_section
from sqsd_filter.errors import InputError
try:
    steering_section(Path({str(tmp_path)!r}))
except InputError as problem:
    print(problem)
"""
    done = subprocess.run([sys.executable, "-O", "-c", script], capture_output=True, text=True, check=True)
    assert "steer.json is damaged, or not what 'sqsd-filter steer' left" in done.stdout
