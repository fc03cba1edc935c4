"""`sqsd-filter steer`: what a pack's directions do to its model when it is moved along them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from sqsd_filter.cli import options, output
from sqsd_filter.cli.base import Command, examples


@click.command(
    cls=Command,
    short_help="Move a pack's model along its directions.",
    epilog=examples(
        ("Does each direction change what the model refuses?", "sqsd-filter steer my-pack --rows harmful.jsonl"),
        (
            "Take fewer steps, and keep the verdict in the pack",
            "sqsd-filter steer my-pack/ --rows harmful.jsonl --alpha -1,0,1 --record",
        ),
    ),
)
@click.argument("pack", metavar="PACK")
@options.option(
    options.ROWS,
    "--rows",
    required=True,
    metavar="SRC",
    help="Harmful prompts, with a safe and an unsafe answer to each if there are any.",
)
@options.option(options.ROWS, "--prompt-column", show_default="prompt", metavar="NAME", help="Column with the prompt.")
@options.option(
    options.ROWS, "--safe-column", show_default="chosen", metavar="NAME", help="Column with the safe answer."
)
@options.option(
    options.ROWS, "--unsafe-column", show_default="rejected", metavar="NAME", help="Column with the unsafe answer."
)
@options.option(
    options.ROWS,
    "--limit",
    type=options.at_least_one,
    show_default="all rows",
    metavar="N",
    help="Read the first N rows only.",
)
@options.option(
    options.MODEL,
    "--alpha",
    default="-1:1:0.25",
    show_default=True,
    metavar="RANGE",
    help="Lengths of the move, as start:stop:step or as a list like -1,0,1.",
)
@options.option(
    options.MODEL,
    "--max-new-tokens",
    type=options.at_least_one,
    default=48,
    show_default=True,
    metavar="TOKENS",
    help="Longest generated answer.",
)
@options.device
@options.option(
    options.MODEL,
    "--dtype",
    type=click.Choice(["float32", "bfloat16"]),
    default="float32",
    show_default=True,
    help="Number format of the model's weights. In bfloat16, rounding hides the effect of a small direction.",
)
@options.trust_remote_code
@options.option(
    options.OUTPUT,
    "--out",
    type=click.Path(path_type=Path),
    default=Path("steer"),
    show_default=True,
    metavar="DIR",
    help="Folder for the curves, a picture and the generated answers.",
)
@options.plain(
    options.OUTPUT,
    "--record",
    "keep_record",
    is_flag=True,
    help="Write the result into the pack, which must be a folder.",
)
@options.as_json
@options.quiet
@click.pass_context
def steer(
    context: click.Context, /, pack: str, rows: str, out: Path, alpha: str, keep_record: bool, **_: object
) -> None:
    """Move the model of PACK along each of its directions, and count refusals.

    Along danger the model should refuse less, along safety more. The same command resumes an interrupted run.
    """
    from sqsd_filter.directions import validation
    from sqsd_filter.directions.steering import run
    from sqsd_filter.directions.steering.curves import parse_alphas
    from sqsd_filter.directions.steering.rows import TrialColumns
    from sqsd_filter.scoring.scorer import SQSDScorer

    params = context.params
    output.listen(quiet=params["quiet"])
    alphas = parse_alphas(alpha)
    home = validation.recordable(pack) if keep_record else None
    model = {name: params[name] for name in ("device", "dtype", "trust_remote_code")}
    display = output.Display(quiet=params["quiet"])
    report = run.steer(
        SQSDScorer(pack, **model),
        rows,
        out,
        alphas=alphas,
        columns=TrialColumns(*(params[f"{kind}_column"] for kind in ("prompt", "safe", "unsafe"))),
        limit=params["limit"],
        max_new_tokens=params["max_new_tokens"],
        progress=display,
    )
    if home is not None and not validation.record(home, validation.STEERING, report):
        display.note("not recorded: without safe and unsafe answers there is no verdict to replace the recorded one")
    output.show(report, as_json=params["json_output"], quiet=params["quiet"], text=_table)


def _table(report: Mapping[str, Any]) -> str:
    """One block per direction: its verdict, then one line per α."""
    rows = report["settings"]["rows"]
    lines = [f"{rows['prompts']:,} prompts, {rows['pairs']:,} of them with a safe and an unsafe answer"]
    for curve in report["directions"]:
        lines += ["", f"{curve['name']} {_verdict(curve)}"]
        cells = [["α", "refusals (95 % interval)", "degenerate", "safe", "unsafe", "margin"]]
        for point in curve["points"]:
            interval = f"({point['refusal_low']:.1%} to {point['refusal_high']:.1%})"
            rates = [f"{point['refusal_rate']:.1%} {interval}", f"{point['degenerate_rate']:.1%}"]
            scores = [_number(point[name]) for name in ("safe", "unsafe", "margin")]
            cells.append([f"{point['alpha']:g}", *rates, *scores])
        lines += [f"  {line}" for line in output.aligned(cells)]
    return "\n".join(lines)


def _verdict(curve: Mapping[str, Any]) -> str:
    refusals = f"refusals {_course(curve['refusals'], curve['expected']['refusals'])}"
    if curve["steers"] is None:
        return f"has no verdict without safe and unsafe answers; {refusals}"
    margin = f"margin {_course(curve['margin'], curve['expected']['margin'])}"
    largest = max((abs(r["change"]) for r in curve["random"] if r["change"] is not None), default=None)
    change = f"by {_number(curve['margin']['change'], '+')}, along random directions by up to {_number(largest)}"
    return f"{'steers' if curve['steers'] else 'does not steer'}: {margin} {change}; {refusals}"


def _course(trend: Mapping[str, Any], sign: int) -> str:
    """Whether a curve rises or falls, as expected or not. `sign` is 1 if it should rise, -1 if it should fall."""
    towards, back = ("rising", "falling")[::sign]
    if trend["against"] is None:
        return "not finite"
    if trend["against"]:
        return f"{back} at {trend['against']} steps"
    return f"strictly {towards}" if trend["monotone"] else f"never {back}"


def _number(value: float | None, sign: str = "") -> str:
    return "-" if value is None else f"{value:{sign}.3f}"
