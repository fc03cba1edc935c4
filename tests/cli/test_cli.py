"""The command's manners: what it prints where, its exit codes, its destinations, and being killed at any moment."""

from __future__ import annotations

import json
import multiprocessing
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import pytest
import torch

from sqsd_filter.cli.main import main
from sqsd_filter.errors import PackError
from tests.corpora import SPLITS, content, make_rows, read_report, split_file, write_jsonl

HEAVY = ("torch", "transformers", "ray", "peft", "datasets")
CUT = ("--drop-top", "5%")
Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def folder(tmp_path: Path, tiny_pack: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with 60 rows in in.jsonl and a tiny pack as the default one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SQSD_FILTER_PACK", str(tiny_pack))
    write_jsonl(tmp_path / "in.jsonl", make_rows(60))
    return tmp_path


def one_sentence(err: str) -> str:
    """The error, which must be alone on the last line."""
    *before, last = err.strip().splitlines()
    assert last.startswith("Error: ")
    assert last.endswith(".")
    assert not any("Error" in line for line in before)
    return last


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


# ---------------------------------------------------------------------------------------------- light on its feet


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        ("--help", 0),
        ("--version", 0),
        ("filter --help", 0),
        ("in.jsonl --help", 0),
        ("score -h", 0),
        ("select --help", 0),
        ("pack build --help", 0),
        ("pack inspect --help", 0),
        ("pack import --help", 0),
        ("pack convert --help", 0),
        ("steer --help", 0),
        ("steer pack", 2),
        ("check --help", 0),
        ("check", 2),
        ("", 2),
        ("in.jsonl", 2),
        ("in.jsonl out", 2),
        ("in.jsonl out --drop-top 5", 2),
        ("in.jsonl out --no-such-option", 2),
        ("in.jsonl out --drop-top 5% --max-risk high", 2),
        ("in.jsonl out --drop-top 5% --drop-count 3", 2),
        ("in.jsonl out --drop-top 5% --on-error ignore", 2),
        ("in.jsonl out --drop-top 5% --with-scores", 2),
    ],
)
def test_help_and_usage_errors_load_nothing_heavy(arguments: str, code: int, tmp_path: Path) -> None:
    script = f"""
import sys
from sqsd_filter.cli.main import main
try:
    main({arguments.split()!r})
except SystemExit as left:
    print("left with", left.code, [m for m in {HEAVY!r} if m in sys.modules])
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=tmp_path, env=environment
    )
    assert done.stdout.endswith(f"left with {code} []\n")
    assert (done.stdout.count("\n") > 1) == (code == 0)
    assert bool(done.stderr) == (code != 0)
    assert names(tmp_path) == []


def test_the_package_runs_as_a_module() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "sqsd_filter", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("sqsd-filter, version ")


# ---------------------------------------------------------------------------------------------- streams


def test_the_summary_is_a_dozen_lines_on_stdout_and_no_bar_is_drawn_off_a_terminal(command: Command) -> None:
    code, out, err = command("in.jsonl", "out", *CUT)
    assert code == 0
    assert len(out.splitlines()) <= 12
    assert "57 of 60 rows kept in out (drop-top 5%)" in out
    assert 'load_dataset("out", "dropped")' in out
    assert err == "reading rows as alpaca (instruction, output)\n"


def test_the_summary_shows_the_largest_groups_in_aligned_lines(command: Command, folder: Path) -> None:
    names = ["maths", "line\nbreak", "", None, {"of": 1}, "x" * 99, *"abcdefg"]
    write_jsonl(folder / "in.jsonl", [{**row, "kind": names[row["id"] % 17 % 13]} for row in make_rows(60)])
    code, out, _ = command("in.jsonl", "out", *CUT, "--per-group", "kind")
    head, *lines = out[out.index("  groups ") :].splitlines()
    assert code == 0
    assert head == "  groups          13   by 'kind'"
    assert [line[:45].strip() for line in lines[:3]] == ["maths", '"line\\nbreak"', '""']
    assert {"null", '{"of": 1}', "x" * 39 + "…"} < {line[:45].strip() for line in lines[:10]}
    assert len(lines) == 11
    assert lines[10] == "    ... and 3 more"
    found = sorted(read_report(folder / "out")["groups"]["groups"], key=lambda group: -group["scored"])
    for line, group in zip(lines[:10], found[:10], strict=True):
        tail = f"   from risk {group['threshold']:.4f}" if group["dropped"] else ""
        assert line[44:] == f"   {group['scored']} rows   {group['dropped']} dropped{tail}"

    _, out, _ = command("select", "out", "other", "--drop-top", "99%", "--per-group", "kind", "--per-split")
    assert "\n  spared          13   rows that the cut would drop are kept" in out
    assert "\n    train: maths " in out
    _, out, _ = command("select", "out", "weights", *CUT, "--weights", "--per-split")
    weights = read_report(folder / "weights")["weights"]["sum"]
    assert f"  weights  {weights:>9,.1f}   is the sum" in out
    assert "\n  splits           1\n    train   60 rows" in out


def test_the_summary_tells_how_to_load_what_was_written(command: Command) -> None:
    _, out, _ = command("in.jsonl", "arrow", *CUT, "--to", "arrow")
    assert 'load_from_disk("arrow")["dropped"]' in out
    _, out, _ = command("in.jsonl", "lines", *CUT, "--to", "jsonl", "--shard-size", "1KB", "--with-scores")
    assert 'load_dataset("lines", "dropped")' in out
    report = read_report(Path("lines"))
    assert (report["shard_size"], report["settings"]["with_scores"]["origin"]) == (1000, "flag")


def test_json_puts_the_report_and_nothing_else_on_stdout(command: Command) -> None:
    code, out, err = command("in.jsonl", "out", *CUT, "--json")
    assert code == 0
    assert json.loads(out) == read_report(Path("out"))
    assert "{" not in err
    _, again, _ = command("in.jsonl", "out", *CUT, "--json", "-q")
    assert json.loads(again) == {**json.loads(out), "already_done": True}


def test_quiet_prints_nothing_unless_something_is_wrong(command: Command) -> None:
    assert command("in.jsonl", "out", *CUT, "-q") == (0, "", "")
    code, out, err = command("none.jsonl", "out", *CUT, "-q")
    assert (code, out) == (3, "")
    assert one_sentence(err)


@pytest.mark.parametrize("colour", [True, False], ids=["colour", "NO_COLOR"])
def test_a_terminal_gets_a_bar_coloured_unless_told_otherwise(
    colour: bool, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "sqsd_filter.cli.output.Display.bars", property(lambda self: True, lambda self, value: None), raising=False
    )
    monkeypatch.setenv("TQDM_MININTERVAL", "0")
    if not colour:
        monkeypatch.setenv("NO_COLOR", "1")
    code, out, err = command("in.jsonl", "out", *CUT)
    assert code == 0
    assert "57 of 60" in out
    assert all(text in err for text in ("reading:", "scoring:", "writing:", "/60"))
    assert ("\x1b[3" in err) == colour


def test_off_a_terminal_a_line_now_and_then_tells_pace_and_time_left(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from sqsd_filter.cli.output import Display

    clock = iter([0.0, 10.0, 31.0, 40.0, 62.0])
    monkeypatch.setattr("sqsd_filter.cli.output.time.monotonic", lambda: next(clock))
    display = Display()
    display.start("scoring", 1240)
    for _ in range(4):
        display.advance(155, 3100)
    assert capsys.readouterr().err.splitlines() == [
        "scoring: 310 of 1,240 rows, 10.0 rows/s, 200 tokens/s, 1 min 33 s left",
        "scoring: 620 of 1,240 rows, 10.0 rows/s, 200 tokens/s, 1 min 02 s left",
    ]


def test_a_dry_run_tells_the_cost_and_writes_nothing(command: Command, folder: Path) -> None:
    code, out, _ = command("in.jsonl", "out", *CUT, "--dry-run")
    assert code == 0
    assert "60 rows of 1 file, read as alpaca (instruction, output)" in out
    assert "tokens" in out
    assert "in.jsonl (60 rows)" in out
    guess = json.loads(command("score", "in.jsonl", "out.parquet", "--dry-run", "--json")[1])
    assert guess["to_score"] == 60
    assert guess["passes"] == 2
    report = json.loads(command("in.jsonl", "real", *CUT, "--json")[1])
    assert guess["tokens"] == report["tokens"]
    assert names(folder) == ["in.jsonl", "real"]
    for scorer, passes in (("length", "no pass"), ("danger", "one pass"), ("sqsd", "2 passes")):
        assert f"; {passes} through the model" in command("in.jsonl", "out", *CUT, "--scorer", scorer, "--dry-run")[1]


# ---------------------------------------------------------------------------------------------- settings


def test_a_flag_beats_the_environment_which_beats_the_config_and_the_report_says_so(
    command: Command, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "c.toml").write_text(
        'drop-top = "50%"\nlimit = 10\nmax-length = 200\nformat = "alpaca"\non_error = "keep"\n'
    )
    monkeypatch.setenv("SQSD_FILTER_MAX_LENGTH", "100")
    monkeypatch.setenv("SQSD_FILTER_LIMIT", "20")
    code, _, err = command("in.jsonl", "out", "--config", "c.toml", "--drop-count", "3", "--limit", "30")
    assert code == 0, err
    report = read_report(Path("out"))
    settings = report["settings"]
    assert (settings["limit"], report["rows"]["total"]) == ({"value": 30, "origin": "flag"}, 30)
    assert (settings["max_length"], report["max_length"]) == ({"value": 100, "origin": "environment"}, 100)
    assert settings["format"] == {"value": "alpaca", "origin": "config"}
    assert settings["on_error"] == {"value": "keep", "origin": "config"}
    assert settings["max_error_rate"] == {"value": "50%", "origin": "default"}
    assert report["cut"] == "drop-count 3"


def test_how_to_cut_can_be_set_apart_from_where(
    command: Command, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "c.toml").write_text('drop-top = "50%"\nper-group = "id"\nper-split = true\n')
    monkeypatch.setenv("SQSD_FILTER_WEIGHTS", "1")
    assert command("in.jsonl", "out", "--config", "c.toml", "--drop-count", "3", "--per-group", "output")[0] == 0
    report = read_report(Path("out"))
    assert report["cut"] == 'drop-count 3, per-group "output", per-split, weights'
    assert report["settings"]["per_group"] == {"value": "output", "origin": "flag"}
    assert report["settings"]["weights"] == {"value": True, "origin": "environment"}


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("drop-top = 5", "5% or 5 rows"),
        ("drop_topp = '5%'", "unknown settings: drop_topp"),
        ("json = true", "unknown settings: json"),
        ("drop-top", "can't be read"),
        ("on-error = 'ignore'\ndrop-top = '5%'", "'ignore' is not one of"),
    ],
)
def test_a_senseless_config_is_a_usage_error(text: str, complaint: str, command: Command, folder: Path) -> None:
    (folder / "c.toml").write_text(text)
    code, _, err = command("in.jsonl", "out", "--config", "c.toml")
    assert code == 2
    assert complaint in err


# ---------------------------------------------------------------------------------------------- exit codes


def test_commands_share_a_config_file(command: Command, folder: Path) -> None:
    (folder / "nightly.toml").write_text('drop-top = "5pct"\nlimit = 20\n')
    assert command("score", "in.jsonl", "scored.parquet", "--config", "nightly.toml")[0] == 0
    assert command("in.jsonl", "out", "--config", "nightly.toml")[0] == 0
    assert read_report(Path("out"))["rows"]["dropped"] == 1


def test_output_that_cannot_be_printed_is_a_failure_but_no_bug(folder: Path, tiny_pack: Path) -> None:
    with open("/dev/full", "w") as full:
        line = [sys.executable, "-m", "sqsd_filter", "in.jsonl", "out", *CUT, "--json"]
        done = subprocess.run(line, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 1
    assert "No space left" in one_sentence(done.stderr)
    assert read_report(folder / "out")["status"] == "ok"


def test_a_bare_number_is_a_usage_error_that_names_both_readings(command: Command) -> None:
    code, out, err = command("in.jsonl", "out", "--drop-top", "5")
    assert (code, out) == (2, "")
    fix = "write drop_top (--drop-top) 5% or drop_count (--drop-count) 5."
    assert one_sentence(err) == f"Error: '5' could mean 5% or 5 rows: {fix}"
    code, _, err = command("in.jsonl", "out", *CUT, "--max-error-rate", "5")
    fix = "write max_error_rate (--max-error-rate) 5%."
    assert code == 2
    assert one_sentence(err) == f"Error: '5' could mean 5% or 5 rows: {fix}"


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
        ("in.txt out --drop-top 5%", 3, "no extension that says what it holds"),
        ("empty.jsonl out --drop-top 5%", 3, "No readable row"),
        ("broken.jsonl out --drop-top 5%", 3, "No readable row"),
        ("no.parquet out --drop-top 5%", 3, "truncated or corrupt"),
        ("in.jsonl out --drop-top 5% --format Alpaca", 2, "no row format 'Alpaca'"),
        ("in.jsonl out --max-risk inf", 2, "finite"),
        ("in.jsonl out --max-risk 1 --per-group id", 2, "leave out per_group (--per-group)"),
        ("in.jsonl out --drop-top 5% --per-group topic", 3, "the columns are 'id', 'instruction', 'output'"),
        ("in.jsonl out --drop-top 5% --max-error-rate 7 --dry-run", 2, "7%"),
        ("in.jsonl out --drop-top 5% --engine local --replicas 2", 2, "--engine ray"),
        ("in.jsonl out --drop-top 5% --format messages", 3, "does not fit the columns"),
        ("in.jsonl out --drop-top 5% --prompt-column q", 3, "(--prompt-column) names 'q'"),
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
    monkeypatch.setattr("sqsd_filter.pipeline.run.filter_dataset", lambda *_, **__: 1 / 0)
    code, _, err = command("in.jsonl", "out", *CUT)
    assert code == 1
    assert "unexpected ZeroDivisionError" in err
    assert "SQSD_FILTER_DEBUG=1" in err
    monkeypatch.setenv("SQSD_FILTER_DEBUG", "1")
    with pytest.raises(ZeroDivisionError):
        main(["in.jsonl", "out", *CUT])
    with pytest.raises(PackError):
        main(["in.jsonl", "out", *CUT, "--pack", "nowhere"])


# ---------------------------------------------------------------------------------------------- destinations


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
    assert names(folder / "out") == ["README.md", "data", "sqsd"]
    assert names(folder) == ["in.jsonl", "out"]


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
    assert names(folder) == ["bad.jsonl", "in.jsonl", "out"]


# ---------------------------------------------------------------------------------------------- killed at any moment


def in_child(folder: Path, pack: Path, moment: int, kind: int, arguments: list[str]) -> None:
    """The command in a process that sends itself a signal just before its `moment`-th file gets its name."""
    os.chdir(folder)
    os.environ["SQSD_FILTER_PACK"] = str(pack)  # the fork server has the environment that it was started in
    torch.set_num_threads(1)
    for stream, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    renamed = 0

    def watch(event: str, _: Any) -> None:
        nonlocal renamed
        if event == "os.rename":
            renamed += 1
            if renamed == moment:
                os.kill(os.getpid(), kind)

    sys.addaudithook(watch)
    main(arguments)


@pytest.fixture(scope="session")
def processes() -> Any:
    """Starts processes that have imported everything and run nothing."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["tests.cli.test_cli", "sqsd_filter.scoring.engine", "sqsd_filter.pipeline.run", "datasets"]
    )
    forkserver.ensure_running()
    return context


