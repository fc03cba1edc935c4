"""`sqsd-filter evaluate`: does a score tell which rows strip a model's safety?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from sqsd_filter.cli import options, output
from sqsd_filter.errors import UsageError
from sqsd_filter.wording import many

TUNING = (
    *("r", "alpha", "dropout", "target_modules", "learning_rate", "epochs", "batch_size", "device_batch_size"),
    *("schedule", "warmup_ratio", "max_length", "dtype"),
)
DESIGN = (
    *("windows", "size", "drop_top", "match_tokens", "held_out"),
    *("harmful", "harmless", "prompts", "max_new_tokens", "generation"),
)
at_least_one = click.IntRange(min=1)

sets = options.together(
    options.option(
        "--arms",
        default="windows",
        show_default=True,
        metavar="NAMES",
        help="What to train on: windows, cut, both as windows,cut, or none.",
    ),
    options.option("--windows", type=int, default=5, show_default=True, metavar="N", help="So many windows."),
    options.option("--size", type=int, metavar="N", help="Rows a window."),
    options.option(
        "--drop-top", default="5%", show_default=True, metavar="SHARE", help="The cut: 5%, 5pct or 0.05 of the rows."
    ),
    options.option("--match-tokens", is_flag=True, help="Cut answers until all windows have as many answer tokens."),
    options.option("--seeds", default="0,1,2", show_default=True, metavar="LIST", help="Train once with each."),
    options.option(
        "--held-out",
        type=int,
        default=100,
        show_default=True,
        metavar="N",
        help="Rows for the loss, in no set.",
    ),
)
questions = options.together(
    options.option("--harmful", metavar="FILE.jsonl", help="Harmful prompts, a 'prompt' a line."),
    options.option("--harmless", metavar="FILE.jsonl", help="Harmless prompts, for over-refusal."),
    options.option("--prompts", type=int, metavar="N", help="Ask the first N prompts of each file only."),
    options.option(
        "--judge",
        multiple=True,
        default=["phrases"],
        show_default=True,
        metavar="SPEC",
        help="Who judges the answers; of several the first decides, and their agreement is told.",
    ),
    options.option(
        "--max-new-tokens", type=int, default=128, show_default=True, metavar="TOKENS", help="Length of the answers."
    ),
    options.option(
        "--generation",
        type=click.Choice(["transformers", "vllm"]),
        default="transformers",
        show_default=True,
        help="What gives the answers.",
    ),
)
tuning = options.together(
    options.option("--r", type=int, default=8, show_default=True, metavar="N", help="Rank of the LoRA."),
    options.option(
        "--alpha", type=int, default=16, show_default=True, metavar="N", help="The LoRA's scale is alpha / r."
    ),
    options.option("--dropout", type=float, default=0.05, show_default=True, metavar="P", help="In the LoRA."),
    options.option(
        "--target-modules", default="all-linear", show_default=True, metavar="NAME", help="Layers with a LoRA."
    ),
    options.option("--learning-rate", type=float, default=5e-5, show_default=True, metavar="X", help="At its highest."),
    options.option("--epochs", type=float, default=10.0, show_default=True, metavar="X", help="Passes over the rows."),
    options.option("--batch-size", type=int, default=8, show_default=True, metavar="N", help="Rows an update."),
    options.option(
        "--device-batch-size", type=int, default=8, show_default=True, metavar="N", help="Rows in memory at a time."
    ),
    options.option("--schedule", default="cosine", show_default=True, metavar="NAME", help="Of the learning rate."),
    options.option(
        "--warmup-ratio",
        type=float,
        default=0.1,
        show_default=True,
        metavar="P",
        help="Share of updates for it to rise in.",
    ),
    options.option(
        "--max-length", type=int, default=1024, show_default=True, metavar="TOKENS", help="Truncate rows here."
    ),
    options.option(
        "--dtype",
        type=click.Choice(["float32", "bfloat16"]),
        default="bfloat16",
        show_default=True,
        help="Of the model's weights; the LoRA's are float32.",
    ),
)


@click.command()
@click.argument("scores", nargs=-1, metavar="SCORES...")
@click.argument("dest", type=click.Path(path_type=Path), metavar="DEST")
@options.option("--pack", default="smollm2-135m", show_default=True, metavar="NAME|DIR|HUB", help="The aligned model.")
@sets
@questions
@tuning
@options.option(
    "--poison", multiple=True, metavar="SCORES", help="Scores of known unsafe rows; once for each of SCORES, in order."
)
@click.option("--keep-adapters", is_flag=True, help="Keep the LoRA of each run.")
@options.option("--device", metavar="NAME", help="cpu or cuda; the default is a GPU if there is one.")
@options.manners
@click.pass_context
def evaluate(context: click.Context, scores: tuple[str, ...], dest: Path, **params: Any) -> None:
    """Fine-tune the pack's model on the riskiest to the safest rows by SCORES, and ask it harmful prompts.

    SCORES are what 'sqsd-filter score' left of the same rows, by one or several scorers. The same command goes on where
    it was interrupted.
    """
    from sqsd_filter.evaluation.run import evaluate as run

    if not scores:
        raise UsageError(f"Name one or more SCORES and then DEST, a folder: there is only {dest}.")
    display = output.begin(context)
    found = run(
        scores,
        dest,
        design_of(params),
        pack=params["pack"],
        poison=params["poison"],
        keep_adapters=params["keep_adapters"],
        device=params["device"],
        progress=display,
    )
    output.show(found, as_json=params["json_output"], quiet=params["quiet"], text=table)


def design_of(params: Mapping[str, Any]) -> Any:
    """The evaluation that the options ask for."""
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
        raise UsageError(f"--seeds must be whole numbers with commas between them, as 0,1,2, not '{text}'.") from None


def table(found: Mapping[str, Any]) -> str:
    """A line for each set of rows, then one for each scorer's verdict, then those of the mixes."""
    blocks = [[_about(found)]]
    if found["rows"]:
        lines = [["untuned", "", *_cells(found["untuned"])], *_windows(found["scorers"]), *_arms(found["arms"])]
        head = ["", "", "rows", "tokens", "ASR (95 % interval)", "refused", "harmless answer", "degenerate"]
        blocks.append(output.aligned([[*head, "over-refusal", "loss"], *lines]))
        verdicts = [*_spreads(found["scorers"]), *_savings(found["arms"])]
        blocks.append([*verdicts, *_agreements(found["judges"]["agreement"])])
        blocks += [found["warnings"]] if found["warnings"] else []
    if found["poisoned"]:
        head = ["", "unsafe", "rows", "precision = recall", "ROC-AUC", "average precision"]
        blocks.append(output.aligned([head, *_poisoned(found["poisoned"])]))
    return "\n\n".join("\n".join(block) for block in blocks)


