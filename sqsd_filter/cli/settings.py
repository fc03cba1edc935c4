"""What the options of a command amount to: values and where each came from, and the objects that the API takes."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from sqsd_filter.errors import UsageError
from sqsd_filter.scoring.baselines import MEANT_FOR

if TYPE_CHECKING:
    from sqsd_filter.corpus.row_formats import Columns
    from sqsd_filter.scoring.pack import Pack
    from sqsd_filter.scoring.scorer import BatchedScorer, SQSDScorer

CUTS = ("drop_top", "drop_count", "max_risk", "keep_lowest", "above_reference")
CUT_HOW = ("per_group", "per_split", "weights")
WRITTEN = ("to", "shard_size", "with_scores", "rows_column", "json_as", "percentile")
_ORIGINS = {
    ParameterSource.COMMANDLINE: "flag",
    ParameterSource.ENVIRONMENT: "environment",
    ParameterSource.DEFAULT_MAP: "config",
    ParameterSource.DEFAULT: "default",
}
_UNRECORDED = {"config", "json_output", "quiet", "verbose", "dry_run", "sources", "dest"}
_CHANGES_NO_ROW = {
    *("device", "token_budget", "explain", "engine", "replicas", "gpus_per_replica", "ray_address"),
    *("score_store", "metrics_file"),
    *("streaming", "max_error_rate", "overwrite", "push_to", "private", "revision", "create_pr", "push_rows"),
}


def read_config(context: click.Context, _: click.Parameter, path: Path | None) -> None:
    """Make the settings of a TOML file the command's defaults. Raises `UsageError` for one that no command has."""
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


def origins(context: click.Context) -> dict[str, dict[str, object]]:
    """Every setting's value and origin (flag, environment, config or default), for the report."""
    settings: dict[str, dict[str, object]] = {}
    for name, parameter in _recorded(context.command).items():
        source = context.get_parameter_source(parameter)
        origin = _ORIGINS.get(source, "default") if source else "default"
        settings[name] = {"value": context.params[parameter], "origin": origin}
    return settings


def command_line(context: click.Context) -> list[str]:
    """The command line without the flags that change no row of the result."""
    name = () if context.info_name == "filter" else (context.info_name or "",)
    words = ["sqsd-filter", *name, *map(str, context.params["sources"]), str(context.params["dest"])]
    for parameter in context.command.params:
        value = context.params.get(parameter.name or "")
        given = context.get_parameter_source(parameter.name or "") is ParameterSource.COMMANDLINE
        if given and isinstance(parameter, click.Option) and parameter.name not in _UNRECORDED | _CHANGES_NO_ROW:
            values = value if isinstance(value, tuple) else (value,)
            words += (
                [parameter.opts[0]] if parameter.is_flag else [w for v in values for w in (parameter.opts[0], str(v))]
            )
    return words


def one_cut(context: click.Context) -> dict[str, Any]:
    """The cut options to use: a flag's cut takes the place of the environment's, and that of the config file's."""
    how = {name: context.params[name] for name in CUT_HOW}
    for source in (ParameterSource.COMMANDLINE, ParameterSource.ENVIRONMENT, ParameterSource.DEFAULT_MAP):
        given = {c: context.params[c] for c in CUTS if context.get_parameter_source(c) is source}
        if given:
            return given | how
    return how


def columns(params: dict[str, Any]) -> Columns:
    """How rows are read, by the options under "Rows"."""
    from sqsd_filter.corpus.row_formats import Columns

    names = ("messages", "prompt", "context", "answer", "system", "history", "tools", "label")
    named = {name: params[f"{name}_column"] for name in names}
    return Columns(format=params["row_format"], labels=params["labels"], strict=params["strict"], **named)


def for_scorer(context: click.Context) -> dict[str, Any]:
    """The anchors and the seed that the scorer takes.

    One that it does not use is included if a flag gave it, so that it is refused. The environment and the config file
    may have those of several scorers.
    """
    params = context.params
    return {
        name: params[name]
        for name, scorers in MEANT_FOR.items()
        if params.get(name) is not None
        and (params["scorer"] in scorers or context.get_parameter_source(name) is ParameterSource.COMMANDLINE)
    }


def scorer(context: click.Context) -> BatchedScorer:
    """The scorer that the options under "Model" name."""
    from sqsd_filter.pipeline.anchors import read_anchors
    from sqsd_filter.scoring.baselines import make_scorer

    params = context.params
    given: dict[str, Any] = {
        name: value if name == "seed" else read_anchors(value) for name, value in for_scorer(context).items()
    }
    return make_scorer(
        params.get("scorer", "sqsd"),
        _pack(params["pack"], params),
        **given,
        **_model(params),
        per_module=params.get("per_module", False),
    )


def sqsd_scorer(where: str, params: dict[str, Any]) -> SQSDScorer:
    """The scorer of this pack, with the other options under "Model"."""
    from sqsd_filter.scoring.scorer import SQSDScorer

    return SQSDScorer(_pack(where, params), **_model(params))


def _pack(where: str, params: dict[str, Any]) -> Pack:
    from sqsd_filter.scoring.pack import load_pack

    pack, risk, shared_state = load_pack(where), params.get("risk"), params.get("shared_state")
    pack = pack if risk is None else pack.with_risk(risk)
    return pack if shared_state is None else pack.at_one_state(shared_state)


def _model(params: dict[str, Any]) -> dict[str, Any]:
    names = ("model", "device", "dtype", "max_length", "token_budget", "attention", "trust_remote_code", "system")
    return {name: params[name] for name in names}
