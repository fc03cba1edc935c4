"""The README tells of every command and option, and its commands are the ones that are tested."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import pytest

from sqsd_filter.cli.main import cli
from sqsd_filter.scoring.conversation import ROLES
from sqsd_filter.scoring.row_formats import FORMATS
from tests.commands import parse

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def commands(group: click.Group, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], click.Command]:
    found = {}
    for name, command in group.commands.items():
        inner = commands(command, (*path, name)) if isinstance(command, click.Group) else {(*path, name): command}
        found.update(inner)
    return found


COMMANDS = commands(cli)


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_the_readme_tells_of_every_command_and_option(path: tuple[str, ...]) -> None:
    if path != ("filter",):  # goes without its name
        assert f"sqsd-filter {' '.join(path)} " in README
    options = [p for p in COMMANDS[path].params if isinstance(p, click.Option)]
    longest = [max(p.opts, key=len) for p in options]
    assert [o for o in longest if not re.search(rf"{o}\b", README)] == []


def test_the_readme_tells_of_every_row_format_and_role() -> None:
    assert [name for name in (*FORMATS, *ROLES) if f"`{name}`" not in README] == []
    formats = next(p for p in COMMANDS[("score",)].params if p.name == "row_format")
    assert [name for name in FORMATS if name not in formats.help] == []


def test_every_option_explains_itself() -> None:
    options = [p for c in COMMANDS.values() for p in c.params if isinstance(p, click.Option)]
    assert options and [p.name for p in options if not p.help] == []


def shown() -> list[list[str]]:
    """Every command line of the README that can be run as it is: no alternatives, no ellipsis."""
    lines = re.findall(r"^    (?:.*&& )?(?:\S*/)?(sqsd-filter .*?)(?:\s+#.*)?$", README, re.MULTILINE)
    return [shlex.split(line) for line in lines if not re.search(r"\.\.\.|[(|]", line)]


@pytest.mark.parametrize("line", shown(), ids=" ".join)
def test_the_command_lines_of_the_readme_parse(line: list[str]) -> None:
    assert parse(line[1:]).params


def test_the_test_command_of_the_readme_is_what_ci_calls() -> None:
    assert "\n    tests/run\n" in README
    assert "\ntests/run " in (ROOT / ".ci" / "run").read_text()
