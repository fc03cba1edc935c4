"""The script that tells how well a pack, and its ablations, tell unsafe answers from others."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from sqsd_filter.directions.states import fresh_state
from sqsd_filter.scoring.chat_encoder import Encoded
from sqsd_filter.scoring.pack import Pack, load_pack
from sqsd_filter.scoring.reference import ReferenceScorer
from sqsd_filter.statistics import auc
from tests.corpora import write_jsonl
from tests.tiny import chat, make_adapter, make_pack

SCRIPT = Path(__file__).parents[2] / "recipes" / "packs" / "smollm2-135m" / "sweep.py"
ROWS = [
    {"id": f"{group}-{k}", "group": group, "prompt": f"Number {k}?", "response": answer * (k + 1)}
    for k in range(6)
    for group, answer in (("unsafe", "yes it is "), ("dolly", "no 12 "), ("gsm8k", "x = 3 "))
]

TURNS = [chat(row["prompt"], row["response"]) for row in ROWS]


@pytest.fixture
def sweep(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("sweep", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "sweep", module)
    spec.loader.exec_module(module)
    return module


def run(sweep: ModuleType, monkeypatch: pytest.MonkeyPatch, folder: Path, *arguments: object) -> dict[str, Any]:
    rows = write_jsonl(folder / "rows.jsonl", ROWS)
    words = [str(rows), *map(str, arguments), "--draws", "20", "--dtype", "float32", "--out", str(folder / "out.json")]
    monkeypatch.setattr(sys, "argv", ["sweep.py", *words])
    sweep.main()
    result: dict[str, Any] = json.loads((folder / "out.json").read_text())
    return result


def dense(pack: Pack) -> dict[str, np.ndarray]:
    scores = ReferenceScorer(pack).score(TURNS)
    return {"risk": scores.risk, **scores.probes}


def encoded_rows(pack: Pack) -> list[Encoded]:
    return [row for row in ReferenceScorer(pack).encoder.encode(TURNS) if isinstance(row, Encoded)]


def dense_without_norms(pack: Pack) -> np.ndarray:
    scorer = ReferenceScorer(pack)
    scorer.load()
    risk = []
    for row in encoded_rows(pack):
        updates = {p.name: scorer.update(row, *p.at) for p in pack.probes}
        dots = {
            p.name: sum(float((updates[p.name][m] * V).sum()) for m, V in scorer.directions[p.direction].items())
            for p in pack.probes
        }
        risk.append(sum(p.weight * dots[p.name] for p in pack.probes))
    return np.array(risk)


def of_unsafe(score: np.ndarray) -> float:
    groups = np.array([row["group"] for row in ROWS])
    return round(auc(score[groups == "unsafe"], score[groups == "dolly"]), 4)


def test_a_pack_is_judged_beside_its_ablations(
    sweep: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Each as the dense form has it, on a model with a base adapter."""
    folder = make_pack(tmp_path / "pack", aligned=True)
    last = make_adapter(folder / "base", folder / "last", r=5, seed=9)
    fresh_state(folder / "initial", folder / "fresh")
    results = run(sweep, monkeypatch, tmp_path, "--pack", folder, "--last", last)
    aucs = {name: entry["dolly"]["auc"] for name, entry in results["auc_of_unsafe_against"].items()}
    pack = load_pack(folder)
    own, shared = dense(pack), dense(pack.at_one_state("initial"))
    risks = {}
    for state in ("last", "fresh"):
        probes = [{**vars(p), "state": state if p.name == "danger" else p.state} for p in pack.probes]
        moved = make_pack(tmp_path / f"at-{state}", folder / "base", aligned=True, probes=probes)
        for name in ("last", "fresh"):
            (moved / name).symlink_to(folder / name)
        risks[state] = dense(load_pack(moved))["risk"]
    assert aucs == {
        "risk": of_unsafe(own["risk"]),
        "risk at a fresh state (B = 0)": of_unsafe(risks["fresh"]),
        "risk at the last checkpoint": of_unsafe(risks["last"]),
        "risk, shared state (initial)": of_unsafe(shared["risk"]),
        "danger only": of_unsafe(own["danger"]),
        "safety only": of_unsafe(-own["safety"]),
        "risk, not normalised": of_unsafe(dense_without_norms(pack)),
        "answer length": of_unsafe(np.array([e.answer.sum() for e in encoded_rows(pack)])),
    }
    assert len(set(aucs.values())) >= 5
    assert results["pack"]["fingerprint"] == pack.fingerprint


def test_every_direction_is_measured_at_every_state(
    sweep: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = make_pack(tmp_path / "pack", aligned=True)
    named = ("--direction", f"danger={folder / 'danger'}", "--direction", f"safety={folder / 'safety'}")
    states = ("--state", f"initial={folder / 'initial'}", "--state", f"safety={folder / 'safety'}@1.0")
    base = ("--base-model", folder / "base", "--base-adapter", folder / "aligned")
    table = run(sweep, monkeypatch, tmp_path, *named, *states, "--fresh", "initial", *base)["auc_of_unsafe_against"]
    grid = [f"{d}|{s}" for s in ("initial", "safety@1", "fresh") for d in ("danger", "safety")]
    assert [name for name in table if "," not in name and " - " not in name] == ["answer length", *grid]
    own = dense(load_pack(folder))
    assert table["danger|initial"]["dolly"] == of_unsafe(own["danger"])
    assert table["safety|safety@1"]["dolly"] == of_unsafe(own["safety"])
