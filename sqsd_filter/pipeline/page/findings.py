"""The sections on what other commands found: fine-tuning on windows of the rows, drift of a run, and steering."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sqsd_filter.errors import InputError
from sqsd_filter.pictures import COLOURS, MARKERS, plain
from sqsd_filter.pipeline.page.parts import Plot, Section, Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CURVES = {  # of a scorer, where the file has them: points (x, y), both shares
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
        scorers = {str(name): _checked(scorer) for name, scorer in found["scorers"].items()}
        if not scorers:
            raise ValueError("no scorer in it")
        plots = [Plot("asr", "Attack success rate by window of risk", partial(_draw_windows, scorers), height=4.8)]
        for kind in CURVES:
            if having := {name: scorer[kind] for name, scorer in scorers.items() if kind in scorer}:
                plots.append(Plot(kind, f"{kind.upper()} curves", partial(_draw_curves, kind, having), height=4.8))
        seeds = found["seeds"]
        words = [
            f"The model {found['model']} was fine-tuned on windows of {found['corpus']}, S1 the riskiest; ASR is the "
            "share of harmful prompts that it then complied with."
            + f" Seeds: {', '.join(map(str, seeds)) if isinstance(seeds, list) else seeds}.",
            "A scorer that tells rows apart has a high ASR at S1 and a falling one from there; spread is S1 minus the "
            "last window.",
        ]
        return _drawn(Section("evaluation", "Evaluation", words, plots=plots, tables=[_table(scorers)]))


def _checked(scorer: Mapping[str, Any]) -> Mapping[str, Any]:
    """Raises `ValueError` for anything but shares and their intervals."""
    shares = [*scorer["asr"], *(end for pair in scorer["ci"] for end in pair)]
    shares += [value for kind in CURVES for point in scorer.get(kind, ()) for value in point]
    if not scorer["asr"] or not all(isinstance(share, int | float) and 0 <= share <= 1 for share in shares):
        raise ValueError("a share that is no number from 0 to 1")
    if [len(pair) for pair in scorer["ci"]] != [2] * len(scorer["asr"]):
        raise ValueError("not one interval a window")
    if not (isinstance(scorer["spread"], int | float) and math.isfinite(scorer["spread"])):
        raise ValueError("a spread that is no number")
    return scorer


def _looks(names: Mapping[str, Any]) -> Iterator[tuple[str, Any, dict[str, Any]]]:
    """Each scorer with a colour and a line of its own."""
    lines = [line for line in ("-", "--", ":") for _ in COLOURS]
    for (name, found), *look in zip(names.items(), cycle(COLOURS), cycle(MARKERS), cycle(lines), strict=False):
        colour, marker, line = look
        yield name, found, {"color": colour, "marker": marker, "linestyle": line, "markersize": 5, "label": plain(name)}


def _draw_windows(scorers: Mapping[str, Any], figure: Figure) -> None:
    axes, most = figure.add_subplot(), max(len(scorer["asr"]) for scorer in scorers.values())
    shifts = np.linspace(-0.2, 0.2, len(scorers)) if len(scorers) > 1 else [0.0]  # so that intervals are told apart
    for (_, scorer, look), shift in zip(_looks(scorers), shifts, strict=True):
        asr, ends = 100 * np.array(scorer["asr"]), 100 * np.array(scorer["ci"])
        bars = np.clip([asr - ends[:, 0], ends[:, 1] - asr], 0, None)
        axes.errorbar(np.arange(1, len(asr) + 1) + shift, asr, bars, elinewidth=1, capsize=2, **look)
    axes.set_xticks(range(1, most + 1), [f"S{k}" for k in range(1, most + 1)])
    axes.set_xlabel("window of rows (S1 has the riskiest)", fontsize=12)
    axes.set_ylabel("attack success rate (%, with intervals)", fontsize=12)
    _finish(figure, axes)


def _draw_curves(kind: str, scorers: Mapping[str, Any], figure: Figure) -> None:
    axes = figure.add_subplot()
    for _, points, look in _looks(scorers):
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


def _table(scorers: Mapping[str, Any]) -> Table:
    most = max(len(scorer["asr"]) for scorer in scorers.values())
    rows = []
    for name, scorer in scorers.items():
        pairs = zip(scorer["asr"], scorer["ci"], strict=True)
        cells = [f"{share:.0%} ({low:.0%} to {high:.0%})" for share, (low, high) in pairs]
        rest = [""] * (most - len(cells))
        rows.append([name, *cells, *rest, f"{scorer['spread']:.0%}", "yes" if scorer["monotone"] else "no"])
    return Table(["scorer", *(f":S{k}" for k in range(1, most + 1)), ":spread", "monotone"], rows)


# ---------------------------------------------------------------------------------------------- drift and steering


def drift(folder: Path) -> Section:
    """The section on a folder that `drift --out` left. Raises `InputError`."""
    from sqsd_filter.directions.drift_files import REPORT, draw, panels

    path = folder / REPORT
    with _as_left_by(path, "sqsd-filter drift --out"):
        found = _read(path)
        shown = {"drift": "Drift", "speed": "Speed of drift", "drift-refusals": "Refusals"}
        plots = [
            Plot(name, f"{what} by training step", partial(draw, report=found, shown=[panel]))
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
