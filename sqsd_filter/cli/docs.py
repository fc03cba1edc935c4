"""docs/cli.md, written from the commands themselves: `python -m sqsd_filter.cli.docs > docs/cli.md`."""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Iterator

import click

from sqsd_filter.cli.base import Command
from sqsd_filter.cli.main import cli

WIDTH = 120
_CODE = re.compile(r"(?<![\w`/-])--[a-z][a-z-]*\w|\S*<\w+>|\b(?:org/name|sqsd_weight|load_from_disk)\b")

INTRO = """\
<!-- Written by `python -m sqsd_filter.cli.docs > docs/cli.md`: change the commands, or the text there. -->

# The command line

    sqsd-filter SRC... DEST --drop-top 5%
    sqsd-filter COMMAND ...

Without a command's name `sqsd-filter` filters. SRC is a file, a glob, a folder, a dataset of the Hub, a URL or `-`
([rows](rows.md) has all of them); several are read one after the other. `sqsd-filter COMMAND --help` shows what is
below.
"""

SETTINGS = """\
## Where a setting comes from

A flag wins over the environment, the environment over the config file, and that over the default. `report.json`
records the value of each setting and where it came from.

- **Environment**: `SQSD_FILTER_` and the name of the option, for example `SQSD_FILTER_DROP_TOP=5pct` or
  `SQSD_FILTER_PER_SPLIT=1`.
- **Config file**: `--config settings.toml`, with the names of options as keys, for example `drop-top = "5%"`. Several
  commands may share one file; each takes the settings that it has.

Other variables:

| variable | what it does |
| --- | --- |
| `SQSD_FILTER_CACHE` | folder for the built-in model and for uploads under way; default `~/.cache/sqsd_filter` |
| `SQSD_FILTER_LONGEST_ROW` | bytes that a row of a text file may have; default 16777216 (16 MiB) |
| `SQSD_FILTER_DEBUG=1` | show the traceback of an error |
| `NO_COLOR=1` | draw progress bars without colour |
| `RAY_ADDRESS` | the Ray cluster to connect to, if `--ray-address` is not given |
| `HF_TOKEN` | the Hub's token, if you have not run `hf auth login` |
"""

OUTPUT = """\
## Output and exit codes

stdout carries the result only: a summary, or with `--json` the report as one JSON object. Progress, notes and errors go
to stderr: bars on a terminal, otherwise a line every 30 seconds. `--quiet` prints errors only.

An error names the cause and the fix.

| exit code | meaning |
| --- | --- |
| 0 | done, or done before |
| 1 | failure; `check`: the scores can't be trusted |
| 2 | wrong usage |
| 3 | an input can't be read |
| 4 | more rows than allowed have no score |
| 5 | DEST holds something else |
| 130 | interrupted by Ctrl-C or SIGTERM; the same command resumes |
"""

COMPLETION = """\
## Shell completion

The shell completes commands, options, their choices, and files. Add one line to the file that your shell reads:

| shell | file | line |
| --- | --- | --- |
| bash (4.4 or newer) | `~/.bashrc` | `eval "$(_SQSD_FILTER_COMPLETE=bash_source sqsd-filter)"` |
| zsh | `~/.zshrc` | `eval "$(_SQSD_FILTER_COMPLETE=zsh_source sqsd-filter)"` |
| fish | `~/.config/fish/completions/sqsd-filter.fish` | `_SQSD_FILTER_COMPLETE=fish_source sqsd-filter \\| source` |
"""


def page() -> str:
    """The whole page."""
    context = click.Context(cli, info_name="sqsd-filter")
    contexts = list(_commands(cli, context))
    parts = [INTRO, _contents(contexts), SETTINGS, _flags_only(contexts), OUTPUT, COMPLETION]
    return "\n".join([*parts, *map(_section, contexts)])


def _commands(group: click.Group, context: click.Context) -> Iterator[click.Context]:
    """A context for each command below a group, in the order of --help."""
    for name in group.list_commands(context):
        within = click.Context(group.commands[name], context, name)
        if isinstance(within.command, click.Group):
            yield from _commands(within.command, within)
        else:
            yield within


def _contents(contexts: list[click.Context]) -> str:
    lines = ["| command | what it does |", "| --- | --- |"]
    for context in contexts:
        anchor = context.command_path.replace(" ", "-")
        lines.append(f"| [`{context.command_path}`](#{anchor}) | {context.command.short_help} |")
    return "\n".join(lines) + "\n"


def _flags_only(contexts: list[click.Context]) -> str:
    """Which options have no environment variable."""
    packs = [context for context in contexts if context.command_path.split()[1] in ("pack", "store")]
    names = dict.fromkeys(
        max(parameter.opts, key=len)
        for context in contexts
        for parameter in context.command.params
        if isinstance(parameter, click.Option) and not parameter.envvar and context not in packs
    )
    listed = ", ".join(f"`{name}`" for name in names)
    return _wrapped(f"These options have no variable: {listed}, and those of the commands below `pack` and `store`.")


def _section(context: click.Context) -> str:
    command = context.command
    assert isinstance(command, Command)
    usage = " ".join([context.command_path, *command.collect_usage_pieces(context)])
    parts = [f"## {context.command_path}\n", f"    {usage}\n", _prose(command.help or "")]
    if command.epilog:
        parts.append(textwrap.indent(command.epilog.replace("\b\n", ""), "    ") + "\n")
    for heading, headed in command.headed_options(context).items():
        options = [option for option in headed if "--help" not in option.opts]
        rows = [f"| {_names(option, context)} | {_default(option)} | {_help(option)} |" for option in options]
        if rows:
            parts.append("\n".join([f"| {heading} | default | |", "| --- | --- | --- |", *rows]) + "\n")
    return "\n".join(parts)


def _prose(text: str) -> str:
    """A docstring's paragraphs, wrapped; those that click leaves alone become code."""
    parts = []
    for paragraph in inspect.cleandoc(text).split("\n\n"):
        if paragraph.startswith("\b\n"):
            parts.append(textwrap.indent(paragraph.removeprefix("\b\n"), "    ") + "\n")
        else:
            parts.append(_wrapped(_marked(" ".join(paragraph.split()))))
    return "\n".join(parts)


def _wrapped(text: str) -> str:
    return textwrap.fill(text, WIDTH, break_on_hyphens=False, break_long_words=False) + "\n"


def _marked(text: str) -> str:
    """Options and names as code."""
    pieces = re.split(r"(`[^`]*`)", text)
    return "".join(piece if k % 2 else _CODE.sub(r"`\g<0>`", piece) for k, piece in enumerate(pieces))


def _names(option: click.Option, context: click.Context) -> str:
    record = option.get_help_record(context)
    assert record is not None
    return f"`{_cell(record[0])}`"


def _default(option: click.Option) -> str:
    if option.required:
        return "required"
    if isinstance(option.show_default, str):
        return _cell(_marked(option.show_default))
    if option.is_flag:
        return "off"
    if not option.show_default:
        return "none"
    values = option.default if isinstance(option.default, list | tuple) else [option.default]
    return f"`{_cell(','.join(map(str, values)))}`"


def _help(option: click.Option) -> str:
    return _cell(_marked(option.help or ""))


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    click.echo(page(), nl=False)
