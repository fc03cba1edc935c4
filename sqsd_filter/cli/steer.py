"""`sqsd-filter steer`: what a pack's directions do to its model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from sqsd_filter.cli import options, output


@click.command()
@click.argument("pack", metavar="PACK")
@options.option("--rows", required=True, metavar="SRC", help="Harmful prompts, and safe and unsafe answers to them.")
@options.option(
    "--alpha", default="-1:1:0.25", show_default=True, metavar="RANGE", help="start:stop:step, or a list as -1,0,1."
)
@options.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("steer"),
    show_default=True,
    metavar="DIR",
    help="Folder for the curves, their picture and the generated answers.",
)
@options.option("--prompt-column", metavar="NAME", help="Column with the prompt; default: prompt.")
@options.option("--safe-column", metavar="NAME", help="Column with the safe answer; default: chosen.")
@options.option("--unsafe-column", metavar="NAME", help="Column with the unsafe answer; default: rejected.")
@options.option("--limit", type=click.IntRange(min=1), metavar="N", help="Take the first N rows only.")
@options.option(
    "--max-new-tokens",
    type=click.IntRange(min=1),
    default=48,
    show_default=True,
    metavar="TOKENS",
    help="Length of the generated answers.",
)
@options.device
@options.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16"]),
    default="float32",
    show_default=True,
    help="In bfloat16 the effect of a small V is lost when activations are rounded.",
)
@options.trust_remote_code
@click.option("--record", "keep_record", is_flag=True, help="Write the result into the pack, which must be a folder.")
@click.option("--json", "json_output", is_flag=True, help="Print the result as one JSON object.")
@click.option("-q", "--quiet", is_flag=True, help="Print errors only.")
def steer(pack: str, rows: str, out: Path, alpha: str, keep_record: bool, **params: Any) -> None:
    """Move the model of PACK along each of its directions, and see whether it refuses less (danger) or more (safety).

    The same command goes on where it was interrupted.
    """
    from sqsd_filter.directions import validation
    from sqsd_filter.directions.steering import run
    from sqsd_filter.directions.steering.curves import parse_alphas
    from sqsd_filter.directions.steering.rows import TrialColumns
    from sqsd_filter.scoring.scorer import SQSDScorer

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
        display.note("not recorded: without safe and unsafe answers this would replace the verdicts that are there")
    output.show(report, as_json=params["json_output"], quiet=params["quiet"], text=_table)


def _table(report: Mapping[str, Any]) -> str:
    """A block a direction: the verdict, and a line for each α."""
    found = report["settings"]["rows"]
    lines = [f"{found['prompts']:,} prompts, {found['pairs']:,} of them with a safe and an unsafe answer"]
    for curve in report["directions"]:
        lines += ["", f"{curve['name']} {_verdict(curve)}"]
        lines.append("      α   refusals (95 % interval)   degenerate      safe    unsafe    margin")
        for p in curve["points"]:
            interval = f"({p['refusal_low']:.1%} to {p['refusal_high']:.1%})"
            lines.append(
                f"{p['alpha']:>7g}   {p['refusal_rate']:>6.1%} {interval:<17}   {p['degenerate_rate']:>10.1%}"
                + "".join(f"{_number(p[name]):>10}" for name in ("safe", "unsafe", "margin"))
            )
    return "\n".join(lines)


def _verdict(curve: Mapping[str, Any]) -> str:
    refusals = f"refusals {_course(curve['refusals'], curve['expected']['refusals'])}"
    if curve["steers"] is None:
        return f"has no safe and unsafe answers to be judged by; {refusals}"
    margin = f"margin {_course(curve['margin'], curve['expected']['margin'])}"
    largest = max((abs(r["change"]) for r in curve["random"] if r["change"] is not None), default=None)
    change = f"by {_number(curve['margin']['change'], '+')}, along random directions by up to {_number(largest)}"
    return f"{'steers' if curve['steers'] else 'does not steer'}: {margin} {change}; {refusals}"


def _course(trend: Mapping[str, Any], sign: int) -> str:
    """Whether a curve goes where it is expected to go."""
    towards, back = ("rising", "falling")[::sign]
    if trend["against"] is None:
        return "not finite"
    if trend["against"]:
        return f"{back} at {trend['against']} steps"
    return f"strictly {towards}" if trend["monotone"] else f"never {back}"


def _number(value: float | None, sign: str = "") -> str:
    return "-" if value is None else f"{value:{sign}.3f}"
