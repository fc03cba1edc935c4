"""What can go wrong for a user: one base error and a class for each kind, with the exit code of the command."""

import re


class SQSDError(Exception):
    """Any failure whose message is meant for the user: it names the cause and the fix."""

    exit_code = 1


def option(name: str) -> str:
    """An option, spelled as in Python and as on the command line, for a sentence."""
    return f"{name} (--{name.replace('_', '-')})"


def as_flags(sentence: str) -> str:
    """A sentence with its options as on the command line only: `drop_top (--drop-top)` becomes `--drop-top`."""

    def as_flag(both: re.Match[str]) -> str:
        name, flags = both.groups()
        return flags if name.startswith("Columns(") or both[0] == option(name) else both[0]

    return re.sub(r"(?:\bcolumns=)?(\bColumns\([^()]*\)|\b\w+) \((--[\w-]+(?:, --[\w-]+)*)\)", as_flag, sentence)


def first_line(problem: BaseException) -> str:
    """The first line of an error's message, or the name of its class where it has none."""
    return next(iter(str(problem).strip().splitlines()), type(problem).__name__)


class ModelError(SQSDError):
    """The model or its tokenizer can't be loaded, or can't be used for scoring."""


class PackError(SQSDError):
    """A direction pack or one of its adapters is missing, damaged or of an unsupported kind."""


class JudgeError(SQSDError):
    """A judge is missing, damaged or of an unsupported kind, or gave no verdict."""


class UsageError(SQSDError):
    """The request contradicts itself or can't be understood."""

    exit_code = 2


class InputError(SQSDError):
    """An input file can't be read, or its rows can't be understood as conversations."""

    exit_code = 3


class RowErrorBudgetExceeded(SQSDError):
    """More rows could not be scored than the run allows."""

    exit_code = 4


class DestinationExists(SQSDError):
    """The destination holds something other than this run."""

    exit_code = 5
