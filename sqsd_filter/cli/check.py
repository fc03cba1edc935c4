"""`sqsd-filter check`: can a score of this pack, model and machine be trusted?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

from sqsd_filter.cli import options, output


@click.command()
@click.argument("pack", metavar="PACK")
@options.option("--rows", metavar="SRC", help="Score these rows; default: 24 short harmless ones that come along.")
@options.option("--drop-top", default="5%", show_default=True, metavar="SHARE", help="The cut that rows are held to.")
@options.shared_state
@options.model
@options.rows
@options.manners
@click.pass_context
def check(context: click.Context, **params: Any) -> None:
    """Score the same rows in several ways and compare: exit 1 where scores as asked for can't be trusted.

    Rows in batches and alone, bfloat16 and float32, attention kernels, a GPU and the CPU, the fast and the dense form.
    """
    from sqsd_filter.pipeline.check import check_pack

    display = output.begin(context)
    found = check_pack(
        rows=params["rows"],
        scorer=options.scorer_of(context),
        columns=options.columns_of(params),
        limit=params["limit"],
        streaming=params["streaming"],
        drop_top=params["drop_top"],
        progress=display,
    )
    output.show(found, as_json=params["json_output"], quiet=params["quiet"], text=table)
    context.exit(0 if found["trusted"] else 1)


def table(found: Mapping[str, Any]) -> str:
    """What there is to see: one line a comparison, then what is wrong and what mends it."""
    pack = found["pack"]
    shared = f", shared state: {pack['shared_state']}" if pack["shared_state"] else ""
    lines = [
        f"{pack['name']} ({pack['fingerprint']}) on {pack['base_model']}, {found['dtype']} on {found['device']}, "
        f"{found['attention']} attention{shared}",
        f"{found['rows']} rows, {found['unscored'] + found['unreadable']} without a score, cut at {found['cut']}",
        "",
    ]
    names = list(found["comparisons"][0]["difference"]) if found["comparisons"] else []
    cells = [["", "rows", *(f"|Δ {name}|" for name in names), "rank", "sides", "verdict"]]
    for one in found["comparisons"]:
        verdict = ("ok" if one["ok"] else "NOT OK") + ("" if one["used"] else ", not in use")
        rank = "" if one["rank"] is None else f"{one['rank']:.4f}"
        sides = "" if one["sides"] is None else str(one["sides"])
        cells.append(
            [one["name"], str(one["rows"]), *(f"{d:.1e}" for d in one["difference"].values()), rank, sides, verdict]
        )
    wide = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for first, *numbers, last in cells:
        middle = "  ".join(f"{cell:>{width}}" for cell, width in zip(numbers, wide[1:-1], strict=True))
        lines.append(f"  {first:<{wide[0]}}  {middle}  {last}")
    may = found["tolerance"]
    lines += [
        "",
        f"In float32 two ways may differ by {may['exact']:g}. With one in bfloat16, ranks must correlate by "
        f"{may['rank']:g}",
        f"and {may['sides']:.0%} of the dropped rows, at least one, may change places with kept ones.",
    ]
    lines += [f"Not compared: {gap['name']} ({gap['why'].rstrip('.')})." for gap in found["skipped"]]
    for one in found["comparisons"]:
        if not one["ok"]:
            lines.append(f"{one['name']}: {one['why']}. {'Use' if one['used'] else 'Stay with'} {one['mend']}.")
    gap = f": there is no comparison {', '.join(found['missing'])}" if found["missing"] else ""
    return "\n".join([*lines, f"Scores as asked for {'can' if found['trusted'] else 'cannot'} be trusted{gap}."])
