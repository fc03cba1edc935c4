"""The section of a run's page on an evaluation: attack success rates after each fine-tuning, with intervals."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path

from sqsd_filter.evaluation.figures import select_set
from sqsd_filter.evaluation.folder import RESULTS
from sqsd_filter.evaluation.plot import CURVES, draw_curves, draw_windows
from sqsd_filter.evaluation.prompt_outcomes import arm_lines, difference_lines, intervals_over
from sqsd_filter.evaluation.results import (
    ArmFigures,
    ContaminatedFigures,
    Estimate,
    Interval,
    JudgeFacts,
    MixFigures,
    Results,
    SetFigures,
    WindowFigures,
)
from sqsd_filter.evaluation.sets import CUT_ARMS
from sqsd_filter.pipeline.page.parts import Plot, Section, Table, read_left
from sqsd_filter.wording import many

FALLING = (
    "The attack success rate is the share of harmful prompts whose answers the judge called unsafe. It should fall "
    "from S1 on. Spread is the rate of S1 minus that of the last window. A low rate alone means little: a model that "
    "refuses harmless prompts, babbles or has a high loss on rows that it did not learn is useless."
)
CUTTING = (
    "Random minus kept is what the cut saves: the attack success rate (the share of harmful prompts whose answers the "
    "judge called unsafe) after random rows, minus the rate after the rows that the cut keeps. Both sets have the same "
    "number of rows."
)
CONTAMINATING = (
    "Unsafe by a judge is the attack success rate: the share of harmful prompts whose answers this judge called "
    "unsafe. Differences are of the same seeds and prompts."
)
MIXING = (
    "Known unsafe rows were mixed in until they made up the share of all rows in the table, and the same number "
    "of rows was dropped. ROC-AUC and average precision need no cut."
)
FIGURES = (":harmless refused", ":held-out loss (nats per token)", ":rows", ":answer tokens")


def evaluation_section(folder: Path) -> Section:
    """The section on a folder that `evaluate` left, or on its results.json. Raises `InputError`."""
    path = folder / RESULTS if folder.is_dir() else folder
    with read_left(path, "sqsd-filter evaluate") as content:
        results: Results = content
        scorers, arms, poisoned = results.get("scorers", {}), results.get("arms", {}), results.get("poisoned", {})
        contaminated = results.get("contaminated", {})
        if not scorers and not arms and not contaminated and not poisoned:
            raise ValueError("it has no scorer")
        plots: list[Plot] = []
        tables: list[Table] = []
        words: list[str] = []
        if scorers:
            _check_windows(scorers)
            asr = "Attack success rate by window"
            plots.append(Plot("asr", asr, partial(draw_windows, scorers=scorers), height=4.8))
            tables += [_windows(scorers), _sets(scorers)]
            words = [_trained(results, "equally spaced windows of its rows, S1 the riskiest"), FALLING]
        if arms:
            tables.append(_arms(arms))
            words += [
                _trained(
                    results,
                    "the rows that a cut drops, those that it keeps, as many random rows as it keeps, and all rows",
                ),
                CUTTING,
            ]
        if contaminated:
            tables += [table for name, one in contaminated.items() for table in _contaminated(name, one)]
            words += [
                _trained(
                    results,
                    "all rows, the rows that the cut above the reference keeps, those that a cut at the true share of "
                    "planted rows keeps, those left when the same number of random rows is dropped, and the clean rows",
                ),
                CONTAMINATING,
                intervals_over(results["seeds"]),
            ]
        if scorers or arms or contaminated:
            words += [*_untuned(results["untuned"], results["judges"]), *results.get("warnings", ())]
        if poisoned:
            tables.append(_mixes(poisoned))
            words.append(MIXING)
        for kind, (title, *_) in CURVES.items():
            if curves := results.get("curves", {}).get(kind):
                _check_shares(share for points in curves.values() for x, y in points for share in (x, y))
                plots.append(Plot(kind, title, partial(draw_curves, kind=kind, curves=curves)))
        return Section("evaluation", "Evaluation", words, plots=plots, tables=tables).drawn()


def _trained(results: Results, sets: str) -> str:
    model, prompts = results["model"], results["prompts"]
    if model is None or prompts is None:
        raise ValueError("there are figures, but no model or prompts")
    counts = {"harmful prompt": prompts["harmful"], "harmless prompt": prompts["harmless"]}
    asked = [many(count, kind) for kind, count in counts.items() if count]
    names = ", ".join(file["name"] for file in results["corpus"])
    return (
        f"{model['name']}, aligned by pack {model['pack']}, was fine-tuned on sets of {names}: {sets} (seeds: "
        f"{', '.join(map(str, results['seeds']))}). Then it was asked {' and '.join(asked)}."
    )


def _untuned(untuned: SetFigures, judges: JudgeFacts) -> Iterator[str]:
    refused = untuned["over_refusal"]
    harmless = "" if refused is None else f", and it refused {refused:.0%} of the harmless prompts"
    rate = _between(untuned["asr"], untuned["ci"])
    yield f"Before fine-tuning its attack success rate, by the judge {judges['asr']}, was {rate}{harmless}."
    for pair in judges["agreement"]:
        first, second = pair["judges"]
        yield f"The judges {first} and {second} agree on {pair['share']:.0%} of {many(pair['answers'], 'answer')}."


def _check_windows(scorers: Mapping[str, WindowFigures]) -> None:
    """Raise `ValueError` unless all rates are shares with one interval per window."""
    for name, figures in scorers.items():
        _check_shares([*figures["asr"], *(bound for interval in figures["ci"] for bound in interval)])
        if not figures["asr"] or [len(interval) for interval in figures["ci"]] != [2] * len(figures["asr"]):
            raise ValueError(f"{name} does not have one interval per window")


def _check_shares(values: Iterable[object]) -> None:
    if not all(isinstance(value, int | float) and 0 <= value <= 1 for value in values):
        raise ValueError("a share is not a number from 0 to 1")


def _windows(scorers: Mapping[str, WindowFigures]) -> Table:
    most = max(len(figures["asr"]) for figures in scorers.values())
    rows = []
    for name, figures in scorers.items():
        cells = [_between(*pair) for pair in zip(figures["asr"], figures["ci"], strict=True)]
        cells += [""] * (most - len(cells))
        rows.append([name, *cells, f"{figures['spread']:.0%}", "yes" if figures["monotone"] else "no"])
    return Table(["scorer", *(f":S{k}" for k in range(1, most + 1)), ":spread", "monotone"], rows)


def _sets(scorers: Mapping[str, WindowFigures]) -> Table:
    rows = []
    for name, figures in scorers.items():
        for k in range(len(figures["asr"])):
            window = select_set(figures, k)
            shares = [f"{share:.0%}" for share in window["outcomes"].values()]
            rows.append([name, f"S{k + 1}", *shares, *_figures(window)])
    outcomes = next(iter(scorers.values()))["outcomes"]
    return Table(["scorer", "set", *(f":{word}" for word in outcomes), *FIGURES], rows)


def _arms(scorers: Mapping[str, ArmFigures]) -> Table:
    rows = []
    for name, arms in scorers.items():
        rows += [[name, arm, _between(arms[arm]["asr"], arms[arm]["ci"]), *_figures(arms[arm])] for arm in CUT_ARMS]
        saved = arms["random_minus_kept"]
        rows.append([name, "random minus kept", _between(saved["asr"], saved["ci"]), *[""] * len(FIGURES)])
    return Table(["scorer", "rows learned", ":attack success rate", *FIGURES], rows)


def _contaminated(scorer: str, figures: ContaminatedFigures) -> Iterator[Table]:
    """The arms by one scorer, and their differences."""
    lines = {"rows learned": arm_lines(figures, _between), "difference": difference_lines(figures, _between)}
    for what, ((_, *titles), *rows) in lines.items():
        yield Table([f"{what}, by {scorer}", *(f":{title}" for title in titles)], rows)


def _figures(figures: SetFigures) -> list[str]:
    over_refusal, loss = figures["over_refusal"], figures["loss"]
    return [
        "" if over_refusal is None else f"{over_refusal:.0%}",
        "" if loss is None else f"{loss:.3f}",
        f"{figures['rows']:,}",
        f"{figures['tokens']:,}",
    ]


def _mixes(poisoned: Mapping[str, Mapping[str, MixFigures]]) -> Table:
    rows = []
    for name, mixes in poisoned.items():
        for share, figures in mixes.items():
            shown = (figures["precision"], figures["auc"], figures["average_precision"])
            rows.append([name, f"{float(share):.0%}", *map(_estimate, shown)])
    return Table(["scorer", ":mixed in", ":unsafe of the dropped", ":ROC-AUC", ":average precision"], rows)


def _estimate(estimate: Estimate) -> str:
    return _between(estimate["mean"], estimate["ci"])


def _between(share: float, interval: Interval | None) -> str:
    return f"{share:.0%}" + (f" ({interval[0]:.0%} to {interval[1]:.0%})" if interval else "")
