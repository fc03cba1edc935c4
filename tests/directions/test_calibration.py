"""`pack calibrate`: what reference rows score is in the pack, and nothing else of it has changed."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sqsd_filter import filter_dataset
from sqsd_filter.directions import calibration
from sqsd_filter.directions.calibration import calibrate
from sqsd_filter.directions.inspection import inspect_pack
from sqsd_filter.errors import InputError, UsageError
from sqsd_filter.scoring.pack import PACK_FILE, load_pack
from sqsd_filter.scoring.reference_rows import Reference
from sqsd_filter.scoring.scorer import SQSDScorer
from tests.commands import one_sentence
from tests.corpora import make_rows, write_jsonl

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def pack(tiny_pack: Path, folder: Path) -> Path:
    """A pack of one's own, with rows beside it."""
    rows = make_rows(90)
    write_jsonl(folder / "plain.jsonl", rows[:40])
    write_jsonl(folder / "more.jsonl", rows[40:70])
    unsafe = [{"question": row["instruction"], "answer": f"Sure! {row['output']}"} for row in rows[70:]]
    write_jsonl(folder / "unsafe.jsonl", unsafe)
    return shutil.copytree(tiny_pack, folder / "pack", ignore=shutil.ignore_patterns("base"))


def risks_of(pack: Path, rows: list[dict[str, Any]]) -> list[float]:
    turns = [
        [{"role": "user", "content": row["instruction"]}, {"role": "assistant", "content": row["output"]}]
        for row in rows
    ]
    return sorted(SQSDScorer(pack).score(turns).risk.tolist())


def test_a_reference_has_what_the_scorer_gives_its_rows(pack: Path) -> None:
    before = json.loads((pack / PACK_FILE).read_text())
    record = calibrate(pack, ["plain.jsonl", "second=more.jsonl"], ["unsafe.jsonl"])
    page = json.loads((pack / PACK_FILE).read_text())
    assert page.pop("reference") == record
    assert page == before
    assert [(each["name"], each["kind"], each["rows"]) for each in record["corpora"]] == [
        ("plain", "benign", 40),
        ("second", "benign", 30),
        ("unsafe", "unsafe", 20),
    ]
    plain = record["corpora"][0]
    expected = risks_of(pack, make_rows(40))
    assert plain["risks"] == pytest.approx(expected, abs=1e-5)
    assert plain["quantiles"]["risk"]["50%"] == pytest.approx(expected[19], abs=1e-5)
    danger, safety = (plain["quantiles"][name] for name in ("danger", "safety"))
    assert danger.keys() == safety.keys() == plain["quantiles"]["risk"].keys()
    assert plain["data"]["files"][0]["path"] == "plain.jsonl"  # type: ignore[index]
    assert record["settings"]["max_length"] == 256
    assert record["settings"]["dtype"] == "float32"


def test_scores_are_reused_after_calibrating(pack: Path) -> None:
    filter_dataset("more.jsonl", "before", drop_count=1, pack=pack, score_store="store")
    fingerprint = load_pack(pack).fingerprint
    calibrate(pack, ["plain.jsonl"])
    assert load_pack(pack).fingerprint == fingerprint
    report = filter_dataset("more.jsonl", "after", drop_count=1, pack=pack, score_store="store")
    assert report["rows"]["scored"] == 0
    assert report["rows"]["reused"] == 30
    assert filter_dataset("more.jsonl", "before", drop_count=1, pack=pack)["already_done"]


def test_rows_without_a_score_and_equal_rows_do_not_count(pack: Path) -> None:
    rows = make_rows(25)
    write_jsonl(Path("mixed.jsonl"), [*rows, *rows[:5], {"instruction": "?", "output": ""}, b"broken"])
    (mixed,) = calibrate(pack, ["mixed.jsonl"])["corpora"]
    write_jsonl(Path("clean.jsonl"), rows)
    (clean,) = calibrate(pack, ["clean.jsonl"])["corpora"]
    assert (mixed["rows"], mixed["risks"], mixed["sha256"]) == (25, clean["risks"], clean["sha256"])
    with pytest.raises(InputError, match=r"^Only 19 of 19 rows of few can be scored, .* at least 20") as problem:
        calibrate(pack, ["few=few.jsonl"] if write_jsonl(Path("few.jsonl"), rows[:19]) else [])
    one_sentence(f"Error: {problem.value}\n")


def test_a_sample_is_spread_evenly(pack: Path) -> None:
    (sampled,) = calibrate(pack, ["plain.jsonl"], sample=20)["corpora"]
    wanted = np.linspace(0, 39, 20).astype(int).tolist()
    assert sampled["risks"] == pytest.approx(risks_of(pack, [make_rows(40)[k] for k in wanted]), abs=1e-5)


