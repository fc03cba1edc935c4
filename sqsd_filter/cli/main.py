"""The command `sqsd-filter`: without a command's name it filters. Nothing heavy is imported before it is needed."""

from __future__ import annotations

import io
import os
import shlex
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sqsd_filter.cli import options, output, output_options, settings
from sqsd_filter.cli.base import DEFAULT, FilterFirst, examples
from sqsd_filter.cli.check import check
from sqsd_filter.cli.drift import drift
from sqsd_filter.cli.evaluate import evaluate
from sqsd_filter.cli.explain import explain
from sqsd_filter.cli.pack import pack
from sqsd_filter.cli.report import report
from sqsd_filter.cli.states import states
from sqsd_filter.cli.steer import steer
from sqsd_filter.cli.store import store
from sqsd_filter.errors import SQSDError, UsageError, as_flags

if TYPE_CHECKING:
    from sqsd_filter.pipeline.options import Scoring, Writing
    from sqsd_filter.pipeline.publishing.hub import PushTo
    from sqsd_filter.pipeline.report import FinishedReport
    from sqsd_filter.pipeline.selecting.selection import Cut
    from sqsd_filter.pipeline.stage.engines import Engine
    from sqsd_filter.progress import Progress


def _show_version(context: click.Context, _: click.Parameter, asked: bool) -> None:
    if asked and not context.resilient_parsing:
        from sqsd_filter import __version__

        click.echo(f"sqsd-filter, version {__version__}")
        context.exit()


@click.group(
    cls=FilterFirst,
    context_settings={"help_option_names": ["-h", "--help"]},
    subcommand_metavar="SRC... DEST --drop-top 5% | COMMAND ...",
)
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_show_version,
    help="Show the version and exit.",
)
def cli() -> None:
    """Give every row of an instruction dataset a safety risk, and write it back without its riskiest rows.

    \b
        sqsd-filter in.jsonl out/ --drop-top 5%

    This is short for the command filter: `filter --help` shows its options.
    """


@contextmanager
def _engine(params: dict[str, Any]) -> Iterator[Engine]:
    from sqsd_filter.pipeline.stage.choice import choose_engine

    asked = {name: params[name] for name in ("replicas", "gpus_per_replica", "ray_address", "device")}
    engine = choose_engine(params["engine"], **asked)
    with ExitStack() as stack:
        # Ray's driver prints the errors of its processes to stdout, which is for the result only.
        elsewhere = sys.stderr if params["verbose"] else stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
        stack.enter_context(redirect_stdout(elsewhere))
        stack.callback(engine.close)
        yield engine


def _push(params: dict[str, Any]) -> PushTo | None:
    """The repository that gets the result, if there is one beside or instead of a folder."""
    from sqsd_filter.corpus.repositories import HUB
    from sqsd_filter.pipeline.publishing.hub import PushTo

    rows = params["push_rows"] and [name.strip() for name in params["push_rows"].split(",")]
    how = {"rows": rows, **{name: params[name] for name in ("private", "revision", "create_pr")}}
    if params["push_to"]:
        return PushTo(params["push_to"], **how)
    if params["dest"].startswith(HUB):
        return PushTo.at(params["dest"], **how)
    if any(value not in (None, False) for value in how.values()) or how["private"] is False:
        raise UsageError("--private, --public, --revision, --create-pr and --push-rows need --push-to: add it.")
    return None


def _writing(params: dict[str, Any]) -> Writing:
    from sqsd_filter.pipeline.options import Writing

    names = (*settings.WRITTEN, "on_error", "overwrite")
    return Writing(push=_push(params), **{name: params[name] for name in names})


def _record(context: click.Context) -> dict[str, Any]:
    """The settings and the command line, for the report."""
    return {"settings": settings.origins(context), "command": settings.command_line(context)}


def _finish(context: click.Context, report: FinishedReport) -> None:
    params = context.params
    dest = params["dest"]
    output.show(report, as_json=params["json_output"], quiet=params["quiet"], text=lambda r: output.summary(r, dest))


