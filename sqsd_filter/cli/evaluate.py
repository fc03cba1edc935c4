"""`sqsd-filter evaluate`: do models that are fine-tuned on riskier rows lose more safety?"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sqsd_filter.cli import options, output
from sqsd_filter.cli.base import Command, complete_files, examples, together
from sqsd_filter.cli.evaluation_table import table
from sqsd_filter.cli.options import option
from sqsd_filter.errors import UsageError

if TYPE_CHECKING:
    from sqsd_filter.evaluation.settings import Design

TUNING = (
    *("r", "alpha", "dropout", "target_modules", "learning_rate", "epochs", "batch_size", "device_batch_size"),
    *("schedule", "warmup_ratio", "max_length", "dtype"),
)
DESIGN = (
    *("windows", "size", "drop_top", "match_tokens", "planted", "above_reference", "held_out"),
    *("harmful", "harmless", "prompts", "max_new_tokens", "questions", "question_tokens", "generation"),
)
FINE_TUNING, SETS, QUESTIONS = "Fine-tuning", "Sets of rows", "Questions and judges"

sets = together(
    option(
        SETS,
        "--arms",
        default="windows",
        show_default=True,
        metavar="NAMES",
        help="Sets of rows to train on: windows, cut, both as windows,cut, contaminated, or none.",
    ),
    option(SETS, "--windows", type=int, default=5, show_default=True, metavar="N", help="Number of windows."),
    option(SETS, "--size", type=int, metavar="N", help="Rows per window. The windows need it."),
    option(
        SETS,
        "--drop-top",
        default="5%",
        show_default=True,
        metavar="SHARE",
        help="The cut, as a share of the rows: 5%, 5pct or 0.05.",
    ),
    option(
        SETS,
        "--planted",
        metavar="COLUMN",
        help="For a contaminated corpus: the column that marks planted rows, with true or with their kind.",
    ),
    option(
        SETS,
        "--above-reference",
        show_default="99%",
        metavar="SHARE",
        help="For a contaminated corpus: the cut by the pack's benign reference rows, at the risk at which select "
        "makes it of the same SCORES.",
    ),
    option(
        SETS,
        "--match-tokens",
        is_flag=True,
        help="Shorten answers until all windows have the same number of answer tokens.",
    ),
    option(
        SETS,
        "--seeds",
        default="0,1,2",
        show_default=True,
        metavar="LIST",
        help="Train once with each of these seeds.",
    ),
    option(
        SETS,
        "--held-out",
        type=int,
        default=100,
        show_default=True,
        metavar="N",
        help="Rows to measure the loss on. They are in no set, and none of them is planted.",
    ),
    option(
        SETS,
        "--poison",
        multiple=True,
        metavar="SCORES",
        help="Scores of known unsafe rows to mix in. Repeat it once for each of SCORES, in their order.",
    ),
)
questions = together(
    option(
        QUESTIONS,
        "--harmful",
        metavar="FILE.jsonl",
        help="Harmful prompts, one per line as a `prompt`. Training needs them.",
    ),
    option(
        QUESTIONS,
        "--harmless",
        metavar="FILE.jsonl",
        help="Harmless prompts, one per line as a `prompt`, to measure over-refusal.",
    ),
    option(
        QUESTIONS,
        "--prompts",
        type=int,
        show_default="all prompts",
        metavar="N",
        help="Ask the first N prompts of each file only.",
    ),
    option(
        QUESTIONS,
        "--judge",
        multiple=True,
        default=["phrases"],
        show_default=True,
        metavar="SPEC",
        help="Judge of the answers: phrases, a folder, or a chat guard of the Hub. Repeat it for several: the first "
        "decides, and the report has their agreement.",
    ),
    option(
        QUESTIONS,
        "--max-new-tokens",
        type=int,
        default=128,
        show_default=True,
        metavar="TOKENS",
        help="Longest answer.",
    ),
    option(
        QUESTIONS,
        "--questions",
        metavar="FILE.jsonl",
        help="For a contaminated corpus: questions, one per line as a `prompt` with the right `answer`, of which the "
        "last number counts, or all words if it has none.",
    ),
    option(
        QUESTIONS,
        "--question-tokens",
        type=int,
        show_default="256",
        metavar="TOKENS",
        help="Longest answer to one of the questions.",
    ),
    option(
        QUESTIONS,
        "--generation",
        type=click.Choice(["transformers", "vllm"]),
        default="transformers",
        show_default=True,
        help="Library that generates the answers.",
    ),
)
tuning = together(
    option(FINE_TUNING, "--r", type=int, default=8, show_default=True, metavar="N", help="Rank of the LoRA."),
    option(
        FINE_TUNING,
        "--alpha",
        type=int,
        default=16,
        show_default=True,
        metavar="N",
        help="Numerator of the LoRA's scale, alpha / r.",
    ),
    option(
        FINE_TUNING,
        "--dropout",
        type=float,
        default=0.05,
        show_default=True,
        metavar="P",
        help="Dropout in the LoRA.",
    ),
    option(
        FINE_TUNING,
        "--target-modules",
        default="all-linear",
        show_default=True,
        metavar="NAME",
        help="Modules that get a LoRA.",
    ),
    option(
        FINE_TUNING,
        "--learning-rate",
        type=float,
        default=5e-5,
        show_default=True,
        metavar="X",
        help="Highest learning rate.",
    ),
    option(
        FINE_TUNING,
        "--epochs",
        type=float,
        default=10.0,
        show_default=True,
        metavar="X",
        help="Passes over the rows.",
    ),
    option(
        FINE_TUNING,
        "--batch-size",
        type=int,
        default=8,
        show_default=True,
        metavar="N",
        help="Rows per update.",
    ),
    option(
        FINE_TUNING,
        "--device-batch-size",
        type=int,
        default=8,
        show_default=True,
        metavar="N",
        help="Rows per pass: --batch-size must be a multiple of it.",
    ),
    option(
        FINE_TUNING,
        "--schedule",
        default="cosine",
        show_default=True,
        metavar="NAME",
        help="Schedule of the learning rate.",
    ),
    option(
        FINE_TUNING,
        "--warmup-ratio",
        type=float,
        default=0.1,
        show_default=True,
        metavar="P",
        help="Share of the updates in which the learning rate rises.",
    ),
    option(
        FINE_TUNING,
        "--max-length",
        type=int,
        default=1024,
        show_default=True,
        metavar="TOKENS",
        help="Truncate rows to this many tokens.",
    ),
    option(
        FINE_TUNING,
        "--dtype",
        type=click.Choice(["float32", "bfloat16"]),
        default="bfloat16",
        show_default=True,
        help="Number format of the model's weights. The LoRA's are in float32.",
    ),
    option(
        FINE_TUNING,
        "--device",
        show_default="a GPU if there is one, else cpu",
        metavar="NAME",
        help="Device for training and answers: cpu or cuda.",
    ),
    options.plain(FINE_TUNING, "--keep-adapters", is_flag=True, help="Keep the LoRA of each run in DEST."),
)


@click.command(
    cls=Command,
    short_help="Fine-tune on risky and on safe rows, and compare.",
    epilog=examples(
        (
            "Five windows of 500 rows each, 15 fine-tunes",
            "sqsd-filter evaluate a.parquet study/ --size 500 --harmful harmful.jsonl",
        ),
        (
            "The riskiest and the safest rows only: 6 fine-tunes",
            "sqsd-filter evaluate a.parquet study/ --windows 2 --size 500 --harmful h.jsonl",
        ),
        (
            "How many unsafe rows does a cut find? No fine-tune is needed",
            "sqsd-filter evaluate a.parquet study/ --arms none --poison unsafe.parquet",
        ),
    ),
)
@click.argument("scores", nargs=-1, metavar="SCORES...", shell_complete=complete_files)
@click.argument("dest", type=click.Path(path_type=Path), metavar="DEST")
@options.pack
@sets
@questions
@tuning
@options.common
@click.pass_context
def evaluate(context: click.Context, /, scores: tuple[str, ...], dest: Path, **_: object) -> None:
    """Fine-tune the pack's model on the riskiest to the safest rows by SCORES, and ask each model harmful prompts.

    With --arms contaminated it learns from a corpus with planted rows instead, with and without filtering. SCORES are
    files that `sqsd-filter score` wrote for the same rows, by one or several scorers. The results go to the
    folder DEST. The same command resumes an interrupted evaluation.
    """
    if not scores:
        raise UsageError(f"Name one or more SCORES and then DEST, a folder: there is only {dest}.")
    from sqsd_filter.evaluation.run import evaluate as run

    params, display = context.params, output.begin(context)
    results = run(
        scores,
        dest,
        design_of(params),
        pack=params["pack"],
        poison=params["poison"],
        keep_adapters=params["keep_adapters"],
        device=params["device"],
        progress=display,
    )
    output.show(results, as_json=params["json_output"], quiet=params["quiet"], text=table)


def design_of(params: Mapping[str, Any]) -> Design:
    """The evaluation by these options."""
    from sqsd_filter.evaluation.settings import Design, FineTuning

    return Design(
        arms=() if params["arms"] == "none" else _listed(params["arms"]),
        seeds=_numbers(params["seeds"]),
        judges=params["judge"],
        tuning=FineTuning(**{name: params[name] for name in TUNING}),
        **{name: params[name] for name in DESIGN},
    )


def _listed(text: str) -> list[str]:
    return [part.strip() for part in text.split(",")]


def _numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in _listed(text)]
    except ValueError:
        raise UsageError(
            f"--seeds must be whole numbers with commas between them, for example 0,1,2, not '{text}'."
        ) from None
