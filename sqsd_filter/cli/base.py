"""Click with what this command line adds: options under headings, examples, "did you mean", and `filter` by default."""

from __future__ import annotations

import re
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.shell_completion import CompletionItem

from sqsd_filter.errors import UsageError
from sqsd_filter.scoring.baselines import NAMES, find_scorer
from sqsd_filter.storage.secrets import check_address

if TYPE_CHECKING:
    from click.types import OptionHelpExtra

DEFAULT = "filter"
FLAGS_WIDTH = 26  # columns for the flags in --help, so that the texts of all sections begin in one column
_BARE_WORD = re.compile(r"[A-Za-z][A-Za-z_-]*")  # no path, URL, glob or id of the Hub

F = TypeVar("F", bound=Callable[..., object])
Decorator = Callable[[F], F]


class Option(click.Option):
    """An option with the heading that it stands under in --help and docs/cli.md."""

    def __init__(self, *names: Any, heading: str = "Options", **settings: Any) -> None:  # noqa: ANN401  click's own
        super().__init__(*names, **settings)
        self.heading = heading

    def get_help_extra(self, ctx: click.Context) -> OptionHelpExtra:
        """Leave out the parentheses around a default that is described in words, and what numbers are allowed."""
        extra = super().get_help_extra(ctx)
        extra.pop("range", None)
        if isinstance(self.show_default, str):
            extra["default"] = self.show_default
        return extra


def together(*decorators: Decorator[F]) -> Decorator[F]:
    """One decorator that adds all of these options, in this order."""

    def apply(command: F) -> F:
        for decorator in reversed(decorators):
            command = decorator(command)
        return command

    return apply


def examples(*pairs: tuple[str, str]) -> str:
    """An epilog of command lines, each below a line that says what it does."""
    return "\n\n".join(f"\b\n# {what}\n{line}" for what, line in pairs)


class Command(click.Command):
    """A command whose help shows its options under their headings."""

    def invoke(self, ctx: click.Context) -> object:
        """Click's. Raises `UsageError` first for an address with a secret, which the run would record."""
        for value in ctx.params.values():
            for word in value if isinstance(value, tuple) else (value,):
                if isinstance(word, str):
                    check_address(word)
        return super().invoke(ctx)

    def headed_options(self, context: click.Context) -> dict[str, list[click.Option]]:
        """The options by heading, in the order in which the headings first appear; --help is under the last one."""
        sections: dict[str, list[click.Option]] = {}
        for parameter in self.get_params(context):
            if isinstance(parameter, click.Option) and not parameter.hidden:
                heading = parameter.heading if isinstance(parameter, Option) else next(reversed(sections), "Options")
                sections.setdefault(heading, []).append(parameter)
        return sections

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for heading, parameters in self.headed_options(ctx).items():
            records = [record for parameter in parameters if (record := parameter.get_help_record(ctx))]
            with formatter.section(heading):
                formatter.write_dl([(flags.ljust(FLAGS_WIDTH), text) for flags, text in records], col_max=FLAGS_WIDTH)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002  click's signature
        if self.epilog:
            with formatter.section("Examples"):
                formatter.write_text(self.epilog)


class Group(click.Group):
    """A group that lists its commands in the order in which they were added, and suggests one for a mistyped name."""

    command_class = Command

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002  click's signature
        return list(self.commands)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Click's, with a hint at the command that was meant. Raises `click.UsageError`."""
        if args[0] not in self.commands and not args[0].startswith("-") and not ctx.resilient_parsing:
            hint = f" Did you mean '{close}'?" if (close := self.closest(args[0])) else ""
            raise click.UsageError(f"'{ctx.command_path}' has no command '{args[0]}'.{hint}", ctx)
        return super().resolve_command(ctx, args)

    def closest(self, word: str) -> str | None:
        """The command that a mistyped word stands for, if there is one; it may be in a group of this one."""
        names = {name: name for name in self.commands}
        for name, command in self.commands.items():
            if isinstance(command, click.Group):
                names = {inner: f"{name} {inner}" for inner in command.commands} | names
        matches = get_close_matches(word, names, n=1)
        return names[matches[0]] if matches else None


class FilterFirst(Group):
    """A group whose first word may be a source: then the command is `filter`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] not in ("--help", "-h", "--version"):
            if not ctx.resilient_parsing:
                self._check_typing(ctx, args[0])
            args = [DEFAULT, *args]
        return super().parse_args(ctx, args)

    def _check_typing(self, ctx: click.Context, word: str) -> None:
        """Raise `click.UsageError` for a word that is no source and much like a command's name."""
        if _BARE_WORD.fullmatch(word) and not Path(word).exists() and (close := self.closest(word)):
            raise click.UsageError(f"'{word}' is neither a command nor a file or folder. Did you mean '{close}'?", ctx)

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Files, commands, and the options of `filter`. Files are first: in bash they set aside what is before them."""
        command = self.commands[DEFAULT]
        options = command.shell_complete(click.Context(command, ctx, DEFAULT), incomplete)
        return [*_files(incomplete), *super().shell_complete(ctx, incomplete), *options]


def complete_files(_: click.Context, __: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Let the shell complete the names of files and folders."""
    return _files(incomplete)


def complete_scorers(_: click.Context, __: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Let the shell complete the names of scorers, up to a colon."""
    names = [name[: name.find(":") + 1] or name for name in NAMES]
    return [CompletionItem(name) for name in names if name.startswith(incomplete)]


def check_scorer(context: click.Context, parameter: click.Parameter, name: str) -> str:
    """The scorer's name. Raises `click.BadParameter` where there is no such scorer."""
    try:
        find_scorer(name)
    except UsageError as problem:
        raise click.BadParameter(str(problem), context, parameter) from problem
    return name


def _files(incomplete: str) -> list[CompletionItem]:
    return [] if incomplete.startswith("-") else [CompletionItem(incomplete, type="file")]
