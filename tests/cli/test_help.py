"""What --help shows, what a mistyped command line is answered with, and how little either loads."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest

import sqsd_filter
from sqsd_filter.cli.main import cli
from tests.commands import exit_code, parse

ROOT = Path(__file__).parents[2]
COMMANDS = [*cli.commands, *(f"pack {name}" for name in cli.commands["pack"].commands)]  # type: ignore[attr-defined]  # a group
LIGHT = [
    *(("--help", 0), ("--version", 0), ("filter --help", 0), ("in.jsonl --help", 0), ("score -h", 0)),
    *(("select --help", 0), ("pack build --help", 0), ("pack inspect --help", 0), ("pack import --help", 0)),
    *(("pack convert --help", 0), ("steer --help", 0), ("check --help", 0), ("evaluate --help", 0)),
    *(("", 2), ("check", 2), ("steer pack", 2), ("evaluate scores.parquet", 2), ("scroe in.jsonl out.parquet", 2)),
    *(("in.jsonl", 2), ("in.jsonl out", 2), ("in.jsonl --drop-top 5%", 2), ("score in.jsonl", 2)),
    *(("in.jsonl out --no-such-option", 2), ("in.jsonl out --drop-top 5", 2)),
    *(("in.jsonl out --drop-top 5% --max-risk high", 2), ("in.jsonl out --drop-top 5% --drop-count 3", 2)),
    *(("in.jsonl out --drop-top 5% --on-error ignore", 2), ("in.jsonl out --drop-top 5% --with-scores", 2)),
]


@pytest.fixture(autouse=True)
def terminal(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A terminal of 80 columns, in an empty folder."""
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def shown(capsys: pytest.CaptureFixture[str]) -> Shown:
    return Shown(capsys)


class Shown:
    """Runs a command line in this process."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self.capsys = capsys

    def help(self, *words: str) -> str:
        assert exit_code(*words, "--help") == 0
        return self.capsys.readouterr().out

    def error(self, line: str) -> str:
        """The error of a usage error, without the usage."""
        assert exit_code(*shlex.split(line)) == 2
        out, err = self.capsys.readouterr()
        assert out == ""
        return re.sub(r"\s+", " ", err).rpartition("Error: ")[2].strip()


# ---------------------------------------------------------------------------------------------- help


def test_help_lists_every_command_with_an_uncut_line(shown: Shown) -> None:
    lines = shown.help().partition("Commands:\n")[2].splitlines()
    assert [line.split()[0] for line in lines] == list(cli.commands)
    assert [line for line in lines if not line.endswith(".") or "..." in line] == []
    for group in ("pack", "store"):
        assert "..." not in shown.help(group).partition("Commands:\n")[2]


def test_the_options_of_filter_stand_under_headings_and_three_examples_follow(shown: Shown) -> None:
    text = shown.help("filter")
    headings = re.findall(r"^(\w+):$", text, re.MULTILINE)
    assert headings == ["Cut", "Model", "Rows", "Engine", "Output", "Hub", "Run", "Examples"]
    assert text.partition("Examples:\n")[2].count("  sqsd-filter ") == 3
    assert "\n  --drop-top SHARE " in text.partition("Cut:")[2].partition("Model:")[0]
    assert "[default: the pack's]" in text
    assert text.partition("Run:")[2].partition("Examples:")[0].strip().endswith("Show this message and exit.")


@pytest.mark.parametrize("name", COMMANDS)
def test_help_fits_into_80_columns(name: str, shown: Shown) -> None:
    assert [line for line in shown.help(*name.split()).splitlines() if len(line) > 80] == []


@pytest.mark.parametrize("name", COMMANDS)
def test_the_examples_are_command_lines_that_parse(name: str) -> None:
    command = click.Context(cli).command
    for word in name.split():
        assert isinstance(command, click.Group)
        command = command.commands[word]
    epilog = (command.epilog or "").replace("\\\n", " ")
    lines = re.findall(r"^sqsd-filter (.*)$", epilog, re.MULTILINE)
    assert lines or isinstance(command, click.Group) or name in ("pack build", "pack inspect")
    for line in lines:
        assert parse(shlex.split(line)).params


def test_the_version_is_that_of_the_package(shown: Shown) -> None:
    assert exit_code("--version") == 0
    assert shown.capsys.readouterr().out == f"sqsd-filter, version {sqsd_filter.__version__}\n"
    assert re.match(r"\d+\.\d+", sqsd_filter.__version__)


def test_the_package_runs_as_a_module() -> None:
    line = [sys.executable, "-m", "sqsd_filter", "--version"]
    done = subprocess.run(line, capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.startswith("sqsd-filter, version ")


# ---------------------------------------------------------------------------------------------- mistyped


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("scroe in.jsonl out.parquet", "'scroe' is neither a command nor a file or folder. Did you mean 'score'?"),
        ("selct", "Did you mean 'select'?"),
        ("inspct my-pack", "Did you mean 'pack inspect'?"),
        ("pack inspct my-pack", "'sqsd-filter pack' has no command 'inspct'. Did you mean 'inspect'?"),
        ("pack zzz", "'sqsd-filter pack' has no command 'zzz'."),
        ("a b --drop-topp 5%", "--drop-top"),
        ("a.jsonl", "DEST is missing: only 'a.jsonl' is given. For example: sqsd-filter a.jsonl out/ --drop-top 5%"),
        ("a.jsonl --drop-top 5%", "DEST is missing: only 'a.jsonl' is given."),
        ("--drop-top 5% 'a b.jsonl'", "For example: sqsd-filter 'a b.jsonl' out/ --drop-top 5%"),
        ("score a.jsonl", "For example: sqsd-filter score a.jsonl scores.parquet"),
        ("select a.parquet", "For example: sqsd-filter select a.parquet out/ --drop-top 5%"),
        ("filter", "SRC and DEST are missing. For example: sqsd-filter in.jsonl out/ --drop-top 5%"),
        ("zzz", "DEST is missing: only 'zzz' is given."),
    ],
)
def test_a_mistyped_command_line_is_answered_with_what_is_missing(line: str, why: str, shown: Shown) -> None:
    error = shown.error(line)
    assert why in error
    assert list(Path().iterdir()) == []


@pytest.mark.parametrize("word", ["scores.jsonl", "./score", "org/score", "score:train", "s3://score", "sco*e", "-"])
def test_a_word_that_can_only_be_a_source_is_taken_for_one(word: str, shown: Shown) -> None:
    assert "DEST is missing" in shown.error(word)


def test_a_file_with_a_name_like_a_command_s_is_a_source(shown: Shown) -> None:
    Path("scroe").mkdir()
    assert "DEST is missing: only 'scroe' is given." in shown.error("scroe")


# ---------------------------------------------------------------------------------------------- light on its feet


def test_help_and_usage_errors_load_nothing_heavy(tmp_path: Path) -> None:
    script = f"""
