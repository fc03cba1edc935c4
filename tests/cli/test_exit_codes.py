"""Every failure is one sentence and has its exit code."""

from __future__ import annotations

from pathlib import Path

import pytest

from sqsd_filter.cli.main import main
from sqsd_filter.errors import PackError, as_flags, option
from tests.commands import CUT, Command, one_sentence
from tests.corpora import make_rows, read_report, write_jsonl


def test_a_bare_number_is_a_usage_error_that_names_both_readings(command: Command) -> None:
    code, out, err = command("in.jsonl", "out", "--drop-top", "5")
    assert (code, out) == (2, "")
    fix = "write --drop-top 5% or --drop-count 5."
    assert one_sentence(err) == f"Error: '5' could mean 5% or 5 rows: {fix}"
    code, _, err = command("in.jsonl", "out", *CUT, "--max-error-rate", "5")
    fix = "write --max-error-rate 5%."
    assert code == 2
    assert one_sentence(err) == f"Error: '5' could mean 5% or 5 rows: {fix}"


def test_errors_name_options_as_the_command_line_spells_them() -> None:
    both = f"set {option('drop_top')}, or with columns=Columns(answer=…) (--answer-column) it, or push (--push-to)."
    several = "name columns=Columns(prompt=…, answer=…) (--prompt-column, --answer-column) or --messages-column"
    assert as_flags(several) == "name --prompt-column, --answer-column or --messages-column"
    assert as_flags(both) == "set --drop-top, or with --answer-column it, or push (--push-to)."


@pytest.mark.parametrize(
    ("arguments", "code", "complaint"),
    [
        ("in.jsonl out --drop-top 5% --pack nowhere", 1, "no pack 'nowhere'"),
        ("in.jsonl out --drop-top 5% --model nowhere", 1, "nowhere"),
        ("in.jsonl out --drop-top 5% --device warp", 2, "warp"),
        ("in.jsonl out --drop-top 5% --max-length 1", 2, "max_length"),
        ("score in.jsonl scores.csv", 2, "scores.parquet"),
        ("missing.jsonl out --drop-top 5%", 3, "missing.jsonl does not exist"),
        ("*.csv out --drop-top 5%", 3, "No file matches"),
        ("in.txt out --drop-top 5%", 3, "no extension that names its format"),
        ("empty.jsonl out --drop-top 5%", 3, "No readable row"),
        ("broken.jsonl out --drop-top 5%", 3, "No readable row"),
        ("no.parquet out --drop-top 5%", 3, "truncated or corrupt"),
        ("in.jsonl out --drop-top 5% --format Alpaca", 2, "no row format 'Alpaca'"),
        ("in.jsonl out --max-risk inf", 2, "finite"),
        ("in.jsonl out --max-risk 1 --per-group id", 2, "leave out --per-group"),
        ("in.jsonl out --drop-top 5% --per-group topic", 3, "the columns are 'id', 'instruction', 'output'"),
        ("in.jsonl out --drop-top 5% --max-error-rate 7 --dry-run", 2, "7%"),
        ("in.jsonl out --drop-top 5% --engine local --replicas 2", 2, "--engine ray"),
        ("in.jsonl out --drop-top 5% --format messages", 3, "does not fit the columns"),
        ("in.jsonl out --drop-top 5% --prompt-column q", 3, "Error: --prompt-column names 'q'"),
        ("in.jsonl nowhere/out --drop-top 5%", 3, "The folder nowhere does not exist"),
        ("in.jsonl in.jsonl/out --drop-top 5%", 3, "in.jsonl"),
        ("select in.jsonl out --drop-top 5%", 3, "score it first"),
        ("bad.jsonl out --drop-top 5% --on-error fail", 4, "1 of 61 rows could not be scored (1 bad_json)"),
        ("score bad.jsonl out.parquet --max-error-rate 1%", 4, "bad.jsonl, line 61"),
        ("in.jsonl . --drop-top 5%", 5, "was not written by this command"),
        ("in.jsonl in.txt --drop-top 5%", 5, "was not written by this command"),
        ("score in.jsonl no.parquet", 5, "was not written by this command"),
    ],
)
def test_every_failure_is_one_sentence_with_its_exit_code(
    arguments: str, code: int, complaint: str, command: Command, folder: Path
) -> None:
    write_jsonl(folder / "bad.jsonl", [*make_rows(60), b"broken"])
    for name, data in {"in.txt": b"x", "empty.jsonl": b"", "broken.jsonl": b"{\n[", "no.parquet": b"x"}.items():
        (folder / name).write_bytes(data)
    before = {p: p.read_bytes() for p in folder.iterdir()}
    left, out, err = command(*arguments.split())
    assert (left, out) == (code, "")
    assert complaint in one_sentence(err)
    assert {p: p.read_bytes() for p in before} == before
    begun = {folder / "out"} if "--model" in arguments or code == 4 else set()
    assert set(folder.iterdir()) - begun - {folder / "out.parquet.sqsd"} == set(before)


def test_a_run_that_failed_before_its_first_score_does_not_bar_the_destination(command: Command) -> None:
    assert command("in.jsonl", "out", *CUT, "--model", "nowhere")[0] == 1
    assert read_report(Path("out"))["status"] == "failed"
    assert command("in.jsonl", "out", *CUT)[0] == 0
    assert read_report(Path("out"))["status"] == "ok"


def test_a_bug_shows_its_traceback_only_when_asked_for(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sqsd_filter.pipeline.run.filter_rows", lambda *_, **__: 1 / 0)
    code, _, err = command("in.jsonl", "out", *CUT)
    assert code == 1
    assert "unexpected ZeroDivisionError" in err
    assert "SQSD_FILTER_DEBUG=1" in err
    monkeypatch.setenv("SQSD_FILTER_DEBUG", "1")
    with pytest.raises(ZeroDivisionError):
        main(["in.jsonl", "out", *CUT])
    with pytest.raises(PackError):
        main(["in.jsonl", "out", *CUT, "--pack", "nowhere"])
