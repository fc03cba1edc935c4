"""The loaded model: a micro-batch of token rows in, the values of each row out (SQSD: its projections)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, Self

import numpy as np
import torch

from sqsd_filter.errors import ModelError, SQSDError
from sqsd_filter.scoring.adapters import Adapter, load_adapter, probe_modules
from sqsd_filter.scoring.batching import default_budget, next_tokens
from sqsd_filter.scoring.capture import Capture, Collect
from sqsd_filter.scoring.chat_encoder import Encoded
from sqsd_filter.scoring.loss_gradient import LossGradient
from sqsd_filter.scoring.models import input_device, load_model
from sqsd_filter.scoring.pack import Pack
from sqsd_filter.scoring.projection import by_token

if TYPE_CHECKING:
    from transformers import PreTrainedModel

StateKey = tuple[str, float | None]  # a state's name and its scaling, as `Probe.at`


class ModelSettings(Protocol):
    """What a model is loaded with. Each `BatchedScorer` has it."""

    pack: Pack
    base_model: str
    base_revision: str | None
    attention: str | None
    gpus: float
    per_module: bool
    trust_remote_code: bool

    @property
    def device(self) -> str: ...

    @property
    def dtype(self) -> str: ...

    @property
    def base_adapter(self) -> Path | None: ...

    def with_pack(self, pack: Pack) -> Self: ...


def memory_share(model: torch.nn.Module, device: torch.device, gpus: float) -> int:
    """Bytes that a model leaves of its share of a GPU.

    Not the bytes that happen to be free: the neighbours of a replica must not change its micro-batches, and with them
    the last bits of scores.
    """
    taken = sum(p.numel() * p.element_size() for p in model.parameters() if p.device == device)
    return max(0, int(torch.cuda.get_device_properties(device).total_memory * min(1.0, gpus)) - taken)


class ScoringModel:
    """A loaded model, with the number of threads and the token budget that suit its device."""

    def __init__(self, model: PreTrainedModel, settings: ModelSettings) -> None:
        self.model = model
        device = input_device(model)
        config = model.config.get_text_config()
        # On a CPU each micro-batch runs in a thread of its own: scores then don't depend on the number of threads, and
        # two small products keep two cores busier than one of twice the size. Some rotary embeddings keep state, so
        # that only one thread may run them.
        rope = getattr(config, "rope_parameters", None) or {}
        stateful = isinstance(rope, dict) and any(k in str(rope) for k in ("dynamic", "longrope"))
        self.workers = 0 if device.type != "cpu" else 1 if stateful else torch.get_num_threads()
        self.default_budget = default_budget(
            free_bytes=memory_share(model, device, settings.gpus) if device.type == "cuda" else None,
            layers=config.num_hidden_layers,
            hidden=config.hidden_size,
            intermediate=getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
            bytes_per_value=next(model.parameters()).element_size(),
        )

    @classmethod
    def load(cls, settings: ModelSettings) -> Self:
        """Load the model in its dtype on its device. Raises `ModelError`, `PackError`."""
        model = load_model(
            settings.base_model,
            settings.base_revision,
            dtype=getattr(torch, settings.dtype),
            device=None if settings.gpus > 1 else settings.device,
            attention=settings.attention,
            adapter=settings.base_adapter,
            trust_remote_code=settings.trust_remote_code,
        )
        try:
            loaded = cls(model, settings)
            loaded.project([Encoded(np.arange(8), np.arange(8) > 3)])
        except SQSDError:
            raise
        except Exception as problem:  # this architecture does something that others don't
            named = settings.attention is not None
            raise ModelError(
                f"{type(model).__name__} can't be scored ({type(problem).__name__}: {problem}): choose another "
                f"{'attention kernel with --attention, or another ' * named}model with --pack or --model."
            ) from problem
        return loaded

    def project(self, rows: Sequence[Encoded]) -> np.ndarray:
        """The scorer's values of each row: (b, values) float64."""
        raise NotImplementedError


