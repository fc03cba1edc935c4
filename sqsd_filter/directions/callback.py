"""Drift while it happens: a `transformers` callback that adds it to the trainer's log.

With LoRA the live factors are compared with those at the start. With full fine-tuning <W_t - W_0, V> = <W_t, V> -
<W_0, V>, so that one number a module and direction is all that is kept of the start; ‖ΔW‖, and with it the cosines,
would take a copy of the weights and are not available there.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from transformers import TrainerCallback
from transformers.modeling_utils import unwrap_model

from sqsd_filter.directions.checkpoints import difference, shape, upright
from sqsd_filter.directions.drift import Direction, check_shape, inner, load_directions, project, risk_projection
from sqsd_filter.errors import PackError, UsageError
from sqsd_filter.scoring.adapters import LoraFactors
from sqsd_filter.scoring.pack import Pack, load_pack

log = logging.getLogger(__name__)


class DriftCallback(TrainerCallback):
    """Logs the drift of a model in training along a pack's directions.

    The log gets `sqsd/danger_projection`, `sqsd/danger_cosine`, `sqsd/danger_cosine_sum`, `sqsd/danger_norm`, the same
    for each other direction, and `sqsd/risk_projection`, all as in `directions.drift`; with full fine-tuning the
    projections only. When the risk's projection (danger minus safety) is above `threshold`, in the weights' unit, a
    warning is logged, once in a training.

    Give it to the trainer with `attach`: trainers call those in their argument `callbacks` after the ones that report
    to TensorBoard, W&B and others, which then don't see the figures.

    Works under DDP and with everything that leaves whole weights on the main process; weights that FSDP or ZeRO-3 cut
    into shards are refused.
    """

    def __init__(self, pack: str | Path | Pack, *, threshold: float | None = None, every: int | None = None) -> None:
        """The figures come with each entry of the trainer's log, or every `every` updates, which then are logged.

        Raises `PackError` where there is no valid pack, `UsageError` for an `every` below 1.
        """
        if every is not None and every < 1:
            raise UsageError(f"every must be at least 1 update, not {every}.")
        self.pack = pack if isinstance(pack, Pack) else load_pack(pack)
        self.threshold, self.every = threshold, every
        self._directions = load_directions(self.pack)
        self._start: LoraStart | FullStart | None = None
        self._logged = 0  # the last step whose figures are in the log
        self._warned = self._first = False

    def attach(self, trainer: Any) -> DriftCallback:
        """Become the first of the trainer's callbacks. Its model is where the drift starts, also if training is then
        resumed from a checkpoint.

        Raises `PackError` where the pack belongs to another model, `UsageError` where its weights are in shards.
        """
        trainer.callback_handler.callbacks.insert(0, self)
        self._first = True
        self.on_init_end(trainer.args, trainer.state, trainer.control, model=trainer.model)
        return self

    def on_init_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if model is not None and state.is_world_process_zero:
            self._remember(model)

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self._logged, self._warned = state.global_step, False
        if not state.is_world_process_zero:
            return
        if not self._first and args.report_to:
            log.warning("%s will not get the drift: use DriftCallback.attach(trainer)", ", ".join(args.report_to))
        if state.global_step and self._start is None:
            log.warning("the drift counts from step %d, where training was resumed", state.global_step)
        if not state.global_step or self._start is None:
            self._remember(model)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.every is not None and state.global_step % self.every == 0:
            control.should_log = True  # on all processes: they gather the loss

    def on_log(
        self, args: Any, state: Any, control: Any, model: Any = None, logs: dict[str, Any] | None = None, **_: Any
    ) -> None:
        due = state.global_step > self._logged and state.global_step % (self.every or 1) == 0
        if logs is None or "loss" not in logs or not due or not state.is_world_process_zero:
            return
        self._logged = state.global_step
        figures = self._figures(model)
        logs.update(figures)
        state.log_history[-1].update(figures)  # the trainer has put a copy of `logs` there
        risk = figures["sqsd/risk_projection"]
        if self.threshold is not None and risk > self.threshold and not self._warned:
            self._warned = True
            log.warning(
                "the model drifts towards danger: risk projection %.4g at step %d, above %.4g",
                *(risk, state.global_step, self.threshold),
            )

    def _figures(self, model: Any) -> dict[str, float]:
        assert self._start is not None
        totals = self._start.totals(_unwrapped(model))
        figures = {f"sqsd/{name}_{key}": value for name, found in totals.items() for key, value in found.items()}
        return {**figures, "sqsd/risk_projection": risk_projection(self._directions, totals)}

    def _remember(self, model: Any) -> None:
        whole = _unwrapped(model)
        kind = LoraStart if any(isinstance(module, LoraLayer) for module in whole.modules()) else FullStart
        self._start = kind(self._directions, whole)


class LoraStart:
    """The active adapter's factors of the pack's modules as they were."""

    def __init__(self, directions: Sequence[Direction], model: torch.nn.Module) -> None:
        self._directions = directions
        self._covered = {module for direction in directions for module in direction.factors}
        self._factors = self._live(model)
        self.totals(model)  # raises now where the pack belongs to another model

    def totals(self, model: torch.nn.Module) -> dict[str, dict[str, float]]:
        now = self._live(model)
        along = project(self._directions, lambda name: difference(now.get(name), self._factors.get(name)))
        return {name: found.totals() for name, found in along.items()}

    def _live(self, model: torch.nn.Module) -> dict[str, LoraFactors]:
        """Copies of the factors in `model`, by the modules' names in the base model."""
        layers = {name.removeprefix("base_model.model."): layer for name, layer in model.named_modules()}
        return {
            name: _product(name, layer)
            for name, layer in layers.items()
            if name in self._covered and isinstance(layer, LoraLayer)
        }


