"""The scripts of the built-in pack's recipe, on tiny models and made-up, harmless rows: prepare.py splits the data,
sweep.py judges scores on the files that it writes, refusals.py judges models. What sweep.py measures is held to the
dense form in test_sweep.py."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sqsd_filter.scoring.pack import load_pack
from tests.compass import QUESTIONS
from tests.corpora import write_jsonl
from tests.recipes.scripts import load_script, write_open_data

RECIPE = "packs/smollm2-135m"
TRAINED_ON = ("align", "danger", "safety", "initial")
Script = Callable[..., None]


@pytest.fixture
def run_script(monkeypatch: pytest.MonkeyPatch) -> Script:
    def run(name: str, *arguments: object) -> None:
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
        load_script(f"{RECIPE}/{name}.py", monkeypatch).main()

    return run


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_prepared_files_share_no_prompt_between_training_and_judging_and_come_back_the_same(
    run_script: Script, tmp_path: Path
) -> None:
    data = write_open_data(tmp_path / "open")
    for out in ("one", "other"):
        run_script("prepare", data, tmp_path / out)
    files = {path.stem: read(path) for path in (tmp_path / "one").iterdir()}
    assert set(files) == {*TRAINED_ON, "val", "test", "steer", "harmful", "harmless"}
    assert all(files.values())
    prompts = {name: {row.get("prompt") or row["instruction"] for row in rows} for name, rows in files.items()}
    judged = set.union(*(prompts[name] for name in files if name not in TRAINED_ON))
    assert not judged & set.union(*(prompts[name] for name in TRAINED_ON))
    assert not prompts["val"] & prompts["test"]
    assert {row["group"] for row in files["test"]} == {"unsafe", "safe", "dolly", "gsm8k", "xstest"}
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "other" / path.name).read_bytes()
    run_script("prepare", data, tmp_path / "another", "--seed", 1)
    assert (tmp_path / "another" / "val.jsonl").read_bytes() != (tmp_path / "one" / "val.jsonl").read_bytes()


def test_a_pack_is_judged_on_the_prepared_rows(run_script: Script, tiny_pack: Path, tmp_path: Path) -> None:
    run_script("prepare", write_open_data(tmp_path / "open"), tmp_path / "data")
    out = tmp_path / "results.json"
    sizes = ("--per-group", 2, "--draws", 20)
    run_script("sweep", tmp_path / "data" / "val.jsonl", "--pack", tiny_pack, *sizes, "--out", out)
    results = json.loads(out.read_text())
    assert results["counts"] == dict.fromkeys(("dolly", "gsm8k", "safe", "unsafe", "xstest"), 2)
    assert set(results["auc_of_unsafe_against"]["risk"]) == {"dolly", "gsm8k", "safe", "xstest"}


def test_refusals_are_counted_by_source_without_and_with_the_base_adapter(
    run_script: Script, compass: Path, tmp_path: Path
) -> None:
    """The base adapter teaches the model to answer these questions with a refusal, or else in one sentence."""
    harmful = [{"prompt": q, "source": f"list {k % 2}"} for k, q in enumerate(QUESTIONS * 2)]
    write_jsonl(tmp_path / "harmful.jsonl", harmful)
    write_jsonl(tmp_path / "harmless.jsonl", [{"prompt": q, "source": "foxes"} for q in QUESTIONS])
    out = tmp_path / "refusals.json"
    run_script("refusals", tmp_path, "--pack", compass, "--per-source", 3, "--max-new-tokens", 8, "--out", out)
    result = json.loads(out.read_text())
    assert result["fingerprint"] == load_pack(compass).fingerprint
    assert list(result["refusals"]) == ["without base adapter", "with base adapter"]
    for counts in result["refusals"].values():
        assert {name: entry["of"] for name, entry in counts.items()} == {
            "harmful: list 0": 3,
            "harmful: list 1": 3,
            "harmless: foxes": 4,
        }
        assert all(
            0 <= entry["low"] <= entry["refused"] / entry["of"] <= entry["high"] <= 1 for entry in counts.values()
        )
    assert all(entry["refused"] == 0 for entry in result["refusals"]["without base adapter"].values())
