"""Options that several commands share, and where each value came from: flag, environment, config file or default."""

from __future__ import annotations

import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from sqsd_filter.errors import UsageError
from sqsd_filter.pipeline.rules import CONSENSUS
from sqsd_filter.scoring.baselines import ANCHORED, MEANT_FOR, SCORERS

WRITTEN = ("to", "shard_size", "with_scores")
CUTS = ("drop_top", "drop_count", "max_risk", "keep_lowest")
CUT_HOW = ("per_group", "per_split", "weights")
_ORIGINS = {
    ParameterSource.COMMANDLINE: "flag",
    ParameterSource.ENVIRONMENT: "environment",
    ParameterSource.DEFAULT_MAP: "config",
    ParameterSource.DEFAULT: "default",
}
_UNRECORDED = {"config", "json_output", "quiet", "verbose", "dry_run", "sources", "dest"}
_BESIDES = {
    *("device", "token_budget", "explain", "engine", "replicas", "gpus_per_replica", "ray_address"),
    *("score_store", "metrics_file"),
    *("streaming", "max_error_rate", "overwrite", "push_to", "private", "revision", "create_pr", "push_rows"),
}
Decorator = Callable[[Any], Any]


def option(name: str, *args: Any, **kwargs: Any) -> Decorator:
    """A click option that can also be set in the environment, as SQSD_FILTER_ and its name."""
    variable = "SQSD_FILTER_" + name.removeprefix("--").split("/")[0].replace("-", "_").upper()
    return click.option(name, *args, envvar=variable, **kwargs)


def together(*decorators: Decorator) -> Decorator:
    def apply(command: Any) -> Any:
        for decorator in reversed(decorators):
            command = decorator(command)
        return command

    return apply


def _read_config(context: click.Context, _: click.Parameter, path: Path | None) -> None:
    if path is None:
        return
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as problem:
        raise UsageError(f"The config file {path} can't be read: {problem}.") from problem
    known = _recorded(context.command)
    given = {key.replace("-", "_"): value for key, value in table.items()}
    group = context.parent.command if context.parent else None
    anywhere = {name for c in getattr(group, "commands", {}).values() for name in _recorded(c)}  # files are shared
    if unknown := sorted(set(given) - set(known) - anywhere):
        raise UsageError(f"The config file {path} has unknown settings: {', '.join(unknown)}.")
    context.default_map = {known[name]: value for name, value in given.items() if name in known}


def _recorded(command: click.Command) -> dict[str, str]:
    """The settings of a command by the names people give them, and the parameters that hold them."""
    names = {p.opts[0].removeprefix("--").replace("-", "_"): p.name or "" for p in command.params}
    return {name: parameter for name, parameter in sorted(names.items()) if parameter not in _UNRECORDED}


def settings(context: click.Context) -> dict[str, dict[str, Any]]:
    """Every setting's value and origin, for the report."""
    found = {}
    for name, parameter in _recorded(context.command).items():
        source = context.get_parameter_source(parameter)
        origin = _ORIGINS.get(source, "default") if source else "default"
        found[name] = {"value": context.params[parameter], "origin": origin}
    return found


def command(context: click.Context) -> list[str]:
    """The command line without those flags that change no row of the result."""
    name = () if context.info_name == "filter" else (context.info_name or "",)
    words = ["sqsd-filter", *name, *map(str, context.params["sources"]), str(context.params["dest"])]
    for parameter in context.command.params:
        value = context.params.get(parameter.name or "")
        given = context.get_parameter_source(parameter.name or "") is ParameterSource.COMMANDLINE
        if given and isinstance(parameter, click.Option) and parameter.name not in _UNRECORDED | _BESIDES:
            values = value if isinstance(value, tuple) else (value,)
            words += (
                [parameter.opts[0]] if parameter.is_flag else [w for v in values for w in (parameter.opts[0], str(v))]
            )
    return words


def one_cut(context: click.Context) -> dict[str, Any]:
    """The cut options to use: a flag's cut sets aside the environment's, and that the config file's."""
    how = {name: context.params[name] for name in CUT_HOW}
    for source in (ParameterSource.COMMANDLINE, ParameterSource.ENVIRONMENT, ParameterSource.DEFAULT_MAP):
        given = {c: context.params[c] for c in CUTS if context.get_parameter_source(c) is source}
        if given:
            return given | how
    return how