def _score_and_report(
    context: click.Context, run: Callable[[Scoring, Progress], FinishedReport], cut: Cut | None = None
) -> None:
    """The part that `filter` and `score` share. With --dry-run, print the estimated cost instead of the run."""
    from sqsd_filter.pipeline.forecast import estimate
    from sqsd_filter.pipeline.metrics import Metrics
    from sqsd_filter.pipeline.options import Scoring
    from sqsd_filter.pipeline.selecting.policy import Policy
    from sqsd_filter.pipeline.writing.destination import spare

    params, display = context.params, output.begin(context)
    with Metrics(None if params["dry_run"] else params["metrics_file"], display) as metrics:
        Policy.of(params.get("on_error", "quarantine"), params["max_error_rate"])
        if params["overwrite"]:
            spare(Path(params["dest"]), settings.for_scorer(context).values())
        scoring = Scoring(
            scorer=settings.scorer(context),
            columns=settings.columns(params),
            **{name: params[name] for name in ("limit", "score_store", "streaming", "max_error_rate", "explain")},
        )
        if params["dry_run"]:
            scoring = scoring.of_cut(cut) if cut is not None else scoring
            guess = estimate(params["sources"], params["dest"], scoring, progress=metrics.meter)
            output.show(guess, as_json=params["json_output"], quiet=False, text=output.forecast)
            return
        with _engine(params) as engine:
            report = metrics.report = run(replace(scoring, engine=engine), metrics.meter)
    _finish(context, report)


@cli.command(
    DEFAULT,
    short_help="Write rows back without the riskiest ones (the default).",
    epilog=examples(
        ("Drop the riskiest 5 % of a file's rows", "sqsd-filter in.jsonl out/ --drop-top 5%"),
        (
            "Drop 5 % of a dataset of the Hub, shared among its categories",
            "sqsd-filter org/corpus out/ --drop-top 5% --per-group category",
        ),
        ("Print rows, tokens and time first, and write nothing", "sqsd-filter in.jsonl out/ --drop-top 5% --dry-run"),
    ),
)
@options.sources
@options.dest
@options.cuts
@options.scoring
@options.rows
@options.errors
@options.on_error
@options.engine
@output_options.written
@output_options.percentile
@output_options.explain
@output_options.overwrite
@output_options.pushed
@options.metrics_file
@options.dry_run
@options.common
@click.pass_context
def filter_command(context: click.Context, /, **_: object) -> None:
    """Score every row of SRC... and write the rows to DEST, a folder, file or URL, without the riskiest ones.

    SRC is a file, a glob, a folder, a dataset of the Hub (org/name), a URL, or `-` for standard input. Give exactly one
    of --drop-top, --drop-count, --max-risk, --keep-lowest and --above-reference. The same command resumes an
    interrupted run.

    A DEST such as out.jsonl, out.json (also .gz, .zst), out.parquet or out.arrow is one file with the kept rows. All
    else is in the folder DEST.sqsd.
    """
    from sqsd_filter.pipeline.selecting.selection import Cut

    params = context.params
    cut = Cut.of(**settings.one_cut(context))
    from sqsd_filter.pipeline.writing.one_file import file_form

    writing = _writing(params)
    writing.output(file_form(params["dest"]))  # also before a dry run
    from sqsd_filter.pipeline.run import filter_rows

    def run(scoring: Scoring, progress: Progress) -> FinishedReport:
        record = _record(context)
        return filter_rows(params["sources"], params["dest"], cut, scoring, writing, progress=progress, record=record)

    _score_and_report(context, run, cut)


@cli.command(
    short_help="Add the scores to all rows; drop none.",
    epilog=examples(
        ("Score all rows of a file", "sqsd-filter score in.jsonl scores.parquet"),
        (
            "Score with your own pack, on one GPU",
            "sqsd-filter score in.jsonl scores.parquet --pack my-pack --device cuda",
        ),
        ("Score by a baseline, to compare", "sqsd-filter score in.jsonl length.parquet --scorer length"),
    ),
)
@options.sources
@options.dest
@options.scoring
@options.rows
@options.errors
@options.engine
@output_options.percentile
@output_options.per_module
@output_options.explain
@output_options.overwrite
@options.metrics_file
@options.dry_run
@options.common
@click.pass_context
def score(context: click.Context, /, **_: object) -> None:
    """Write all rows of SRC... to DEST, a parquet file, with their scores. No row is dropped.

    The same command resumes an interrupted run.
    """
    from sqsd_filter.pipeline.run import score_dataset

    params = context.params

    def run(scoring: Scoring, progress: Progress) -> FinishedReport:
        return score_dataset(
            params["sources"],
            params["dest"],
            scoring,
            percentile=params["percentile"],
            overwrite=params["overwrite"],
            progress=progress,
            record=_record(context),
        )

    _score_and_report(context, run)


