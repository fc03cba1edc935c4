"""`sqsd-filter drift`: how far a fine-tuning run has moved along the directions of a pack."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from sqsd_filter.cli import options, output
from sqsd_filter.errors import UsageError


@click.command()
@click.argument("run", type=click.Path(path_type=Path), metavar="RUN_DIR")
@options.option("--pack", default="smollm2-135m", show_default=True, metavar="NAME|DIR|HUB", help="Direction pack.")
@options.option("--base", metavar="DIR|HUB", help="Where the run started, if not from the pack's base: model or LoRA.")
@options.option("--out", type=click.Path(path_type=Path), metavar="DIR", help="Write tables, report and picture there.")
@options.option("--refusals", metavar="FILE.jsonl", help="Count each checkpoint's refusals of these prompts.")
@options.option("--limit", type=click.IntRange(min=1), metavar="N", help="Ask the first N prompts only.")
@options.option("--device", metavar="NAME", help="Where prompts are answered; the default is a GPU if there is one.")
@options.manners
@click.pass_context
def drift(context: click.Context, run: Path, **params: Any) -> None:
    """Project the change of every checkpoint in RUN_DIR on the pack's directions."""
    from sqsd_filter.directions.drift import measure_drift, with_refusals
    from sqsd_filter.directions.drift_files import check_folder, write_drift
    from sqsd_filter.directions.refusals import read_prompts
    from sqsd_filter.scoring.pack import load_pack

    display = output.begin(context)
    if params["limit"] and not params["refusals"]:
        raise UsageError("--limit says how many prompts to ask: add --refusals.")
    pack, out = load_pack(params["pack"]), params["out"]
    if out:
        check_folder(out, run, pack)
    prompts = read_prompts(params["refusals"], params["limit"]) if params["refusals"] else ()
    found = measure_drift(run, pack, base=params["base"], progress=display)
    if out:
        write_drift(found, out)  # before the refusals, which take longer
    if prompts:
        found = with_refusals(found, prompts, params["device"], display)
        if out:
            write_drift(found, out)
    output.show(found.report(), as_json=params["json_output"], quiet=params["quiet"], text=table)


def table(report: Mapping[str, Any]) -> str:
    """A line for each checkpoint and direction, under their names."""
    lines = [["step", "direction", "projection", "cosine", "cosine sum", "norm", "risk projection", "refusals"]]
    for point in report["checkpoints"]:
        whole = [f"{point['risk_projection']:.6g}", *_refusals(point)]
        for k, (name, along) in enumerate(point["directions"].items()):
            figures = [f"{along[key]:.6g}" for key in ("projection", "cosine", "cosine_sum", "norm")]
            lines.append([str(point["step"]) * (k == 0), name, *figures, *(text * (k == 0) for text in whole)])
    lines[0] = lines[0][: len(lines[1])]
    pack = report["pack"]
    head = f"{report['run']} along pack {pack['name']} ({pack['fingerprint']}) on {report['base_model']}"
    return "\n".join([head, *output.aligned(lines)])


def _refusals(point: Mapping[str, Any]) -> list[str]:
    """Their share with its interval, where they were counted."""
    if "refusal_rate" not in point:
        return []
    rate, low, high = (100 * point[f"refusal_{key}"] for key in ("rate", "low", "high"))
    return [f"{rate:.1f}% ({low:.1f}-{high:.1f})"]