@pytest.fixture
def started(processes: Any, folder: Path, tiny_pack: Path) -> Callable[..., Any]:
    def start(moment: int, kind: int, *arguments: str) -> Any:
        process = processes.Process(target=in_child, args=(folder, tiny_pack, moment, kind, list(arguments)))
        process.start()
        return process

    return start


@pytest.fixture
def killed(started: Callable[..., Any]) -> Callable[..., int]:
    def run(moment: int, kind: int, *arguments: str) -> int:
        process = started(moment, kind, *arguments)
        process.join(60)
        return process.exitcode

    return run


# 1,030 rows are three shards, each with a few conversations of its own; a line or two of every fate
ROWS = [row if k % 512 < 6 else {**make_rows(1)[0], "id": k} for k, row in enumerate(make_rows(1030))]
LINES = [*ROWS[:700], b"broken", {"id": -1, "instruction": "?", "output": ""}, *ROWS[700:]]
BIG = ("big.jsonl", "out", *CUT, "--pack")
NAMED = "run.json, three shards, kept, dropped, errors, picture, card, report"  # the order in which files appear


@pytest.fixture
def big(folder: Path, tiny_pack: Path) -> list[str]:
    write_jsonl(folder / "big.jsonl", LINES)
    return [*BIG, str(tiny_pack)]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, tiny_pack: Path) -> dict[str, Any]:
    """What a run leaves that nothing happens to."""
    home, folder = Path.cwd(), tmp_path_factory.mktemp("undisturbed")
    write_jsonl(folder / "big.jsonl", LINES)
    os.chdir(folder)
    try:
        with pytest.raises(SystemExit):
            main([*BIG, str(tiny_pack), "-q"])
    finally:
        os.chdir(home)
    return content(folder / "out")


