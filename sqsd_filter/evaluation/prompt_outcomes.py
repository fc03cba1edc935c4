"""outcomes.json: the outcome of each answer as 0 or 1, without its text, and the figures that follow from these.

Whoever has outcomes.json can compute the figures again. `combine` puts the outcomes of several corpora together, one
corpus per seed. Then a seed stands for the draw of the rows and for the training.

Every value belongs to a seed and to a prompt, and all seeds have the same prompts. Intervals are those of a
hierarchical bootstrap: a draw takes seeds with replacement, and prompts with replacement, and an answer counts once for
each time that both were taken. A difference of two arms is one of the same seeds and prompts. With few seeds such draws
vary too little (with three, by a third of the seeds' variance), and there are too few seeds for the tails. So the
2.5th and 97.5th percentile are moved away from the mean, both by one factor: the half-width by Student's t over that of
a normal distribution with the draws' standard deviation. Standard error and degrees of freedom are those of
`statistics.sureness`. In simulations with three seeds the intervals cover 94 to 100 %, and without the factor as little
as 84 %. With one seed only the prompts vary.

Where all outcomes of an arm are 0, or all 1, no draw varies: the interval is then Wilson's over the prompts, and
Newcombe's for differences, as in `figures`. Two different models may also have the same outcomes everywhere. That does
not show that they are alike, so the interval of their difference is Newcombe's, too. But where two arms are one model
with each seed, because their rows are equal (`RunRecord.run`), they differ by exactly 0, with the interval [0, 0].
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from itertools import chain
from statistics import NormalDist

import numpy as np

from sqsd_filter.errors import InputError
from sqsd_filter.evaluation.figures import draws, interval, newcombe
from sqsd_filter.evaluation.results import (
    ArmMeasures,
    ContaminatedFigures,
    Interval,
    Measured,
    MeasuredBySeed,
    PromptOutcomes,
    RunRecord,
)
from sqsd_filter.statistics import sureness, wilson

UNTUNED_ARM = "untuned"
LOSS = "loss"
DIFFERENCES = (
    *(("all", "above-reference"), ("all", "cut"), ("all", "clean"), ("random", "above-reference"), ("random", "cut")),
    *(("above-reference", "clean"), ("cut", "clean")),
)
_Z = NormalDist().inv_cdf(0.975)

Values = Mapping[int, Mapping[str, np.ndarray]]  # by seed and by what was measured: (p,) floats
ShareFormat = Callable[[float, Interval | None], str]  # a share in words, with its interval if there is one


def prompt_hash(prompt: str) -> str:
    """16 hex digits."""
    return hashlib.blake2b(prompt.encode(), digest_size=8).hexdigest()


def bits(values: Iterable[bool]) -> str:
    """One digit, 0 or 1, for each value."""
    return "".join("01"[value] for value in values)


def combine(several: Sequence[PromptOutcomes]) -> PromptOutcomes:
    """The runs of several corpora in one. Raises `InputError` where two can't be compared, or have a run in common."""
    first = several[0]
    for other in several[1:]:
        for name in ("model", "sets", "settings", "judges", "prompts"):
            if first[name] != other[name]:
                raise InputError(f"These outcomes can't be combined, because they have different {name}.")
    runs = list(chain.from_iterable(each["runs"] for each in several))
    if len({(run["scorer"], run["arm"], run["seed"]) for run in runs}) < len(runs):
        raise InputError("These outcomes can't be combined, because two corpora have the same seed.")
    return {**first, "runs": runs}


def contaminated_figures(outcomes: PromptOutcomes) -> dict[str, ContaminatedFigures]:
    """The figures of each scorer's arms and of the model before any fine-tuning."""
    runs = outcomes["runs"]
    before = [run for run in runs if run["arm"] == UNTUNED_ARM]
    figures: dict[str, ContaminatedFigures] = {}
    for scorer in dict.fromkeys(run["scorer"] for run in runs if run["arm"] != UNTUNED_ARM):
        by_arm: dict[str, list[RunRecord]] = {UNTUNED_ARM: before} if before else {}
        for run in runs:
            if run["scorer"] == scorer and run["arm"] != UNTUNED_ARM:
                by_arm.setdefault(run["arm"], []).append(run)
        values = {arm: {run["seed"]: _measured(run, outcomes["judges"]) for run in own} for arm, own in by_arm.items()}
        pairs = [(a, b) for a, b in DIFFERENCES if values.keys() >= {a, b}]
        figures[scorer] = {
            "arms": {arm: _arm(own, values[arm]) for arm, own in by_arm.items()},
            "differences": {
                f"{a} - {b}": _differences(values[a], values[b], one_model=_one_model(by_arm[a], by_arm[b]))
                for a, b in pairs
            },
        }
    return figures


def _measured(run: RunRecord, judges: Sequence[str]) -> dict[str, np.ndarray]:
    """All that was measured of a run, each (p,)."""
    texts = {f"unsafe by {judge}": run["unsafe"][judge] for judge in judges}
    texts |= {name: run[name][judges[0]] for name in ("refused", "degenerate")}
    texts |= {"harmless refused": run["harmless_refused"], "right": run["right"]}
    values = {name: np.array(list(text), float) for name, text in texts.items() if text}
    return values if run["loss"] is None else {**values, LOSS: np.array([run["loss"]])}


