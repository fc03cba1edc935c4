"""The sections on what other commands found: fine-tuning on windows of the rows, drift of a run, and steering."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from sqsd_filter.errors import InputError
from sqsd_filter.pipeline.page.parts import Plot, Section, Table, sensible
from sqsd_filter.wording import many


@contextmanager
def _as_left_by(path: Path, command: str) -> Iterator[None]:
    """Raise `InputError` where the file turns out to be none that the command leaves."""
    try:
        with sensible(f"{path} is damaged, or not what '{command}' left", "make it again, or name another"):
            yield
    except OSError as problem:
        raise InputError(f"{path} can't be read ({problem.strerror}): name what '{command}' left.") from problem


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


# ---------------------------------------------------------------------------------------------- evaluation

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


def evaluation(folder: Path) -> Section:
    """The section on a folder that `evaluate` left, or its results.json. Raises `InputError`."""
    from sqsd_filter.evaluation.folder import RESULTS
    from sqsd_filter.evaluation.plot import CURVES, draw_curves, draw_windows

    path = folder / RESULTS if folder.is_dir() else folder
    with _as_left_by(path, "sqsd-filter evaluate"):
        found = _read(path)
        scorers, arms, poisoned, curves = (found.get(key, {}) for key in ("scorers", "arms", "poisoned", "curves"))
        if not scorers and not arms and not poisoned:
            raise ValueError("there is no scorer in it")
        plots: list[Plot] = []
        tables, words = [], []
        if scorers:
            _check_windows(scorers)
            asr = "Attack success rate by window"
            plots.append(Plot("asr", asr, partial(draw_windows, scorers=scorers), height=4.8))
            tables += [_windows(scorers), _sets(scorers)]
            words = [_trained(found, "equally spaced windows of its rows, S1 the riskiest"), FALLING]
        if arms:
            tables.append(_arms(arms))
            words += [_trained(found, "what a cut drops, what it keeps, as many random rows, and all"), CUTTING]
        if scorers or arms:
            words += [*_before(found["untuned"], found["judges"]), *found.get("warnings", ())]
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
        return _drawn(Section("evaluation", "Evaluation", words, plots=plots, tables=tables))


def _trained(found: Mapping[str, Any], sets: str) -> str:
    asked = [many(count, f"{kind} prompt") for kind, count in found["prompts"].items() if count]
    names = ", ".join(each["name"] for each in found["corpus"])
    return (
        f"{found['model']['name']}, as pack {found['model']['pack']} aligns it, was fine-tuned on sets of {names}: "
        f"{sets} (seeds: {', '.join(map(str, found['seeds']))}), and then asked {' and '.join(asked)}."
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
    for name, found in scorers.items():
        for k, words in enumerate(zip(*found["outcomes"].values(), strict=True)):
            figures = [found[key][k] for key in FIGURES]
            rows.append([name, f"S{k + 1}", *(f"{share:.0%}" for share in words), *_figures(*figures)])
    outcomes = next(iter(scorers.values()))["outcomes"]
    return Table(["scorer", "set", *(f":{word}" for word in outcomes), *FIGURES.values()], rows)


def _arms(arms: Mapping[str, Any]) -> Table:
    rows = []
    for name, found in arms.items():
        for arm, figures in found.items():
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


# ---------------------------------------------------------------------------------------------- drift and steering


def drift(folder: Path) -> Section:
    """The section on a folder that `drift --out` left. Raises `InputError`."""
    from sqsd_filter.directions.drift_files import REPORT, draw, panels

    path = folder / REPORT
    with _as_left_by(path, "sqsd-filter drift --out"):
        found = _read(path)
        shown = {"drift": "Drift", "speed": "Speed of drift", "drift-refusals": "Refusals"}
        plots = [
            Plot(name, f"{what} by training step", partial(draw, report=found, shown=[panel]), height=4.6)
            for (name, what), panel in zip(shown.items(), panels(found), strict=False)
        ]
        names = list(found["checkpoints"][0]["directions"])
        rows = [
            [
                str(point["step"]),
                *(f"{point['directions'][name]['projection']:.4g}" for name in names),
                f"{point['risk_projection']:.4g}",
            ]
            for point in found["checkpoints"]
        ]
        words = [f"What the fine-tuning run {found['run']} changed, along the directions of {found['pack']['name']}."]
        table = Table([":step", *(f":{name}" for name in names), ":risk"], rows)
        return _drawn(Section("drift", "Drift", words, plots=plots, tables=[table]))


def steering(folder: Path) -> Section:
    """The section on a folder that `steer --out` left. Raises `InputError`."""
    from sqsd_filter.directions.steering.folder import REPORT
    from sqsd_filter.directions.steering.plot import VERDICTS, draw

    path = folder / REPORT
    with _as_left_by(path, "sqsd-filter steer"):
        found = _read(path)
        pairs, curves = found["settings"]["rows"]["pairs"] > 0, found["directions"]
        height = 10 if pairs else 4
        plots = [
            Plot(
                f"steer-{k}",
                f"Steering along {curve['name']}: {VERDICTS[curve['steers']]}",
                partial(draw, curves=[curve], likelihoods=pairs),
                height=height,
            )
            for k, curve in enumerate(curves)
        ]
        words = [f"What the model of {found['pack']} does when it is moved along each direction V, to θ0 + αV."]
        return _drawn(Section("steering", "Steering", words, plots=plots))


def _drawn(section: Section) -> Section:
    """The section with its pictures drawn, so that what can't be drawn is told of the file that it is from."""
    _ = [plot.svg for plot in section.plots]
    return section