import contextlib, io, sys
from sqsd_filter.cli.main import main
for line, expected in {LIGHT!r}:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main(line.split())
        except SystemExit as left:
            code = left.code
    heavy = [m for m in ("torch", "transformers", "ray", "peft", "datasets", "pandas") if m in sys.modules]
    assert (code, bool(out.getvalue()), bool(err.getvalue()), heavy) == (expected, not expected, bool(expected), []), (
        line, code, heavy, err.getvalue())
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", script], check=True, cwd=tmp_path, env=environment)
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------------------------------- completion


def completed(words: str, shell: str = "bash") -> list[str]:
    """What the command offers in the place of the last of these words, as it answers the shell."""
    variables = {"_SQSD_FILTER_COMPLETE": f"{shell}_complete", "COMP_WORDS": words, "PYTHONPATH": str(ROOT)}
    variables["COMP_CWORD"] = str(len(words.split(" ")) - 1) if shell != "fish" else words.split(" ")[-1]
    code = "from sqsd_filter.cli.main import run; run()"
    line = [sys.executable, "-c", code]
    done = subprocess.run(line, env={**os.environ, **variables}, capture_output=True, text=True, check=True)
    return done.stdout.split()


def test_the_shell_completes_commands_options_choices_and_files() -> None:
    assert completed("sqsd-filter se") == ["file,se", "plain,select"]
    assert completed("sqsd-filter in.jsonl out --drop-t") == ["plain,--drop-top"]
    assert completed("sqsd-filter --drop-t") == ["plain,--drop-top"]
    assert completed("sqsd-filter score in.jsonl --engine r") == ["plain,ray"]
    assert completed("sqsd-filter in.jsonl out --scorer gu") == ["plain,guard:"]
    assert completed("sqsd-filter in.jsonl ou") == ["file,ou"]
    assert completed("sqsd-filter pack ins") == ["plain,inspect"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_line_of_the_docs_completes_in_its_shell(shell: str, tmp_path: Path) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"there is no {shell} here")
    (tmp_path / "sqsd-filter").write_text(f'#!/bin/sh\nexec {sys.executable} -m sqsd_filter "$@"\n')
    (tmp_path / "sqsd-filter").chmod(0o755)
    page = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    (setup,) = re.findall(rf"`([^`]*{shell}_source[^`]*)`", page)
    ask = {
        "bash": "COMP_WORDS=(sqsd-filter sel); COMP_CWORD=1; _sqsd_filter_completion sqsd-filter; echo ${COMPREPLY[0]}",
        "zsh": "autoload -U compinit; compinit -u; whence -w _sqsd_filter_completion >/dev/null && echo select",
        "fish": "complete --do-complete 'sqsd-filter sel'",
    }[shell]
    start = "autoload -U compinit; compinit -u; " if shell == "zsh" else ""
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    line = [shell, "-c", start + setup.replace("\\|", "|") + "\n" + ask]
    done = subprocess.run(line, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split()[0] == "select", done.stderr
