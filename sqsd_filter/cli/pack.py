"""`sqsd-filter pack`: make direction packs, and look at them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import click

from sqsd_filter.cli import options, output, settings
from sqsd_filter.cli.base import Group, examples
from sqsd_filter.cli.options import OPTIONS

CORPORA = "Reference"  # heading of options


@click.group(cls=Group, short_help="Build, import and inspect direction packs.")
def pack() -> None:
    """Build, import and inspect direction packs."""
    output.listen()


@pack.command(short_help="Train a pack for your own model.")
@click.argument("recipe", type=click.Path(path_type=Path), metavar="CONFIG.toml")
@click.argument("out", type=click.Path(path_type=Path), metavar="OUT")
def build(recipe: Path, out: Path) -> None:
    """Train a pack by the recipe CONFIG.toml and write it to the folder OUT. The same command resumes.

    \b
    On N GPUs:
        torchrun --nproc-per-node N -m sqsd_filter pack build CONFIG.toml OUT
    """
    from sqsd_filter.directions import processes
    from sqsd_filter.directions.build import build_pack
    from sqsd_filter.directions.recipe import PackRecipe

    loaded = PackRecipe.load(recipe)
    built = build_pack(loaded, out, output.Display())
    if processes.is_first():
        click.echo(_ready({"pack": built.name, "fingerprint": built.fingerprint, "path": out}))


@pack.command(
    "import",
    short_help="Make a pack of the published SQSD directions.",
    epilog=examples(
        ("Import the directions that SQSD's authors publish", "sqsd-filter pack import Wxxxx/SQSD --as qwen3-8b")
    ),
)
@click.argument("source", metavar="SRC")
@options.plain(OPTIONS, "--as", "name", required=True, metavar="NAME", help="The pack's name.")
@click.argument("out", required=False, type=click.Path(path_type=Path), metavar="[OUT]")
@options.plain(
    OPTIONS,
    "--danger",
    type=click.Choice(["Beaver-Danger", "Ageis_Danger", "both"]),
    default="Beaver-Danger",
    show_default=True,
    help="The published danger direction. both makes two probes with half the weight each.",
)
@options.plain(
    OPTIONS,
    "--base-model",
    show_default="as the adapters name it",
    metavar="DIR|HUB",
    help="Base model, if the adapters name none on the Hub.",
)
@options.as_json
def import_command(
    source: str, name: str, out: Path | None, danger: str, base_model: str | None, json_output: bool
) -> None:
    """Make a pack of the adapters that SQSD's authors publish: SRC is Wxxxx/SQSD, or a folder of that layout.

    The pack is written to the folder OUT, or to a folder called NAME if OUT is left out.
    """
    from sqsd_filter.directions.importing import import_pack

    target = out or Path(name)
    made = import_pack(source, name, target, danger=danger, base_model=base_model)
    report = {"pack": made.name, "fingerprint": made.fingerprint, "path": str(target), "base_model": made.base_model}
    report["provenance"] = made.notes["provenance"]
    output.show(report, as_json=json_output, quiet=False, text=_ready)


def _ready(report: Mapping[str, object]) -> str:
    return "pack {pack} ({fingerprint}) in {path}: use it with --pack {path}".format_map(report)


@pack.command(short_help="Show the contents of a pack, and warn of flaws.")
@click.argument("where", metavar="PACK")
@options.plain(OPTIONS, "--modules", is_flag=True, help="List the norm of every module.")
@options.risk
@options.as_json
def inspect(where: str, modules: bool, risk: str | None, json_output: bool) -> None:
    """Show the contents of PACK and warn of flaws. PACK is a built-in name, a folder or a repository of the Hub."""
    from sqsd_filter.cli.inspection import inspection
    from sqsd_filter.directions.inspection import inspect_pack
    from sqsd_filter.scoring.pack import load_pack

    pack = load_pack(where)
    report = inspect_pack(pack if risk is None else pack.with_risk(risk))
    output.show(report, as_json=json_output, quiet=False, text=lambda shown: inspection(shown, modules=modules))


@pack.command(
    short_help="Add reference rows, so that a risk has a meaning.",
    epilog=examples(
        (
            "Compare risks with those of benign rows and of known unsafe answers",
            "sqsd-filter pack calibrate my-pack --benign b.jsonl --unsafe u.jsonl",
        ),
    ),
)
@click.argument("where", metavar="PACK")
@options.plain(
    CORPORA,
    "--benign",
    multiple=True,
    required=True,
    metavar="[NAME=]SRC",
    help="Benign rows that nothing in the pack was trained or chosen on. Repeat it for several corpora.",
)
@options.plain(
    CORPORA,
    "--unsafe",
    multiple=True,
    metavar="[NAME=]SRC",
    help="Known unsafe answers that nothing in the pack was trained or chosen on. Repeat it for several corpora.",
)
@options.plain(
    CORPORA,
    "--sample",
    type=options.at_least_one,
    default=1000,
    show_default=True,
    metavar="N",
    help="Largest number of rows to score of each corpus, spread evenly over it.",
)
@options.rows
@options.risk
@options.shared_state
@options.model
@options.as_json
@options.quiet
@click.pass_context
def calibrate(context: click.Context, /, **_: object) -> None:
    """Score reference rows and write what they score into PACK, a folder. Its scores stay the same.

    Later runs then say what a risk means ("above 97 % of the benign reference rows"), and can cut with
    --above-reference. The command replaces the reference that PACK has.
    """
    from sqsd_filter.cli.inspection import reference
    from sqsd_filter.directions.calibration import calibrate as calibrate_pack

    params = context.params
    record = calibrate_pack(
        params["where"],
        params["benign"],
        params["unsafe"],
        scorer=lambda: settings.sqsd_scorer(params["where"], params),
        columns=settings.columns(params),
        progress=output.Display(quiet=params["quiet"]),
        **{name: params[name] for name in ("sample", "limit", "streaming")},
    )
    output.show(
        {"path": params["where"], "reference": record},
        as_json=params["json_output"],
        quiet=params["quiet"],
        text=lambda shown: "\n".join(reference(shown["reference"])),
    )


@pack.command(
    short_help="Make a direction of a full fine-tune.",
    epilog=examples(
        (
            "Keep the best approximation of rank 16 in each module",
            "sqsd-filter pack convert my-checkpoint/ danger/ --base org/model --rank 16",
        ),
        (
            "Keep 90 % of each module's change",
            "sqsd-filter pack convert my-checkpoint/ danger/ --base org/model --energy 0.9",
        ),
    ),
)
@click.argument("checkpoint", metavar="CHECKPOINT")
@click.argument("out", type=click.Path(path_type=Path), metavar="OUT")
@options.plain(OPTIONS, "--base", required=True, metavar="DIR|HUB", help="Model that CHECKPOINT was trained from.")
@options.plain(
    OPTIONS,
    "--rank",
    type=int,
    show_default="8",
    metavar="R",
    help="Rank in each module. With --energy it is the highest rank allowed.",
)
@options.plain(
    OPTIONS,
    "--energy",
    type=float,
    metavar="SHARE",
    help="Take the lowest rank that keeps this share of each module's ‖D‖².",
)
@options.plain(
    OPTIONS,
    "--device",
    show_default="a GPU if there is one, else cpu",
    metavar="NAME",
    help="Device for the computation: cpu, cuda, cuda:1, ...",
)
@options.as_json
def convert(
    checkpoint: str,
    out: Path,
    base: str,
    rank: int | None,
    energy: float | None,
    device: str | None,
    json_output: bool,
) -> None:
    """Make a direction of a full fine-tune: its change from --base, as a LoRA adapter in the folder OUT."""
    from sqsd_filter.cli.inspection import conversion
    from sqsd_filter.directions import conversion as converting

    converted = converting.convert(
        checkpoint, out, base=base, rank=rank, energy=energy, device=device, progress=output.Display()
    )
    output.show({"path": str(out), **converted}, as_json=json_output, quiet=False, text=conversion)