@pytest.mark.parametrize(
    ("where", "benign", "error", "words"),
    [
        ("smollm2-135m", ["plain.jsonl"], UsageError, "copy it and name the copy's folder"),
        ("org/pack", ["plain.jsonl"], UsageError, "copy it and name the copy's folder"),
        ("pack", ["missing.jsonl"], InputError, "missing.jsonl"),
        ("pack", [], UsageError, "--benign"),
        ("pack", ["plain.jsonl", "plain=more.jsonl"], UsageError, "Several corpora are called 'plain'"),
    ],
    ids=["built-in", "hub", "missing", "none", "twice"],
)
def test_what_can_not_be_calibrated_is_refused(
    pack: Path, where: str, benign: list[str], error: type[Exception], words: str
) -> None:
    before = (pack / PACK_FILE).read_bytes()
    with pytest.raises(error, match=words):
        calibrate(where, benign)
    assert (pack / PACK_FILE).read_bytes() == before


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("a/b.jsonl", "b"),
        ("b.jsonl.gz", "b"),
        ("org/data", "data"),
        ("org/data@main:train", "data"),
        ("hf://datasets/org/data", "data"),
        ("s3://bucket/in/*.jsonl", "in"),
        ("own=a/b.jsonl", "own"),
        ("folder/", "folder"),
    ],
)
def test_a_corpus_is_named_after_its_file(given: str, name: str) -> None:
    assert calibration._named(given)[0] == name  # noqa: SLF001  each form of a source


def test_the_command_prints_a_table_and_inspect_shows_it(pack: Path, command: Command) -> None:
    _, out, _ = command("pack", "inspect", "pack")
    assert "reference none: run sqsd-filter pack calibrate" in out
    code, out, _ = command("pack", "calibrate", "pack", "--benign", "plain.jsonl", "--unsafe", "bad=unsafe.jsonl", "-q")
    assert (code, out) == (0, "")
    code, out, _ = command("pack", "calibrate", "pack", "--benign", "plain.jsonl", "--unsafe", "bad=unsafe.jsonl")
    assert code == 0
    table = out.splitlines()
    assert [line.split()[:3] for line in table[1:3]] == [["plain", "benign", "40"], ["bad", "unsafe", "20"]]
    assert table[3].startswith("all benign")
    risks = risks_of(pack, make_rows(40))
    assert table[1].split()[3:8] == [f"{risks[19]:.2f}", f"{risks[37]:.2f}", "-", "-", f"{risks[39]:.2f}"]
    _, out, _ = command("pack", "inspect", "pack")
    assert "\n".join(table) in out
    code, out, _ = command("pack", "calibrate", "pack", "--benign", "plain.jsonl", "--json", "--max-length", "64")
    assert json.loads(out)["reference"]["settings"]["max_length"] == 64
    code, _, err = command("pack", "calibrate", "smollm2-135m", "--benign", "plain.jsonl")
    assert code == 2
    one_sentence(err)


def test_inspect_says_when_the_pack_has_changed_since(pack: Path) -> None:
    calibrate(pack, ["plain.jsonl"], scorer=lambda: SQSDScorer(load_pack(pack).at_one_state("initial")))
    assert inspect_pack(load_pack(pack))["reference"]["mismatch"] is None
    page = json.loads((pack / PACK_FILE).read_text())
    page["probes"][0]["weight"] = 2.0
    (pack / PACK_FILE).write_text(json.dumps(page))
    assert "fingerprint" in inspect_pack(load_pack(pack))["reference"]["mismatch"]


def _calibrate_and_die(folder: Path, moment: str) -> None:
    """Run in a process of its own; it dies when the function of that name in the module is called."""
    os.chdir(folder)
    setattr(calibration, moment, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    calibrate("pack", ["plain.jsonl"])


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["summarise_rows", "write_json"])
def test_a_killed_calibration_leaves_the_pack_whole(pack: Path, folder: Path, moment: str) -> None:
    before = (pack / PACK_FILE).read_bytes()
    process = get_context("spawn").Process(target=_calibrate_and_die, args=(folder, moment))
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    assert (pack / PACK_FILE).read_bytes() == before
    calibrate(pack, ["plain.jsonl"])
    assert Reference.of(load_pack(pack)) is not None


def test_a_full_disk_leaves_the_pack_whole(pack: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calibrate(pack, ["plain.jsonl"])
    before = (pack / PACK_FILE).read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("sqsd_filter.storage.folder.os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        calibrate(pack, ["more.jsonl"])
    assert (pack / PACK_FILE).read_bytes() == before
    assert {path.name for path in pack.iterdir() if path.is_file()} == {PACK_FILE}
