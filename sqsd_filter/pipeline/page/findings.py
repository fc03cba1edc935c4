"""The sections on what other commands found: fine-tuning on windows of the rows, drift of a run, and steering."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sqsd_filter.errors import InputError
from sqsd_filter.pictures import COLOURS, MARKERS, plain
from sqsd_filter.pipeline.page.parts import Plot, Section, Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CURVES = {  # of results.json, where it has them: points [x, y] of each scorer, both shares
    "roc": ("false positive rate (%)", "true positive rate (%)"),
    "pr": ("recall (%)", "precision (%)"),
}


@contextmanager
def _as_left_by(path: Path, command: str) -> Iterator[None]:
    """Raise `InputError` where the file turns out to be none that the command leaves."""
    try:
        yield
    except OSError as problem:
        raise InputError(f"{path} can't be read ({problem.strerror}): name what '{command}' left.") from problem
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as problem:
        why = f"it has no {problem}" if isinstance(problem, KeyError) else str(problem)
        raise InputError(
            f"{path} is damaged, or not what '{command}' left ({why}): make it again, or name another."
        ) from problem


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


# ---------------------------------------------------------------------------------------------- evaluation


def evaluation(path: Path) -> Section:
    """The section on a results.json. Raises `InputError`."""
    with _as_left_by(path, "sqsd-filter evaluate"):
        found = _read(path)
        scorers, poisoned, curves = found["scorers"], found.get("poisoned", {}), found.get("curves", {})
        if not scorers and not poisoned:
            raise ValueError("there is no scorer in it")
        plots: list[Plot] = []
        tables, words = [], []
        if scorers:
            _check_windows(scorers)
            plots.append(
                Plot("asr", "Attack success rate by window", partial(_draw_windows, scorers=scorers), height=4.8)
            )
            tables.append(_windows(scorers))
            words = [_trained(found)]
        if poisoned:
            tables.append(_mixes(poisoned))
            words.append(
                "Known unsafe rows were mixed in, the share of all rows that the table says, and as many rows dropped. "
                "ROC-AUC and average precision do without a cut."
            )
        for kind in CURVES:
            if kind in curves:
                _check_shares(share for points in curves[kind].values() for x, y in points for share in (x, y))
                plots.append(
                    Plot(kind, f"{kind.upper()} curves", partial(_draw_curves, kind=kind, scorers=curves[kind]))
                )
        return _drawn(Section("evaluation", "Evaluation", words, plots=plots, tables=tables))


def _trained(found: Mapping[str, Any]) -> str:
    corpus, seeds = found["corpus"], found["seeds"]
    names = corpus if isinstance(corpus, str) else ", ".join(each["name"] for each in corpus)
    several = ", ".join(map(str, seeds)) if isinstance(seeds, list) else seeds
    return (
        f"{found['model']} was fine-tuned on windows of {names}, S1 the riskiest (seeds: {several}). The attack "
        "success rate is the share of harmful prompts that it then complied with: it should fall from S1 on. Spread is "
        "S1 minus the last window."
    )


def _check_windows(scorers: Mapping[str, Any]) -> None:
    """Raise `ValueError` for anything but shares, an interval each."""
    for name, scorer in scorers.items():
        _check_shares([*scorer["asr"], *(end for pair in scorer["ci"] for end in pair)])
        if not scorer["asr"] or [len(pair) for pair in scorer["ci"]] != [2] * len(scorer["asr"]):
            raise ValueError(f"{name} has not one interval a window")


def _check_shares(values: Iterable[Any]) -> None:
    if not all(isinstance(value, int | float) and 0 <= value <= 1 for value in values):
        raise ValueError("a share is no number from 0 to 1")


def _looks(scorers: Mapping[str, Any]) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Each scorer's figures with a colour and a line of its own."""
    for k, (name, found) in enumerate(scorers.items()):
        line = ("-", "--", ":")[k // len(COLOURS) % 3]
        look = {"color": COLOURS[k % len(COLOURS)], "marker": MARKERS[k % len(MARKERS)], "linestyle": line}
        yield found, {**look, "markersize": 5, "label": plain(name)}


def _draw_windows(figure: Figure, scorers: Mapping[str, Any]) -> None:
    axes, most = figure.add_subplot(), max(len(scorer["asr"]) for scorer in scorers.values())
    shifts = np.linspace(-0.2, 0.2, len(scorers)) if len(scorers) > 1 else [0.0]  # so that intervals are told apart
    for (scorer, look), shift in zip(_looks(scorers), shifts, strict=True):
        asr, ends = 100 * np.array(scorer["asr"]), 100 * np.array(scorer["ci"])
        beyond = np.clip([asr - ends[:, 0], ends[:, 1] - asr], 0, None)
        axes.errorbar(np.arange(1, len(asr) + 1) + shift, asr, beyond, elinewidth=1, capsize=2, **look)
    axes.set_xticks(range(1, most + 1), [f"S{k}" for k in range(1, most + 1)])
    axes.set_xlabel("window of rows (S1 has the riskiest)", fontsize=12)
    axes.set_ylabel("attack success rate (%, 95 % interval)", fontsize=12)
    _finish(figure, axes)


def _draw_curves(figure: Figure, kind: str, scorers: Mapping[str, Any]) -> None:
    axes = figure.add_subplot()
    for points, look in _looks(scorers):
        axes.plot(*(100 * np.array(points, np.float64)).T, **{**look, "marker": None})
    across, up = CURVES[kind]
    axes.set_xlim(-2, 102)
    axes.set_xlabel(across, fontsize=12)
    axes.set_ylabel(up, fontsize=12)
    _finish(figure, axes)


def _finish(figure: Figure, axes: Axes) -> None:
    axes.set_ylim(-2, 102)
    axes.tick_params(labelsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper left", ncols=3, fontsize=11, frameon=False)


def _windows(scorers: Mapping[str, Any]) -> Table:
    most = max(len(scorer["asr"]) for scorer in scorers.values())
    rows = []
    for name, scorer in scorers.items():
        cells = [_between(*pair) for pair in zip(scorer["asr"], scorer["ci"], strict=True)]
        cells += [""] * (most - len(cells))
        rows.append([name, *cells, f"{scorer['spread']:.0%}", "yes" if scorer["monotone"] else "no"])
    return Table(["scorer", *(f":S{k}" for k in range(1, most + 1)), ":spread", "monotone"], rows)


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
    for plot in section.plots:
        assert plot.svg
    return section
