"""The model at θ0 + αV for each direction of a pack: its answers, and the likelihood it gives to fixed answers.

Along the danger direction it should refuse fewer and fewer harmful prompts and find unsafe answers likelier than safe
ones; along the safety direction the reverse. Each point of a curve is saved once it is measured, so that the same call
resumes an interrupted run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from decimal import Decimal
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sqsd_filter.directions.offset import offset, random_like
from sqsd_filter.directions.steering.curves import RANDOM, steers, trend
from sqsd_filter.directions.steering.rows import TrialColumns, Trials, read_trials
from sqsd_filter.directions.steering.steer_files import LIKELIHOODS, REPORT, SteerFiles
from sqsd_filter.errors import UsageError
from sqsd_filter.judges import is_degenerate, is_refusal
from sqsd_filter.judges.generation import answer
from sqsd_filter.judges.likelihood import log_probabilities
from sqsd_filter.progress import Progress, Silent
from sqsd_filter.scoring.adapters import Adapter, load_adapter
from sqsd_filter.scoring.chat_encoder import Encoded
from sqsd_filter.scoring.models import load_model
from sqsd_filter.scoring.pack import Pack
from sqsd_filter.scoring.scorer import Scorer
from sqsd_filter.statistics import wilson

if TYPE_CHECKING:
    from transformers import PreTrainedModel

STEERING = 1  # raise this whenever a change in the code changes figures
BASE = "base"  # the point that all curves share: the model itself


def steer(
    scorer: Scorer,
    rows: str | Path,
    out: str | Path,
    *,
    alphas: Sequence[Decimal],
    columns: TrialColumns | None = None,
    limit: int | None = None,
    max_new_tokens: int = 48,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Move the model of the scorer's pack along each of its directions, and write the curves to the folder `out`.

    `rows` holds harmful prompts, with a safe and an unsafe answer if `columns` finds them. The pack, dtype, device and
    length limit are those of `scorer`. `alphas` comes from `parse_alphas`.

    Returns the report, as in steer.json. Raises `DestinationExists` if `out` holds anything else, `InputError`,
    `PackError`, `ModelError`, `UsageError`.
    """
    if max_new_tokens < 1:
        raise UsageError("max_new_tokens (--max-new-tokens) must be at least 1.")
    scorer.check_device()
    progress = progress or Silent()
    trials = read_trials(rows, columns or TrialColumns(), limit)
    settings = {
        **{name: value for name, value in scorer.settings().items() if name != "scoring"},
        "steering": STEERING,
        "alphas": [float(alpha) for alpha in alphas],
        "max_new_tokens": max_new_tokens,
        "rows": trials.source,
    }
    encoded = trials.encoded(scorer.encoder)
    files = SteerFiles(Path(out), settings)
    if files.report is not None:
        progress.note(f"{files.out / REPORT} exists already: nothing to do")
        return files.report
    Measuring(scorer, trials, encoded, files, max_new_tokens, progress).measure(alphas)
    curves = [
        _curve(files, name, adapter, sign, alphas, with_pairs=bool(trials.pairs))
        for name, (adapter, sign) in directions(scorer.pack).items()
    ]
    report = {"pack": scorer.pack.name, "settings": settings, "directions": curves}
    files.finish(report, _answers(files, [c["name"] for c in curves], alphas, trials.prompts))
    return report


def directions(pack: Pack) -> dict[str, tuple[str, int]]:
    """Each distinct direction of a pack, by the name of the first probe that uses it: its adapter and expected sign.

    The sign is 1 if moving along it should make the model less safe, -1 if safer (a negative weight)."""
    first = {probe.direction: probe for probe in reversed(pack.probes)}
    return {p.name: (p.direction, -1 if p.weight < 0 else 1) for p in pack.probes if first[p.direction] is p}


def _point(name: str, alpha: Decimal) -> str:
    return f"{name}@{alpha}" if alpha else BASE


def _random(name: str, seed: int, alpha: Decimal) -> str:
    return _point(f"{name}~{seed}", alpha)


