"""What the command does with a DEST that exists."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.commands import CUT, Command, entries, one_sentence
from tests.corpora import content, make_rows, read_report, write_jsonl


def test_the_same_command_finds_its_work_done(command: Command) -> None:
    command("in.jsonl", "out", *CUT)
    before = content(Path("out"))
    code, out, _ = command("in.jsonl", "out", *CUT)
    assert code == 0
    assert "already done" in out
    assert command("in.jsonl", "out", *CUT, "--overwrite")[1] == out
    assert content(Path("out")) == before


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        (["--drop-top", "6%"], "cut: drop-top 5% there, drop-top 6% here"),
        ([*CUT, "--limit", "59"], "limit: None there, 59 here"),
        ([*CUT, "--max-length", "99"], "max_length: 256 there, 99 here"),
        ([*CUT, "--on-error", "keep"], "on_error: quarantine there, keep here"),
    ],
    ids=["cut", "limit", "scoring", "policy"],
)
def test_another_run_is_refused_naming_what_differs(change: list[str], difference: str, command: Command) -> None:
    command("in.jsonl", "out", *CUT)
    before = content(Path("out"))
    code, out, err = command("in.jsonl", "out", *change)
    assert (code, out) == (5, "")
    assert difference in one_sentence(err)
    assert content(Path("out")) == before


def test_foreign_files_are_found_before_a_row_is_read_and_only_overwrite_removes_them(
    command: Command, folder: Path
) -> None:
    (folder / "out").mkdir()
    (folder / "out" / "thesis.tex").write_text("years of work")
    code, _, err = command("missing.jsonl", "out", *CUT)
    assert code == 5
    assert one_sentence(err)
    assert (folder / "out" / "thesis.tex").read_text() == "years of work"
    assert command("in.jsonl", "out", *CUT, "--overwrite")[0] == 0
    assert entries(folder / "out") == ["README.md", "_sqsd", "data"]
    assert entries(folder) == ["in.jsonl", "out"]


def test_another_cut_of_a_finished_run_is_pointed_to_select(command: Command, folder: Path) -> None:
    command("in.jsonl", "out", *CUT)
    code, _, err = command("in.jsonl", "out", "--drop-top", "10%")
    assert code == 5
    assert "'sqsd-filter select out OTHER', or replace it with --overwrite, which reuses its scores." in err
    code, _, err = command("in.jsonl", "out", "--drop-top", "10%", "--to", "jsonl")
    assert (code, "select" in err) == (5, False)
    (folder / "out/_sqsd/report.json").unlink()  # as if it had been killed: then select can't read it
    code, _, err = command("in.jsonl", "out", "--drop-top", "10%")
    assert (code, "select" in err) == (5, False)


def test_an_empty_folder_will_do(command: Command, folder: Path) -> None:
    (folder / "out").mkdir()
    assert command("in.jsonl", "out", *CUT)[0] == 0


def test_a_failed_overwrite_leaves_the_old_output_alone(command: Command, folder: Path) -> None:
    command("in.jsonl", "out", *CUT)
    before = content(Path("out"))
    write_jsonl(folder / "bad.jsonl", [*make_rows(60), b"broken"])
    assert command("bad.jsonl", "out", *CUT, "--on-error", "fail", "--overwrite")[0] == 4
    assert content(Path("out")) == before
    assert command("bad.jsonl", "out", *CUT, "--overwrite")[0] == 0
    assert read_report(Path("out"))["rows"]["reused"] == 60
    assert entries(folder) == ["bad.jsonl", "in.jsonl", "out"]


def test_a_link_stays_and_what_it_leads_to_is_replaced(command: Command, folder: Path) -> None:
    (folder / "disk").mkdir()
    (folder / "out").symlink_to("disk")
    assert command("in.jsonl", "out", *CUT)[0] == 0
    assert command("in.jsonl", "out", "--drop-top", "30%", "--overwrite")[0] == 0
    assert (folder / "out").is_symlink()
    assert read_report(folder / "disk")["cut"] == "drop-top 30%"
    assert entries(folder) == ["disk", "in.jsonl", "out"]


def test_so_does_one_that_leads_to_a_file(command: Command, folder: Path) -> None:
    (folder / "disk").mkdir()
    (folder / "out.parquet").symlink_to("disk/scores.parquet")
    assert command("score", "in.jsonl", "out.parquet")[0] == 0
    assert command("score", "in.jsonl", "out.parquet", "--max-length", "64", "--overwrite")[0] == 0
    assert (folder / "out.parquet").is_symlink()
    assert entries(folder / "disk") == ["scores.parquet", "scores.parquet.sqsd"]


def test_a_link_to_itself_a_device_and_a_pipe_are_no_destination(command: Command, folder: Path) -> None:
    (folder / "loop").symlink_to("loop")
    (folder / "null").symlink_to("/dev/null")
    os.mkfifo(folder / "pipe")
    for dest, complaint in (
        ("loop", "loop is a link that leads to itself"),
        ("null", "null is neither a file nor a folder"),
        ("/dev/null", "/dev/null is neither a file nor a folder"),
        ("pipe", "pipe is neither a file nor a folder"),
    ):
        for more in ([], ["--overwrite"]):
            code, _, err = command("in.jsonl", dest, *CUT, *more)
            assert code == 3
            assert complaint in one_sentence(err)


def test_a_damaged_record_is_said_to_be_damaged(command: Command, folder: Path) -> None:
    assert command("in.jsonl", "out", *CUT)[0] == 0
    record = folder / "out/_sqsd/run.json"
    record.write_bytes(record.read_bytes()[:100])
    code, _, err = command("in.jsonl", "out", *CUT)
    assert code == 5
    assert "run.json is damaged, so nothing says which run out holds" in one_sentence(err)
    assert command("in.jsonl", "out", *CUT, "--overwrite")[0] == 0
    assert read_report(folder / "out")["rows"]["reused"] == 60
