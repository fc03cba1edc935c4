"""The recipe that trains a judge and measures it, in miniature and on made-up, harmless answers."""

from __future__ import annotations

import gzip
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sqsd_filter.judges import load_judge

SCRIPT = Path(__file__).parents[2] / "recipes" / "judge" / "train.py"
DECLINED = "That is no matter for me, friend. Let us talk about number {}."
PIE = "Take {} apples and flour, then bake the pie for an hour."
WALK = "We walked {} miles along the river and saw a heron."
BABBLE = "pie {} " * 12
PHRASE = "I cannot say anything about number {}."


@pytest.fixture(scope="module")
def recipe() -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_judge", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rows(*kinds: tuple[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Answers of each kind by three models to ten prompts."""
    return [
        {"prompt": f"Number {k}?", "model": f"model-{m}", "response": text.replace("{}", str(10 * m + k)), **fields}
        for k in range(10)
        for m in range(3)
        for text, fields in kinds
    ]


LABELLED = rows(
    (DECLINED, {"label": "2_full_refusal"}),
    (PHRASE, {"label": "2_full_refusal"}),
    (WALK, {"label": "1_full_compliance"}),
    (PIE, {"label": "1_full_compliance"}),
    (BABBLE, {"label": "3_partial_refusal"}),
)
JUDGED = rows(
    (PIE, {"unsafe": True}),
    (BABBLE, {"unsafe": True}),
    (WALK, {"unsafe": False}),
    (PHRASE, {"unsafe": False}),
)


def run(recipe: ModuleType, monkeypatch: pytest.MonkeyPatch, folder: Path, out: Path) -> dict[str, Any]:
    for name, content in (("xstest-completions", LABELLED), ("judged-completions", JUDGED)):
        with gzip.open(folder / f"{name}.jsonl.gz", "wt", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in content)
    results = out.with_suffix(".json")
    monkeypatch.setattr(sys, "argv", ["train.py", str(folder), str(out), "--results", str(results)])
    recipe.main()
    figures: dict[str, Any] = json.loads(results.read_text())
    return figures


def test_the_judge_that_it_trains_loads_and_judges(
    recipe: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    results = run(recipe, monkeypatch, tmp_path, tmp_path / "pies")
    answers = [text.replace("{}", "77") for text in (DECLINED, PIE, WALK, PHRASE)]
    judge = load_judge(str(tmp_path / "pies"))
    assert judge.judge([""] * 4, answers) == ["refused", "unsafe", "harmless", "refused"]
    refusals, unsafe = results["refusals"], results["unsafe"]
    assert (refusals["answers"], refusals["refusals"], refusals["phrases"]) == (120, 60, {"accuracy": 0.75})
    assert (unsafe["answers"], unsafe["asr"]) == (120, 0.5)
    assert unsafe["unsettled"] == {"answers": 60, "asr": 0.5}
    assert unsafe["unsettled, but refused by the classifier"] == {"answers": 0, "asr": None}
    assert unsafe["refused"] == {"answers": 30, "asr": 0.0}
    assert unsafe["degenerate"] == {"answers": 30, "asr": 1.0}
    assert unsafe["phrases"] == {"accuracy": 0.5, "accuracy of unsettled": 0.5, "asr": 0.5}
    for way in ("held out by model", "held out by prompt"):
        assert refusals[way] == {"accuracy": 1.0, "lowest of a fold": 1.0, "auc of the classifier": 1.0}
        assert unsafe[way] == {
            **{"auc": 1.0, "auc of unsettled": 1.0},
            **{"accuracy": 0.75, "accuracy of unsettled": 1.0, "asr": 0.25},  # babble is not unsafe
        }


def test_the_same_data_give_the_same_judge(recipe: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("one", "other"):
        run(recipe, monkeypatch, tmp_path, tmp_path / name)
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "other" / path.name).read_bytes()


def test_what_is_held_out_is_not_seen(recipe: ModuleType) -> None:
    """Other labels of a fold change what is said of the other folds, and nothing of its own."""
    texts, folds = [row["response"] for row in LABELLED], recipe.ways(LABELLED)["prompt"]
    is_one = np.array([row["response"].startswith("Take") for row in LABELLED])
    found = recipe.held_out(texts, is_one, folds, 100)
    other = recipe.held_out(texts, np.where(folds == 2, ~is_one, is_one), folds, 100)
    assert ((found == other) == (folds == 2)).all()
    assert ((found > 0.5) == is_one).all()


def test_every_prompt_is_in_one_fold_and_every_fold_has_its_fifth(recipe: ModuleType) -> None:
    folds = recipe.ways(LABELLED)["prompt"]
    fold_of: dict[str, set[int]] = {}
    for row, fold in zip(LABELLED, folds, strict=True):
        fold_of.setdefault(row["prompt"], set()).add(int(fold))
    assert all(len(found) == 1 for found in fold_of.values())
    assert np.bincount(folds).tolist() == [len(LABELLED) // 5] * 5


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 9), st.booleans()), min_size=1, max_size=25))
def test_the_cut_has_the_fewest_errors(recipe: ModuleType, drawn: list[tuple[int, bool]]) -> None:
    probabilities, is_one = np.array([p / 10 for p, _ in drawn]), np.array([one for _, one in drawn])
    cut = recipe.best_cut(probabilities, is_one)
    right = [int(((probabilities >= other) == is_one).sum()) for other in np.arange(0, 1.05, 0.05)]
    assert ((probabilities >= cut) == is_one).sum() == max(right)
