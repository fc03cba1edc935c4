"""The command `sqsd-filter`: without a subcommand it filters. Nothing heavy is imported before it is needed."""

from __future__ import annotations

import os
import shlex
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import click

from sqsd_filter.cli import options, output
from sqsd_filter.cli.check import check
from sqsd_filter.cli.drift import drift
from sqsd_filter.cli.evaluate import evaluate
from sqsd_filter.cli.pack import pack
from sqsd_filter.cli.report import report
from sqsd_filter.cli.states import states
from sqsd_filter.cli.steer import steer
from sqsd_filter.cli.store import store
from sqsd_filter.errors import SQSDError, UsageError

DEFAULT = "filter"


class FilterFirst(click.Group):
    """A group whose first argument may be a source: then the subcommand is `filter`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] not in ("--help", "-h", "--version"):
            args = [DEFAULT, *args]
        return super().parse_args(ctx, args)


@click.group(
    cls=FilterFirst,
    context_settings={"help_option_names": ["-h", "--help"]},
    subcommand_metavar="SRC... DEST --drop-top 5% | COMMAND ...",
)
@click.version_option(package_name="sqsd-filter", prog_name="sqsd-filter")
def cli() -> None:
    """Put a safety-risk column on every row of an instruction corpus, and write it back without its riskiest rows.

    \b
        sqsd-filter in.jsonl out/ --drop-top 5%

    is short for `sqsd-filter filter ...`; see `sqsd-filter filter --help` for its options.
    """


@contextmanager
def _engine(params: dict[str, Any]) -> Iterator[Any]:
    from sqsd_filter.pipeline.stage.engines import choose_engine

    asked = {name: params[name] for name in ("replicas", "gpus_per_replica", "ray_address", "device")}
    engine = choose_engine(params["engine"], **asked)
    with ExitStack() as stack:
        # Ray's driver prints what its processes complain of to stdout, which belongs to the results.
        elsewhere = sys.stderr if params["verbose"] else stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
        stack.enter_context(redirect_stdout(elsewhere))
        stack.callback(engine.close)
        yield engine


def _push(params: dict[str, Any]) -> Any:
    """The repository that gets the result, if there is one besides or instead of a folder."""
    from sqsd_filter.pipeline.publishing.hub import HUB, PushTo

    rows = params["push_rows"] and [name.strip() for name in params["push_rows"].split(",")]
    how = {"rows": rows, **{name: params[name] for name in ("private", "revision", "create_pr")}}
    if params["push_to"]:
        return PushTo(params["push_to"], **how)
    if params["dest"].startswith(HUB):
        return PushTo.at(params["dest"], **how)
    if any(value not in (None, False) for value in how.values()) or how["private"] is False:
        raise UsageError("--private, --public, --revision, --create-pr and --push-rows say how to push: add --push-to.")
    return None


def _record(context: click.Context) -> dict[str, Any]:
    """What the report says of how it was asked for."""
    return {"settings": options.settings(context), "command": options.command(context)}


def _finish(context: click.Context, report: dict[str, Any]) -> None:
    params = context.params
    dest = params["dest"]
    output.show(report, as_json=params["json_output"], quiet=params["quiet"], text=lambda r: output.summary(r, dest))


def _score_and_report(context: click.Context, run: Callable[..., dict[str, Any]], **more: Any) -> None:
    """What the commands that score have in common: `run` is the API's function, `more` what only it takes.

    With --dry-run, say what it would cost instead of doing it.
    """
    from sqsd_filter.pipeline.forecast import estimate
    from sqsd_filter.pipeline.metrics import Metrics
    from sqsd_filter.pipeline.selecting.policy import Policy
    from sqsd_filter.pipeline.writing.destination import spare

    params, display = context.params, output.begin(context)
    with Metrics(None if params["dry_run"] else params["metrics_file"], display) as metrics:
        Policy.of(params.get("on_error", "quarantine"), params["max_error_rate"])
        if params["overwrite"]:
            spare(Path(params["dest"]), options.for_scorer(context).values())
        common = {name: params[name] for name in ("limit", "score_store", "streaming")}
        common |= {
            "columns": options.columns_of(params),
            "scorer": options.scorer_of(context),
            "progress": metrics.meter,
        }
        if params["dry_run"]:
            guess = estimate(params["sources"], params["dest"], **common)
            output.show(guess, as_json=params["json_output"], quiet=False, text=output.forecast)
            return
        with _engine(params) as engine:
            metrics.report = run(
                params["sources"],
                params["dest"],
                **common,
                engine=engine,
                max_error_rate=params["max_error_rate"],
                explain=params["explain"],
                overwrite=params["overwrite"],
                record=_record(context),
                **more,
            )
    _finish(context, metrics.report)


@cli.command(DEFAULT)
@options.sources
@options.dest
@options.cuts
@options.scoring
@options.engine
@options.stored
@options.rows
@options.errors
@options.on_error
@options.written
@options.pushed
@options.explain
@options.overwrite
@options.dry_run
@options.manners
@click.pass_context
def filter_command(context: click.Context, **params: Any) -> None:
    """Score every row of SRC... and write the rows to the folder or URL DEST without the riskiest."""
    from sqsd_filter.pipeline.run import filter_dataset
    from sqsd_filter.pipeline.selecting.selection import Cut
    from sqsd_filter.pipeline.writing.writers import Output

    cut, how = options.one_cut(context), {name: params[name] for name in options.WRITTEN}
    Cut.of(**cut)
    Output.of(**how)
    _score_and_report(context, filter_dataset, **cut, **how, on_error=params["on_error"], push=_push(params))


@cli.command()
@options.sources
@options.dest
@options.scoring
@options.engine
@options.stored
@options.rows
@options.errors
@options.per_module
@options.explain
@options.overwrite
@options.dry_run
@options.manners
@click.pass_context
def score(context: click.Context, **params: Any) -> None:
    """Write all rows of SRC... to the file DEST.parquet with their score columns; drop none."""
    from sqsd_filter.pipeline.run import score_dataset

    _score_and_report(context, score_dataset)


@cli.command()
@options.sources
@options.dest
@options.cuts
@options.combined
@options.on_error
@options.written
@options.pushed
@options.overwrite
@options.manners
@click.pass_context
def select(context: click.Context, **params: Any) -> None:
    """Cut again, without a model: SRC... are scored files, or the folder of an earlier run."""
    from sqsd_filter.pipeline.run import select_dataset

    display = output.begin(context)
    report = select_dataset(
        params["sources"],
        params["dest"],
        **options.one_cut(context),
        **{name: params[name] for name in (*options.WRITTEN, "scores", "consensus")},
        on_error=params["on_error"],
        push=_push(params),
        overwrite=params["overwrite"],
        progress=display,
        record=_record(context),
    )
    _finish(context, report)


cli.add_command(check)
cli.add_command(pack)
cli.add_command(steer)
cli.add_command(store)
cli.add_command(drift)
cli.add_command(evaluate)
cli.add_command(report)
pack.add_command(states)


INTERRUPTED = 130  # exit code


def run() -> None:
    """A process of the command's own: once it was interrupted it leaves at once, whatever threads still do, because
    what native code does at the exit of an interpreter may change the exit code."""
    try:
        main()
    except SystemExit as leaving:
        if leaving.code != INTERRUPTED:
            raise
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(INTERRUPTED)


def _terminate(*_: object) -> None:
    raise KeyboardInterrupt


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and leave with its exit code."""
    given = sys.argv[1:] if arguments is None else arguments
    signal.signal(signal.SIGTERM, _terminate)
    try:
        code = cli.main(args=given, prog_name="sqsd-filter", standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except click.ClickException as problem:
        problem.show(sys.stderr)
        sys.exit(2 if isinstance(problem, click.UsageError) else problem.exit_code)
    except (KeyboardInterrupt, click.Abort):
        click.echo("Interrupted. What was written is kept; the same command does the rest:", err=True)
        click.echo("  " + shlex.join(["sqsd-filter", *given]), err=True)
        sys.exit(INTERRUPTED)
    except SQSDError as problem:
        if os.environ.get("SQSD_FILTER_DEBUG"):
            raise
        click.echo(f"Error: {problem}", err=True)
        sys.exit(problem.exit_code)
    except OSError as problem:
        if os.environ.get("SQSD_FILTER_DEBUG"):
            raise
        click.echo(f"Error: {problem}.", err=True)
        sys.exit(1)
    except Exception as problem:
        if os.environ.get("SQSD_FILTER_DEBUG"):
            raise
        click.echo(
            f"Error: unexpected {type(problem).__name__}: {problem}. This is a bug; SQSD_FILTER_DEBUG=1 shows where.",
            err=True,
        )
        sys.exit(1)
