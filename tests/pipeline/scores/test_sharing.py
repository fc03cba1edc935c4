"""Scores that runs share: the second night costs what changed, and nobody's mishap harms the others."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sqsd_filter import Scoring
from sqsd_filter.cli.main import main
from sqsd_filter.errors import InputError, SQSDError, UsageError
from sqsd_filter.pipeline.report import CONFIGS, FinishedReport
from sqsd_filter.pipeline.run import filter_dataset, score_dataset
from sqsd_filter.pipeline.scores import sharing
from sqsd_filter.pipeline.scores.keys import KEYS
from sqsd_filter.pipeline.scores.store import ScoreStore
from sqsd_filter.pipeline.scores.upkeep import compact_all, describe
from sqsd_filter.pipeline.stage import shards
from sqsd_filter.pipeline.stage.engines import LocalEngine
from sqsd_filter.scoring.results import Scores
from sqsd_filter.scoring.scorer import SQSDScorer
from sqsd_filter.storage.folder import Folder
from tests.corpora import make_rows, rows_of, write_jsonl


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, with 40 rows in monday.jsonl, and two more in tuesday.jsonl."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(shards, "shard_size", lambda rows: 16)
    rows = make_rows(42)
    write_jsonl(tmp_path / "monday.jsonl", rows[:40])
    write_jsonl(tmp_path / "tuesday.jsonl", [rows[41], *rows[:40], rows[40]])
    return tmp_path


def run(source: str, dest: str, scorer: SQSDScorer, store: str | None = "store", **named: Any) -> FinishedReport:
    return filter_dataset(source, dest, drop_top="5%", scorer=scorer, score_store=store, **named)


def counts(report: FinishedReport) -> tuple[int, int]:
    return report["rows"]["scored"], report["rows"]["reused"]


def assert_same(dest: str, other: str) -> None:
    """The same rows in the same order with the same scores, up to the last bits, which depend on the batch."""
    for config in CONFIGS:
        ours, theirs = rows_of(Path(dest), config), rows_of(Path(other), config)
        assert [row["id"] for row in ours] == [row["id"] for row in theirs]
        for row, twin in zip(ours, theirs, strict=True):
            assert row["sqsd_risk"] == pytest.approx(twin["sqsd_risk"], abs=1e-5)


# ---------------------------------------------------------------------------------------------- what is shared


def test_the_second_night_scores_only_the_new_rows_and_cuts_the_same(folder: Path, scorer: SQSDScorer) -> None:
    assert counts(run("monday.jsonl", "monday", scorer)) == (40, 0)
    assert counts(run("tuesday.jsonl", "tuesday", scorer)) == (2, 40)
    run("tuesday.jsonl", "alone", scorer, None)
    assert_same("tuesday", "alone")
    assert counts(score_dataset("tuesday.jsonl", "t.parquet", Scoring(scorer=scorer, score_store="store"))) == (0, 42)


def test_scores_for_other_settings_are_not_taken(folder: Path, scorer: SQSDScorer, tiny_pack: Path) -> None:
    run("monday.jsonl", "monday", scorer)
    shorter = SQSDScorer(tiny_pack, max_length=200)
    assert counts(run("monday.jsonl", "shorter", shorter)) == (40, 0)
    assert [store["rows"] for store in describe("store")["stores"]] == [40, 40]


def test_any_url_that_fsspec_knows_can_hold_the_store(folder: Path, scorer: SQSDScorer) -> None:
    url = "memory://scores/of/all"
    assert counts(run("monday.jsonl", "monday", scorer, url)) == (40, 0)
    assert counts(run("tuesday.jsonl", "tuesday", scorer, url)) == (2, 40)
    before = describe(url)
    compact_all(url)
    assert [s["rows"] for s in before["stores"]] == [s["rows"] for s in describe(url)["stores"]] == [42]
    assert counts(run("tuesday.jsonl", "again", scorer, url)) == (0, 42)


def test_what_an_interrupted_run_scored_is_there_for_others(folder: Path, scorer: SQSDScorer) -> None:
    class Impatient(SQSDScorer):
        done = 0

        def score(self, *arguments: Any) -> Scores:
            Impatient.done += 1
            if Impatient.done == 3:
                raise KeyboardInterrupt
            return super().score(*arguments)

    impatient = Impatient(scorer.pack.path)
    with pytest.raises(KeyboardInterrupt):
        run("monday.jsonl", "monday", impatient)
    assert counts(run("tuesday.jsonl", "tuesday", scorer)) == (10, 32)
    # and the other way round: it goes on with what others scored meanwhile
    assert counts(run("monday.jsonl", "monday", scorer)) == (32, 8)


def test_what_a_killed_run_could_not_hand_on_is_handed_on_by_its_successor(
    folder: Path, scorer: SQSDScorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(sharing.Sharing, "add", lambda *_: None)  # as if the kill came before
        run("monday.jsonl", "out", scorer)
    assert describe_rows("store") == 0
    (folder / "out" / "README.md").unlink()  # not finished, then
    assert counts(run("monday.jsonl", "out", scorer)) == (40, 0)
    assert describe_rows("store") == 40


def describe_rows(where: str) -> int:
    return sum(store["rows"] for store in describe(where)["stores"]) if Path(where).exists() else 0


def test_the_store_has_no_part_in_what_a_run_is(folder: Path, scorer: SQSDScorer) -> None:
    run("monday.jsonl", "out", scorer, None)
    assert run("monday.jsonl", "out", scorer)["already_done"]


def test_overwriting_takes_scores_from_both_the_old_run_and_the_store(folder: Path, scorer: SQSDScorer) -> None:
    rows = make_rows(60)
    write_jsonl(folder / "a.jsonl", rows[:20])
    write_jsonl(folder / "b.jsonl", rows[20:40])
    write_jsonl(folder / "all.jsonl", rows)
    run("a.jsonl", "out", scorer, None)
    run("b.jsonl", "elsewhere", scorer)
    assert counts(run("all.jsonl", "out", scorer, overwrite=True)) == (20, 40)
    assert describe_rows("store") == 60


# ---------------------------------------------------------------------------------------------- mishaps


def test_a_store_that_takes_no_files_is_one_sentence_after_the_first_shard_and_no_score_is_lost(
    folder: Path, scorer: SQSDScorer
) -> None:
    (folder / "store").write_text("in the way")
    with pytest.raises(InputError, match=r"^store is not a folder; check the path\.$"):
        run("monday.jsonl", "out", scorer)
    (folder / "store").unlink()
    (folder / "store").symlink_to("/proc")  # a folder that can be read and takes no file
    with pytest.raises(
        SQSDError, match=r"^The scores can't be written to store \([^\n]*\): check the free space [^\n]*kept\.$"
    ):
        run("monday.jsonl", "out", scorer)
    assert json.loads(Path("out/_sqsd/report.json").read_text())["status"] == "failed"
    assert len(list(Path("out/_sqsd/scores").glob("*.parquet"))) == 1
    assert counts(run("monday.jsonl", "out", scorer, None)) == (40, 0)


@pytest.mark.parametrize(
    ("url", "complaint"),
    [
        ("s3://key:secret@bucket/scores", "must not hold a password"),
        ("abfs://container@account/x?client_secret=secret", "must not hold a password"),
        ("nonsense://x", "nonsense://x can't be used"),
    ],
)
def test_a_url_that_can_not_be_used_is_a_usage_error_that_shows_no_secret(
    url: str, complaint: str, folder: Path, scorer: SQSDScorer
) -> None:
    with pytest.raises(UsageError, match=complaint) as problem:
        run("monday.jsonl", "out", scorer, url)
    assert "=secret" not in str(problem.value)
    assert ":secret" not in str(problem.value)
    assert not Path("out").exists()


def test_a_damaged_file_costs_its_scores_only(
    folder: Path, scorer: SQSDScorer, caplog: pytest.LogCaptureFixture
) -> None:
    run("monday.jsonl", "monday", scorer)
    first, second = sorted(Path("store").iterdir(), key=lambda p: p.stat().st_size)
    second.write_bytes(second.read_bytes()[:-100])
    Path("store/notes.txt").write_text("not ours")
    with caplog.at_level(logging.WARNING):
        scored, reused = counts(run("tuesday.jsonl", "tuesday", scorer))
    assert scored + reused == 42
    assert 2 < scored < 42
    assert caplog.text.count(f"skipping {second}") == 1
    run("tuesday.jsonl", "alone", scorer, None)
    assert_same("tuesday", "alone")
    assert describe("store")["foreign"] == sorted([second.name, "notes.txt"])
    compact_all("store")
    assert second.exists()
    assert Path("store/notes.txt").exists()
    assert not first.exists()


@pytest.mark.slow
def test_two_runs_at_once_and_compactions_meanwhile_lose_nothing(folder: Path, tiny_pack: Path) -> None:
    command = [sys.executable, "-m", "sqsd_filter", "--drop-top", "5%", "--score-store", "store"]
    command += ["--pack", str(tiny_pack), "--quiet"]
    write_jsonl(folder / "long.jsonl", make_rows(1500))
    write_jsonl(folder / "other.jsonl", make_rows(1600)[300:])
    processes = [subprocess.Popen([*command, f"{name}.jsonl", name]) for name in ("long", "other")]
    while any(p.poll() is None for p in processes):
        if Path("store").exists():
            compact_all("store")
    assert [p.wait() for p in processes] == [0, 0]
    compact_all("store")
    store = describe("store")
    assert store["stores"][0]["rows"] == 1600
    assert store["stores"][0]["files"] == 1
    assert not store["foreign"]


def test_lookups_beside_compactions_always_find_everything(tmp_path: Path) -> None:
    store = ScoreStore(tmp_path, {"pack": "p"}, ["danger"])
    keys = np.random.default_rng(0).integers(0, 2**63, 2 * 4000, dtype=np.uint64).view(KEYS)
    values = np.arange(4000.0)

    def scores(at: slice) -> Scores:
        n = len(values[at])
        return Scores({"danger": values[at]}, values[at], ["scored"] * n, [""] * n, np.zeros(n, np.int32))

    stop = threading.Event()

    def keep_compacting() -> None:
        while not stop.is_set():
            ScoreStore(tmp_path, {"pack": "p"}, ["danger"]).compact()

    store.append("first", keys[:10], scores(slice(10)))
    thread = threading.Thread(target=keep_compacting)
    thread.start()
    try:
        for start in range(10, 4000, 95):
            store.append(f"from-{start}", keys[start : start + 95], scores(slice(start, start + 95)))
            stored = store.lookup(keys)
            assert np.array_equal(stored.probes["danger"][: start + 95], values[: start + 95])
    finally:
        stop.set()
        thread.join()


def test_a_store_that_refuses_later_on_costs_no_run(
    folder: Path, scorer: SQSDScorer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Filling(LocalEngine):
        def score(self, *arguments: Any) -> Any:
            for number, shard in enumerate(super().score(*arguments)):
                if number == 1:
                    Path("store").rename("full")
                    Path("store").symlink_to("/proc")
                yield shard

    monkeypatch.setattr(sharing, "SHARE_EVERY", 0.0)
    assert counts(run("monday.jsonl", "monday", scorer, engine=Filling())) == (40, 0)
    assert "The scores can't be written to store" in caplog.text
    Path("store").unlink()
    Path("full").rename("store")
    assert describe_rows("store") == 16
    assert counts(run("tuesday.jsonl", "tuesday", scorer)) == (26, 16)


def test_a_store_that_has_just_refused_does_not_hold_up_an_interrupted_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, shared = (ScoreStore(tmp_path / name, {"pack": "p"}, ["danger"]) for name in ("own", "shared"))
    tries: list[str] = []

    def refuse(self: Any, name: str, write: Any) -> None:
        tries.append(name)
        raise OSError(28, "No space left on device")

    keys = np.arange(1, 9, dtype=np.uint64).view(KEYS)
    monkeypatch.setattr(sharing, "SHARE_EVERY", 0.0)

    def score_until_interrupted() -> None:
        with sharing.Sharing(own, shared) as exchange:
            for number in range(2):
                at = slice(2 * number, 2 * number + 2)
                scores = Scores({"danger": np.ones(2)}, np.ones(2), ["scored"] * 2, [""] * 2, np.ones(2))
                own.append(f"shard-{number}", keys[at], scores)
                exchange.add(keys[at])
                monkeypatch.setattr(shared.folder, "write", refuse.__get__(shared.folder))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score_until_interrupted()
    assert len(tries) == 1
    assert len(shared.segments()) == 1


@pytest.mark.parametrize("dest", ["out/scores", "out", "out/_sqsd/scores"])
def test_a_store_inside_the_destination_is_refused(folder: Path, scorer: SQSDScorer, dest: str) -> None:
    with pytest.raises(
        UsageError, match=r"^The score store .* lies in out, which belongs to one run: put it elsewhere"
    ):
        run("monday.jsonl", "out", scorer, dest)
    assert not Path("out").exists()


def test_what_can_not_be_read_is_neither_deleted_nor_taken_for_damage(
    folder: Path, scorer: SQSDScorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    run("monday.jsonl", "monday", scorer)
    before = sorted(Path("store").iterdir())
    lost, read = before[0].name, Folder.read

    def stumble(self: Folder, name: str) -> Any:
        if name == lost:
            raise InputError("the connection was lost")
        return read(self, name)

    for times in (0, 1, 2):  # at the first, second, third reading
        left = iter(range(times))
        with monkeypatch.context() as patch:
            patch.setattr(
                Folder,
                "read",
                lambda s, n, left=left: read(s, n) if n != lost or next(left, None) is not None else stumble(s, n),
            )
            with pytest.raises(InputError, match="connection was lost"):
                compact_all("store")
        assert sorted(Path("store").iterdir()) == before
    assert counts(run("monday.jsonl", "again", scorer)) == (0, 40)


# ---------------------------------------------------------------------------------------------- upkeep


def test_compacting_keeps_every_score_and_no_temporary_file(folder: Path, scorer: SQSDScorer) -> None:
    run("monday.jsonl", "monday", scorer)
    run("tuesday.jsonl", "tuesday", scorer)
    half = Path("store/.half.tmp")
    half.write_bytes(b"left by a killed process")
    fresh = Path("store/.fresh.tmp")
    fresh.write_bytes(b"being written right now")
    two_days_ago = half.stat().st_mtime - 2 * 86400
    os.utime(half, (two_days_ago, two_days_ago))
    done = compact_all("store")
    assert done["files_before"] > done["files"] == 1
    assert fresh.exists()
    assert not half.exists()
    assert counts(run("tuesday.jsonl", "again", scorer)) == (0, 42)
    assert_same("again", "tuesday")


def test_info_and_compact_from_the_command_line(
    folder: Path, scorer: SQSDScorer, capsys: pytest.CaptureFixture[str]
) -> None:
    run("monday.jsonl", "monday", scorer)

    def call(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as end:
            main(["store", *arguments])
        return int(end.value.code or 0), *capsys.readouterr()

    code, out, err = call("info", "store", "--json")
    assert (code, err) == (0, "")
    assert json.loads(out)["stores"][0]["settings"] == scorer.settings()
    code, out, _ = call("info", "store")
    assert code == 0
    assert "40 scores in 2 files" in out
    assert scorer.pack.fingerprint in out
    code, out, _ = call("compact", "store")
    assert (code, out) == (0, "store: 2 files joined into 1\n")
    code, out, err = call("info", "nowhere")
    assert (code, out) == (3, "")
    assert err == "Error: nowhere does not exist; check the path.\n"


def test_a_dry_run_counts_on_what_is_known(
    folder: Path, scorer: SQSDScorer, capsys: pytest.CaptureFixture[str]
) -> None:
    run("monday.jsonl", "monday", scorer)

    def forecast(*arguments: str) -> dict[str, Any]:
        with pytest.raises(SystemExit):
            main([*arguments, "--drop-top", "5%", "--pack", str(scorer.pack.path), "--dry-run", "--json"])
        shown: dict[str, Any] = json.loads(capsys.readouterr().out)
        return shown

    shown = forecast("tuesday.jsonl", "out", "--score-store", "store")
    assert (shown["to_score"], shown["reused"]) == (2, 40)
    assert shown["tokens"] > 0
    shown = forecast("monday.jsonl", "monday")
    assert (shown["to_score"], shown["reused"], shown["tokens"], shown["seconds"]) == (0, 40, 0, 0)
    assert forecast("tuesday.jsonl", "out")["to_score"] == 42