def _arm(runs: Sequence[RunRecord], values: Values) -> ArmMeasures:
    measures: dict[str, MeasuredBySeed] = {}
    for name, values_sp in _stacked(values, values.keys()).items():
        ci = mean_interval(values_sp, share=name != LOSS)
        measures[name] = {"mean": float(values_sp.mean()), "ci": ci, "by_seed": values_sp.mean(1).tolist()}
    kinds = dict.fromkeys(chain.from_iterable(run["dropped"] for run in runs))
    return {
        "seeds": [run["seed"] for run in runs],
        "rows": float(np.mean([run["rows"] for run in runs])),
        "tokens": float(np.mean([run["tokens"] for run in runs])),
        "dropped": {kind: float(np.mean([run["dropped"].get(kind, 0) for run in runs])) for kind in kinds},
        "measures": measures,
    }


def _one_model(a: Iterable[RunRecord], b: Iterable[RunRecord]) -> bool:
    """Are two arms known to be one model with each seed that both have?"""
    of_a, of_b = ({run["seed"]: run.get("run") for run in arm} for arm in (a, b))
    return all(of_a[seed] is not None and of_a[seed] == of_b[seed] for seed in of_a.keys() & of_b.keys())


def _differences(a: Values, b: Values, *, one_model: bool) -> dict[str, Measured]:
    """By what was measured: the first arm's mean minus the second's, over the seeds that both have."""
    seeds = [seed for seed in a if seed in b]
    of_a, of_b = _stacked(a, seeds), _stacked(b, seeds)
    return {
        name: {
            "mean": float((of_a[name] - of_b[name]).mean()),
            "ci": [0.0, 0.0] if one_model else difference_interval(of_a[name], of_b[name], share=name != LOSS),
        }
        for name in of_a
        if name in of_b
    }


def _stacked(values: Values, seeds: Iterable[int]) -> dict[str, np.ndarray]:
    """(s, p) for all that was measured with each of these seeds."""
    rows = [values[seed] for seed in seeds]
    return {name: np.array([row[name] for row in rows]) for name in rows[0] if all(name in row for row in rows)}


def mean_interval(values_sp: np.ndarray, *, share: bool) -> Interval | None:
    """The 95 % interval of the mean of values (s, p), which are 0 or 1 where it is a `share`; None for one value."""
    prompts = values_sp.shape[1]
    if share and float(values_sp.mean()) in (0.0, 1.0):
        return list(wilson(round(float(values_sp[0].sum())), prompts))
    return _bootstrapped(values_sp, (0.0, 1.0) if share else None)


def difference_interval(a_sp: np.ndarray, b_sp: np.ndarray, *, share: bool) -> Interval | None:
    """The 95 % interval of the mean of `a_sp - b_sp`, both (s, p) with the same seeds and prompts."""
    if share:
        rate_a, rate_b = float(a_sp.mean()), float(b_sp.mean())
        if (a_sp == b_sp).all() or rate_a in (0.0, 1.0) or rate_b in (0.0, 1.0):
            of_a, of_b = mean_interval(a_sp, share=True), mean_interval(b_sp, share=True)
            assert of_a is not None
            assert of_b is not None
            return newcombe(rate_a, of_a, rate_b, of_b)
    return _bootstrapped(a_sp - b_sp, (-1.0, 1.0) if share else None)


def _bootstrapped(values_sp: np.ndarray, bounds: tuple[float, float] | None) -> Interval | None:
    sure = sureness(values_sp)
    if sure is None:
        return None
    mean, drawn_d = float(values_sp.mean()), draws(values_sp[None])[:, 0]
    spread = float(drawn_d.std())
    factor = sure.reach / (_Z * spread) if spread > 0 else 0.0
    ends = mean + factor * (np.array(interval(drawn_d)) - mean)
    return [float(end) for end in (np.clip(ends, *bounds) if bounds else ends)]


def intervals_over(seeds: Collection[int]) -> str:
    """What the intervals are over, as a sentence."""
    if len(seeds) == 1:
        return "Intervals are over prompts only, because there is one seed: they leave out what another would change."
    return "Intervals are over seeds and prompts together; those of a model with one seed are over prompts only."


def arm_lines(figures: ContaminatedFigures, share: ShareFormat) -> list[list[str]]:
    """A table of the arms, its titles first: the arm, its rows, its dropped rows of each kind, and all measures."""
    arms = figures["arms"]
    kinds = list(dict.fromkeys(chain.from_iterable(arm["dropped"] for arm in arms.values())))
    names = list(dict.fromkeys(chain.from_iterable(arm["measures"] for arm in arms.values())))
    lines = [["", "rows", *(f"{kind} dropped" for kind in kinds), *names]]
    for name, arm in arms.items():
        counts = [arm["rows"], *(arm["dropped"].get(kind) for kind in kinds)]
        cells = [measured_cell(arm["measures"].get(measure), measure, share) for measure in names]
        lines.append([name, *map(count_cell, counts), *cells])
    return lines


def difference_lines(figures: ContaminatedFigures, share: ShareFormat) -> list[list[str]]:
    """A table of the differences of two arms, its titles first."""
    differences = figures["differences"]
    names = list(dict.fromkeys(chain.from_iterable(differences.values())))
    lines = [[pair, *(measured_cell(each.get(n), n, share) for n in names)] for pair, each in differences.items()]
    return [["difference", *names], *lines]


def count_cell(mean: float | None) -> str:
    """A mean number of rows with at most one decimal, or "-" for None."""
    return "-" if mean is None else f"{mean:,.1f}".removesuffix(".0")


def measured_cell(measured: Measured | None, name: str, share: ShareFormat) -> str:
    """A loss or a share with its interval, or "-" for None."""
    if measured is None:
        return "-"
    mean, ci = measured["mean"], measured["ci"]
    if name == LOSS:
        return f"{mean:.3f}" + (f" ({ci[0]:.3f} to {ci[1]:.3f})" if ci else "")
    return share(mean, ci)
