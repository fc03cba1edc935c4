"""Command lines found in documents and scripts, read as the commands themselves would read them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import pytest

from sqsd_filter.cli.main import cli, main

CUT = ("--drop-top", "5%")
Command = Callable[..., tuple[int, str, str]]  # the fixture `command`: exit code, stdout and stderr


def exit_code(*words: object) -> int:
    """That of the command, run in this process."""
    with pytest.raises(SystemExit) as left:
        main(list(map(str, words)))
    return int(left.value.code or 0)


def one_sentence(err: str) -> str:
    """The error in what was printed to stderr; it must be the last line, and the only one."""
    *before, last = err.strip().splitlines()
    assert last.startswith("Error: ")
    assert last.endswith(".")
    assert not any("Error" in line for line in before)
    return last


def entries(folder: Path) -> list[str]:
    """The names in a folder, sorted."""
    return sorted(path.name for path in folder.iterdir())


def parse(arguments: list[str], within: click.Context | None = None, default: str | None = "filter") -> click.Context:
    """What click makes of a command line, the program's name left out. Raises `click.UsageError`."""
    within = within or click.Context(cli)
    group = within.command
    assert isinstance(group, click.Group)
    if arguments[0] in group.commands:
        command, arguments = group.commands[arguments[0]], arguments[1:]
    else:
        command = group.commands[default or arguments[0]]
    if isinstance(command, click.Group):
        return parse(arguments, click.Context(command, within), None)
    return command.make_context(command.name, list(arguments), parent=within)


def calls(program: str, shell: str) -> Iterator[list[str]]:
    """The arguments of each call of `program` in a shell text, whatever starts it; a variable's value is taken as 0."""
    for line in _without_substitutions(shell.replace("\\\n", " ")).splitlines():
        words = shlex.shlex(line, posix=True, punctuation_chars="();&|<>")
        words.whitespace_split = True
        found: list[str] | None = None
        before = ""
        for word in words:
            if set(word) <= set("();&|<>"):  # the end of a command
                if found:
                    yield found
                found = None
            elif found is not None:
                found.append(word)
            elif word.rpartition("/")[2] == program and not re.match(r"--?\w[^=]*$", before):  # not an option's value
                found = []
            before = word
        if found:
            yield found


def _without_substitutions(shell: str) -> str:
    inmost = re.compile(r"\$\(\([^()]*\)\)|\$\([^()]*\)|\$\{[^{}]*\}|\$[\w?@#]")
    while True:
        shell, count = inmost.subn("0", re.sub(r"\$[A-Za-z_]\w*", "0", shell))
        if not count:
            return shell