def columns_of(params: dict[str, Any]) -> Any:
    """How rows are read, as the options of `rows` say."""
    from sqsd_filter.corpus.row_formats import Columns

    names = ("messages", "prompt", "context", "answer", "system", "history", "tools")
    return Columns(format=params["row_format"], **{name: params[f"{name}_column"] for name in names})


def for_scorer(context: click.Context) -> dict[str, Any]:
    """The anchors and the seed that the scorer takes. What it has no use for is here if a flag gave it, to be refused;
    the environment and the config file may be those of several scorers."""
    params = context.params
    return {
        name: params[name]
        for name, scorers in MEANT_FOR.items()
        if params.get(name) is not None
        and (params["scorer"] in scorers or context.get_parameter_source(name) is ParameterSource.COMMANDLINE)
    }


def scorer_of(context: click.Context) -> Any:
    """The scorer that the options of `scoring` name."""
    from sqsd_filter.pipeline.anchors import read_anchors
    from sqsd_filter.scoring.baselines import make_scorer
    from sqsd_filter.scoring.pack import load_pack

    params = context.params
    given: dict[str, Any] = {
        name: value if name == "seed" else read_anchors(value) for name, value in for_scorer(context).items()
    }
    pack, shared_state = load_pack(params["pack"]), params.get("shared_state")
    return make_scorer(
        params.get("scorer", "sqsd"),
        pack if shared_state is None else pack.at_one_state(shared_state),
        **given,
        model=params["model"],
        device=params["device"],
        dtype=params["dtype"],
        max_length=params["max_length"],
        token_budget=params["token_budget"],
        attention=params["attention"],
        per_module=params.get("per_module", False),
        trust_remote_code=params["trust_remote_code"],
    )


sources = click.argument("sources", nargs=-1, required=True, metavar="SRC...")
dest = click.argument("dest", metavar="DEST")

