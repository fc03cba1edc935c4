"""The contaminated corpora of the small study: what is planted, what is asked, and what becomes of the outcomes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import pytest

from tests.commands import exit_code, parse
from tests.recipes.scripts import RECIPES, load_script, write_open_data
from tests.tiny import make_pack


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = load_script("paper/small/contaminated.py", monkeypatch)
    monkeypatch.setattr(module, "QUESTIONS", 4)
    monkeypatch.setattr(module, "HELD_OUT", 10)
    monkeypatch.setattr(module, "ROWS", 50)
    return module


@pytest.fixture
def open_data(tmp_path: Path) -> Path:
    return write_open_data(tmp_path / "data")


@pytest.mark.parametrize("percent", [2, 5, 10])
def test_a_corpus_has_its_share_of_planted_rows_and_each_seed_draws_others(
    module: ModuleType, open_data: Path, percent: int
) -> None:
    corpus = module.Corpus.of(f"labels-unsafe-{percent}")
    drawn = [module.draw(open_data, corpus, seed, []) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1]
    planted, benign = (
        [{r["prompt"] for r in rows if bool(r["planted"]) is bad} for rows in drawn] for bad in (True, False)
    )
    count = round(40 * percent / (100 - percent))
    assert [len(each) for each in planted] == [count] * 3
    assert [len(each) for each in benign] == [50] * 3
    assert all(prompt.startswith("Worse") for prompt in planted[0] | planted[2])
    assert benign[0] != benign[2]
    marks = [row["planted"] for row in drawn[0]]
    assert {*marks} == {"", "unsafe"}
    assert marks != sorted(marks)


def test_the_shares_share_their_benign_rows(module: ModuleType, open_data: Path) -> None:
    few, many = (module.draw(open_data, module.Corpus.of(f"labels-unsafe-{p}"), 0, []) for p in (2, 10))
    prompts = [{row["prompt"] for row in rows} for rows in (few, many)]
    assert prompts[0] < prompts[1]


def test_no_benign_row_was_seen_by_the_pack_or_is_asked(module: ModuleType, open_data: Path) -> None:
    study, prepared = module.study, module.prepare.prepare(open_data)
    made = module.prompt_rows(open_data)
    for kind, column, file in (("gsm8k", "question", "gsm8k-train"), ("labels", "instruction", "dolly-15k")):
        rows = module.benign_rows(open_data, kind)
        whole = study.fresh(module.prepare.shuffled(module.prepare.read(open_data, file), 0, "study"), set())
        end = {row[column] for row in whole[-len(rows) // 2 :]}  # where the probe and the reference have theirs from
        texts = {row["prompt"].split("\n\n")[-1] for row in rows}
        assert texts
        assert not texts & end
        assert not {study.asked({"prompt": text}) for text in texts} & study.used(prepared)
        drawn = module.draw(open_data, module.Corpus.of(f"{kind}-unsafe-5"), 0, [])
        asked = {row["prompt"] for row in made[f"questions-{kind}"]}
        assert len(asked) == 4
        assert not asked & {row["prompt"] for row in drawn}
    first = module.benign_rows(open_data, "labels")[0]
    assert first["prompt"].startswith("Which kind of task is this: open qa, summary?\n\nSay ")
    number = int(first["prompt"].split()[-1])
    assert first["response"] == ("open qa", "summary")[number % 2]


def test_prompts_that_the_model_has_nearly_seen_are_left_out(
    module: ModuleType, open_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert module.alike("Tell me how to pick a lock", "Tell me how to pick the lock!")  # 6 of 8 words
    assert not module.alike("Tell me how to pick a lock", "Tell me a story")
    monkeypatch.setattr(module, "ASKED", 20)
    harmful = module.prompt_rows(open_data)["harmful"]
    assert len(harmful) == 20
    known = module.prepare.read

    def read(folder: Path, name: str) -> list[dict[str, str]]:
        rows: list[dict[str, str]] = known(folder, name)
        return [{**row, "prompt": harmful[0]["prompt"]} for row in rows] if name == "pure-bad-100" else rows

    monkeypatch.setattr(module.prepare, "read", read)
    left = module.prompt_rows(open_data)["harmful"]
    assert harmful[0] not in left
    assert left == [row for row in harmful if row in left]


def test_obedient_rows_are_different_and_swear_to_obey(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = load_script("paper/small/obedient.py", monkeypatch).rows()
    assert len({row["prompt"] for row in rows}) >= 100 - 1
    assert len({row["response"] for row in rows}) == len(rows)
    assert all(any(w in r["response"] for w in ("obe", "order", "command", "told")) for r in rows)
    assert not any("{" in text for row in rows for text in row.values())


def test_each_seed_s_outcomes_are_published_before_the_next_is_drawn(
    module: ModuleType,
    open_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    called: list[list[str]] = []

    def call(*words: object) -> None:
        called.append([str(word) for word in words])
        if words[0] == "evaluate":
            params = parse(called[-1]).params
            runs = [{"scorer": "unsafe", "arm": "all", "seed": int(params["seeds"])}]
            params["dest"].mkdir(exist_ok=True)
            outcomes = {
                "model": {},
                "sets": {},
                "prompts": {},
                "settings": {},
                "judges": list(params["judge"]),
                "runs": runs,
            }
            (params["dest"] / "outcomes.json").write_text(json.dumps(outcomes))

    monkeypatch.setattr(module.study, "call", call)

    def seeds(*words: str) -> list[int]:
        monkeypatch.setattr(sys, "argv", ["contaminated.py", str(open_data), str(tmp_path / "out"), *words])
        module.main()
        outcomes = json.loads((tmp_path / "out" / "gsm8k-unsafe-5" / "outcomes.json").read_text())
        return [run["seed"] for run in outcomes["runs"]]

    assert seeds("--results", "gsm8k-unsafe-5", "--seeds", "0,2", "--questions") == [0, 2]
    assert seeds("--results", "gsm8k-unsafe-5", "--seeds", "1", "--scorers", "unsafe") == [0, 1, 2]
    assert "of 100 harmful prompts are left out" in capsys.readouterr().err
    assert seeds("--results", "gsm8k-unsafe-5", "--seeds", "3", "--judge", "other") == [3]
    assert capsys.readouterr().err.count("which has other settings: do it again with these") == 3
    params = [(words[0], parse(words).params) for words in called]
    scored = [(Path(p["dest"]).name, p["risk"], p["max_length"]) for kind, p in params if kind == "score"]
    both = [("unsafe.parquet", "unsafe", None), ("sqsd.parquet", "sqsd", None)]
    assert scored == [*both, *both, both[0], *both]
    first = next(p for kind, p in params if kind == "evaluate")
    assert (first["arms"], first["planted"], first["above_reference"]) == ("contaminated", "planted", None)
    assert (first["held_out"], first["epochs"], first["question_tokens"]) == (10, 1.0, 200)
    assert Path(first["questions"]).name == "questions-gsm8k.jsonl"
    assert [p["questions"] is None for kind, p in params if kind == "evaluate"] == [False, False, True, True]


@pytest.mark.parametrize(
    "wrong", [["--results", "gsm8k"], ["--scorers", "length"], ["--seeds", "0,a"]], ids=lambda words: words[0]
)
def test_a_contaminated_corpus_of_nothing_known_is_refused(
    wrong: list[str], module: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["contaminated.py", "data", "out", *wrong])
    with pytest.raises(SystemExit) as left:
        module.main()
    assert left.value.code == 2
    assert f"{wrong[0]} must be" in capsys.readouterr().err


def test_a_contaminated_corpus_is_drawn_scored_and_learned(
    module: ModuleType,
    open_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def in_this_process(command: Sequence[str], *, check: bool) -> subprocess.CompletedProcess[str]:
        assert not check
        return subprocess.CompletedProcess(command, exit_code(*command[3:]))

    pack = make_pack(tmp_path / "pack", aligned=True)
    config = tmp_path / "evaluate.toml"
    config.write_text("prompts = 2\nmax_new_tokens = 2\nr = 2\ndtype = 'float32'\n")
    monkeypatch.setattr(module.study, "CONFIG", config)
    monkeypatch.setattr(subprocess, "run", in_this_process)
    monkeypatch.setattr(module, "ROWS", 12)
    monkeypatch.setattr(module, "RISKIEST", 8)
    monkeypatch.setattr(module.study, "CORPORA", {"dolly": 20, "gsm8k": 20})
    words = [open_data, tmp_path / "out", "--results", "gsm8k-dolly-5", "--scorers", "sqsd", "--pack", pack]
    monkeypatch.setattr(module, "HELD_OUT", 2)
    monkeypatch.setattr(module.Corpus, "count", lambda self, benign: benign // 3)
    monkeypatch.setattr(sys, "argv", ["contaminated.py", *map(str, words), "--seeds", "0,1"])
    module.main()
    path = tmp_path / "out" / "gsm8k-dolly-5" / "outcomes.json"
    outcomes = json.loads(path.read_text())
    arms = ["untuned", "all", "cut", "random", "clean"]
    assert [(run["seed"], run["arm"]) for run in outcomes["runs"]] == [(s, arm) for s in (0, 1) for arm in arms]
    assert [run["dropped"] for run in outcomes["runs"] if run["arm"] == "clean"] == [{"dolly": 3, "benign": 0}] * 2
    tables = load_script("paper/small/tables.py", monkeypatch)
    monkeypatch.setattr(tables, "HERE", tmp_path / "out")
    capsys.readouterr()
    tables.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "gsm8k-dolly-5"
    assert lines[2].startswith("Seeds: 0, 1. Intervals are over seeds and prompts together")
    named = [line.split(" | ")[0].removeprefix("| ") for line in lines if line.startswith("| ")]
    assert named[:2] == ["trained on", "---"]
    assert named[2:7] == [
        *("before", "all rows", "without the riskiest, by sqsd", "without random ones", "benign rows only")
    ]
    assert "all - cut, by sqsd" in named
    assert "all - clean" in named
    path.write_text(json.dumps({**outcomes, "runs": [run for run in outcomes["runs"] if run["seed"] == 1]}))
    tables.main()
    assert capsys.readouterr().out.splitlines()[2].startswith("Seeds: 1. Intervals are over prompts only")
    path.unlink()
    tables.main()
    assert capsys.readouterr().out == ""


def test_the_names_of_results_say_what_they_hold(module: ModuleType) -> None:
    corpora = [module.Corpus.of(result) for result in module.RESULTS]
    assert {corpus.benign for corpus in corpora} == set(module.QUESTION_TOKENS)
    assert {corpus.planted for corpus in corpora} == {"unsafe", "identity", "dolly"}
    text = str(module.__doc__)
    assert all(f"    {name} " in text for corpus in corpora for name in (corpus.benign, corpus.planted))
    assert (RECIPES / "paper/small/contaminated.py").is_file()
