"""Drift: how far fine-tuning has moved the weights along the directions of a pack.

ΔW_m = θ_t - θ_0 is the change of module m, 0 if the run does not train it, and V_m a direction there. The sums run over
the modules that the direction covers:

    projection   Σ_m <ΔW_m, V_m> / ‖V_m‖                           scalar projections: a length, in the weights' unit
    cosine       Σ_m <ΔW_m, V_m> / (‖ΔW‖ ‖V‖)                      of the concatenated vectors: -1 to 1
    cosine_sum   Σ_m <ΔW_m, V_m> / (‖ΔW_m‖ ‖V_m‖)                  as a row's projection in SQSD: -modules to modules
    norm         ‖ΔW‖ = (Σ_m ‖ΔW_m‖²)^½

A quotient by zero is 0. The weights of the pack's probes combine the projections into one number, `risk_projection` =
Σ weight · projection: by default danger minus safety.

For two low-rank products, <B A, B_V A_V> = <Bᵀ B_V, A A_Vᵀ> needs r-sized matrices only; for a dense ΔW it is
<B_Vᵀ ΔW, A_V>. All of it is computed in float64, on the device of the change.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sqsd_filter.directions.checkpoints import (
    Change,
    Checkpoint,
    Origin,
    changes,
    find_checkpoints,
    shape,
    trained_on,
)
from sqsd_filter.directions.refusals import Refusals, count_refusals
from sqsd_filter.errors import PackError
from sqsd_filter.progress import Progress, Silent
from sqsd_filter.scoring import adapters
from sqsd_filter.scoring.adapters import LoraFactors, exact, load_adapter
from sqsd_filter.scoring.pack import Pack

log = logging.getLogger(__name__)

ROWS = 4096  # of a dense matrix are in float64 at a time


@dataclass(frozen=True)
class Direction:
    """A direction, named after its probe, with that probe's weight in the risk."""

    name: str
    weight: float
    factors: Mapping[str, LoraFactors]
    lengths: Mapping[str, float]  # ‖V_m‖


@dataclass(frozen=True)
class Along:
    """A change measured along one direction: (m,) arrays over the modules that the direction covers."""

    modules: tuple[str, ...]
    dots_m: np.ndarray  # <ΔW_m, V_m>
    norms_m: np.ndarray  # ‖ΔW_m‖
    lengths_m: np.ndarray  # ‖V_m‖

    @property
    def projections_m(self) -> np.ndarray:
        return _ratio(self.dots_m, self.lengths_m)

    @property
    def cosines_m(self) -> np.ndarray:
        return _ratio(self.dots_m, self.norms_m * self.lengths_m)

    def totals(self) -> dict[str, float]:
        """The four numbers of the module's docstring."""
        norm, length = np.linalg.norm(self.norms_m), np.linalg.norm(self.lengths_m)
        return {
            "projection": float(self.projections_m.sum()),
            "cosine": float(self.dots_m.sum() / (norm * length)) if norm * length else 0.0,
            "cosine_sum": float(self.cosines_m.sum()),
            "norm": float(norm),
        }


def _ratio(over: np.ndarray, under: np.ndarray) -> np.ndarray:
    quotients: np.ndarray = np.divide(over, under, out=np.zeros_like(over), where=np.not_equal(under, 0))
    return quotients


def load_directions(pack: Pack) -> list[Direction]:
    """Each distinct direction of the pack's probes, with the sum of the weights of probes that share it.

    Raises `PackError`."""
    directions: dict[str, Direction] = {}
    for probe in pack.probes:
        if (known := directions.get(probe.direction)) is not None:
            directions[probe.direction] = replace(known, weight=known.weight + probe.weight)
            continue
        factors = load_adapter(pack.adapter(probe.direction)).factors
        lengths = {module: adapters.norm(product) for module, product in factors.items()}
        directions[probe.direction] = Direction(probe.name, probe.weight, factors, lengths)
    return list(directions.values())


def inner(change: Change, direction: LoraFactors) -> float:
    """<ΔW, V> of one module."""
    if isinstance(change, LoraFactors):
        return adapters.inner(change, direction)
    A_V, B_V = exact(direction.A.to(change.device)), exact(direction.B.to(change.device))
    parts = [(B.T @ exact(rows) * A_V).sum() for rows, B in zip(change.split(ROWS), B_V.split(ROWS), strict=True)]
    return direction.scaling * float(torch.stack(parts).sum())


def length(change: Change) -> float:
    """‖ΔW‖ of one module."""
    if isinstance(change, LoraFactors):
        return adapters.norm(change)
    return float(torch.linalg.vector_norm(exact(change)))