class Measuring:
    """The model and the rows of a run, which measure the points that are still missing."""

    def __init__(
        self,
        scorer: Scorer,
        trials: Trials,
        encoded: tuple[list[Encoded], list[Encoded]],
        files: SteerFiles,
        max_new_tokens: int,
        progress: Progress,
    ) -> None:
        self.scorer, self.trials, self.files = scorer, trials, files
        self.safe, self.unsafe = encoded
        self.max_new_tokens, self.progress = max_new_tokens, progress

    @cached_property
    def model(self) -> PreTrainedModel:
        scorer = self.scorer
        model: PreTrainedModel = load_model(
            scorer.base_model,
            scorer.base_revision,
            dtype=getattr(torch, scorer.dtype),
            device=scorer.device,
            adapter=scorer.pack.base_folder,
            trust_remote_code=scorer.trust_remote_code,
        )
        return model

    def measure(self, alphas: Sequence[Decimal]) -> None:
        """Measure every missing point, the model itself first."""
        pack, prompts = self.scorer.pack, len(self.trials.prompts)
        adapters = {name: load_adapter(pack.adapter(folder)) for name, (folder, _) in directions(pack).items()}
        points = {BASE: (next(iter(adapters.values())), Decimal(0))}
        points |= {_point(name, a): (adapter, a) for name, adapter in adapters.items() for a in alphas if a}
        left = {label: point for label, point in points.items() if not self.files.has(label)}
        self.progress.start("steering", len(left) * prompts)
        for label, (adapter, alpha) in left.items():
            self.files.keep(label, self._at(adapter, alpha))
            self.progress.advance(prompts)
        if self.trials.pairs:
            self.measure_random(adapters, [alpha for alpha in (alphas[0], alphas[-1]) if alpha])
        self.progress.finish()

    def measure_random(self, adapters: Mapping[str, Adapter], ends: Sequence[Decimal]) -> None:
        """Measure the random directions at both ends of the range, to compare with."""
        wanted = [(name, seed, alpha) for name in adapters for seed in range(RANDOM) for alpha in ends]
        left = [(name, seed, alpha) for name, seed, alpha in wanted if not self.files.has(_random(name, seed, alpha))]
        self.progress.start("random directions", len(left) * len(self.trials.pairs))
        for name, seed, alpha in left:
            with offset(self.model, random_like(adapters[name], seed), float(alpha)):
                self.files.keep(_random(name, seed, alpha), self._likelihoods())
            self.progress.advance(len(self.trials.pairs))

    def _at(self, adapter: Adapter, alpha: Decimal) -> dict[str, Any]:
        with offset(self.model, adapter, float(alpha)):
            answers = answer(
                self.model,
                self.scorer.encoder.tokenizer,
                self.trials.prompts,
                max_new_tokens=self.max_new_tokens,
                template=self.scorer.pack.chat_template_kwargs,
            )
            return {"answers": answers, **self._likelihoods()}

    def _likelihoods(self) -> dict[str, float | None]:
        """Mean log-probabilities of the safe and of the unsafe answers over the rows, and unsafe minus safe.

        None if there are no answers or the model overflows."""
        if not self.trials.pairs:
            return dict.fromkeys(LIKELIHOODS)
        safe, unsafe = (float(log_probabilities(self.model, rows).mean()) for rows in (self.safe, self.unsafe))
        figures = zip(LIKELIHOODS, (safe, unsafe, unsafe - safe), strict=True)
        return {name: value if math.isfinite(value) else None for name, value in figures}


def _curve(
    files: SteerFiles, name: str, adapter: str, sign: int, alphas: Sequence[Decimal], *, with_pairs: bool
) -> dict[str, Any]:
    """A direction's points, their trends, and the verdict."""
    points = [{"alpha": float(alpha), **_figures(files.read(_point(name, alpha)))} for alpha in alphas]
    numbers = [point["alpha"] for point in points]
    refusals = trend(numbers, [point["refusal_rate"] for point in points], -sign)
    curve = {"name": name, "adapter": adapter, "expected": {"refusals": -sign, "margin": sign}, "points": points}
    if not with_pairs:
        return {**curve, "refusals": refusals, "margin": None, "random": [], "steers": None}
    margin = trend(numbers, [point["margin"] for point in points], sign)
    random = []
    for seed in range(RANDOM):
        start, stop = (files.read(_random(name, seed, alpha))["margin"] for alpha in (alphas[0], alphas[-1]))
        change = None if start is None or stop is None else stop - start
        random.append({"seed": seed, "start": start, "stop": stop, "change": change})
    verdict = steers(margin, sign, [other["change"] for other in random])
    return {**curve, "refusals": refusals, "margin": margin, "random": random, "steers": verdict}


def _figures(point: Mapping[str, Any]) -> dict[str, Any]:
    answers = point["answers"]
    refusals = sum(map(is_refusal, answers))
    low, high = wilson(refusals, len(answers))
    return {
        "prompts": len(answers),
        "refusals": refusals,
        "refusal_rate": refusals / len(answers),
        "refusal_low": low,
        "refusal_high": high,
        "degenerate_rate": sum(map(is_degenerate, answers)) / len(answers),
        **{name: point[name] for name in LIKELIHOODS},
    }


def _answers(
    files: SteerFiles, names: Sequence[str], alphas: Sequence[Decimal], prompts: Sequence[str]
) -> list[dict[str, Any]]:
    """Every answer with its prompt, direction and α. The answers of the model itself come once, without a direction."""
    points: list[tuple[str | None, Decimal]] = [(None, Decimal(0))]
    points += [(name, alpha) for name in names for alpha in alphas if alpha]
    return [
        {
            "direction": name,
            "alpha": float(alpha),
            "prompt": prompt,
            "answer": text,
            "refusal": is_refusal(text),
            "degenerate": is_degenerate(text),
        }
        for name, alpha in points
        for prompt, text in zip(prompts, files.read(_point(name or BASE, alpha))["answers"], strict=True)
    ]
