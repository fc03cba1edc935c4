"""The judge that is trained: what it says, and that it comes back from its folder as it was, or not at all."""

from __future__ import annotations

import hashlib
import json
import pickle
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline, make_union

from sqsd_filter.errors import JudgeError
from sqsd_filter.judges import is_refusal, load_judge
from sqsd_filter.judges.classifier import TextClassifier
from sqsd_filter.judges.trained import ARRAYS_FILE, SETTINGS_FILE, TrainedJudge
from tests.tiny_judges import DECLINED, PIES, TEXTS, make_judge

BABBLE = "the sea " * 12


@pytest.fixture(scope="module")
def judge() -> TrainedJudge:
    return make_judge()


@pytest.fixture
def folder(judge: TrainedJudge, tmp_path: Path) -> Path:
    judge.save(tmp_path / "pies")
    return tmp_path / "pies"


def test_each_outcome_is_found_and_phrases_go_first(judge: TrainedJudge) -> None:
    refused = "I'm sorry, I can't bake. Take 3 apples and flour, then bake the pie."
    assert not any(map(is_refusal, TEXTS))
    answers = [DECLINED[0], "Take 9 apples and bake the pie.", "We saw a river and a heron.", BABBLE, "", refused]
    expected = ["refused", "unsafe", "harmless", "degenerate", "degenerate", "refused"]
    assert judge.judge([""] * 6, answers) == expected
    assert judge.judge([""] * 6, answers[::-1]) == expected[::-1]
    assert judge.judge([], []) == []
    assert judge.judge(["pie?"], [BABBLE]) == ["degenerate"]


def test_the_probabilities_are_those_of_a_pipeline_of_scikit_learn(judge: TrainedJudge) -> None:
    how: dict[str, Any] = {"lowercase": False, "sublinear_tf": True, "min_df": 2}
    pipeline = make_pipeline(
        make_union(
            TfidfVectorizer(ngram_range=(1, 3), token_pattern=r"[\w']+", **how),
            TfidfVectorizer(analyzer="char", ngram_range=(2, 5), **how),
        ),
        LogisticRegression(C=10.0, max_iter=1000),
    )
    lower = [text.lower() for text in TEXTS]
    pipeline.fit(lower, [text in PIES for text in TEXTS])
    np.testing.assert_allclose(judge.unsafe.probabilities(TEXTS), pipeline.predict_proba(lower)[:, 1], rtol=1e-9)


def test_only_the_head_of_a_text_is_read_and_neither_case_nor_spacing(judge: TrainedJudge) -> None:
    short = TextClassifier.fit(TEXTS, [text in PIES for text in TEXTS], head=20)
    (found, other) = short.probabilities([PIES[0], f"{PIES[0][:20].upper()}\n and a heron by the river"])
    assert found == other
    assert judge.unsafe.probabilities([PIES[0]])[0] != judge.unsafe.probabilities([PIES[0][:20]])[0]


def test_a_probability_at_the_cut_is_positive(judge: TrainedJudge) -> None:
    at = float(judge.unsafe.probabilities(PIES[:1])[0])
    for cut, expected in ((at, True), (np.nextafter(at, 1), False)):
        moved = TextClassifier(600, cut, judge.unsafe.vectorizers, judge.unsafe.coefficients, judge.unsafe.bias)
        assert moved.positive(PIES[:1]).tolist() == [expected]


def test_a_judge_is_told_from_another_of_its_name(judge: TrainedJudge, folder: Path) -> None:
    retrained = replace(judge, unsafe=judge.refusal)
    assert TrainedJudge.load(folder).fingerprint == judge.fingerprint != retrained.fingerprint


