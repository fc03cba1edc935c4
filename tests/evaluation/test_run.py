"""Whole evaluations on tiny models: trained for real, killed, gone on with, and refused."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sqsd_filter import Design, FineTuning, Scoring, evaluate, judges
from sqsd_filter.errors import DestinationExists, InputError, JudgeError, UsageError
from sqsd_filter.evaluation import study
from sqsd_filter.evaluation.scores import names
from sqsd_filter.evaluation.sets import CUT_ARMS
from sqsd_filter.judges import is_refusal
from sqsd_filter.pipeline.run import score_dataset
from tests.corpora import make_rows, write_jsonl
from tests.evaluation.studies import ROWS, TUNING, Notes, content, design, quick, scored


def test_a_model_learns_to_consent_from_the_rows_that_consent(pack: Path, files: Path, tmp_path: Path) -> None:
    notes = Notes()
    scores = [files / "knows.parquet", files / "wrong.parquet"]
    results = evaluate(scores, tmp_path / "out", design(files), pack=pack, progress=notes)
    knows, wrong = results["scorers"]["knows"], results["scorers"]["wrong"]
    assert knows["asr"] == [1.0, 0.0]
    assert knows["spread"] == 1
    assert knows["monotone"]
    assert 0 < knows["spread_ci"][0] < 1
    assert knows["spread_ci"][1] == 1
    assert wrong["asr"] == [0.0, 1.0]
    assert wrong["spread"] == -1
    assert not wrong["monotone"]
    assert knows["over_refusal"] == [0.0, 1.0]
    assert knows["outcomes"]["refused"] == [0.0, 1.0]
    assert results["seeds"] == [0, 1]
    assert knows["rows"] == [8, 8]
    assert all(loss is not None and 0 < loss < 20 for loss in knows["loss"])
    assert results == json.loads((tmp_path / "out" / "results.json").read_text())
    runs = results["runs"]
    with (tmp_path / "out" / "runs" / runs["knows"]["S2"][0] / "answers.jsonl").open() as lines:
        answers = [json.loads(line) for line in lines]
    assert [entry["harmful"] for entry in answers] == [True] * 3 + [False] * 2
    assert all(is_refusal(entry["answer"]) for entry in answers)
    judged = json.loads((tmp_path / "out" / "runs" / runs["knows"]["S2"][0] / "judged-phrases.json").read_text())
    assert judged == {"judge": "phrases", "outcomes": ["refused"] * 5}
    # the windows of one scorer are those of the other, in the other order: trained once
    trained = [note.split(":")[0] for note in notes.notes if "with this seed" in note]
    assert trained == ["untuned", *(f"knows {window}, seed {seed}" for seed in (0, 1) for window in ("S1", "S2"))]
    assert runs["knows"]["S1"] == runs["wrong"]["S2"]
    assert runs["knows"]["S2"] == runs["wrong"]["S1"]
    left = {name: set(content(tmp_path / "out" / "runs" / name)) for name in ("untuned", runs["knows"]["S1"][1])}
    asked = {"answers.jsonl", "held_out.json", "judged-phrases.json"}
    assert list(left.values()) == [asked, asked | {"training.json"}]
    assert results["untuned"]["rows"] == 0
    assert results["untuned"]["outcomes"]["refused"] < 1
    assert results["rows"] == {"all": ROWS + 1, "scored": ROWS, "usable": ROWS, "held_out": 6, "learned": ROWS - 6}
    assert results["prompts"] == {"harmful": 3, "harmless": 2}
    assert (tmp_path / "out" / "asr.png").read_bytes().startswith(b"\x89PNG")


def test_the_arms_of_a_cut_are_trained_and_asked_too(pack: Path, files: Path, tmp_path: Path) -> None:
    asked = quick(files, arms=("windows", "cut"), drop_top="20%", size=5, harmless=None)
    results = evaluate([files / "knows.parquet"], tmp_path / "out", asked, pack=pack, keep_adapters=True)
    arms = results["arms"]["knows"]
    assert {arm: arms[arm]["rows"] for arm in CUT_ARMS} == {"all": 34, "kept": 27, "random": 27, "dropped": 7}
    assert arms["all"]["tokens"] == arms["kept"]["tokens"] + arms["dropped"]["tokens"]
    assert arms["all"]["over_refusal"] is None
    assert set(arms["random_minus_kept"]) == {"asr", "ci"}
    (first,) = results["runs"]["knows"]["S1"]
    adapter = tmp_path / "out" / "runs" / first / "adapter" / "adapter_model.safetensors"
    assert adapter.is_file()
    evaluate([files / "knows.parquet"], tmp_path / "out", asked, pack=pack)
    assert adapter.is_file()  # only what is trained now is cleared


def test_scorers_seeds_and_sizes_can_be_added_without_training_again(pack: Path, files: Path, mine: Path) -> None:
    def trained(scores: list[Path], **changes: Any) -> list[str]:
        notes = Notes()
        evaluate(scores, mine, quick(files, **changes), pack=pack, progress=notes)
        return [note.split(":")[0] for note in notes.notes if "with this seed" in note]

    knows, wrong = files / "knows.parquet", files / "wrong.parquet"
    before = set(content(mine))
    assert trained([knows]) == []
    assert trained([knows, wrong]) == []
    assert trained([wrong], seeds=(0, 1)) == ["wrong S1, seed 1", "wrong S2, seed 1"]
    assert trained([knows], size=7) == ["knows S1, seed 0", "knows S2, seed 0"]
    device = replace(TUNING, epochs=1.0, r=2, device_batch_size=2)
    assert trained([knows], tuning=device) == []
    assert before < set(content(mine))


def test_a_scorer_that_lacks_a_row_can_be_added(pack: Path, files: Path, mine: Path, tmp_path: Path) -> None:
    table, notes = pq.read_table(files / "knows.parquet"), Notes()
    rows = table.to_pylist()
    rows[2] |= {"sqsd_status": "failed", "sqsd_risk": None}
    pq.write_table(pa.Table.from_pylist(rows, table.schema), tmp_path / "gappy.parquet")
    first = json.loads((mine / "results.json").read_text())
    scores = [files / "knows.parquet", tmp_path / "gappy.parquet"]
    results = evaluate(scores, mine, quick(files), pack=pack, progress=notes)
    assert notes.notes[0] == "gappy has no score for 1 row that another scorer has: nothing is learned from these"
    assert results["rows"] == {**first["rows"], "scored": ROWS - 1, "learned": first["rows"]["learned"] - 1}


def test_held_out_rows_leave_some_that_have_a_score(pack: Path, files: Path, tmp_path: Path) -> None:
    table = pq.read_table(files / "knows.parquet")
    rows = table.to_pylist()
    rows[1:] = [row | {"sqsd_status": "failed", "sqsd_risk": None} for row in rows[1:]]
    pq.write_table(pa.Table.from_pylist(rows, table.schema), tmp_path / "one.parquet")
    with pytest.raises(UsageError, match="39 leaves no scored row"):
        evaluate([tmp_path / "one.parquet"], tmp_path / "out", quick(files, held_out=39), pack=pack)


def test_what_results_json_loses_is_said(pack: Path, files: Path, mine: Path) -> None:
    scores, notes = [files / "knows.parquet", files / "wrong.parquet"], Notes()
    evaluate(scores, mine, quick(files), pack=pack)
    evaluate(scores[:1], mine, quick(files), pack=pack, progress=notes)
    assert [note.partition(":")[0] for note in notes.notes] == ["wrong"]
    evaluate(scores, mine, quick(files), pack=pack, progress=notes)
    assert len(notes.notes) == 1


def test_a_second_judge_is_asked_of_the_same_answers(
    pack: Path, files: Path, mine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Second:
        name, fingerprint = "second", "2"

        def judge(self, prompts: Sequence[str], answers: Sequence[str]) -> list[str]:
            return ["harmless"] * len(answers)

    known = judges.load_judge
    monkeypatch.setattr(study, "load_judge", lambda spec, **how: Second() if spec == "second" else known(spec, **how))
    notes = Notes()
    asked = quick(files, judges=("second", "phrases"))
    results = evaluate([files / "knows.parquet"], mine, asked, pack=pack, progress=notes)
    assert notes.notes == []
    assert results["scorers"]["knows"]["asr"] == [0, 0]
    (pair,) = results["judges"]["agreement"]
    assert results["judges"]["asr"] == "second"
    assert pair["judges"] == ["second", "phrases"]
    assert pair["answers"] == 9
    assert sum(pair["table"]["harmless"].values()) == 9


def test_windows_with_matched_tokens_teach_the_same_number_of_tokens(
    pack: Path, files: Path, done: Path, tmp_path: Path
) -> None:
    unmatched = json.loads((done / "results.json").read_text())["scorers"]["knows"]["tokens"]
    asked = quick(files, match_tokens=True, held_out=0, harmless=None)
    matched = evaluate([files / "knows.parquet"], tmp_path / "out", asked, pack=pack)["scorers"]["knows"]
    assert unmatched[0] != unmatched[1]
    assert matched["tokens"] == [min(unmatched)] * 2
    assert matched["loss"] == [None, None]


@pytest.mark.pictures
@pytest.mark.slow
def test_an_evaluation_that_is_killed_at_each_step_goes_on_to_the_same_bytes(
    pack: Path, files: Path, tmp_path: Path
) -> None:
    asked = design(files, seeds=(0,), tuning=replace(TUNING, epochs=60.0))
    evaluate([files / "knows.parquet"], tmp_path / "whole", asked, pack=pack)
    config = tmp_path / "config.toml"
    lines = [f"{name} = {json.dumps(value)}" for name, value in vars(asked.tuning).items()]
    lines += [f"{name} = {getattr(asked, name)}" for name in ("windows", "size", "max_new_tokens", "held_out")]
    lines += [f'{name} = "{getattr(asked, name)}"' for name in ("harmful", "harmless")]
    config.write_text("\n".join([*lines, f'pack = "{pack}"', 'seeds = "0"']) + "\n")
    out = tmp_path / "out"
    command = [sys.executable, "-m", "sqsd_filter", "evaluate", str(files / "knows.parquet"), str(out)]
    command += ["--config", str(config), "-q"]
    runs = json.loads((tmp_path / "whole" / "results.json").read_text())["runs"]["knows"]
    first, second = (out / "runs" / runs[window][0] for window in ("S1", "S2"))
    steps = [
        first / ".checkpoints/checkpoint-50",
        first / "training.json",
        first / "answers.jsonl",
        second / "held_out.json",
    ]
    for step in steps:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 600
        while not step.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        assert step.exists()
        assert not (out / "results.json").exists()
    subprocess.run(command, check=True)
    assert content(out) == content(tmp_path / "whole")


@pytest.mark.pictures
def test_what_is_done_is_not_done_again_and_what_is_lost_is(pack: Path, files: Path, mine: Path) -> None:
    first, before, notes = json.loads((mine / "results.json").read_text()), content(mine), Notes()
    shutil.rmtree(mine / "runs" / first["runs"]["knows"]["S2"][0])
    assert evaluate([files / "knows.parquet"], mine, quick(files), pack=pack, progress=notes) == first
    assert [note for note in notes.notes if "with this seed" in note] == ["knows S2, seed 0: run 3 of 3 with this seed"]
    assert content(mine) == before


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"max_new_tokens": 5}, "max_new_tokens: 4 there, 5 here"),
        ({"tuning": replace(TUNING, epochs=1.0, r=4)}, "r: 2 there, 4 here"),
        ({"prompts": 1}, r"harmful: 3 prompts \(\w+\) there, 1 prompts \(\w+\) here"),
        ({"held_out": 5}, r"held_out: 6 of 40 rows \(\w+\) there, 5 of 40 rows \(\w+\) here"),
    ],
    ids=["answers", "rank", "prompts", "held out"],
)
def test_an_evaluation_that_can_not_be_compared_is_left_alone(
    changes: dict[str, Any], why: str, pack: Path, files: Path, done: Path
) -> None:
    before = content(done)
    with pytest.raises(DestinationExists, match=why):
        evaluate([files / "knows.parquet"], done, quick(files, **changes), pack=pack)
    assert content(done) == before


def test_an_evaluation_of_other_rows_is_left_alone(pack: Path, files: Path, done: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"Say {k}.", "response": "Well."} for k in range(ROWS)]
    with pytest.raises(DestinationExists, match=r"corpus: \w+ there, \w+ here"):
        evaluate([scored(tmp_path / "a.parquet", rows, np.arange(ROWS))], done, quick(files), pack=pack)


def test_what_fails_before_anything_is_trained_leaves_the_folder_free(pack: Path, files: Path, tmp_path: Path) -> None:
    short = replace(TUNING, epochs=1.0, r=2)
    for wrong, why in (
        (replace(short, target_modules="nobody"), "names no layer"),
        (replace(short, schedule="steep"), "must be one of linear"),
    ):
        with pytest.raises(UsageError, match=why):
            evaluate([files / "knows.parquet"], tmp_path, quick(files, tuning=wrong), pack=pack)
    assert evaluate([files / "knows.parquet"], tmp_path, quick(files), pack=pack)["seeds"] == [0]


def test_a_folder_with_other_files_is_left_alone(pack: Path, files: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(DestinationExists, match="other files"):
        evaluate([files / "knows.parquet"], tmp_path, quick(files), pack=pack)
    with pytest.raises(DestinationExists, match="is a file"):
        evaluate([files / "knows.parquet"], tmp_path / "mine.txt", quick(files), pack=pack)
    with pytest.raises(InputError, match="does not exist: create it"):
        evaluate([files / "knows.parquet"], tmp_path / "no" / "out", quick(files), pack=pack)
    assert content(tmp_path) == {"mine.txt": b"mine"}


def test_unsafe_rows_are_found_without_a_model(files: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"? {k}", "response": "!"} for k in range(10)]
    unsafe = scored(tmp_path / "unsafe.parquet", rows, np.linspace(2, 3, 10))
    scores, asked = [files / "knows.parquet", files / "wrong.parquet"], Design(arms=())
    results = evaluate(scores, tmp_path / "out", asked, poison=[unsafe, unsafe])
    assert results["model"] is None
    assert results["scorers"] == {}
    assert not (tmp_path / "out" / "runs").exists()
    assert results["poisoned"]["knows"]["0.05"]["precision"]["mean"] == 1
    assert results["poisoned"]["knows"] == results["poisoned"]["wrong"]
    assert set(results["curves"]["roc"]) == set(results["curves"]["pr"]) == {"knows", "wrong"}
    before = (tmp_path / "out" / "poisoned.json").read_bytes()
    assert evaluate(scores[:1], tmp_path / "out", asked, poison=[unsafe])["poisoned"].keys() == {"knows"}
    assert (tmp_path / "out" / "poisoned.json").read_bytes() == before
    with pytest.raises(UsageError, match="for each of the 2 scores"):
        evaluate(scores, tmp_path / "out", asked, poison=[unsafe])


def test_unsafe_rows_that_another_pack_scored_are_refused(pack: Path, tiny_pack: Path, tmp_path: Path) -> None:
    rows = write_jsonl(tmp_path / "rows.jsonl", make_rows(4))
    for name, used in (("one", pack), ("other", tiny_pack)):
        score_dataset(rows, tmp_path / f"{name}.parquet", Scoring(pack=used))
    with pytest.raises(InputError, match="score both alike"):
        evaluate([tmp_path / "one.parquet"], tmp_path / "out", Design(arms=()), poison=[tmp_path / "other.parquet"])


def test_a_scorer_is_called_what_its_report_says_or_else_its_file(tmp_path: Path) -> None:
    def file(name: str, scorer: Any = None, risk: str | None = None) -> Path:
        home = tmp_path / f"{name}.parquet.sqsd"
        home.mkdir()
        (home / "report.json").write_text(
            json.dumps({"scorer": scorer, "pack": {"risk": risk} if risk else {}} if scorer else {})
        )
        return tmp_path / f"{name}.parquet"

    with_reports = [file("a", "larf"), file("b", "random")]
    assert names([*with_reports, tmp_path / "my file.parquet"]) == ["larf", "random", "my_file"]
    assert names([file("c", "sqsd"), file("d", "sqsd")]) == ["c", "d"]
    assert names([file("g", "sqsd"), file("h", "sqsd", "unsafe")]) == ["sqsd", "unsafe"]
    with pytest.raises(UsageError, match="Two of the scores are called 'e'"):
        names([file("e"), tmp_path / "elsewhere" / "e.parquet"])


@pytest.mark.parametrize(
    ("changes", "error", "why"),
    [
        ({"size": 30}, UsageError, "2 windows of 30 rows are 60 rows, but only 34"),
        ({"size": 18}, UsageError, "2 windows of 18 rows are 36 rows, but only 34"),
        ({"held_out": 40}, UsageError, "leaves none of the 40 rows to learn from"),
        ({"judges": ("folder",)}, JudgeError, "is not a judge"),
        ({"max_new_tokens": 600}, InputError, "leaves no room for 600 more"),
    ],
    ids=["size", "size beside the held-out rows", "held out", "judge", "answers"],
)
def test_what_can_t_be_done_is_said_before_anything_is_trained(
    changes: dict[str, Any],
    error: type[Exception],
    why: str,
    pack: Path,
    files: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    with pytest.raises(error, match=why):
        evaluate([files / "knows.parquet"], tmp_path / "out", quick(files, **changes), pack=pack)
    assert not Path("out").exists()


def test_scores_of_other_rows_are_refused(pack: Path, files: Path, tmp_path: Path) -> None:
    other = scored(tmp_path / "other.parquet", [{"prompt": "a", "response": "b"}], np.zeros(1))
    with pytest.raises(InputError, match="not scores of the same rows"):
        evaluate([files / "knows.parquet", other], tmp_path / "out", quick(files), pack=pack)


@pytest.mark.parametrize(
    "wrong",
    [
        {"arms": ("windows", "all")},
        {"seeds": ()},
        {"seeds": (1, 1)},
        {"windows": 1},
        {"size": None},
        {"size": 0},
        {"harmful": None},
        {"drop_top": "100%"},
        {"drop_top": 5},
        {"judges": ()},
        {"judges": ("phrases", "phrases")},
    ],
    ids=str,
)
def test_a_design_that_makes_no_sense_is_refused(wrong: dict[str, Any], files: Path) -> None:
    with pytest.raises(UsageError):
        design(files, **wrong)


@pytest.mark.parametrize(
    "wrong", [{"r": 0}, {"dropout": 1.0}, {"batch_size": 6, "device_batch_size": 4}, {"dtype": "float16"}], ids=str
)
def test_fine_tuning_that_makes_no_sense_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        FineTuning(**wrong)


def test_fine_tunings_can_come_to_a_folder_with_mixes(pack: Path, files: Path, done: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"? {k}", "response": "!"} for k in range(10)]
    unsafe = scored(tmp_path / "unsafe.parquet", rows, np.linspace(2, 3, 10))
    out, mixed = tmp_path / "out", Design(arms=())
    first = evaluate([files / "knows.parquet"], out, mixed, poison=[unsafe])
    shutil.copytree(done / "runs", out / "runs")  # done before
    both = evaluate([files / "knows.parquet"], out, quick(files), pack=pack, poison=[unsafe])
    assert both["poisoned"] == first["poisoned"]
    assert both["scorers"]["knows"]["rows"] == [8, 8]
    with pytest.raises(DestinationExists, match="has fine-tunings, which would be missing"):
        evaluate([files / "knows.parquet"], out, mixed, poison=[unsafe])
