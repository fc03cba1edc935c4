"""A trained judge as row scorer, here one that finds pies unsafe."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline, make_union

from sqsd_filter import make_scorer
from sqsd_filter.corpus.conversation import Message
from sqsd_filter.errors import JudgeError
from sqsd_filter.judges.judge_scorer import MARGIN
from tests.tiny import CONVERSATIONS, chat
from tests.tiny_judges import DECLINED, PIES, TEXTS, WALKS, make_judge

REFUSED = "I'm sorry, I can't bake. Take 3 apples and flour, then bake the pie."
NEW = ["Take 9 apples and bake the pie.", "We saw a river and a heron.", "A pie by the river, friend?"]
LOWEST = np.log(MARGIN) - np.log1p(-MARGIN)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("judges") / "pies"
    make_judge().save(folder)
    return folder


def answered(*answers: str) -> list[list[Message]]:
    return [chat("And then?", answer) for answer in answers]


def test_the_risk_is_the_log_odds_of_an_unsafe_answer_that_is_no_refusal(folder: Path, tiny_pack: Path) -> None:
    def fitted(positive: list[str]) -> Pipeline:
        how: dict[str, Any] = {"lowercase": True, "sublinear_tf": True, "min_df": 2}
        words = TfidfVectorizer(ngram_range=(1, 3), token_pattern=r"[\w']+", **how)
        characters = TfidfVectorizer(analyzer="char", ngram_range=(2, 5), **how)
        pipeline = make_pipeline(make_union(words, characters), LogisticRegression(C=10.0, max_iter=1000))
        return pipeline.fit(TEXTS, [text in positive for text in TEXTS])

    answers = [*PIES, *WALKS, *NEW]
    unsafe, refusal = (fitted(texts).predict_proba(answers)[:, 1] for texts in (PIES, DECLINED))
    assert refusal.max() < 0.5
    p = unsafe * (1 - refusal)
    found = make_scorer(f"judge:{folder}", tiny_pack).score(answered(*answers))
    assert set(found.status) == {"scored"}
    np.testing.assert_allclose(found.risk, np.log(p / (1 - p)), rtol=1e-6)
    assert np.array_equal(found.probes["unsafe"], found.risk)
    assert found.risk[: len(PIES)].min() > found.risk[len(PIES) : len(PIES + WALKS)].max()


def test_refusals_have_the_lowest_risk_whatever_they_are_about(folder: Path, tiny_pack: Path) -> None:
    found = make_scorer(f"judge:{folder}", tiny_pack).score(answered(REFUSED, *DECLINED, *NEW)).risk
    assert found[: 1 + len(DECLINED)].tolist() == [LOWEST] * (1 + len(DECLINED))
    assert found[1 + len(DECLINED) :].min() > LOWEST


def test_the_last_answer_within_the_limit_decides(folder: Path, tiny_pack: Path) -> None:
    scorer = make_scorer(f"judge:{folder}", tiny_pack)
    pie, walk, first, both, late = scorer.score(
        [
            *answered(PIES[0], WALKS[0]),
            chat("And then?", PIES[0], "And then?", WALKS[0]),
            chat("And then?", PIES[0], "And then?", WALKS[0], system="Be brief."),
            chat("And then?", PIES[0], "the sea " * 200, WALKS[0]),
        ]
    ).risk
    assert first == both == walk
    assert late == pie


def test_rows_without_a_score_have_the_statuses_that_other_scorers_give(folder: Path, tiny_pack: Path) -> None:
    rows = [chat("no answer?", "  "), *CONVERSATIONS[:2], chat("x " * 400, "too long"), [], chat("q", "\ud83d")]
    scorer, others = make_scorer(f"judge:{folder}", tiny_pack), make_scorer("length", tiny_pack).score(rows)
    found = scorer.score(rows)
    assert (found.status, found.detail, found.tokens.tolist()) == (others.status, others.detail, others.tokens.tolist())
    assert scorer.passes == 0


def test_a_judge_travels_with_its_scorer(folder: Path, tiny_pack: Path, tmp_path: Path) -> None:
    make_judge().save(tmp_path / "pies")
    scorer = make_scorer(f"judge:{tmp_path / 'pies'}", tiny_pack)
    assert scorer.settings() == make_scorer(f"judge:{folder}", tiny_pack).settings()
    assert scorer.name == "judge:pies"
    packed = pickle.dumps(scorer)
    for path in (tmp_path / "pies").iterdir():
        path.unlink()
    rows = answered(*NEW)
    assert np.array_equal(pickle.loads(packed).score(rows).risk, scorer.score(rows).risk)


def test_a_folder_without_a_judge_is_one_clear_error(tiny_pack: Path, tmp_path: Path) -> None:
    with pytest.raises(JudgeError, match=r"nowhere does not hold a whole judge .*train one with recipes/judge"):
        make_scorer(f"judge:{tmp_path / 'nowhere'}", tiny_pack)