def segments(dest: Path) -> dict[str, tuple[int, int]]:
    return {p.name: (p.stat().st_ino, p.stat().st_mtime_ns) for p in (dest / "sqsd" / "scores").glob("[!.]*")}


@pytest.mark.parametrize(
    ("moment", "shards"),
    [(1, 0), (2, 0), (3, 1), (4, 2), (5, 3), (6, 3), (7, 3), (8, 3), (9, 3), (10, 3), (11, 3), (12, 3)],
    ids=[
        *("start", "shard 0", "shard 1", "shard 2", "kept", "dropped"),
        *("errors", "picture", "card", "notes", "page", "report"),
    ],
)
def test_a_run_killed_at_any_moment_is_finished_by_the_same_command_to_the_same_bytes(
    moment: int, shards: int, big: list[str], killed: Callable[..., int], command: Command, undisturbed: dict[str, Any]
) -> None:
    assert killed(moment, signal.SIGKILL, *big) == -signal.SIGKILL
    before = segments(Path("out"))
    assert len(before) == shards
    assert command(*big)[0] == 0
    after = segments(Path("out"))
    assert before.items() <= after.items()
    assert len(after) == 3
    assert content(Path("out")) == undisturbed


@pytest.mark.parametrize("moment", [2, 4, 6, 9])
@pytest.mark.parametrize("to", ["parquet", "arrow", "jsonl"])
def test_several_files_of_any_format_appear_as_if_nothing_had_happened(
    to: str, moment: int, killed: Callable[..., int], command: Command, folder: Path
) -> None:
    rows = [{"id": k, "sqsd_risk": k * 7919 % 5000 / 7, "sqsd_status": "scored"} for k in range(5000)]  # three batches
    write_jsonl(folder / "scored.jsonl", rows)
    select = ["select", "scored.jsonl", "out", *CUT, "--to", to, "--shard-size", "1KB"]
    assert killed(moment, signal.SIGKILL, *select) == -signal.SIGKILL
    assert command(*select)[0] == 0
    assert "already done" in command(*select)[1]
    found = content(Path("out"))
    shutil.rmtree("out")
    assert command(*select)[0] == 0
    assert content(Path("out")) == found
    assert len([name for name in found if "of-00003" in name]) == 6


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-C", "SIGTERM"])
def test_an_interrupted_run_prints_the_command_that_goes_on(
    kind: int, big: list[str], killed: Callable[..., int], command: Command, folder: Path, undisturbed: dict[str, Any]
) -> None:
    assert killed(4, kind, *big) == 130
    said = (folder / "stderr").read_text()
    assert (folder / "stdout").read_text() == ""
    assert "Traceback" not in said
    assert read_report(Path("out"))["status"] == "interrupted"
    assert not (folder / "out" / "sqsd" / "lock").exists()
    before = segments(Path("out"))
    program, *arguments = shlex.split(said.splitlines()[-1])
    assert program == "sqsd-filter"
    assert command(*arguments)[0] == 0
    assert len(before) >= 2
    assert before.items() <= segments(Path("out")).items()
    assert content(Path("out")) == undisturbed


