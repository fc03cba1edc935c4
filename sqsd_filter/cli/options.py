"""Options that several commands share, under the headings of --help."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import click

from sqsd_filter.cli.base import Decorator, Option, check_scorer, complete_files, complete_scorers, together
from sqsd_filter.cli.settings import read_config
from sqsd_filter.corpus.row_formats import FORMATS
from sqsd_filter.corpus.row_reading import LABELS
from sqsd_filter.pipeline.rules import CONSENSUS
from sqsd_filter.scoring.baselines import ANCHORED, NAMES
from sqsd_filter.scoring.scorer_settings import SYSTEM

PACK = "smollm2-135m"
CUT, MODEL, ROWS, ENGINE, OUTPUT, HUB, RUN = "Cut", "Model", "Rows", "Engine", "Output", "Hub", "Run"
OPTIONS = "Options"  # of commands that have too few for headings
at_least_one = click.IntRange(min=1)


def variable(name: str) -> str:
    """The environment variable of an option: SQSD_FILTER_DROP_TOP for --drop-top."""
    return "SQSD_FILTER_" + name.removeprefix("--").split("/")[0].replace("-", "_").upper()


def option(heading: str, name: str, *more: str, **settings: Any) -> Decorator[Any]:  # noqa: ANN401  click's own
    """A click option under a heading, that can also be set in the environment."""
    return click.option(name, *more, cls=Option, heading=heading, envvar=variable(name), **settings)


def plain(heading: str, name: str, *more: str, **settings: Any) -> Decorator[Any]:  # noqa: ANN401  click's own
    """A click option under a heading, for the command line only."""
    return click.option(name, *more, cls=Option, heading=heading, **settings)


def _two_paths(context: click.Context, parameter: click.Parameter, dest: str | None) -> str | None:
    """Refuse a command line with one path, which could be either."""
    sources: tuple[str, ...] = context.params.get("sources", ())
    if context.resilient_parsing or (sources and dest is not None):
        return dest
    example = {
        "score": "sqsd-filter score {} scores.parquet",
        "select": "sqsd-filter select {} out/ --drop-top 5%",
    }.get(context.info_name or "", "sqsd-filter {} out/ --drop-top 5%")
    metavar = parameter.metavar
    if dest is None:
        raise click.UsageError(f"SRC and {metavar} are missing. For example: {example.format('in.jsonl')}", context)
    raise click.UsageError(
        f"{metavar} is missing: only '{dest}' is given. For example: {example.format(shlex.quote(dest))}", context
    )


sources = click.argument("sources", nargs=-1, metavar="SRC...", shell_complete=complete_files)
dest = click.argument("dest", required=False, metavar="DEST", callback=_two_paths, shell_complete=complete_files)

cuts = together(
    option(
        CUT,
        "--drop-top",
        metavar="SHARE",
        help="Drop this share of the scored rows, riskiest first: 5%, 5pct or 0.05.",
    ),
    option(CUT, "--drop-count", type=int, metavar="N", help="Drop the N riskiest rows."),
    option(CUT, "--max-risk", type=float, metavar="X", help="Drop every row with a risk above X."),
    option(CUT, "--keep-lowest", type=int, metavar="N", help="Keep the N rows with the lowest risk."),
    option(
        CUT,
        "--above-reference",
        metavar="SHARE",
        help="Drop every row that is riskier than this share of the pack's benign reference rows, for example 99%.",
    ),
    option(
        CUT,
        "--per-group",
        metavar="COLUMN",
        help="Share the cut among the groups of rows with equal values in COLUMN. No group is emptied, except above a "
        "reference.",
    ),
    option(CUT, "--per-split", is_flag=True, help="Cut each split on its own instead of all splits together."),
    option(
        CUT,
        "--weights",
        is_flag=True,
        help="Drop no row. Add the column sqsd_weight, which falls from 1 to 0 as the risk grows.",
    ),
)
combined = together(
    option(
        CUT,
        "--scores",
        multiple=True,
        metavar="FILE|DIR",
        help="Scores of the same rows by another pack. Repeat it for several packs.",
    ),
    option(
        CUT,
        "--consensus",
        type=click.Choice(list(CONSENSUS)),
        help="With --scores: take the mean of a row's ranks by all packs as its risk, or the largest rank.",
    ),
)

scored_by = together(
    option(
        CUT,
        "--risk",
        show_default="the one that the scores were cut by",
        metavar="NAME",
        help="Cut by this risk that the scores have: sqsd, the pack's own, or a linear probe beside it.",
    ),
    plain(
        CUT,
        "--pack",
        show_default="the one that the scores name",
        metavar="NAME|DIR|HUB",
        help="Pack that gave the scores, if that is not known or if it has been moved. Its reference rows are used.",
    ),
)

pack = option(
    MODEL,
    "--pack",
    default=PACK,
    show_default=True,
    metavar="NAME|DIR|HUB",
    help="Direction pack: a built-in name, a folder or a repository of the Hub.",
)
device = option(
    MODEL,
    "--device",
    show_default="a GPU if there is one, else cpu",
    metavar="NAME",
    help="Device that runs the model: cpu, cuda, cuda:1, ...",
)
dtype = option(
    MODEL,
    "--dtype",
    type=click.Choice(["float32", "bfloat16"]),
    show_default="bfloat16 on a GPU, else float32",
    help="Number format of the model's weights.",
)
trust_remote_code = option(
    MODEL, "--trust-remote-code", is_flag=True, help="Run model code that a repository of the Hub brings along."
)
model = together(
    option(
        MODEL,
        "--model",
        show_default="the pack's",
        metavar="DIR|HUB",
        help="Score with this base model instead of the pack's.",
    ),
    device,
    dtype,
    option(
        MODEL,
        "--max-length",
        type=int,
        show_default="the pack's",
        metavar="TOKENS",
        help="Truncate conversations to this many tokens.",
    ),
    option(
        MODEL,
        "--token-budget",
        type=int,
        show_default="by the device",
        metavar="TOKENS",
        help="Largest number of tokens in a batch, padding included.",
    ),
    option(
        MODEL,
        "--attention",
        show_default="the model's",
        metavar="NAME",
        help="Attention kernel, for example eager or sdpa.",
    ),
    trust_remote_code,
    option(
        MODEL,
        "--system",
        type=click.Choice(list(SYSTEM)),
        default=SYSTEM[0],
        show_default=True,
        help="A system prompt that the chat template refuses: put it before the first user turn (fold), or make its "
        "row a template_error (error).",
    ),
)
risk = option(
    MODEL,
    "--risk",
    show_default="the pack's own",
    metavar="NAME",
    help="Compute this risk of the pack alone: sqsd, its own, or another one that `pack inspect` lists. The built-in "
    "pack has one called unsafe.",
)
shared_state = option(
    MODEL,
    "--shared-state",
    metavar="NAME",
    help="Fast mode: take the gradients for all directions at this one state of the pack. The scores differ.",
)
scorer = together(
    option(
        MODEL,
        "--scorer",
        callback=check_scorer,
        shell_complete=complete_scorers,
        default="sqsd",
        show_default=True,
        metavar="NAME",
        help="Scoring method: SQSD, one of its ablations, a published baseline, a chat guard or a trained judge. One "
        f"of {', '.join(NAMES)}.",
    ),
    option(
        MODEL,
        "--unsafe-anchors",
        metavar="SRC",
        help=f"Conversations with unsafe answers, for the scorers {', '.join(ANCHORED)}.",
    ),
    option(
        MODEL,
        "--safe-anchors",
        metavar="SRC",
        help=f"Conversations with safe answers, for the scorers {', '.join(ANCHORED)}.",
    ),
    option(MODEL, "--seed", type=int, show_default="0", metavar="N", help="Seed for `--scorer random`."),
)
scoring = together(pack, risk, shared_state, scorer, model)

rows = together(
    option(
        ROWS,
        "--format",
        "row_format",
        show_default="detected from the rows",
        metavar="NAME",
        help=f"Format of the rows: {', '.join(FORMATS[:-1])} or {FORMATS[-1]}.",
    ),
    option(ROWS, "--messages-column", metavar="NAME", help="Column with the list of turns."),
    option(ROWS, "--prompt-column", metavar="NAME", help="Column with the prompt, as text or a list of turns."),
    option(ROWS, "--context-column", metavar="NAME", help="Column with text to add to the prompt, on its own line."),
    option(ROWS, "--answer-column", metavar="NAME", help="Column with the answer, as text or a list of turns."),
    option(ROWS, "--system-column", metavar="NAME", help="Column with the system prompt."),
    option(
        ROWS, "--history-column", metavar="NAME", help="Column with earlier turns, or pairs of questions and answers."
    ),
    option(ROWS, "--tools-column", metavar="NAME", help="Column with the tools that the model may call."),
    option(ROWS, "--label-column", metavar="NAME", help="Column that says whether the answer is wanted (KTO)."),
    option(
        ROWS,
        "--labels",
        type=click.Choice(list(LABELS)),
        default=LABELS[0],
        show_default=True,
        help="With a label column: score the rows with this label. The others are not learned, and get no score.",
    ),
    option(
        ROWS,
        "--strict",
        is_flag=True,
        help="Fail if a column or key that looks as if it changed what is learned is not read.",
    ),
    option(
        ROWS,
        "--streaming",
        is_flag=True,
        help="Read files of the Hub from there at each pass instead of keeping copies of them.",
    ),
    option(
        ROWS, "--limit", type=at_least_one, show_default="all rows", metavar="N", help="Read the first N rows only."
    ),
)
errors = option(
    ROWS,
    "--max-error-rate",
    default="50%",
    show_default=True,
    metavar="SHARE",
    help="Fail with exit code 4 if more than this share of the rows can't be scored.",
)
on_error = option(
    ROWS,
    "--on-error",
    type=click.Choice(["quarantine", "keep", "fail"]),
    default="quarantine",
    show_default=True,
    help="Rows that can't be scored: write them to errors (quarantine), keep them, or fail with exit code 4.",
)

engine = together(
    option(
        ENGINE,
        "--engine",
        type=click.Choice(["auto", "local", "ray"]),
        default="auto",
        show_default=True,
        help="Run the model in this process (local) or on Ray (ray). auto takes Ray if there are several GPUs or "
        "replicas, or a cluster.",
    ),
    option(
        ENGINE,
        "--replicas",
        type=int,
        show_default="as many as the GPUs hold",
        metavar="N",
        help="Number of copies of the model on Ray.",
    ),
    option(
        ENGINE,
        "--gpus-per-replica",
        type=float,
        show_default="1, or 0 without GPUs",
        metavar="X",
        help="GPUs for each replica: 0.5 puts two replicas on a GPU, 2 spreads a large model over two GPUs.",
    ),
    option(
        ENGINE, "--ray-address", show_default="$RAY_ADDRESS", metavar="HOST:PORT", help="Ray cluster to connect to."
    ),
    option(
        ENGINE,
        "--score-store",
        metavar="DIR|URL",
        help="Share scores with other runs: rows with a score there need no model, and new scores are added.",
    ),
)

metrics_file = option(
    RUN, "--metrics-file", metavar="FILE", help="Keep the run's figures in this file, in Prometheus' text format."
)
dry_run = plain(RUN, "--dry-run", is_flag=True, help="Print format, rows, tokens and estimated time. Write nothing.")
as_json = plain(RUN, "--json", "json_output", is_flag=True, help="Print the result as one JSON object.")
quiet = plain(RUN, "-q", "--quiet", is_flag=True, help="Print errors only.")
common = together(
    plain(
        RUN,
        "--config",
        type=click.Path(path_type=Path, dir_okay=False),
        is_eager=True,
        expose_value=False,
        callback=read_config,
        metavar="FILE",
        help="TOML file with any of these settings.",
    ),
    as_json,
    quiet,
    plain(RUN, "-v", "--verbose", is_flag=True, help="Also print what libraries log."),
)
