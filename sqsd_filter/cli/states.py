"""`sqsd-filter pack states`: at which checkpoint of a training run should a pack take its gradients?"""

from __future__ import annotations

import json
import warnings
from contextlib import closing
from pathlib import Path
from typing import Any

import click

from sqsd_filter.cli import options, output
from sqsd_filter.cli.base import Command, examples
from sqsd_filter.cli.options import OPTIONS
from sqsd_filter.errors import UsageError


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
    from sqsd_filter.directions.states import checkpoints, compare_states
    from sqsd_filter.scoring.pack import load_pack

    warnings.simplefilter("ignore")
    conversations, marks = _read(rows, sample, positive)
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


def _read(source: str, sample: int, positive: str | None) -> tuple[list[Any], list[bool] | None]:
    """The conversations of rows spread evenly over the source, and which of them are positive."""
    import numpy as np

    from sqsd_filter.corpus.addresses import Opener, expand, peek
    from sqsd_filter.corpus.row_formats import Columns
    from sqsd_filter.corpus.sources import Corpus

    column, given, value = (positive or "").partition("=")
    if positive is not None and not given:
        raise UsageError(f"--positive must be COLUMN=VALUE, not '{positive}'.")
    with closing(Opener()) as opener:
        sources = opener.open(expand([source]))
        form = Columns().choose(peek(sources))
        corpus = Corpus.scan(sources, form=form)
        if positive is not None and column not in corpus.schema.names:
            raise UsageError(f"--positive names '{column}', but {source} has {', '.join(corpus.schema.names)}.")
        wanted = set(np.linspace(0, corpus.n_rows - 1, min(sample, corpus.n_rows)).astype(int).tolist())
        found = [row for row in corpus.read(0, corpus.n_rows) if row.index in wanted]
    conversations: list[Any] = [form.parse(row.value, row.problem) for row in found]
    if positive is None:
        return conversations, None
    texts = [(row.value or {}).get(column) for row in found]
    return conversations, [(text if isinstance(text, str) else json.dumps(text)) == value for text in texts]