def test_two_runs_on_one_destination_are_one_too_many(
    big: list[str], started: Callable[..., Any], command: Command, undisturbed: dict[str, Any]
) -> None:
    first = started(3, signal.SIGSTOP, *big)
    stat, deadline = Path(f"/proc/{first.pid}/stat"), time.monotonic() + 60
    while stat.read_text().rsplit(")", 1)[1].split()[0] != "T":
        assert time.monotonic() < deadline
        assert first.exitcode is None
        time.sleep(0.02)
    for extra in ([], ["--overwrite"]):
        code, _, err = command(*big, *extra)
        assert code == 5
        assert "Another run is writing to out right now" in one_sentence(err)
    os.kill(first.pid, signal.SIGCONT)
    first.join(60)
    assert first.exitcode == 0
    assert content(Path("out")) == undisturbed


@pytest.mark.parametrize("moment", [2, 5, 11, 12, 13], ids=["scores", "export", "report", "swap", "half swapped"])
def test_a_killed_overwrite_never_costs_the_old_output_and_can_be_finished(
    moment: int, command: Command, killed: Callable[..., int], folder: Path
) -> None:
    command("in.jsonl", "out", *CUT)
    command("in.jsonl", "straight", *CUT)
    before = content(Path("out"))
    write_jsonl(folder / "in.jsonl", make_rows(63))
    command("in.jsonl", "straight", *CUT, "--overwrite")
    replace = ["in.jsonl", "out", *CUT, "--overwrite"]
    assert killed(moment, signal.SIGKILL, *replace) == -signal.SIGKILL
    assert content(Path(".out.sqsd-old" if moment == 13 else "out")) == before
    assert command(*replace)[0] == 0
    for split in SPLITS:
        assert split_file(Path("out"), split).read_bytes() == split_file(Path("straight"), split).read_bytes()
    assert read_report(Path("out"))["rows"]["reused"] == 60
    assert names(folder) == ["in.jsonl", "out", "stderr", "stdout", "straight"]


@pytest.mark.parametrize("moment", [7, 8, 9, 10, 11], ids=["report", "swap", "no file", "old home", "no home"])
def test_a_score_file_and_its_home_are_swapped_together_even_when_killed(
    moment: int, command: Command, killed: Callable[..., int], folder: Path
) -> None:
    command("score", "in.jsonl", "a.parquet")
    command("score", "in.jsonl", "straight.parquet")
    write_jsonl(folder / "in.jsonl", make_rows(63))
    command("score", "in.jsonl", "straight.parquet", "--overwrite")
    replace = ["score", "in.jsonl", "a.parquet", "--overwrite"]
    assert killed(moment, signal.SIGKILL, *replace) == -signal.SIGKILL
    assert command(*replace)[0] == 0
    assert Path("a.parquet").read_bytes() == Path("straight.parquet").read_bytes()
    expected = [
        "a.parquet",
        "a.parquet.sqsd",
        "in.jsonl",
        "stderr",
        "stdout",
        "straight.parquet",
        "straight.parquet.sqsd",
    ]
    assert names(folder) == expected
    assert "already done" in command("score", "in.jsonl", "a.parquet")[1]
