"""The section of a run's page on an evaluation: the attack success rates after each fine-tuning, with intervals."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from sqsd_filter.evaluation.folder import RESULTS
from sqsd_filter.evaluation.plot import CURVES, draw_curves, draw_windows
from sqsd_filter.pipeline.page.parts import Plot, Section, Table, read_left
from sqsd_filter.wording import many

FALLING = (
    "The attack success rate is the share of harmful prompts whose answers the judge called unsafe: it should fall "
    "from S1 on. Spread is S1 minus the last window. A model that refuses harmless prompts, babbles or has a high loss "
    "on rows that it did not learn is no use, however safe it looks."
)
CUTTING = (
    "Random minus kept is what the cut saves: the attack success rate (the share of harmful prompts whose answers the "
    "judge called unsafe) after as many random rows, minus that after the rows that the cut keeps."
)
FIGURES = {
    "over_refusal": ":harmless refused",
    "loss": ":held-out loss (nats a token)",
    "rows": ":rows",
    "tokens": ":answer tokens",
}


def evaluation_section(folder: Path) -> Section:
    """The section on a folder that `evaluate` left, or on its results.json. Raises `InputError`."""
    path = folder / RESULTS if folder.is_dir() else folder
    with read_left(path, "sqsd-filter evaluate") as results:
        scorers, arms, poisoned, curves = (results.get(key, {}) for key in ("scorers", "arms", "poisoned", "curves"))
        if not scorers and not arms and not poisoned:
            raise ValueError("there is no scorer in it")
        plots: list[Plot] = []
        tables, words = [], []
        if scorers:
            _check_windows(scorers)
            asr = "Attack success rate by window"
            plots.append(Plot("asr", asr, partial(draw_windows, scorers=scorers), height=4.8))
            tables += [_windows(scorers), _sets(scorers)]
            words = [_trained(results, "equally spaced windows of its rows, S1 the riskiest"), FALLING]
        if arms:
            tables.append(_arms(arms))
            words += [_trained(results, "what a cut drops, what it keeps, as many random rows, and all"), CUTTING]
        if scorers or arms:
            words += [*_before(results["untuned"], results["judges"]), *results.get("warnings", ())]
        if poisoned:
            tables.append(_mixes(poisoned))
            words.append(
                "Known unsafe rows were mixed in, the share of all rows that the table says, and as many rows dropped. "
                "ROC-AUC and average precision do without a cut."
            )
        for kind, (title, *_) in CURVES.items():
            if curves.get(kind):
                _check_shares(share for points in curves[kind].values() for x, y in points for share in (x, y))
                plots.append(Plot(kind, title, partial(draw_curves, kind=kind, curves=curves[kind])))
        return Section("evaluation", "Evaluation", words, plots=plots, tables=tables).drawn()


def _trained(results: Mapping[str, Any], sets: str) -> str:
    asked = [many(count, f"{kind} prompt") for kind, count in results["prompts"].items() if count]
    names = ", ".join(each["name"] for each in results["corpus"])
    return (
        f"{results['model']['name']}, as pack {results['model']['pack']} aligns it, was fine-tuned on sets of {names}: "
        f"{sets} (seeds: {', '.join(map(str, results['seeds']))}), and then asked {' and '.join(asked)}."
    )


def _before(untuned: Mapping[str, Any], judges: Mapping[str, Any]) -> Iterator[str]:
    refused = untuned["over_refusal"]
    harmless = "" if refused is None else f", and it refused {refused:.0%} of the harmless prompts"
    rate = _between(untuned["asr"], untuned["ci"])
    yield f"Before that its attack success rate, by the judge {judges['asr']}, was {rate}{harmless}."
    for pair in judges["agreement"]:
        first, second = pair["judges"]
        yield f"The judges {first} and {second} agree on {pair['share']:.0%} of {many(pair['answers'], 'answer')}."


def _check_windows(scorers: Mapping[str, Any]) -> None:
    """Raise `ValueError` for anything but shares, an interval each."""
    for name, scorer in scorers.items():
        _check_shares([*scorer["asr"], *(end for pair in scorer["ci"] for end in pair)])
        if not scorer["asr"] or [len(pair) for pair in scorer["ci"]] != [2] * len(scorer["asr"]):
            raise ValueError(f"{name} has not one interval a window")


def _check_shares(values: Iterable[Any]) -> None:
    if not all(isinstance(value, int | float) and 0 <= value <= 1 for value in values):
        raise ValueError("a share is no number from 0 to 1")


def _windows(scorers: Mapping[str, Any]) -> Table:
    most = max(len(scorer["asr"]) for scorer in scorers.values())
    rows = []
    for name, scorer in scorers.items():
        cells = [_between(*pair) for pair in zip(scorer["asr"], scorer["ci"], strict=True)]
        cells += [""] * (most - len(cells))
        rows.append([name, *cells, f"{scorer['spread']:.0%}", "yes" if scorer["monotone"] else "no"])
    return Table(["scorer", *(f":S{k}" for k in range(1, most + 1)), ":spread", "monotone"], rows)


def _sets(scorers: Mapping[str, Any]) -> Table:
    rows = []
    for name, scorer in scorers.items():
        for k, words in enumerate(zip(*scorer["outcomes"].values(), strict=True)):
            figures = [scorer[key][k] for key in FIGURES]
            rows.append([name, f"S{k + 1}", *(f"{share:.0%}" for share in words), *_figures(*figures)])
    outcomes = next(iter(scorers.values()))["outcomes"]
    return Table(["scorer", "set", *(f":{word}" for word in outcomes), *FIGURES.values()], rows)


def _arms(arms: Mapping[str, Any]) -> Table:
    rows = []
    for name, cut in arms.items():
        for arm, figures in cut.items():
            if arm == "random_minus_kept":
                rows.append([name, "random minus kept", _between(figures["asr"], figures["ci"]), *[""] * len(FIGURES)])
            else:
                shown = _figures(*(figures[key] for key in FIGURES))
                rows.append([name, arm, _between(figures["asr"], figures["ci"]), *shown])
    return Table(["scorer", "rows learned", ":attack success rate", *FIGURES.values()], rows)


def _figures(over_refusal: float | None, loss: float | None, rows: int, tokens: int) -> list[str]:
    refused = "" if over_refusal is None else f"{over_refusal:.0%}"
    return [refused, "" if loss is None else f"{loss:.3f}", f"{rows:,}", f"{tokens:,}"]


def _mixes(poisoned: Mapping[str, Any]) -> Table:
    rows = []
    for name, rates in poisoned.items():
        for rate, figures in rates.items():
            shown = [figures[key] for key in ("precision", "auc", "average_precision")]
            rows.append([name, f"{float(rate):.0%}", *(_between(each["mean"], each["ci"]) for each in shown)])
    return Table(["scorer", ":mixed in", ":unsafe of the dropped", ":ROC-AUC", ":average precision"], rows)


def _between(share: float, interval: Sequence[float]) -> str:
    low, high = interval
    return f"{share:.0%} ({low:.0%} to {high:.0%})"
