"""`sqsd-filter pack`: make direction packs, and look at them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from sqsd_filter.cli import output

as_json = click.option("--json", "json_output", is_flag=True, help="Print the result as one JSON object.")


@click.group()
def pack() -> None:
    """Make and look at direction packs."""
    output.listen()


@pack.command()
@click.argument("recipe", type=click.Path(path_type=Path), metavar="CONFIG.toml")
@click.argument("out", type=click.Path(path_type=Path), metavar="OUT")
def build(recipe: Path, out: Path) -> None:
    """Train a pack as CONFIG.toml says and write it to the folder OUT; the same command resumes.

    \b
    On several GPUs: torchrun --nproc-per-node N -m sqsd_filter pack build CONFIG.toml OUT
    """
    from sqsd_filter.directions import processes
    from sqsd_filter.directions.build import build_pack
    from sqsd_filter.directions.recipe import PackRecipe

    loaded = PackRecipe.load(recipe)
    built = build_pack(loaded, out, output.Display())
    if processes.is_first():
        click.echo(_ready({"pack": built.name, "fingerprint": built.fingerprint, "path": out}))


@pack.command("import")
@click.argument("source", metavar="SRC")
@click.option("--as", "name", required=True, metavar="NAME", help="The pack's name.")
@click.argument("out", required=False, type=click.Path(path_type=Path), metavar="[OUT]")
@click.option(
    "--danger",
    type=click.Choice(["Beaver-Danger", "Ageis_Danger", "both"]),
    default="Beaver-Danger",
    show_default=True,
    help="The published danger direction; both make two probes of half the weight.",
)
@click.option("--base-model", metavar="DIR|HUB", help="Base model, where the adapters don't name one of the Hub.")
@as_json
def import_command(
    source: str, name: str, out: Path | None, danger: str, base_model: str | None, json_output: bool
) -> None:
    """Make a pack of what SQSD's authors publish: SRC is Wxxxx/SQSD, or a folder of that layout.

    The folder OUT is called NAME where it is left out.
    """
    from sqsd_filter.directions.importing import import_pack

    target = out or Path(name)
    made = import_pack(source, name, target, danger=danger, base_model=base_model)
    report = {"pack": made.name, "fingerprint": made.fingerprint, "path": str(target), "base_model": made.base_model}
    report["provenance"] = made.notes["provenance"]
    output.show(report, as_json=json_output, quiet=False, text=_ready)


def _ready(report: Mapping[str, Any]) -> str:
    return "pack {pack} ({fingerprint}) in {path}: use it with --pack {path}".format_map(report)


@pack.command()
@click.argument("where", metavar="PACK")
@click.option("--modules", is_flag=True, help="List the norm of every module.")
@as_json
def inspect(where: str, modules: bool, json_output: bool) -> None:
    """Say what is in a pack, and what looks wrong with it; PACK is a name, a folder or a Hub repository."""
    from sqsd_filter.cli.inspection import inspection
    from sqsd_filter.directions.inspection import inspect_pack
    from sqsd_filter.scoring.pack import load_pack

    report = inspect_pack(load_pack(where))
    output.show(report, as_json=json_output, quiet=False, text=lambda found: inspection(found, modules=modules))


@pack.command()
@click.argument("checkpoint", metavar="CHECKPOINT")
@click.argument("out", type=click.Path(path_type=Path), metavar="OUT")
@click.option("--base", required=True, metavar="DIR|HUB", help="The model that CHECKPOINT was trained from.")
@click.option("--rank", type=int, metavar="R", help="Rank of each module, 8 by default; with --energy the highest one.")
@click.option("--energy", type=float, metavar="SHARE", help="Lowest rank that keeps this share of each module's ‖D‖².")
@click.option("--device", metavar="NAME", help="cpu, cuda, cuda:1, ...; the default is a GPU if there is one.")
@as_json
def convert(checkpoint: str, out: Path, json_output: bool, **params: Any) -> None:
    """Make a direction of a fully fine-tuned model: its change from --base, as a LoRA adapter in the folder OUT."""
    from sqsd_filter.cli.inspection import conversion
    from sqsd_filter.directions.conversion import convert

    report = {"path": str(out), **convert(checkpoint, out, **params, progress=output.Display())}
    output.show(report, as_json=json_output, quiet=False, text=conversion)
