"""`sqsd-filter store`: look at scores that runs share, and merge their files."""

from __future__ import annotations

import click

from sqsd_filter.cli import options, output
from sqsd_filter.cli.base import Group

location = click.argument("location", metavar="DIR|URL")


@click.group(cls=Group, short_help="Look at shared scores, and merge their files.")
def store() -> None:
    """Look at the scores that runs share with --score-store, and merge their files."""


@store.command(short_help="List the scores by pack, model and settings.")
@location
@options.as_json
def info(location: str, json_output: bool) -> None:
    """List the scores in a store by pack, model and settings."""
    from sqsd_filter.pipeline.scores.upkeep import describe

    output.show(describe(location), as_json=json_output, quiet=False, text=output.stored)


@store.command(short_help="Merge many small files into a few.")
@location
@options.as_json
def compact(location: str, json_output: bool) -> None:
    """Merge many small files of a store into a few. Runs may read and write meanwhile."""
    from sqsd_filter.pipeline.scores.upkeep import compact_all

    output.show(compact_all(location), as_json=json_output, quiet=False, text=output.compacted)
