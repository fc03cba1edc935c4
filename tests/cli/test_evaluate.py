"""`sqsd-filter evaluate` as people type it."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from sqsd_filter.evaluation.section import evaluation_section
from tests.commands import exit_code
from tests.corpora import write_jsonl
from tests.evaluation.studies import REFUSAL, scored

called = partial(exit_code, "evaluate")


def test_the_table_and_the_json_say_what_results_json_does(
    tiny_pack: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"Explain {k}.", "response": REFUSAL} for k in range(20)]
    scores = scored(Path("mine.parquet"), rows, np.arange(20) / 20)
    unsafe = scored(Path("unsafe.parquet"), rows[:5], np.arange(5) + 1)
    write_jsonl(Path("harmful.jsonl"), [{"prompt": "What is red?"}, {"prompt": "And blue?"}])
    config = Path("config.toml")
    config.write_text('windows = 2\nsize = 4\nr = 2\nepochs = 1\nmax-new-tokens = 4\nheld_out = 3\nseeds = "0"\n')
    words = [scores, "out", "--pack", tiny_pack, "--harmful", "harmful.jsonl", "--config", config]
    words += ["--arms", "windows,cut", "--drop-top", "20%", "--poison", unsafe]
    assert called(*words) == 0
    shown = capsys.readouterr().out
    assert called(*words, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads(Path("out/results.json").read_text())
    assert found["settings"]["tuning"]["r"] == 2
    assert found["settings"]["tuning"]["learning_rate"] == 5e-5
    about, sets, verdicts, warnings, mixes = (block.splitlines() for block in shown.rstrip("\n").split("\n\n"))
    learned = "of 21 rows 17 to learn from, 3 held out"
    asked = "2 harmful prompts, judged by phrases, seeds 0"
    assert about == [f"base, {asked}; {learned}; shares in %, loss in nats per token"]
    named = [next(word for word in line.split() if word != "mine") for line in sets[1:]]
    assert named == ["untuned", "S1", "S2", "all", "kept", "random", "dropped"]
    asr, (low, high) = found["scorers"]["mine"]["asr"][0], found["scorers"]["mine"]["ci"][0]
    assert f" {100 * asr:.1f} ({100 * low:.1f} to {100 * high:.1f}) " in sets[2]
    assert verdicts[0].startswith("mine: S1 - S2 is ")
    assert verdicts[1].startswith("mine: ASR of a random choice")
    assert warnings == found["warnings"]
    assert "little safety to lose" in warnings[0]
    first = ["1% 1 of 21", "5% 1 of 21", "10% 2 of 22", "20% 5 of 25"]
    assert [" ".join(line.removeprefix("mine").split()[:4]) for line in mixes[1:]] == first
    section = evaluation_section(Path("out/results.json"))  # of the page, which reads what is written here
    assert [plot.name for plot in section.plots] == ["asr", "roc", "pr"]
    assert [len(table.rows) for table in section.tables] == [1, 2, 5, 4]
    assert called(*words, "-q") == 0
    assert capsys.readouterr().out == ""
    assert called(*words, "--r", "4") == 5
    assert "r: 2 there, 4 here" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "code", "why"),
    [
        (["s.parquet", "out", "--harmful", "h.jsonl"], 2, "--size"),
        (["s.parquet", "out", "--size", "3"], 2, "--harmful"),
        (["s.parquet", "out", "--arms", "none"], 2, "--poison"),
        (["s.parquet", "out", "--arms", "both"], 2, "windows, cut, contaminated, or none, not both"),
        (["s.parquet", "out", "--arms", "none", "--above-reference", "99%"], 2, "--above-reference is for --arms"),
        (["s.parquet", "out", "--arms", "none", "--question-tokens", "9"], 2, "--question-tokens is for --arms"),
        (["s.parquet", "out", "--seeds", "a"], 2, "whole numbers with commas"),
        (["s.parquet", "out", "--drop-top", "5", "--arms", "none"], 2, "could mean 5% or 5 rows"),
        (["s.parquet", "out", "--size", "3", "--harmful", "h.jsonl"], 3, "s.parquet does not exist"),
        (["out"], 2, "SCORES and then DEST, a folder: there is only out"),
        (
            ["s.parquet", __file__, "--arms", "none", "--poison", "u.parquet"],
            5,
            "name a folder as DEST, which comes last",
        ),
        (["s.parquet", "out", "--batch-size", "4", "--arms", "none"], 2, "is not a multiple of --device-batch-size"),
    ],
    ids=[
        "size",
        "harmful",
        "nothing",
        "arms",
        "reference",
        "tokens",
        "seeds",
        "share",
        "scores",
        "no scores",
        "no folder",
        "batch",
    ],
)
def test_what_can_t_be_done_is_said_in_a_sentence(
    words: list[str],
    code: int,
    why: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert called(*words) == code
    assert why in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_the_paper_s_settings_are_the_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr("sqsd_filter.evaluation.run.evaluate", lambda scores, dest, design, **_: seen.append(design))
    assert called("s.parquet", "out", "--harmful", "h.jsonl", "--size", "1000", "-q") == 0
    tuning = seen[0].tuning
    assert (tuning.r, tuning.alpha, tuning.target_modules, tuning.learning_rate) == (8, 16, "all-linear", 5e-5)
    assert (tuning.epochs, tuning.batch_size, tuning.schedule, tuning.warmup_ratio) == (10, 8, "cosine", 0.1)
    assert seen[0].windows == 5
    assert list(seen[0].seeds) == [0, 1, 2]
