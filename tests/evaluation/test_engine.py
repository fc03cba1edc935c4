"""Answers by vLLM: the same as by transformers, from one engine for many models, and resumed where it breaks."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sqsd_filter import evaluate
from sqsd_filter.errors import DestinationExists, SQSDError
from sqsd_filter.evaluation import runs, study
from sqsd_filter.evaluation.model import Answerer, Subject
from tests.corpora import write_jsonl
from tests.evaluation.studies import REFUSAL, ROWS, TUNING, Notes, quick, scored
from tests.tiny import make_model, make_pack


@pytest.mark.slow
def test_vllm_answers_as_transformers_does(files: Path, tmp_path: Path) -> None:
    pytest.importorskip("vllm")
    base = make_model(tmp_path / "base", head_dim=32)  # its kernels know of no smaller one
    pack = make_pack(tmp_path / "pack", base, aligned=True)
    asked = quick(files, max_new_tokens=24, tuning=replace(TUNING, dtype="float32"))
    outcomes = {}
    for generation in ("transformers", "vllm"):
        out = tmp_path / generation
        results = evaluate([files / "knows.parquet"], out, replace(asked, generation=generation), pack=pack)
        outcomes[generation] = results["runs"], *(path.read_text() for path in sorted(out.glob("runs/*/answers.jsonl")))
        assert not list(out.glob(".*"))
    assert outcomes["vllm"] == outcomes["transformers"]
    assert len(set(outcomes["vllm"][1:])) == 3


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Stands in for vLLM's engine: it answers as transformers does, counts, and breaks after `answers` models."""
    state: dict[str, Any] = {"answers": 99, "started": 0, "asked": 0}

    @contextmanager
    def answering(subject: Subject, base: Path, room: int) -> Iterator[Answerer]:
        state["started"] += 1

        def answer(adapter: Path | None, prompts: Sequence[str], max_new_tokens: int) -> list[str]:
            if state["asked"] == state["answers"]:
                raise SQSDError("The engine broke: start again.")
            state["asked"] += 1
            return subject.answers(adapter, prompts, max_new_tokens)

        yield answer

    monkeypatch.setattr(runs, "vllm_answers", answering)
    monkeypatch.setattr(study, "check_vllm", lambda *_: None)
    return state


def test_one_engine_answers_for_a_seed_and_goes_on_where_it_broke(
    pack: Path, files: Path, done: Path, engine: dict[str, Any], tmp_path: Path
) -> None:
    scores, notes = [files / "knows.parquet", files / "wrong.parquet"], Notes()
    asked, out = quick(files, generation="vllm", seeds=(0, 1)), tmp_path / "out"
    engine["answers"] = 2
    with pytest.raises(SQSDError, match="The engine broke"):
        evaluate(scores, out, asked, pack=pack, keep_adapters=True, progress=notes)
    first = list(notes.notes)
    assert len(first) == 3
    assert len(list(out.glob("runs/*/answers.jsonl"))) == 2
    with pytest.raises(DestinationExists, match="generation: vllm there, transformers here"):
        evaluate(scores, out, replace(asked, generation="transformers"), pack=pack)
    engine["answers"] = 99
    results = evaluate(scores, out, asked, pack=pack, keep_adapters=True, progress=notes)
    assert (engine["started"], engine["asked"]) == (3, 5)  # once a seed and once more; two windows a seed, and untuned
    assert [note.split(":")[0] for note in notes.notes[3:]] == ["knows S1, seed 1", "knows S2, seed 1"]
    for key in (each for windows in results["runs"].values() for keys in windows.values() for each in keys):
        assert {path.name for path in (out / "runs" / key).iterdir()} >= {"adapter", "answers.jsonl"}
    for path in done.glob("runs/*/answers.jsonl"):
        assert path.read_bytes() == (out / "runs" / path.parent.name / "answers.jsonl").read_bytes()


def test_an_engine_that_never_answered_can_be_left_out(
    pack: Path, files: Path, done: Path, engine: dict[str, Any], tmp_path: Path
) -> None:
    asked, out, notes = quick(files, generation="vllm"), tmp_path / "out", Notes()
    engine["answers"] = 0
    with pytest.raises(SQSDError, match="The engine broke"):
        evaluate([files / "knows.parquet"], out, asked, pack=pack)
    assert len(list(out.glob("runs/*/adapter"))) == 2
    evaluate([files / "knows.parquet"], out, quick(files), pack=pack, progress=notes)
    assert notes.notes == []
    for name in ("training.json", "answers.jsonl"):
        paths = list(done.glob(f"runs/*/{name}"))
        assert len(paths) >= 2
        assert len(list(out.glob(f"runs/*/{name}"))) == len(paths)
        assert all(path.read_bytes() == (out / path.relative_to(done)).read_bytes() for path in paths)


def test_without_vllm_it_can_t_answer(pack: Path, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm.platforms", None)
    with pytest.raises(SQSDError, match=r"pip install 'sqsd-filter\[vllm\]'"):
        evaluate([files / "knows.parquet"], tmp_path / "out", quick(files, generation="vllm"), pack=pack)
    assert not (tmp_path / "out").exists()


def test_questions_stay_once_a_killed_evaluation_has_answered_them(
    pack: Path, files: Path, engine: dict[str, Any], tmp_path: Path
) -> None:
    rows = [{"prompt": f"Explain {k}.", "response": REFUSAL, "bad": k < 8} for k in range(ROWS)]
    path, out = scored(tmp_path / "a.parquet", rows, np.linspace(1, -1, ROWS)), tmp_path / "out"
    one, other = (write_jsonl(tmp_path / f"{k}.jsonl", [{"prompt": f"Say {k}.", "answer": f"{k}"}]) for k in (1, 2))
    asked = quick(files, arms=("contaminated",), planted="bad", questions=one, generation="vllm")
    engine["answers"] = 1  # the questions, but not the prompts
    with pytest.raises(SQSDError, match="The engine broke"):
        evaluate([path], out, asked, pack=pack)
    assert [each.name for each in (out / "runs" / "untuned").glob("*.jsonl")] == ["solutions.jsonl"]
    engine["answers"] = 99
    with pytest.raises(DestinationExists, match=r"questions: 1 questions \(\w+\), 256 tokens there"):
        evaluate([path], out, replace(asked, questions=other), pack=pack)
    assert evaluate([path], out, asked, pack=pack)["seeds"] == [0]
