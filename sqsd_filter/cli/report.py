"""`sqsd-filter report`: the page of a finished run once more, with what other commands found in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from sqsd_filter.cli import options, output


@click.command()
@click.argument("out", type=click.Path(path_type=Path), metavar="OUT")
@options.option("--evaluation", type=click.Path(path_type=Path), metavar="DIR", help="What 'evaluate ... DIR' left.")
@options.option("--drift", type=click.Path(path_type=Path), metavar="DIR", help="What 'drift --out DIR' left.")
@options.option("--steering", type=click.Path(path_type=Path), metavar="DIR", help="What 'steer --out DIR' left.")
@options.manners
@click.pass_context
def report(context: click.Context, out: Path, **params: Any) -> None:
    """Make report.html of the run in OUT (a folder, or a file of scores) anew, and its plots as PNG files."""
    from sqsd_filter.directions.drift_section import drift_section
    from sqsd_filter.directions.steering.section import steering_section
    from sqsd_filter.evaluation.section import evaluation_section
    from sqsd_filter.pipeline.page.page import remake_page

    output.begin(context)
    draw = {"evaluation": evaluation_section, "drift": drift_section, "steering": steering_section}
    page, *plots = remake_page(out, (draw[name](params[name]) for name in draw if params[name] is not None))
    found = {"page": str(page), "bytes": page.stat().st_size, "plots": [str(path) for path in plots]}
    output.show(found, as_json=params["json_output"], quiet=params["quiet"], text=_text)


def _text(found: Any) -> str:
    return f"{found['page']} ({found['bytes']:,} bytes), plots in {Path(found['plots'][0]).parent}"
