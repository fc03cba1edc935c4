"""`sqsd-filter pack`: make direction packs."""

from __future__ import annotations

import warnings
from pathlib import Path

import click

from sqsd_filter.cli import output


@click.group()
def pack() -> None:
    """Make and look at direction packs."""


@pack.command()
@click.argument("recipe", type=click.Path(path_type=Path), metavar="CONFIG.toml")
@click.argument("out", type=click.Path(path_type=Path), metavar="OUT")
def build(recipe: Path, out: Path) -> None:
    """Train a pack as CONFIG.toml says and write it to the folder OUT; the same command resumes."""
    from sqsd_filter.directions.build import build_pack
    from sqsd_filter.directions.recipe import PackRecipe

    loaded = PackRecipe.load(recipe)
    warnings.simplefilter("ignore")
    built = build_pack(loaded, out, output.Display())
    click.echo(f"pack {built.name} ({built.fingerprint}) in {out}: use it with --pack {out}")
