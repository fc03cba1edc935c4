"""`sqsd-filter report`: write the page of a finished run again, with the results of other commands."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from sqsd_filter.cli import options, output
from sqsd_filter.cli.base import Command, complete_files, examples


@click.command(
    cls=Command,
    short_help="Write a run's page again, with other commands' results.",
    epilog=examples(
        (
            "Show an evaluation, a drift and a steering on the page of a run",
            "sqsd-filter report out/ --evaluation study/ --drift drift/ --steering steer/",
        ),
    ),
)
@click.argument("out", type=click.Path(path_type=Path), metavar="OUT", shell_complete=complete_files)
@options.option(
    options.OUTPUT,
    "--evaluation",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Show the results of `sqsd-filter evaluate ... DIR`.",
)
@options.option(
    options.OUTPUT,
    "--drift",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Show the results of `sqsd-filter drift ... --out DIR`.",
)
@options.option(
    options.OUTPUT,
    "--steering",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Show the results of `sqsd-filter steer ... --out DIR`.",
)
@options.common
@click.pass_context
def report(context: click.Context, /, out: Path, **_: object) -> None:
    """Write report.html of the run in OUT again, and its plots as PNG files.

    OUT is the folder that `sqsd-filter` or `sqsd-filter select` wrote, or the file that `sqsd-filter score` wrote.
    """
    from sqsd_filter.directions.drift_section import drift_section
    from sqsd_filter.directions.steering.section import steering_section
    from sqsd_filter.evaluation.section import evaluation_section
    from sqsd_filter.pipeline.page.page import remake_page

    params = context.params
    output.begin(context)
    draw = {"evaluation": evaluation_section, "drift": drift_section, "steering": steering_section}
    page, *plots = remake_page(out, (draw[name](params[name]) for name in draw if params[name] is not None))
    files = {"page": str(page), "bytes": page.stat().st_size, "plots": [str(path) for path in plots]}
    output.show(files, as_json=params["json_output"], quiet=params["quiet"], text=_text)


def _text(files: Mapping[str, Any]) -> str:
    return f"{files['page']} ({files['bytes']:,} bytes), plots in {Path(files['plots'][0]).parent}"