class SQSDModel(ScoringModel):
    """A loaded model at the pack's states."""

    def __init__(self, model: PreTrainedModel, settings: ModelSettings) -> None:
        pack = settings.pack
        self.probes, self.per_module = pack.probes, settings.per_module
        adapters = {name: load_adapter(pack.adapter(name)) for name in pack.adapters}
        self.passes = list(dict.fromkeys(p.at for p in pack.probes))
        self.members = {at: [k for k, p in enumerate(pack.probes) if p.at == at] for at in self.passes}
        states: dict[StateKey, tuple[Adapter, Sequence[Adapter] | None]] = {
            at: (
                adapters[at[0]].with_scaling(at[1]),
                [adapters[pack.probes[k].direction] for k in self.members[at]],
            )
            for at in self.passes
        }
        self.capture = Capture(model, states)
        self.gradient = LossGradient(model)
        self.coverage = {
            self.probes[k].name: count
            for at in self.passes
            for k, count in zip(self.members[at], self.capture.coverage(at), strict=True)
        }
        self.modules = {at: self.capture.modules(at) for at in self.passes}
        self.probe_modules = probe_modules(self.probes, adapters)
        super().__init__(model, settings)

    def project(self, rows: Sequence[Encoded]) -> np.ndarray:
        """Σ_m cos of each row and probe: (b, probes) float64.

        With `per_module`, the cosines of each probe's modules follow, in the order of `probe_modules`.
        """
        sums_bp = np.empty((len(rows), len(self.probes)))
        cosines = self.cosines(rows)
        for at, cosines_bpm in cosines.items():
            sums_bp[:, self.members[at]] = cosines_bpm.double().sum(-1).cpu().numpy()
        each = [self._of_probe(k, cosines[probe.at]) for k, probe in enumerate(self.probes)] if self.per_module else []
        return np.concatenate([sums_bp, *each], axis=1)

    def cosines(self, rows: Sequence[Encoded]) -> dict[StateKey, torch.Tensor]:
        """The cosines of each pass, (b, p, m): rows, the pass's probes, its modules (`self.modules`)."""
        return {at: self.capture.cosines() for at in self.run_passes(rows)}

    def parts(self, row: Encoded) -> list[tuple[np.ndarray, np.ndarray]]:
        """The parts of a row's value of each probe, in two ways that both sum to the value.

        First the cosine of each module (m,), in the order of `probe_modules`. Second the part of each position (t,), of
        all tokens up to the last but one.
        """
        parts: dict[StateKey, tuple[torch.Tensor, np.ndarray]] = {}
        for at in self.run_passes([row], collect=by_token):
            parts_btp = self.capture.token_parts().double().cpu().numpy()
            parts[at] = self.capture.cosines(), parts_btp[0]
        return [
            (self._of_probe(k, parts[p.at][0])[0], parts[p.at][1][:, self.members[p.at].index(k)])
            for k, p in enumerate(self.probes)
        ]

    def run_passes(self, rows: Sequence[Encoded], *, collect: Collect | None = None) -> Iterator[StateKey]:
        """Each pass of the probes, once its backward pass is done."""
        ids_bt, targets_bt = next_tokens(rows, self.gradient.device)
        for at in self.passes:
            self.capture.use(at, (ids_bt.shape[0], ids_bt.shape[1]), collect=collect)
            self.gradient.backward(ids_bt, targets_bt)
            yield at

    def _of_probe(self, k: int, cosines_bpm: torch.Tensor) -> np.ndarray:
        """The cosines (b, m) float64 of probe k's own modules, selected from those of its pass."""
        at = self.probes[k].at
        columns = [self.modules[at].index(name) for name in self.probe_modules[self.probes[k].name]]
        cosines: np.ndarray = cosines_bpm[:, self.members[at].index(k), columns].double().cpu().numpy()
        return cosines
