"""`sqsd-filter steer` as people type it."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path

import pytest

from sqsd_filter.scoring.pack import load_pack
from tests.commands import exit_code
from tests.compass import PAIRS
from tests.corpora import write_jsonl

called = partial(exit_code, "steer")


def test_steer_prints_a_table_then_json_and_records(
    compass: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    pack = shutil.copytree(compass, tmp_path / "pack")
    before = load_pack(pack).fingerprint
    rows = write_jsonl(tmp_path / "rows.jsonl", PAIRS)
    words = [pack, "--rows", rows, "--alpha", "-1,1", "--max-new-tokens", "16"]
    assert called(*words) == 0
    shown = capsys.readouterr().out
    assert shown.startswith(
        "4 prompts, 4 of them with a safe and an unsafe answer\n\ndanger steers: margin strictly ris"
    )
    assert "\nsafety steers: margin strictly falling by -0." in shown
    assert shown.count("100.0%") > 2
    report = json.loads((tmp_path / "steer" / "steer.json").read_text())
    assert called(*words, "--json", "--record") == 0
    assert json.loads(capsys.readouterr().out) == report
    assert json.loads((pack / "pack.json").read_text())["validation"] == {"steering": report}
    assert load_pack(pack).fingerprint == before
    assert called(*words, "--record", "-q") == 0
    assert capsys.readouterr().out == ""
    bare = write_jsonl(tmp_path / "bare.jsonl", [{"prompt": "What is red?"}])
    assert called(pack, "--rows", bare, "--alpha", "1", "--max-new-tokens", "2", "--out", "bare", "--record") == 0
    assert "not recorded: without safe and unsafe answers" in capsys.readouterr().err
    assert json.loads((pack / "pack.json").read_text())["validation"] == {"steering": report}


def test_rows_with_prompts_alone_are_said_to_have_no_verdict(
    compass: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"q": "What is red?"}])
    words = ["--alpha", "1", "--max-new-tokens", "4", "--out", tmp_path / "out", "--prompt-column", "q"]
    assert called(compass, "--rows", rows, *words) == 0
    shown = capsys.readouterr().out
    assert "danger has no verdict without safe and unsafe answers; refusals " in shown
    assert shown.splitlines()[-1].split()[-3:] == ["-", "-", "-"]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_steering_is_in_float32_everywhere_unless_it_is_told_otherwise(
    compass: Path, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    seen: list[str] = []
    monkeypatch.setattr("sqsd_filter.directions.steering.run.steer", lambda scorer, *_, **__: seen.append(scorer.dtype))
    words = [compass, "--rows", "rows.jsonl", "--device", device, "-q"]
    assert called(*words) == called(*words, "--dtype", "bfloat16") == 0
    assert seen == ["float32", "bfloat16"]


@pytest.mark.parametrize(
    ("words", "code", "why"),
    [
        (["nowhere", "--rows", "r.jsonl"], 1, "There is no pack 'nowhere'"),
        (["PACK", "--rows", "r.jsonl"], 3, "r.jsonl does not exist"),
        (["PACK", "--rows", "r.jsonl", "--alpha", "1:0:1"], 2, "must go up"),
        (["PACK"], 2, "--rows"),
        (["smollm2-135m", "--rows", "r.jsonl", "--record"], 2, "not a folder that can be written to"),
    ],
    ids=["pack", "rows", "alpha", "no rows", "record"],
)
def test_what_can_t_be_done_is_said_in_a_sentence(
    words: list[str],
    code: int,
    why: str,
    compass: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert called(*[str(compass) if word == "PACK" else word for word in words]) == code
    assert why in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
