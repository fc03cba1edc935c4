"""Drift during training: a `transformers` callback that adds it to the trainer's log.

With LoRA the live factors are compared with those at the start. With full fine-tuning <W_t - W_0, V> = <W_t, V> -
<W_0, V>, so one number per module and direction is all that has to be kept of the start. ‖ΔW‖ and the cosines would
need a copy of the weights, so full fine-tuning does not log them.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from peft.tuners.lora import LoraLayer
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.modeling_utils import unwrap_model

from sqsd_filter.directions.checkpoints import difference, shape, upright
from sqsd_filter.directions.drift import Direction, check_shape, inner, load_directions, project, risk_projection
from sqsd_filter.errors import PackError, UsageError
from sqsd_filter.scoring.adapters import LoraFactors
from sqsd_filter.scoring.pack import Pack, load_pack

if TYPE_CHECKING:
    from transformers import Trainer

log = logging.getLogger(__name__)


class DriftCallback(TrainerCallback):
    """Logs the drift of a model in training along a pack's directions.

    It logs `sqsd/danger_projection`, `sqsd/danger_cosine`, `sqsd/danger_cosine_sum` and `sqsd/danger_norm`, the same
    for each other direction, and `sqsd/risk_projection`, all as defined in `directions.drift`. Full fine-tuning logs
    only the projections. A warning is logged, once per training, when the risk projection (danger minus safety)
    exceeds `threshold`, which is in the unit of the weights.

    Add it with `attach`. Callbacks in the trainer's argument `callbacks` run after those that report to TensorBoard,
    W&B and others, which then don't see the figures.

    It works under DDP and wherever the main process has whole weights. Weights sharded by FSDP or ZeRO-3 are refused.
    """

    def __init__(self, pack: str | Path | Pack, *, threshold: float | None = None, every: int | None = None) -> None:
        """The figures join each entry of the trainer's log, or with `every` one entry every `every` updates.

        Raises `PackError` if the pack is missing or invalid, `UsageError` for an `every` below 1.
        """
        if every is not None and every < 1:
            raise UsageError(f"every must be at least 1 update, not {every}.")
        self.pack = pack if isinstance(pack, Pack) else load_pack(pack)
        self.threshold, self.every = threshold, every
        self._directions = load_directions(self.pack)
        self._start: LoraStart | FullStart | None = None
        self._logged = 0  # the last step whose figures are in the log
        self._warned = self._first = False

    def attach(self, trainer: Trainer) -> DriftCallback:
        """Become the first of the trainer's callbacks. Drift counts from the model as it is now, even if training is
        then resumed from a checkpoint.

        Raises `PackError` if the pack belongs to another model, `UsageError` if the model's weights are sharded.
        """
        trainer.callback_handler.callbacks.insert(0, self)
        self._first = True
        self.on_init_end(trainer.args, trainer.state, trainer.control, model=trainer.model)
        return self

    def on_init_end(
        self,
        args: TrainingArguments,  # noqa: ARG002, the signature is the trainer's
        state: TrainerState,
        control: TrainerControl,  # noqa: ARG002
        model: torch.nn.Module | None = None,
        **_: object,
    ) -> None:
        if model is not None and state.is_world_process_zero:
            self._remember(model)

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,  # noqa: ARG002
        model: torch.nn.Module | None = None,
        **_: object,
    ) -> None:
        self._logged, self._warned = state.global_step, False
        if not state.is_world_process_zero:
            return
        if not self._first and args.report_to:
            log.warning("%s will not get the drift: use DriftCallback.attach(trainer)", ", ".join(args.report_to))
        if state.global_step and self._start is None:
            log.warning("the drift counts from step %d, where training was resumed", state.global_step)
        if model is not None and (not state.global_step or self._start is None):
            self._remember(model)

    def on_step_end(
        self,
        args: TrainingArguments,  # noqa: ARG002
        state: TrainerState,
        control: TrainerControl,
        **_: object,
    ) -> None:
        if self.every is not None and state.global_step % self.every == 0:
            control.should_log = True  # on all processes: they gather the loss

    def on_log(
        self,
        args: TrainingArguments,  # noqa: ARG002
        state: TrainerState,
        control: TrainerControl,  # noqa: ARG002
        model: torch.nn.Module | None = None,
        logs: dict[str, float] | None = None,
        **_: object,
    ) -> None:
        due = state.global_step > self._logged and state.global_step % (self.every or 1) == 0
        if model is None or logs is None or "loss" not in logs or not due or not state.is_world_process_zero:
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

    def _figures(self, model: torch.nn.Module) -> dict[str, float]:
        assert self._start is not None
        totals = self._start.totals(_unwrapped(model))
        figures = {f"sqsd/{name}_{key}": value for name, along in totals.items() for key, value in along.items()}
        return {**figures, "sqsd/risk_projection": risk_projection(self._directions, totals)}

    def _remember(self, model: torch.nn.Module) -> None:
        whole = _unwrapped(model)
        kind = LoraStart if any(isinstance(module, LoraLayer) for module in whole.modules()) else FullStart
        self._start = kind(self._directions, whole)


class LoraStart:
    """The active adapters' factors at the start, of the modules that the pack covers."""

    def __init__(self, directions: Sequence[Direction], model: torch.nn.Module) -> None:
        self._directions = directions
        self._covered = {module for direction in directions for module in direction.factors}
        self._factors = self._live(model)
        self.totals(model)  # raises now if the pack belongs to another model

    def totals(self, model: torch.nn.Module) -> dict[str, dict[str, float]]:
        now = self._live(model)
        along = project(self._directions, lambda name: difference(now.get(name), self._factors.get(name)))
        return {name: change.totals() for name, change in along.items()}

    def _live(self, model: torch.nn.Module) -> dict[str, LoraFactors]:
        """Copies of the current factors, by the modules' names in the base model."""
        layers = {name.removeprefix("base_model.model."): layer for name, layer in model.named_modules()}
        return {
            name: _product(name, layer)
            for name, layer in layers.items()
            if name in self._covered and isinstance(layer, LoraLayer)
        }


