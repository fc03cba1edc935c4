"""`sqsd-filter evaluate`: do models that are fine-tuned on riskier rows lose more safety?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sqsd_filter.cli import options, output
from sqsd_filter.cli.base import Command, complete_files, examples, together
from sqsd_filter.cli.options import option
from sqsd_filter.errors import UsageError
from sqsd_filter.wording import many

if TYPE_CHECKING:
    from sqsd_filter.evaluation.results import ArmFigures, Interval, MixFigures, Results, SetFigures, WindowFigures
    from sqsd_filter.evaluation.settings import Design
    from sqsd_filter.judges.agreement import AgreementReport

TUNING = (
    *("r", "alpha", "dropout", "target_modules", "learning_rate", "epochs", "batch_size", "device_batch_size"),
    *("schedule", "warmup_ratio", "max_length", "dtype"),
)
DESIGN = (
    *("windows", "size", "drop_top", "match_tokens", "held_out"),
    *("harmful", "harmless", "prompts", "max_new_tokens", "generation"),
)
FINE_TUNING, SETS, QUESTIONS = "Fine-tuning", "Sets of rows", "Questions and judges"

sets = together(
    option(
        SETS,
        "--arms",
        default="windows",
        show_default=True,
        metavar="NAMES",
        help="Sets of rows to train on: windows, cut, both as windows,cut, or none.",
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
        help="Rows to measure the loss on. They are in no set.",
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

    SCORES are files that `sqsd-filter score` wrote for the same rows, by one or several scorers. The results go to the
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


def table(results: Results) -> str:
    """One line per set of rows, then one per scorer with its verdict, then the mixes with unsafe rows."""
    blocks = [[_about(results)]]
    if results["rows"]:
        lines = [["untuned", "", *_cells(results["untuned"])], *_windows(results["scorers"]), *_arms(results["arms"])]
        head = ["", "", "rows", "tokens", "ASR (95 % interval)", "refused", "harmless answer", "degenerate"]
        blocks.append(output.aligned([[*head, "over-refusal", "loss"], *lines]))
        verdicts = [*_spreads(results["scorers"]), *_savings(results["arms"])]
        blocks.append([*verdicts, *_agreements(results["judges"]["agreement"])])
        blocks += [results["warnings"]] if results["warnings"] else []
    if results["poisoned"]:
        head = ["", "unsafe", "rows", "precision = recall", "ROC-AUC", "average precision"]
        blocks.append(output.aligned([head, *_poisoned(results["poisoned"])]))
    return "\n\n".join("\n".join(block) for block in blocks)


def _about(results: Results) -> str:
    model, rows, prompts = results["model"], results["rows"], results["prompts"]
    if model is None or rows is None or prompts is None:
        return "shares in %"
    seeds = ", ".join(map(str, results["seeds"]))
    asked = many(prompts["harmful"], "harmful prompt")
    what = f"{model['name']}, {asked}, judged by {results['judges']['asr']}, seeds {seeds}"
    usable = f"of {rows['all']:,} rows {rows['learned']:,} to learn from, {rows['held_out']:,} held out"
    return f"{what}; {usable}; shares in %, loss in nats per token"


def _windows(scorers: Mapping[str, WindowFigures]) -> Iterator[list[str]]:
    from sqsd_filter.evaluation.figures import select_set

    for name, figures in scorers.items():
        for k in range(len(figures["asr"])):
            yield [name * (k == 0), f"S{k + 1}", *_cells(select_set(figures, k))]


def _arms(scorers: Mapping[str, ArmFigures]) -> Iterator[list[str]]:
    from sqsd_filter.evaluation.sets import CUT_ARMS

    for name, arms in scorers.items():
        for k, arm in enumerate(CUT_ARMS):
            yield [name * (k == 0), arm, *_cells(arms[arm])]


def _cells(figures: SetFigures) -> list[str]:
    shares = [_percent(figures["outcomes"][word]) for word in ("refused", "harmless", "degenerate")]
    loss = "-" if figures["loss"] is None else f"{figures['loss']:.3f}"
    rates = [_between(figures["asr"], figures["ci"]), *shares, _percent(figures["over_refusal"])]
    return [f"{figures['rows']:,}", f"{figures['tokens']:,}", *rates, loss]


def _spreads(scorers: Mapping[str, WindowFigures]) -> Iterator[str]:
    for name, figures in scorers.items():
        course = "monotone" if figures["monotone"] else "not monotone"
        spread = _between(figures["spread"], figures["spread_ci"])
        yield f"{name}: S1 - S{len(figures['asr'])} is {spread} points, {course}{_perhaps_none(figures['spread_ci'])}"


def _savings(scorers: Mapping[str, ArmFigures]) -> Iterator[str]:
    for name, arms in scorers.items():
        saved = arms["random_minus_kept"]
        points = _between(saved["asr"], saved["ci"])
        none = _perhaps_none(saved["ci"])
        yield f"{name}: ASR of a random choice of rows minus that of the kept ones is {points} points{none}"


def _perhaps_none(interval: Interval) -> str:
    return "; no difference is shown" if interval[0] <= 0 <= interval[1] else ""


def _agreements(pairs: Sequence[AgreementReport]) -> Iterator[str]:
    for pair in pairs:
        first, second = pair["judges"]
        kappa = "" if pair["kappa"] is None else f", Cohen's kappa {pair['kappa']:.2f}"
        yield f"{first} and {second} agree on {pair['share']:.1%} of {pair['answers']:,} answers{kappa}"


def _poisoned(scorers: Mapping[str, Mapping[str, MixFigures]]) -> Iterator[list[str]]:
    for name, rates in scorers.items():
        for k, (rate, figures) in enumerate(rates.items()):
            shown = (figures["precision"], figures["auc"], figures["average_precision"])
            unsafe, benign = figures["unsafe"], figures["benign"]
            rows = f"{unsafe:,} of {benign + unsafe:,}"
            yield [name * (k == 0), f"{float(rate):.0%}", rows, *(_between(each["mean"], each["ci"]) for each in shown)]


def _between(value: float, interval: Interval) -> str:
    """A share and its interval, in percent."""
    low, high = (100 * bound for bound in interval)
    return f"{100 * value:.1f} ({low:.1f} to {high:.1f})"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"