cuts = together(
    option("--drop-top", metavar="SHARE", help="Drop this share of the scored rows, riskiest first: 5%, 5pct or 0.05."),
    option("--drop-count", type=int, metavar="N", help="Drop the N riskiest rows."),
    option("--max-risk", type=float, metavar="X", help="Drop every row with a risk above X."),
    option("--keep-lowest", type=int, metavar="N", help="Keep the N rows with the lowest risk."),
    option("--per-group", metavar="COLUMN", help="Share the cut among groups of equal values there; empty none."),
    option("--per-split", is_flag=True, help="Cut each split on its own."),
    option("--weights", is_flag=True, help="Drop nothing: add sqsd_weight, from 1 down to 0 as risk grows."),
)
device = option("--device", metavar="NAME", help="cpu, cuda, cuda:1, ...; the default is a GPU if there is one.")
dtype = option(
    "--dtype", type=click.Choice(["float32", "bfloat16"]), help="Default: float32 on a CPU, bfloat16 on a GPU."
)
trust_remote_code = option("--trust-remote-code", is_flag=True, help="Run model code that comes from the Hub.")
combined = together(
    option("--scores", multiple=True, metavar="FILE|DIR", help="Scores of the same rows by another pack; repeatable."),
    option(
        "--consensus",
        type=click.Choice(list(CONSENSUS)),
        help="With --scores: a row's risk is the mean of its ranks by all packs, or the largest.",
    ),
)
model = together(
    option("--model", metavar="DIR|HUB", help="Score with this base model instead of the pack's."),
    device,
    dtype,
    option("--max-length", type=int, metavar="TOKENS", help="Truncate conversations here; default: the pack's."),
    option("--token-budget", type=int, metavar="TOKENS", help="Padded tokens in one batch; default: by the device."),
    option("--attention", metavar="NAME", help="Attention kernel, as eager or sdpa; default: the model's."),
    trust_remote_code,
)
shared_state = option(
    "--shared-state", metavar="NAME", help="Fast mode: all of the pack's directions at this one of its states."
)
scorer = together(
    option(
        "--scorer",
        type=click.Choice(list(SCORERS)),
        default="sqsd",
        show_default=True,
        help="What the risk is: SQSD's, a part of it, or another method's to compare it with.",
    ),
    option("--unsafe-anchors", metavar="SRC", help=f"Conversations with unsafe answers, for {', '.join(ANCHORED)}."),
    option("--safe-anchors", metavar="SRC", help="Conversations with safe answers, for the same."),
    option("--seed", type=int, metavar="N", help="Of the scorer random; default: 0."),
)
scoring = together(
    option("--pack", default="smollm2-135m", show_default=True, metavar="NAME|DIR|HUB", help="Direction pack."),
    shared_state,
    scorer,
    model,
)
engine = together(
    option(
        "--engine",
        type=click.Choice(["auto", "local", "ray"]),
        default="auto",
        show_default=True,
        help="In this process, or on Ray; auto takes Ray for several replicas or GPUs, or a cluster.",
    ),
    option("--replicas", type=int, metavar="N", help="Models side by side on Ray; default: what the GPUs hold."),
    option("--gpus-per-replica", type=float, metavar="X", help="A share of a GPU, or several for one large model."),
    option("--ray-address", metavar="HOST:PORT", help="Cluster to join; default: RAY_ADDRESS."),
)
stored = together(
    option("--score-store", metavar="DIR|URL", help="Scores that runs share: rows known there need no model."),
    option("--metrics-file", metavar="FILE", help="Keep the run's figures here in Prometheus' text format."),
)
rows = together(
    option(
        "--format",
        "row_format",
        metavar="NAME",
        help="messages, conversations, preference, alpaca, prompt-completion or question-answer; default: detected.",
    ),
    option("--messages-column", metavar="NAME", help="Column with the list of turns."),
    option("--prompt-column", metavar="NAME", help="Column with the prompt, as text or a list of turns."),
    option("--context-column", metavar="NAME", help="Column that joins the prompt on a line of its own."),
    option("--answer-column", metavar="NAME", help="Column with the answer, as text or a list of turns."),
    option("--system-column", metavar="NAME", help="Column with the system prompt."),
    option("--history-column", metavar="NAME", help="Column with pairs of earlier questions and answers."),
    option("--tools-column", metavar="NAME", help="Column with the tools that the model may call."),
    option("--streaming", is_flag=True, help="Read files of the Hub from there at each pass; keep none here."),
    option("--limit", type=click.IntRange(min=1), metavar="N", help="Take the first N rows only."),
)
errors = together(
    option(
        "--max-error-rate",
        default="50%",
        show_default=True,
        metavar="SHARE",
        help="Fail (exit 4) when more rows than this can't be scored.",
    ),
)
on_error = option(
    "--on-error",
    type=click.Choice(["quarantine", "keep", "fail"]),
    default="quarantine",
    show_default=True,
    help="Rows that can't be scored: set apart, kept, or a failure.",
)
written = together(
    option(
        "--to",
        type=click.Choice(["parquet", "arrow", "jsonl"]),
        default="parquet",
        show_default=True,
        help="Format of the rows in DEST; arrow is what load_from_disk reads, jsonl has the input's own lines.",
    ),
    option("--shard-size", default="500MB", show_default=True, metavar="SIZE", help="End a file at 100MB, 1GB, ..."),
    option("--with-scores", is_flag=True, help="Put the scores at the end of jsonl lines; other formats have them."),
)
pushed = together(
    option("--push-to", metavar="ORG/NAME", help="Dataset of the Hub that gets the result, in one commit."),
    option("--private/--public", default=None, help="Of a dataset that has to be made there; default: private."),
    option("--revision", metavar="BRANCH", help="Push to this branch."),
    option("--create-pr", is_flag=True, help="Push as a pull request."),
    option(
        "--push-rows",
        metavar="NAMES",
        help="Push these, as kept,dropped; default: kept, dropped and errors, to a public dataset kept only.",
    ),
)
explain = option(
    "--explain",
    type=click.IntRange(min=1),
    metavar="N",
    help="Tell which layers, module types and tokens make the N (up to 1,000) riskiest rows so; never pushed.",
)
per_module = option("--per-module", is_flag=True, help="Add each probe's value at each module, as a column of lists.")
overwrite = option("--overwrite", is_flag=True, help="Replace what DEST holds, once the new run is complete.")
dry_run = click.option("--dry-run", is_flag=True, help="Show format, rows, tokens and time; write nothing.")
manners = together(
    click.option(
        "--config",
        type=click.Path(path_type=Path, dir_okay=False),
        is_eager=True,
        expose_value=False,
        callback=_read_config,
        metavar="FILE",
        help="TOML file with any of these settings.",
    ),
    click.option("--json", "json_output", is_flag=True, help="Print the report as one JSON object."),
    click.option("-q", "--quiet", is_flag=True, help="Print errors only."),
    click.option("-v", "--verbose", is_flag=True, help="Print what libraries have to say, too."),
)
