"""The reference implementation, for tests and checks: one row at a time, with dense d_out × d_in matrices.

It has the fast scorer's signature and tokens, but none of its maths: PEFT loads the adapters, autograd computes the
gradients of lora_A and lora_B, and ΔW and V are formed as dense matrices. A linear probe is a sum over tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Unpack

import numpy as np
import torch
from torch.nn import functional as F

from sqsd_filter.scoring.adapters import load_adapter
from sqsd_filter.scoring.chat_encoder import Encoded
from sqsd_filter.scoring.linear_probe import load_weights
from sqsd_filter.scoring.models import load_model
from sqsd_filter.scoring.pack import Pack
from sqsd_filter.scoring.results import ScoreCollector
from sqsd_filter.scoring.scorer import Scorer
from sqsd_filter.scoring.scorer_settings import ScorerSettings

if TYPE_CHECKING:
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer
    from transformers import PreTrainedModel


class ReferenceScorer(Scorer):
    """SQSD written as the formula, slow on purpose; float64 by default."""

    default_dtype = "float64"

    def __init__(self, pack: str | Path | Pack, model: str | None = None, **settings: Unpack[ScorerSettings]) -> None:
        super().__init__(pack, model, **settings)
        self._peft: PeftModel | None = None
        self._base: PreTrainedModel | None = None
        self.directions: dict[str, dict[str, torch.Tensor]] = {}  # V of each module, dense, by adapter

    @property
    def peft(self) -> PeftModel:
        """The loaded model with all adapters of the pack."""
        if self._peft is None:
            self._peft = self._load()
        return self._peft

    @property
    def base(self) -> PreTrainedModel:
        """The loaded model without adapters, the pack's base adapter merged."""
        if self._base is None:
            self._base = self._load_base()
        return self._base

    def _score(self, rows: Mapping[int, Encoded], collector: ScoreCollector) -> None:
        for k, row in rows.items():
            linear = [pack for pack in (self.pack, *self.pack.beside) if pack.linear is not None]
            read = [self.probe(pack, row) for pack in linear]
            collector.done([k], np.array([[*(self.project(row)[0] if self.pack.probes else []), *read]]))

    def load(self) -> None:
        """Load the model with every adapter of the pack and compute the dense directions, the first time."""
        if self.directions:
            return
        for name in {p.direction for p in self.pack.probes}:
            self.directions[name] = {m: _multiplied(layer, name) for m, layer in self._layers(name)}

    def _load_base(self) -> PreTrainedModel:
        from peft import PeftModel

        dtype = getattr(torch, self.dtype)
        model = load_model(
            self.base_model,
            self.base_revision,
            dtype=dtype,
            device=self.device,
            trust_remote_code=self.trust_remote_code,
        )
        if (base := self.pack.base_folder) is not None:
            aligned = PeftModel.from_pretrained(model, str(base), autocast_adapter_dtype=False).to(dtype)
            model = aligned.merge_and_unload()
        model.eval()
        return model

    def _load(self) -> PeftModel:
        from peft import PeftModel

        first, *others = self.pack.adapters
        peft = PeftModel.from_pretrained(
            self._load_base(), str(self.pack.adapter(first)), adapter_name=first, autocast_adapter_dtype=False
        )
        for name in others:
            peft.load_adapter(str(self.pack.adapter(name)), adapter_name=name, autocast_adapter_dtype=False)
        peft.to(getattr(torch, self.dtype)).eval()
        return peft

    @property
    def dense_bytes(self) -> int:
        """Bytes of the dense matrices: all directions, and one state's update while the next is computed."""
        adapters = {name: load_adapter(self.pack.adapter(name)) for name in self.pack.adapters}
        values = {
            name: sum(len(f.B) * f.A.shape[1] for f in adapter.factors.values()) for name, adapter in adapters.items()
        }
        directions = sum(values[name] for name in {p.direction for p in self.pack.probes})
        update = max((values[p.state] for p in self.pack.probes), default=0)
        itemsize: int = getattr(torch, self.dtype).itemsize
        return (directions + 2 * update) * itemsize

    def project(self, row: Encoded) -> np.ndarray:
        """Σ_m cos of one row for each probe: (1, probes)."""
        self.load()
        sums_1p = np.zeros((1, len(self.pack.probes)))
        for at in dict.fromkeys(p.at for p in self.pack.probes):
            update = self.update(row, *at)
            for k, probe in enumerate(self.pack.probes):
                if probe.at == at:
                    sums_1p[0, k] = sum(
                        cosine(update[m], V) for m, V in self.directions[probe.direction].items() if m in update
                    )
        return sums_1p

    def probe(self, pack: Pack, row: Encoded) -> float:
        """The risk of one row by the pack's linear probe."""
        assert pack.linear is not None
        weight_lsh, risk = load_weights(pack.path, pack.linear)
        ids = torch.from_numpy(row.ids).to(self.device)
        with torch.no_grad():
            hidden = self.base(input_ids=ids[None], use_cache=False, output_hidden_states=True).hidden_states
        answer = [t for t in range(len(row)) if row.answer[t]]
        before = [t - 1 for t in answer if not row.answer[t - 1]]
        for layer, weights in zip(pack.linear.layers, weight_lsh, strict=True):
            for positions, weight_h in zip((answer, before), weights, strict=True):
                states = [hidden[layer][0, t].double().cpu().numpy() for t in positions]
                risk += sum(float(state @ weight_h) for state in states) / len(states)
        return risk

    def update(self, row: Encoded, state: str, scaling: float | None) -> dict[str, torch.Tensor]:
        """ΔW (d_out, d_in) of every module that the state adapts."""
        ids = torch.from_numpy(row.ids).to(self.device)
        answer = torch.from_numpy(row.answer).to(self.device)
        layers = dict(self._layers(state))
        with self._at_state(state, scaling, layers):
            factors = {m: _factors(layer, state) for m, layer in layers.items()}
            leaves = [w.requires_grad_() for pair in factors.values() for w in pair]
            logits = self.peft(input_ids=ids[None], use_cache=False).logits[0]
            loss = F.cross_entropy(logits[:-1][answer[1:]], ids[1:][answer[1:]])
            grads = iter(torch.autograd.grad(loss, leaves, allow_unused=True))
            update = {}
            for m, (A, B) in factors.items():
                G_A, G_B = next(grads), next(grads)
                if G_A is not None and G_B is not None:
                    update[m] = -(G_B @ A.detach() + B.detach() @ G_A)
        return update

    @contextmanager
    def _at_state(self, state: str, scaling: float | None, layers: dict[str, LoraLayer]) -> Iterator[None]:
        self.peft.set_adapter(state)
        own = {m: layer.scaling[state] for m, layer in layers.items()}
        try:
            for m, layer in layers.items():
                layer.scaling[state] = own[m] if scaling is None else scaling
            yield
        finally:
            for m, layer in layers.items():
                layer.scaling[state] = own[m]

    def _layers(self, adapter: str) -> Iterator[tuple[str, LoraLayer]]:
        from peft.tuners.lora import LoraLayer

        for name, module in self.peft.get_base_model().named_modules():
            if isinstance(module, LoraLayer) and adapter in module.lora_A:
                yield name, module


def _multiplied(layer: LoraLayer, adapter: str) -> torch.Tensor:
    A, B = _factors(layer, adapter)
    product: torch.Tensor = (B @ A).detach() * layer.scaling[adapter]
    return product


def _factors(layer: LoraLayer, adapter: str) -> tuple[torch.Tensor, torch.Tensor]:
    A, B = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    assert isinstance(A, torch.Tensor)
    assert isinstance(B, torch.Tensor)
    return A, B


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    """The cosine of two matrices as vectors; 0 where either is 0."""
    scale = a.norm() * b.norm()
    return float((a * b).sum() / scale) if scale > 0 else 0.0
