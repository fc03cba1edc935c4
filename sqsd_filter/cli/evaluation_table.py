"""The results of `sqsd-filter evaluate` as a table for the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from sqsd_filter.cli import output
from sqsd_filter.wording import many

if TYPE_CHECKING:
    from sqsd_filter.evaluation.results import (
        ArmFigures,
        ContaminatedFigures,
        Interval,
        MixFigures,
        Results,
        SetFigures,
        WindowFigures,
    )
    from sqsd_filter.judges.agreement import AgreementReport


def table(results: Results) -> str:
    """One line per set of rows, then one per scorer with its verdict, then the arms of a contaminated corpus, then the
    mixes with unsafe rows."""
    blocks = [[_about(results)]]
    contaminated = results.get("contaminated", {})
    if results["rows"] and not contaminated:
        lines = [["untuned", "", *_cells(results["untuned"])], *_windows(results["scorers"]), *_arms(results["arms"])]
        head = ["", "", "rows", "tokens", "ASR (95 % interval)", "refused", "harmless answer", "degenerate"]
        blocks.append(output.aligned([[*head, "over-refusal", "loss"], *lines]))
        verdicts = [*_spreads(results["scorers"]), *_savings(results["arms"])]
        blocks.append([*verdicts, *_agreements(results["judges"]["agreement"])])
        blocks += [results["warnings"]] if results["warnings"] else []
    if contaminated:
        from sqsd_filter.evaluation.prompt_outcomes import intervals_over

        blocks += _contaminated(contaminated)
        about = [intervals_over(results["seeds"]), *_agreements(results["judges"]["agreement"])]
        blocks += [about, results["warnings"]]
    if results["poisoned"]:
        head = ["", "unsafe", "rows", "precision = recall", "ROC-AUC", "average precision"]
        blocks.append(output.aligned([head, *_poisoned(results["poisoned"])]))
    return "\n\n".join("\n".join(block) for block in blocks if block)


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


def _contaminated(scorers: Mapping[str, ContaminatedFigures]) -> Iterator[list[str]]:
    from sqsd_filter.evaluation.prompt_outcomes import arm_lines, difference_lines

    for name, figures in scorers.items():
        yield [f"{name}:"]
        yield output.aligned(arm_lines(figures, _between))
        yield output.aligned(difference_lines(figures, _between))


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


def _between(value: float, interval: Interval | None) -> str:
    """A share and its interval, in percent."""
    if interval is None:
        return _percent(value)
    low, high = (100 * bound for bound in interval)
    return f"{100 * value:.1f} ({low:.1f} to {high:.1f})"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"
