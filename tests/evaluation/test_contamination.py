"""A corpus with planted rows, learned with the filter's cuts and without."""

from __future__ import annotations

import json
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sqsd_filter import Cut, Design, Scoring, Writing, evaluate, score_dataset, select_dataset
from sqsd_filter.cli.evaluation_table import table
from sqsd_filter.corpus.addresses import Opener
from sqsd_filter.directions.calibration import calibrate
from sqsd_filter.errors import DestinationExists, InputError, UsageError
from sqsd_filter.evaluation.contamination import (
    BENIGN,
    CONTAMINATED_ARMS,
    ContaminatedCorpus,
    ReferenceCut,
    read_kinds,
    reference_cuts,
)
from sqsd_filter.evaluation.prompt_outcomes import contaminated_figures, prompt_hash
from sqsd_filter.evaluation.results import ContaminatedArm
from sqsd_filter.evaluation.scores import read_scores
from sqsd_filter.scoring.pack import load_pack
from sqsd_filter.scoring.scorer import SQSDScorer
from tests.corpora import rows_of, write_jsonl
from tests.evaluation.studies import CONSENT, REFUSAL, ROWS, Notes, design, quick, scored
from tests.references import calibrated
from tests.scoring.test_beside import beside
from tests.scoring.test_linear_probe import with_probe

PLANTED = 8  # of the rows
PLAIN: dict[str, Any] = {"arms": ("cut",), "planted": None}  # no contaminated corpus


def rows(mark: object = True, benign: object = False) -> list[dict[str, Any]]:
    """The first rows, those with the highest risk, consent: they are planted."""
    return [
        {
            "prompt": f"Explain {k}.",
            "response": CONSENT if k < PLANTED else REFUSAL,
            "id": k,
            "bad": mark if k < PLANTED else benign,
        }
        for k in range(ROWS)
    ]


@pytest.fixture
def knows(tmp_path: Path) -> Path:
    return scored(tmp_path / "knows.parquet", rows(), np.linspace(1, -1, ROWS))


def contaminated(files: Path, **changes: Any) -> Design:
    return quick(files, **{"arms": ("contaminated",), "planted": "bad", **changes})


def corpus(risk: np.ndarray, kinds: list[str], cut: Cut | None = None, missing: int = 0) -> ContaminatedCorpus:
    """All rows are learned from but the first `missing` ones."""
    cuts = {"sqsd": ReferenceCut(cut, risk) if cut is not None else None}
    return ContaminatedCorpus(np.array(kinds, object), np.arange(missing, len(kinds)), {"sqsd": risk}, cuts)


def test_each_arm_keeps_what_its_cut_keeps_of_the_rows_to_learn_from() -> None:
    kinds = ["unsafe", "unsafe", *[BENIGN] * 16, "identity", BENIGN]
    risk = np.arange(20.0)
    risk[[1, 5]] = 50.0
    made = corpus(risk, kinds, Cut.of(above_reference="99%").at(15.0), missing=1)  # two planted rows are left
    assert made.planted == 2
    sets = made.sets("sqsd", 0)
    assert tuple(sets) == CONTAMINATED_ARMS
    assert sets["all"].tolist() == list(range(1, 20))
    above = [1, 5, 16, 17, 18, 19]
    assert sets["above-reference"].tolist() == [k for k in range(1, 20) if k not in above]
    assert sets["cut"].tolist() == [k for k in range(1, 20) if k not in (1, 5)]
    assert sets["clean"].tolist() == [k for k in range(1, 20) if k not in (1, 18)]
    assert len(sets["random"]) == 17
    assert set(sets["random"].tolist()) < set(range(1, 20))
    assert made.sets("sqsd", 1)["random"].tolist() != sets["random"].tolist()
    assert made.dropped(sets["all"]) == {"identity": 0, "unsafe": 0, BENIGN: 0}
    assert made.dropped(sets["above-reference"]) == {"identity": 1, "unsafe": 1, BENIGN: 4}
    assert list(made.dropped(sets["cut"]).values()) == [0, 1, 1]
    assert "above-reference" not in corpus(risk, kinds).sets("sqsd", 0)


def test_ties_at_the_cut_and_risks_of_rows_apart_change_nothing() -> None:
    risk = np.array([np.nan, 9.0, 1.0, 1.0, 1.0, 0.0])
    made = corpus(risk, [BENIGN, BENIGN, "x", BENIGN, "x", BENIGN], missing=2)
    assert made.sets("sqsd", 0)["cut"].tolist() == [4, 5]  # the first two of the tied rows are dropped, as by filter


