"""`sqsd-filter store`: look at scores that runs share, and tidy them up."""

from __future__ import annotations

import click

from sqsd_filter.cli import output

place = click.argument("place", metavar="DIR|URL")
as_json = click.option("--json", "json_output", is_flag=True, help="Print the result as one JSON object.")


@click.group()
def store() -> None:
    """Look at scores that runs share (--score-store), and tidy them up."""


@store.command()
@place
@as_json
def info(place: str, json_output: bool) -> None:
    """Say which scores there are: by pack, model and settings."""
    from sqsd_filter.pipeline.scores.upkeep import describe

    output.show(describe(place), as_json=json_output, quiet=False, text=output.stored)


@store.command()
@place
@as_json
def compact(place: str, json_output: bool) -> None:
    """Join many small files into few; safe while runs read and write."""
    from sqsd_filter.pipeline.scores.upkeep import compact_all

    output.show(compact_all(place), as_json=json_output, quiet=False, text=output.compacted)
