"""`sqsd-filter drift`: how far a fine-tuning run has moved along the directions of a pack."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from sqsd_filter.cli import options, output
from sqsd_filter.cli.base import Command, examples
from sqsd_filter.errors import UsageError


@click.command(
    cls=Command,
    short_help="Measure how far your fine-tune moved along the directions.",
    epilog=examples(
        ("Write tables and a picture, too", "sqsd-filter drift my-run/ --pack my-pack --out drift/"),
        ("Also count refusals", "sqsd-filter drift my-run/ --pack my-pack --refusals harmful.jsonl --limit 100"),
    ),
)
@click.argument("run", type=click.Path(path_type=Path), metavar="RUN_DIR")
@options.pack
@options.option(
    options.MODEL,
    "--base",
    show_default="the pack's base model",
    metavar="DIR|HUB",
    help="Model or LoRA that the run started from.",
)
@options.option(
    options.MODEL,
    "--device",
    show_default="a GPU if there is one, else cpu",
    metavar="NAME",
    help="Device that answers the prompts.",
)
@options.option(
    options.ROWS,
    "--refusals",
    metavar="FILE.jsonl",
    help="Let each checkpoint answer these prompts, and count its refusals.",
)
@options.option(
    options.ROWS,
    "--limit",
    type=options.at_least_one,
    show_default="all prompts",
    metavar="N",
    help="Ask the first N prompts only.",
)
@options.option(
    options.OUTPUT,
    "--out",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Write the tables, the report and a picture to this folder.",
)
@options.common
@click.pass_context
def drift(context: click.Context, /, run: Path, **_: object) -> None:
    """Project the change of every checkpoint in RUN_DIR on the pack's directions.

    Checkpoints are the folders checkpoint-<step>, with LoRA adapters or whole models in safetensors.
    """
    from sqsd_filter.directions.drift import measure_drift, with_refusals
    from sqsd_filter.directions.drift_files import check_folder, write_drift
    from sqsd_filter.directions.refusals import read_prompts
    from sqsd_filter.scoring.pack import load_pack

    params, display = context.params, output.begin(context)
    if params["limit"] and not params["refusals"]:
        raise UsageError("--limit is the number of prompts to ask: add --refusals.")
    pack, out = load_pack(params["pack"]), params["out"]
    if out:
        check_folder(out, run, pack)
    prompts = read_prompts(params["refusals"], params["limit"]) if params["refusals"] else ()
    measured = measure_drift(run, pack, base=params["base"], progress=display)
    if out:
        write_drift(measured, out)  # before the refusals, which take longer
    if prompts:
        measured = with_refusals(measured, prompts, params["device"], display)
        if out:
            write_drift(measured, out)
    output.show(measured.report(), as_json=params["json_output"], quiet=params["quiet"], text=table)


def table(report: Mapping[str, Any]) -> str:
    """One line per checkpoint and direction."""
    lines = [["step", "direction", "projection", "cosine", "cosine sum", "norm", "risk projection", "refusals"]]
    for checkpoint in report["checkpoints"]:
        whole = [f"{checkpoint['risk_projection']:.6g}", *_refusals(checkpoint)]
        for k, (name, along) in enumerate(checkpoint["directions"].items()):
            figures = [f"{along[key]:.6g}" for key in ("projection", "cosine", "cosine_sum", "norm")]
            lines.append([str(checkpoint["step"]) * (k == 0), name, *figures, *(text * (k == 0) for text in whole)])
    lines[0] = lines[0][: len(lines[1])]
    pack = report["pack"]
    head = f"{report['run']} along pack {pack['name']} ({pack['fingerprint']}) on {report['base_model']}"
    return "\n".join([head, *output.aligned(lines)])


def _refusals(checkpoint: Mapping[str, Any]) -> list[str]:
    """The refusal rate with its interval, if refusals were counted."""
    if "refusal_rate" not in checkpoint:
        return []
    rate, low, high = (100 * checkpoint[f"refusal_{key}"] for key in ("rate", "low", "high"))
    return [f"{rate:.1f}% ({low:.1f}-{high:.1f})"]