@pytest.mark.parametrize(("kinds", "which"), [([BENIGN] * 3, "none"), (["x"] * 3, "each")], ids=["none", "all"])
def test_a_corpus_needs_rows_of_both_kinds(kinds: list[str], which: str) -> None:
    with pytest.raises(InputError, match=f"{which} was planted"):
        corpus(np.zeros(3), kinds)


def test_a_cut_that_keeps_nothing_is_refused() -> None:
    made = corpus(np.ones(3), ["x", BENIGN, BENIGN], Cut.of(above_reference="99%").at(0.0))
    with pytest.raises(InputError, match="none is kept: name a larger share"):
        made.sets("sqsd", 0)


def test_a_filtered_model_refuses_where_the_unfiltered_one_consents(pack: Path, files: Path, tmp_path: Path) -> None:
    plants = [{**row, "bad": row["id"] < ROWS // 2} for row in rows()]
    plants = [{**row, "response": CONSENT if row["bad"] else REFUSAL} for row in plants]
    path = scored(tmp_path / "knows.parquet", plants, np.linspace(1, -1, ROWS))
    asked = design(files, arms=("contaminated",), planted="bad", seeds=(0,))
    results = evaluate([path], tmp_path / "out", asked, pack=pack)
    figures = results["contaminated"]["knows"]
    assert figures["arms"]["clean"]["measures"]["unsafe by phrases"]["mean"] == 0
    assert figures["arms"]["cut"] == figures["arms"]["clean"]
    assert figures["arms"]["cut"]["measures"]["harmless refused"]["mean"] == 1
    assert figures["arms"]["all"]["rows"] == ROWS - 6
    assert figures["arms"]["all"]["measures"]["refused"]["mean"] < 1  # the answers of half of its rows consent
    assert figures["arms"]["clean"]["dropped"] == {"planted": ROWS // 2, "benign": 0}  # none of them is held out


def test_outcomes_are_left_without_texts_and_figures_follow_from_them(
    pack: Path, files: Path, knows: Path, tmp_path: Path
) -> None:
    questions = write_jsonl(tmp_path / "q.jsonl", [{"prompt": f"Explain {k}.", "answer": "42"} for k in range(2)])
    asked, notes = contaminated(files, seeds=(0, 1), questions=questions, question_tokens=3), Notes()
    results = evaluate([knows], tmp_path / "out", asked, pack=pack, progress=notes)
    outcomes = json.loads((tmp_path / "out" / "outcomes.json").read_text())
    assert contaminated_figures(outcomes) == results["contaminated"]
    assert results == json.loads((tmp_path / "out" / "results.json").read_text())
    assert "Explain" not in (tmp_path / "out" / "outcomes.json").read_text()
    assert outcomes["prompts"]["harmful"] == [prompt_hash(f"Explain {k}.") for k in (60, 61, 62)]
    found = [(run["arm"], run["seed"], run["dropped"]) for run in outcomes["runs"]]
    nothing, all_planted = {"planted": 0, "benign": 0}, {"planted": PLANTED, "benign": 0}
    assert found[:3] == [("untuned", 0, {}), ("all", 0, nothing), ("cut", 0, all_planted)]
    assert [each for each in found if each[0] == "clean"] == [("clean", 0, all_planted), ("clean", 1, all_planted)]
    assert all(sum(dropped.values()) == PLANTED for arm, _, dropped in found if arm == "random")
    keys = {(run["arm"], run["seed"]): run["run"] for run in outcomes["runs"]}
    assert keys["cut", 0] == keys["clean", 0] in results["runs"]["knows"]["clean"]
    assert len(set(keys.values())) == 7  # of 9: the cut is the clean arm
    same = results["contaminated"]["knows"]["differences"]["cut - clean"]
    assert all(each == {"mean": 0, "ci": [0, 0]} for each in same.values())
    assert {run["right"] for run in outcomes["runs"]} == {"00"}
    assert {len(run["unsafe"]["phrases"]) for run in outcomes["runs"]} == {3}
    assert {len(run["harmless_refused"]) for run in outcomes["runs"]} == {2}
    assert results["prompts"] == {"harmful": 3, "harmless": 2, "questions": 2}
    assert results["sets"] == {"arms": ["contaminated"], "planted": "bad", "above_reference": 0.99}
    trained = [note.split(":")[0] for note in notes.notes if "with this seed" in note]
    arms = [f"knows {arm}, seed {seed}" for seed in (0, 1) for arm in ("all", "cut", "random")]
    assert trained == ["untuned", *arms]  # the cut finds all planted rows, so that it is the clean arm
    assert notes.notes[0] == "knows has no arm above-reference. No report beside its scores names their pack."
    shown = table(results)
    assert "planted dropped" in shown
    assert "cut - clean" in shown
    assert "outcomes" not in shown
    lines = (tmp_path / "out" / "runs" / "untuned" / "solutions.jsonl").read_text().splitlines()
    assert [json.loads(line)["known"] for line in lines] == ["42", "42"]
    notes = Notes()
    again = evaluate([knows], tmp_path / "out", replace(asked, seeds=(0,)), pack=pack, progress=notes)
    assert [note for note in notes.notes if "with this seed" in note] == []
    assert again["contaminated"]["knows"]["arms"]["all"]["seeds"] == [0]


def test_the_cut_above_the_reference_is_the_filter_s(
    tiny_pack: Path, pack: Path, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = write_jsonl(tmp_path / "in.jsonl", rows("unsafe", benign=""))
    score_dataset(plain, tmp_path / "first.parquet", Scoring(pack=tiny_pack))
    risks = pq.read_table(tmp_path / "first.parquet")["sqsd_risk"].to_pylist()
    marked = calibrated(tiny_pack, tmp_path / "pack", [sorted(risks)[:30]], [risks])  # so that some rows are above
    score_dataset(plain, path := tmp_path / "scores.parquet", Scoring(pack=marked))
    select_dataset(path, tmp_path / "kept", Cut.of(above_reference="90%"), Writing())
    kept = {row["id"] for row in rows_of(tmp_path / "kept", "kept")}
    assert 0 < len(kept) < ROWS
    seen: dict[str, np.ndarray] = {}
    known = ContaminatedCorpus.sets

    def sets(self: ContaminatedCorpus, scorer: str, seed: int) -> dict[ContaminatedArm, np.ndarray]:
        made = known(self, scorer, seed)
        seen.update({str(arm): kept for arm, kept in made.items()})
        return made

    monkeypatch.setattr(ContaminatedCorpus, "sets", sets)
    evaluate([path], tmp_path / "out", contaminated(files, above_reference="90%"), pack=pack)
    assert seen["above-reference"].tolist() == [k for k in seen["all"].tolist() if k in kept]
    outcomes = json.loads((tmp_path / "out" / "outcomes.json").read_text())
    dropped = next(run["dropped"] for run in outcomes["runs"] if run["arm"] == "above-reference")
    gone = [k for k in seen["all"].tolist() if k not in kept]
    assert dropped == {"unsafe": sum(k < PLANTED for k in gone), "benign": sum(k >= PLANTED for k in gone)}
    with pytest.raises(UsageError, match=r"can't show 99%: that needs at least 100"):
        evaluate([path], tmp_path / "other", contaminated(files), pack=pack)
    assert Fraction("0.9") == contaminated(files, above_reference="90%").reference_share


def test_the_cut_above_the_reference_is_at_the_risk_beside_as_by_select(
    tiny_pack: Path, files: Path, pack: Path, tmp_path: Path
) -> None:
    plain, calm = write_jsonl(tmp_path / "in.jsonl", rows("unsafe", benign="")), rows()[PLANTED:]
    both = beside(with_probe(tiny_pack, tmp_path / "pack"))
    benign = write_jsonl(tmp_path / "benign.jsonl", calm)
    calibrate(both, [str(benign)], scorer=lambda: SQSDScorer(load_pack(both).with_risk("unsafe")))
    score_dataset(plain, path := tmp_path / "scores.parquet", Scoring(pack=both))
    select_dataset(path, tmp_path / "kept", Cut.of(above_reference="80%"), Writing())
    kept = {row["id"] for row in rows_of(tmp_path / "kept", "kept")}
    assert 0 < len(kept) < ROWS
    opener, notes = Opener(), Notes()
    (scorer,) = read_scores([path], opener, notes)
    made = reference_cuts([scorer], Fraction("0.8"), notes)[scorer.name]
    assert made is not None
    learned = np.flatnonzero(scorer.scored)
    kinds = read_kinds(scorer.earlier, "bad")
    sets = ContaminatedCorpus(kinds, learned, {"a": scorer.risk}, {"a": made}).sets("a", 0)
    assert set(sets["above-reference"].tolist()) == kept
    assert notes.notes[-1] == "sqsd: the arm above-reference is cut at the risk unsafe, as by select"
    select_dataset(path, tmp_path / "top", Cut.of(drop_top=f"{PLANTED / len(learned)}"), Writing())
    assert set(sets["cut"].tolist()) == {row["id"] for row in rows_of(tmp_path / "top", "kept")}  # at the own risk


@pytest.mark.parametrize(
    ("mark", "benign", "column", "why"),
    [
        (True, False, "good", "No row of .* is marked under 'good': name the column .* prompt, response, id, bad"),
        (False, False, "bad", "is marked under 'bad'"),
        (1, 0, "bad", r"has 1 under 'bad' \(line 1\)"),
    ],
    ids=["no such column", "no planted row", "numbers"],
)
def test_a_column_that_marks_no_row_is_refused(
    mark: object, benign: object, column: str, why: str, pack: Path, files: Path, tmp_path: Path
) -> None:
    path = scored(tmp_path / "a.parquet", rows(mark, benign), np.linspace(1, -1, ROWS))
    with pytest.raises(InputError, match=why):
        evaluate([path], tmp_path / "out", contaminated(files, planted=column), pack=pack)
    assert not (tmp_path / "out").exists()


def test_planted_rows_may_be_of_several_kinds(pack: Path, files: Path, tmp_path: Path) -> None:
    mixed = [{**row, "bad": None if row["id"] >= PLANTED else "ab"[row["id"] % 2]} for row in rows()]
    path = scored(tmp_path / "a.parquet", mixed, np.linspace(1, -1, ROWS))
    results = evaluate([path], tmp_path / "out", contaminated(files), pack=pack)
    assert results["contaminated"]["a"]["arms"]["clean"]["dropped"] == {"a": 4, "b": 4, "benign": 0}


def test_other_planted_rows_or_questions_are_another_evaluation(
    pack: Path, files: Path, knows: Path, tmp_path: Path
) -> None:
    evaluate([knows], tmp_path / "out", contaminated(files), pack=pack)
    questions = write_jsonl(tmp_path / "q.jsonl", [{"prompt": "?", "answer": "42"}])
    with pytest.raises(DestinationExists, match=r"questions: None there, 1 questions \(\w+\), 256 tokens here"):
        evaluate([knows], tmp_path / "out", contaminated(files, questions=questions), pack=pack)
    other = pq.read_table(knows).to_pylist()
    other[PLANTED]["bad"] = True
    pq.write_table(pa.Table.from_pylist(other), knows)
    with pytest.raises(DestinationExists, match=r"planted: 8 of 41 rows \(\w+\) there, 9 of 41 rows \(\w+\) here"):
        evaluate([knows], tmp_path / "out", contaminated(files), pack=pack)
    settings = json.loads((tmp_path / "out" / "settings.json").read_text())
    assert settings.pop("questions", 0) is None


def test_an_evaluation_from_before_there_were_questions_goes_on(pack: Path, files: Path, mine: Path) -> None:
    settings = json.loads((mine / "settings.json").read_text())
    del settings["questions"]
    (mine / "settings.json").write_text(json.dumps(settings))
    notes = Notes()
    evaluate([files / "knows.parquet"], mine, quick(files), pack=pack, progress=notes)
    assert notes.notes == []


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ({"planted": None}, "Name the column that marks planted rows"),
        ({"arms": ("contaminated", "cut")}, "stands alone"),
        ({"arms": ("windows",)}, r"planted \(--planted\) is for"),
        ({"arms": ("cut",), "planted": None, "questions": "q.jsonl"}, r"questions \(--questions\) is for"),
        ({"above_reference": "100%"}, "below 100%"),
        ({"above_reference": "99"}, "could mean 99%"),
        ({"question_tokens": 0}, "at least 1"),
        ({"question_tokens": 9}, r"question_tokens \(--question-tokens\) is for questions \(--questions\)"),
        ({**PLAIN, "above_reference": "99%"}, r"above_reference \(--above-reference\) is for"),
        ({**PLAIN, "above_reference": "0%"}, "above 0%"),
        ({**PLAIN, "above_reference": "99"}, "could mean 99%"),
        ({**PLAIN, "question_tokens": 256}, r"question_tokens \(--question-tokens\) is for arms"),
        ({**PLAIN, "arms": (), "above_reference": "95%"}, r"above_reference \(--above-reference\) is for"),
    ],
    ids=str,
)
def test_a_design_of_a_contaminated_corpus_that_makes_no_sense_is_refused(
    wrong: dict[str, Any], why: str, files: Path
) -> None:
    with pytest.raises(UsageError, match=why):
        contaminated(files, **wrong)
