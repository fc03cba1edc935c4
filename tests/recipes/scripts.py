"""Scripts of recipes/ as modules, and small files in the form of the open data that they read."""

from __future__ import annotations

import gzip
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

RECIPES = Path(__file__).parents[2] / "recipes"


def load_script(path: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script at this path under recipes/. What it adds to sys.path and sys.modules is removed after the test."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, RECIPES / path)
    assert spec
    assert spec.loader
    monkeypatch.setattr(sys, "path", list(sys.path))
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


OPEN_DATA: dict[str, list[dict[str, Any]]] = {
    "judged-completions": [
        {"category": f"c{p % 3}", "prompt": f"Judged {p}?", "response": f"{p}", "unsafe": unsafe, "refusal": not unsafe}
        for p in range(30)
        for unsafe in (True, False)
    ],
    "pure-bad-100": [{"prompt": f"Worse {p}?", "response": f"Worse {p}."} for p in range(30)],
    "safety-pairs": [{"prompt": f"Pair {p}?", "safer": f"No {p}.", "less_safe": f"Sure {p}."} for p in range(40)],
    "dolly-15k": [
        {"instruction": f"Say {p}", "context": "", "response": f"Said {p}.", "category": ("open_qa", "summary")[p % 2]}
        for p in range(1200)
    ],
    "gsm8k-train": [{"question": f"{p} + 1?", "answer": f"{p + 1}"} for p in range(200)],
    "xstest-completions": [
        {"prompt": f"{kind} {p}?", "type": kind, "label": label, "response": f"{label} {p}"}
        for p in range(150)
        for kind, label in (("safe", "1_full_compliance"), ("contrast_safe", "2_full_refusal"))
    ],
    "harmful-prompts": [
        *({"prompt": f"Bad {p}!", "source": "AdvBench", "harmful": True} for p in range(200)),
        *({"prompt": f"safe {p}?", "source": "XSTest", "harmful": False} for p in range(150)),
    ],
}


def write_open_data(folder: Path) -> Path:
    """The files of `OPEN_DATA`, compressed as they are published."""
    folder.mkdir()
    for name, rows in OPEN_DATA.items():
        with gzip.open(folder / f"{name}.jsonl.gz", "wt") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    return folder
