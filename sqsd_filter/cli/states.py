"""`sqsd-filter pack states`: at which checkpoint of a training run should a pack take its gradients?"""

from __future__ import annotations

import warnings
from pathlib import Path

import click

from sqsd_filter.cli import options, output
from sqsd_filter.cli.base import Command, examples
from sqsd_filter.cli.options import OPTIONS


@click.command(
    cls=Command,
    short_help="Compare a run's checkpoints as states.",
    epilog=examples(
        (
            "Compare the checkpoints of a run on 64 of your rows",
            "sqsd-filter pack states my-pack --run my-run/ --rows in.jsonl",
        ),
    ),
)
@click.argument("pack", metavar="PACK")
@options.plain(
    OPTIONS,
    "--run",
    type=click.Path(path_type=Path),
    required=True,
    metavar="DIR",
    help="Output folder of the training run, with folders checkpoint-<step>.",
)
@options.plain(OPTIONS, "--rows", required=True, metavar="SRC", help="Rows to measure on. Benign ones suffice.")
@options.plain(
    OPTIONS,
    "--sample",
    type=options.at_least_one,
    default=64,
    show_default=True,
    metavar="N",
    help="Number of rows to take, spread evenly over SRC.",
)
@options.plain(
    OPTIONS,
    "--positive",
    metavar="COLUMN=VALUE",
    help="Rows that should have the higher risk. This adds an AUC for each checkpoint.",
)
@options.plain(
    OPTIONS,
    "--answer-tokens",
    type=options.at_least_one,
    metavar="N",
    help="Cut answers to N tokens, and leave out rows with shorter ones.",
)
@options.plain(
    OPTIONS,
    "--dtype",
    type=click.Choice(["float32", "bfloat16"]),
    show_default="bfloat16 on a GPU, else float32",
    help="Number format of the model's weights.",
)
@options.as_json
def states(
    pack: str,
    run: Path,
    rows: str,
    sample: int,
    positive: str | None,
    answer_tokens: int | None,
    dtype: str | None,
    json_output: bool,
) -> None:
    """Compare the checkpoints of a training run as states at which PACK takes its gradients. Nothing is changed."""
    from sqsd_filter.directions.state_rows import read_rows
    from sqsd_filter.directions.states import checkpoints, compare_states
    from sqsd_filter.scoring.pack import load_pack

    warnings.simplefilter("ignore")
    conversations, marks = read_rows(rows, sample, positive)
    comparison = compare_states(
        load_pack(pack),
        checkpoints(run),
        conversations,
        marks,
        answer_tokens=answer_tokens,
        dtype=dtype,
        progress=output.Display(),
    )
    output.show(comparison, as_json=json_output, quiet=False, text=output.states)