def project(directions: Sequence[Direction], change: Callable[[str], Change | None]) -> dict[str, Along]:
    """A change along each direction; `change` maps a module's name to its change.

    Raises `PackError` if a module has another shape than in the pack, or if the run trains no module of the pack.
    """
    modules = sorted({module for direction in directions for module in direction.factors})
    dots = {direction.name: dict.fromkeys(sorted(direction.factors), 0.0) for direction in directions}
    norms = dict.fromkeys(modules, 0.0)
    touched = False
    for module in modules:  # each change is computed once, and freed before the next one
        if (delta := change(module)) is None:
            continue
        touched = True
        norms[module] = length(delta)
        for direction in directions:
            if (factors := direction.factors.get(module)) is not None:
                check_shape(module, shape(delta), factors)
                dots[direction.name][module] = inner(delta, factors)
    if not touched:
        raise PackError(
            f"The run trains no module of the pack ('{modules[0]}', ...): name the pack of the model that was trained."
        )
    return {d.name: _along(d, dots[d.name], norms) for d in directions}


def check_shape(module: str, changed: tuple[int, ...], direction: LoraFactors) -> None:
    """Raise `PackError` if a module's shape in the run is not that in the pack."""
    if changed != shape(direction):
        raise PackError(
            f"'{module}' has the shape {changed} in the run and {shape(direction)} in the pack: the pack belongs to "
            "another model."
        )


def _along(direction: Direction, dots: Mapping[str, float], norms: Mapping[str, float]) -> Along:
    columns = (dots, norms, direction.lengths)
    return Along(tuple(dots), *(np.array([column[module] for module in dots], np.float64) for column in columns))


def risk_projection(directions: Sequence[Direction], along: Mapping[str, Mapping[str, float]]) -> float:
    """Σ weight · projection, from the totals along each direction."""
    return sum(d.weight * along[d.name]["projection"] for d in directions)


@dataclass(frozen=True)
class Point:
    """A run after `step` updates, along each direction; with its refusals if prompts were asked."""

    step: int
    name: str
    along: Mapping[str, Along]
    risk_projection: float
    refusals: Refusals | None = None


@dataclass(frozen=True)
class Drift:
    """A run's points by step, the first one the origin."""

    run: Path
    pack: Pack
    origin: Origin
    checkpoints: list[Checkpoint]
    points: list[Point]

    def report(self) -> dict[str, Any]:
        """Everything but the figures per module, as JSON."""
        first = self.points[0]
        return {
            "run": str(self.run),
            "pack": {"name": self.pack.name, "fingerprint": self.pack.fingerprint},
            "base_model": self.origin.model,
            "started_from": str(self.origin.continued) if self.origin.continued else None,
            "modules": {name: len(along.modules) for name, along in first.along.items()},
            "checkpoints": [_entry(point) for point in self.points],
        }


def _entry(point: Point) -> dict[str, Any]:
    entry: dict[str, Any] = {"step": point.step, "checkpoint": point.name, "risk_projection": point.risk_projection}
    entry["directions"] = {name: along.totals() for name, along in point.along.items()}
    return entry | (point.refusals.report() if point.refusals else {})


def measure_drift(
    run: str | Path,
    pack: Pack,
    *,
    base: str | None = None,
    progress: Progress | None = None,
) -> Drift:
    """Project every checkpoint of a run on the pack's directions.

    `base` is where the run started, if not from the pack's base model: another model, or a LoRA folder on the pack's
    base model that the run continued to train.

    Raises `InputError` if a file can't be read, `PackError` if run and pack don't belong together.
    """
    run, progress = Path(run), progress or Silent()
    checkpoints = find_checkpoints(run)
    origin = Origin.of(pack, base)
    directions = load_directions(pack)
    _compare_bases(checkpoints, origin)
    points = [_origin_point(directions)]
    for checkpoint in checkpoints:
        if not checkpoint.is_adapter:
            progress.note(f"reading {checkpoint.folder}")
        along = project(directions, changes(checkpoint, origin))
        totals = {name: measured.totals() for name, measured in along.items()}
        points.append(Point(checkpoint.step, checkpoint.folder.name, along, risk_projection(directions, totals)))
    return Drift(run, pack, origin, checkpoints, points)


def with_refusals(
    drift: Drift, prompts: Sequence[str], device: str | None = None, progress: Progress | None = None
) -> Drift:
    """The same drift with each checkpoint's share of refusals to these prompts, which it answers on `device`."""
    counted = count_refusals(drift.checkpoints, drift.origin, drift.pack, prompts, device, progress or Silent())
    points = [replace(point, refusals=refusals) for point, refusals in zip(drift.points, counted, strict=True)]
    return replace(drift, points=points)


def _origin_point(directions: Sequence[Direction]) -> Point:
    modules = {module for direction in directions for module in direction.factors}
    nothing = dict.fromkeys(modules, 0.0)
    along = {d.name: _along(d, dict.fromkeys(sorted(d.factors), 0.0), nothing) for d in directions}
    return Point(0, "start", along, 0.0)


def _compare_bases(checkpoints: Sequence[Checkpoint], origin: Origin) -> None:
    """Warn if an adapter names a base model that is clearly not the origin's."""
    for name in dict.fromkeys(trained_on(c.folder) for c in checkpoints if c.is_adapter):
        if name is not None and not _alike(name, origin.model):
            log.warning("the run was trained on '%s', but the directions belong to '%s'", name, origin.model)


def _alike(one: str, other: str) -> bool:
    """May two names mean the same model? Folders, organisations and additions to the name may differ."""
    one, other = one.lower(), other.lower()
    return Path(one).name in other or Path(other).name in one
