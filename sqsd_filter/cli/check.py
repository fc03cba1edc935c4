"""`sqsd-filter check`: can the scores of this pack, model and machine be trusted?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

from sqsd_filter.cli import options, output, settings
from sqsd_filter.cli.base import Command, examples


@click.command(
    cls=Command,
    short_help="Test whether scores on this machine can be trusted.",
    epilog=examples(
        ("Check the built-in pack on this machine", "sqsd-filter check smollm2-135m"),
        ("Check on your own rows, with your own cut", "sqsd-filter check my-pack --rows in.jsonl --drop-top 10%"),
    ),
)
@click.argument("pack", metavar="PACK")
@options.option(
    options.CUT,
    "--drop-top",
    default="5%",
    show_default=True,
    metavar="SHARE",
    help="Count the rows that change sides at this cut.",
)
@options.risk
@options.shared_state
@options.model
@options.option(
    options.ROWS,
    "--rows",
    show_default="24 short harmless ones, built in",
    metavar="SRC",
    help="Rows to score.",
)
@options.rows
@options.common
@click.pass_context
def check(context: click.Context, /, **_: object) -> None:
    """Score the same rows in several ways, and compare the scores.

    The ways are: rows in batches and alone, bfloat16 and float32, each attention kernel, a GPU and the CPU, the fast
    and the dense computation. If the scores by your options can't be trusted, the exit code is 1, and the output names
    the flag that fixes it.
    """
    from sqsd_filter.pipeline.check import check_pack
    from sqsd_filter.scoring.scorer import SQSDScorer

    params, display = context.params, output.begin(context)
    scorer = settings.scorer(context)
    assert isinstance(scorer, SQSDScorer)  # there is no --scorer here
    report = check_pack(
        rows=params["rows"],
        scorer=scorer,
        columns=settings.columns(params),
        limit=params["limit"],
        streaming=params["streaming"],
        drop_top=params["drop_top"],
        progress=display,
    )
    output.show(report, as_json=params["json_output"], quiet=params["quiet"], text=table)
    context.exit(0 if report["trusted"] else 1)


def table(report: Mapping[str, Any]) -> str:
    """One line per comparison, then each failure with the flag that fixes it."""
    pack = report["pack"]
    shared = f", risk: {pack['risk']}" if pack["risk"] else ""
    shared += f", shared state: {pack['shared_state']}" if pack["shared_state"] else ""
    lines = [
        f"{pack['name']} ({pack['fingerprint']}) on {pack['base_model']}, {report['dtype']} on {report['device']}, "
        f"{report['attention']} attention{shared}",
        f"{report['rows']} rows, {report['unscored'] + report['unreadable']} without a score, cut at {report['cut']}",
        "",
    ]
    names = list(report["comparisons"][0]["difference"]) if report["comparisons"] else []
    cells = [["", "rows", *(f"|Δ {name}|" for name in names), "rank", "sides", "verdict"]]
    for comparison in report["comparisons"]:
        verdict = ("ok" if comparison["ok"] else "NOT OK") + ("" if comparison["used"] else ", not in use")
        rank = "" if comparison["rank"] is None else f"{comparison['rank']:.4f}"
        sides = "" if comparison["sides"] is None else str(comparison["sides"])
        differences = (f"{difference:.1e}" for difference in comparison["difference"].values())
        cells.append([comparison["name"], str(comparison["rows"]), *differences, rank, sides, verdict])
    lines += [f"  {line}" for line in output.aligned(cells, left=(0, len(cells[0]) - 1))]
    allowed = report["tolerance"]
    lines += [
        "",
        f"In float32 two ways may differ by {allowed['exact']:g}. If one is in bfloat16, the rank correlation must be",
        f"{allowed['rank']:g} or more, and {allowed['sides']:.0%} of the dropped rows, at least one, may change sides.",
    ]
    lines += [f"Not compared: {skipped['name']} ({skipped['why'].rstrip('.')})." for skipped in report["skipped"]]
    for comparison in report["comparisons"]:
        if not comparison["ok"]:
            verb = "Use" if comparison["used"] else "Stay with"
            lines.append(f"{comparison['name']}: {comparison['why']}. {verb} {comparison['fix']}.")
    gap = f": there is no comparison {', '.join(report['missing'])}" if report["missing"] else ""
    trusted = f"Scores by these options {'can' if report['trusted'] else 'cannot'} be trusted{gap}."
    return "\n".join([*lines, trusted])