def test_a_judge_comes_back_bit_for_bit(judge: TrainedJudge, folder: Path) -> None:
    again = load_judge(str(folder))
    assert isinstance(again, TrainedJudge)
    assert again.name == "pies"
    unseen = [*TEXTS, "A pie by the river, friend?", "nothing of this kind", "?"]
    for name in ("refusal", "unsafe"):
        one, other = getattr(judge, name), getattr(again, name)
        assert (one.head, one.cut) == (other.head, other.cut)
        assert np.array_equal(one.probabilities(unseen), other.probabilities(unseen))
    again.save(folder.with_name("again"))
    for name in (SETTINGS_FILE, ARRAYS_FILE):
        assert (folder / name).read_bytes() == (folder.with_name("again") / name).read_bytes()
    assert sorted(path.name for path in folder.iterdir()) == [SETTINGS_FILE, ARRAYS_FILE]


def change(folder: Path, alter: Callable[[dict[str, Any]], object]) -> None:
    settings = json.loads((folder / SETTINGS_FILE).read_text())
    alter(settings)
    (folder / SETTINGS_FILE).write_text(json.dumps(settings))


def reweigh(folder: Path, alter: Callable[[dict[str, np.ndarray]], object]) -> None:
    """Other numbers, with their checksum."""
    arrays = load_file(folder / ARRAYS_FILE)
    alter(arrays)
    (folder / ARRAYS_FILE).write_bytes(save(arrays))
    digest = hashlib.sha256((folder / ARRAYS_FILE).read_bytes()).hexdigest()
    change(folder, lambda settings: settings.update(sha256=digest))


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))


def a_pickle(folder: Path) -> None:
    (folder / ARRAYS_FILE).write_bytes(pickle.dumps({"unsafe.bias": 0}))
    digest = hashlib.sha256((folder / ARRAYS_FILE).read_bytes()).hexdigest()
    change(folder, lambda settings: settings.update(sha256=digest))


DAMAGES: dict[str, Callable[[Path], object]] = {
    "no arrays": lambda folder: (folder / ARRAYS_FILE).unlink(),
    "half the arrays": lambda folder: (folder / ARRAYS_FILE).write_bytes((folder / ARRAYS_FILE).read_bytes()[:99]),
    "one bit": lambda folder: flip(folder / ARRAYS_FILE),
    "half the settings": lambda folder: (folder / SETTINGS_FILE).write_text((folder / SETTINGS_FILE).read_text()[:99]),
    "settings that are no object": lambda folder: (folder / SETTINGS_FILE).write_text("[1]"),
    "an array too few": lambda folder: reweigh(folder, lambda arrays: arrays.pop("unsafe.idf")),
    "numbers too few": lambda folder: reweigh(folder, lambda a: a.update({"refusal.weights": np.ones(3)})),
    "numbers that are none": lambda folder: reweigh(folder, lambda a: a["unsafe.weights"].fill(np.nan)),
    "a pickle": a_pickle,
    "another format": lambda folder: change(folder, lambda settings: settings.update(format=2)),
    "a classifier too few": lambda folder: change(folder, lambda settings: settings.pop("unsafe")),
    "terms that are no text": lambda folder: change(
        folder, lambda settings: settings["unsafe"].update(words=list(range(len(settings["unsafe"]["words"]))))
    ),
    "a term twice": lambda folder: change(
        folder, lambda settings: settings["unsafe"]["words"].__setitem__(0, settings["unsafe"]["words"][1])
    ),
    "a cut that is no number": lambda folder: change(folder, lambda settings: settings["unsafe"].update(cut="high")),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_broken_judge_is_one_clear_error(folder: Path, damage: Callable[[Path], object]) -> None:
    damage(folder)
    with pytest.raises(
        JudgeError, match=r"pies does not hold a whole judge \(.*\): copy it again, or train one"
    ) as caught:
        load_judge(str(folder))
    assert "\n" not in str(caught.value)


def test_a_folder_or_file_that_is_no_judge_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no judge")
    for place in (tmp_path, tmp_path / "notes.txt"):
        with pytest.raises(JudgeError, match=rf"{place.name} is not a judge.*judge\.json.*config\.json.*'phrases'"):
            load_judge(str(place))


def test_without_scikit_learn_the_extra_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "sqsd_filter.judges.classifier")
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
    with pytest.raises(JudgeError, match=r"needs scikit-learn: pip install 'sqsd-filter\[judge\]'"):
        load_judge(str(folder))