def _product(name: str, layer: LoraLayer) -> LoraFactors:
    """The sum that all active adapters of a layer add to its weight, as one product."""
    active = [adapter for adapter in layer.active_adapters if adapter in layer.lora_A]
    if any(adapter in layer.lora_variant for adapter in active):
        raise PackError(
            f"'{name}' has an adapter that is not plain LoRA, such as DoRA: train plain LoRA to log the drift."
        )
    A = [layer.lora_A[adapter].get_parameter("weight").detach() for adapter in active]
    B = [layer.scaling[adapter] * layer.lora_B[adapter].get_parameter("weight").detach() for adapter in active]
    return LoraFactors(torch.cat(A), torch.cat(B, dim=1), 1.0)


class FullStart:
    """<W_m, V_m> of every module and direction at the start."""

    def __init__(self, directions: Sequence[Direction], model: torch.nn.Module) -> None:
        self._directions = directions
        self._dots = self._live(model)

    def totals(self, model: torch.nn.Module) -> dict[str, dict[str, float]]:
        now = self._live(model)
        totals = {}
        for d in self._directions:
            lengths = {module: length for module, length in d.lengths.items() if length}
            changed = (now[d.name][module] - self._dots[d.name][module] for module in lengths)
            totals[d.name] = {"projection": sum(dot / lengths[m] for m, dot in zip(lengths, changed, strict=True))}
        return totals

    def _live(self, model: torch.nn.Module) -> dict[str, dict[str, float]]:
        modules = dict(model.named_modules())
        return {
            direction.name: {name: _dot(name, modules, factors) for name, factors in direction.factors.items()}
            for direction in self._directions
        }


def _dot(name: str, modules: Mapping[str, torch.nn.Module], factors: LoraFactors) -> float:
    weight = getattr(modules.get(name), "weight", None)
    if weight is None:
        raise PackError(f"The model has no module '{name}', but the pack does: name the pack of this model.")
    weight = upright(weight.detach(), modules[name])
    check_shape(name, shape(weight), factors)
    return inner(weight, factors)


def _unwrapped(model: torch.nn.Module) -> torch.nn.Module:
    """The model inside its wrappers. Raises `UsageError` if this process has only shards of the weights."""
    whole: torch.nn.Module = unwrap_model(model)
    if any(hasattr(p, "ds_id") or hasattr(p, "device_mesh") for p in whole.parameters()) or any(
        "_fsdp_wrapped_module" in name for name, _ in whole.named_modules()
    ):
        raise UsageError(
            "DriftCallback needs whole weights, but FSDP or ZeRO-3 has sharded them: leave it out, and run "
            "`sqsd-filter drift` on the checkpoints."
        )
    return whole