def _about(found: Mapping[str, Any]) -> str:
    if not found["model"]:
        return "shares in %"
    seeds, rows = ", ".join(map(str, found["seeds"])), found["rows"]
    asked = many(found["prompts"]["harmful"], "harmful prompt")
    what = f"{found['model']['name']}, {asked}, judged by {found['judges']['asr']}, seeds {seeds}"
    usable = f"of {rows['all']:,} rows {rows['learned']:,} to learn from, {rows['held_out']:,} held out"
    return f"{what}; {usable}; shares in %, loss in nats a token"


def _windows(scorers: Mapping[str, Any]) -> Iterator[list[str]]:
    from sqsd_filter.evaluation.results import of_set

    for name, figures in scorers.items():
        for k in range(len(figures["asr"])):
            yield [name * (k == 0), f"S{k + 1}", *_cells(of_set(figures, k))]


def _arms(scorers: Mapping[str, Any]) -> Iterator[list[str]]:
    for name, arms in scorers.items():
        shown = {arm: figures for arm, figures in arms.items() if "rows" in figures}
        for k, (arm, figures) in enumerate(shown.items()):
            yield [name * (k == 0), arm, *_cells(figures)]


def _cells(figures: Mapping[str, Any]) -> list[str]:
    shares = [_percent(figures["outcomes"][word]) for word in ("refused", "harmless", "degenerate")]
    loss = "-" if figures["loss"] is None else f"{figures['loss']:.3f}"
    rates = [_between(figures["asr"], figures["ci"]), *shares, _percent(figures["over_refusal"])]
    return [f"{figures['rows']:,}", f"{figures['tokens']:,}", *rates, loss]


def _spreads(scorers: Mapping[str, Any]) -> Iterator[str]:
    for name, figures in scorers.items():
        course = "monotone" if figures["monotone"] else "not monotone"
        spread = _between(figures["spread"], figures["spread_ci"])
        yield f"{name}: S1 - S{len(figures['asr'])} is {spread} points, {course}{_perhaps_none(figures['spread_ci'])}"


def _savings(scorers: Mapping[str, Any]) -> Iterator[str]:
    for name, arms in scorers.items():
        saved = arms["random_minus_kept"]
        points = _between(saved["asr"], saved["ci"])
        none = _perhaps_none(saved["ci"])
        yield f"{name}: ASR of a random choice of rows minus that of the kept ones is {points} points{none}"


def _perhaps_none(interval: Sequence[float]) -> str:
    return "; no difference is shown" if interval[0] <= 0 <= interval[1] else ""


def _agreements(pairs: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    for pair in pairs:
        first, second = pair["judges"]
        kappa = "" if pair["kappa"] is None else f", Cohen's kappa {pair['kappa']:.2f}"
        yield f"{first} and {second} agree on {pair['share']:.1%} of {pair['answers']:,} answers{kappa}"


def _poisoned(scorers: Mapping[str, Any]) -> Iterator[list[str]]:
    for name, rates in scorers.items():
        for k, (rate, figures) in enumerate(rates.items()):
            shown = [figures[key] for key in ("precision", "auc", "average_precision")]
            unsafe, benign = figures["unsafe"], figures["benign"]
            rows = f"{unsafe:,} of {benign + unsafe:,}"
            yield [name * (k == 0), f"{float(rate):.0%}", rows, *(_between(each["mean"], each["ci"]) for each in shown)]


def _between(value: float, interval: tuple[float, float]) -> str:
    """A share and its interval, in percent."""
    low, high = (100 * bound for bound in interval)
    return f"{100 * value:.1f} ({low:.1f} to {high:.1f})"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"
