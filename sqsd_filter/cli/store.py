"""`sqsd-filter store`: look at scores that runs share, and tidy them up."""

from __future__ import annotations

import click

from sqsd_filter.cli import output

location = click.argument("location", metavar="DIR|URL")
as_json = click.option("--json", "json_output", is_flag=True, help="Print the result as one JSON object.")


@click.group()
def store() -> None:
    """Look at scores that runs share (--score-store), and tidy them up."""


@store.command()
@location
@as_json
def info(location: str, json_output: bool) -> None:
    """Say which scores there are: by pack, model and settings."""
    from sqsd_filter.pipeline.scores.upkeep import describe

    output.show(describe(location), as_json=json_output, quiet=False, text=output.stored)


@store.command()
@location
@as_json
def compact(location: str, json_output: bool) -> None:
    """Join many small files into few; safe while runs read and write."""
    from sqsd_filter.pipeline.scores.upkeep import compact_all

    output.show(compact_all(location), as_json=json_output, quiet=False, text=output.compacted)