def _product(name: str, layer: Any) -> LoraFactors:
    """What all active adapters of a layer add to its weight, as one product."""
    active = [adapter for adapter in layer.active_adapters if adapter in layer.lora_A]
    if any(adapter in layer.lora_variant for adapter in active):
        raise PackError(f"'{name}' has another adapter than plain LoRA (DoRA, say): drift can't be read from it.")
    A = [layer.lora_A[adapter].weight.detach() for adapter in active]
    B = [layer.scaling[adapter] * layer.lora_B[adapter].weight.detach() for adapter in active]
    return LoraFactors(torch.cat(A), torch.cat(B, dim=1), 1.0)


class FullStart:
    """<W_m, V_m> of every module and direction as it was."""

    def __init__(self, directions: Sequence[Direction], model: torch.nn.Module) -> None:
        self._directions = directions
        self._dots = self._live(model)

    def totals(self, model: torch.nn.Module) -> dict[str, dict[str, float]]:
        now = self._live(model)
        found = {}
        for d in self._directions:
            lengths = {module: length for module, length in d.lengths.items() if length}
            changed = (now[d.name][module] - self._dots[d.name][module] for module in lengths)
            found[d.name] = {"projection": sum(dot / lengths[m] for m, dot in zip(lengths, changed, strict=True))}
        return found

    def _live(self, model: torch.nn.Module) -> dict[str, dict[str, float]]:
        modules = dict(model.named_modules())
        return {
            direction.name: {name: _dot(name, modules, factors) for name, factors in direction.factors.items()}
            for direction in self._directions
        }


def _dot(name: str, modules: Mapping[str, torch.nn.Module], factors: LoraFactors) -> float:
    weight = getattr(modules.get(name), "weight", None)
    if weight is None:
        raise PackError(f"The model has no module '{name}', which the pack has: it is of another architecture.")
    weight = upright(weight.detach(), modules[name])
    check_shape(name, shape(weight), factors)
    return inner(weight, factors)


def _unwrapped(model: Any) -> torch.nn.Module:
    """The model itself. Raises `UsageError` where this process has only shards of its weights."""
    whole: torch.nn.Module = unwrap_model(model)
    if any(hasattr(p, "ds_id") or hasattr(p, "device_mesh") for p in whole.parameters()) or any(
        "_fsdp_wrapped_module" in name for name, _ in whole.named_modules()
    ):
        raise UsageError(
            "DriftCallback needs whole weights, and FSDP or ZeRO-3 has cut them into shards: leave it out, and run "
            "`sqsd-filter drift` on the checkpoints."
        )
    return whole