@cli.command(
    short_help="Cut scored rows again, without a model.",
    epilog=examples(
        ("Drop 10 % by the scores in a file", "sqsd-filter select scores.parquet out/ --drop-top 10%"),
        ("Cut the rows of an earlier run elsewhere", "sqsd-filter select out/ other/ --max-risk 30"),
        (
            "Cut by the scores of two packs",
            "sqsd-filter select a/ out/ --scores b/ --consensus max --drop-top 5%",
        ),
    ),
)
@options.sources
@options.dest
@options.cuts
@options.combined
@options.scored_by
@options.on_error
@output_options.written
@output_options.percentile
@output_options.overwrite
@output_options.pushed
@options.common
@click.pass_context
def select(context: click.Context, /, **_: object) -> None:
    """Cut rows by the scores that they have, without a model, and write them to DEST, a folder, file or URL.

    SRC... are files that `sqsd-filter score` wrote, or the folder or file of an earlier run. Give exactly one of
    --drop-top, --drop-count, --max-risk, --keep-lowest and --above-reference.
    """
    from sqsd_filter.pipeline.run import select_dataset
    from sqsd_filter.pipeline.selecting.selection import Cut

    params = context.params
    display = output.begin(context)
    report = select_dataset(
        params["sources"],
        params["dest"],
        Cut.of(**settings.one_cut(context)),
        _writing(params),
        scores=params["scores"],
        consensus=params["consensus"],
        risk=params["risk"],
        pack=params["pack"],
        progress=display,
        record=_record(context),
    )
    _finish(context, report)


pack.add_command(states)
for command in (explain, check, report, evaluate, drift, steer, pack, store):
    cli.add_command(command)


INTERRUPTED = 130  # exit code


def run() -> None:
    """Run the command line in a process of its own.

    After an interruption the process ends at once, whatever its threads do: native code that runs at the exit of an
    interpreter may change the exit code.
    """
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
    """Run the command line. Raises `SystemExit` with its exit code."""
    given = sys.argv[1:] if arguments is None else arguments
    signal.signal(signal.SIGTERM, _terminate)
    try:
        code = cli.main(args=given, prog_name="sqsd-filter", standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except click.ClickException as problem:
        said = io.StringIO()
        problem.show(said)
        click.echo(output.visible(said.getvalue()), err=True, nl=False)
        sys.exit(2 if isinstance(problem, click.UsageError) else problem.exit_code)
    except (KeyboardInterrupt, click.Abort):
        click.echo(
            "Interrupted. Nothing was written. The same command starts again:"
            if "--dry-run" in given
            else "Interrupted. What was written is kept. The same command resumes:",
            err=True,
        )
        click.echo("  " + output.visible(shlex.join(["sqsd-filter", *given])), err=True)
        sys.exit(INTERRUPTED)
    except SQSDError as problem:
        if os.environ.get("SQSD_FILTER_DEBUG"):
            raise
        output.complain(f"Error: {as_flags(str(problem))}")
        sys.exit(problem.exit_code)
    except OSError as problem:
        if os.environ.get("SQSD_FILTER_DEBUG"):
            raise
        output.complain(f"Error: {problem}.")
        sys.exit(1)
    except Exception as problem:
        if os.environ.get("SQSD_FILTER_DEBUG"):
            raise
        output.complain(
            f"Error: unexpected {type(problem).__name__}: {problem}. This is a bug; SQSD_FILTER_DEBUG=1 shows where."
        )
        sys.exit(1)
