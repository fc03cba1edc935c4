"""The textbook form, for tests and checks: one row at a time, PEFT's own model, dense d_out × d_in matrices.

It has the fast scorer's signature and shares its tokens, but no line of its maths: adapters are loaded by PEFT, the
gradients are autograd's on lora_A and lora_B, ΔW and V are multiplied out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from sqsd_filter.scoring.adapters import load_adapter
from sqsd_filter.scoring.chat_encoder import Encoded
from sqsd_filter.scoring.models import load_model
from sqsd_filter.scoring.results import Results
from sqsd_filter.scoring.scorer import Scorer


class ReferenceScorer(Scorer):
    """SQSD as the formula says it, slow on purpose. float64 unless told otherwise."""

    default_dtype = "float64"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._peft: Any = None
        self._dense: dict[str, dict[str, torch.Tensor]] = {}

    def _score(self, rows: Mapping[int, Encoded], results: Results) -> None:
        self.load()
        for k, row in rows.items():
            results.done([k], self.project(row))

    def load(self) -> None:
        """Load the model with every adapter of the pack, and multiply the directions out."""
        if self._peft is not None:
            return
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
            aligned: Any = PeftModel.from_pretrained(model, base, autocast_adapter_dtype=False).to(dtype)
            model = aligned.merge_and_unload()
        first, *others = self.pack.adapters
        self._peft = PeftModel.from_pretrained(
            model, self.pack.adapter(first), adapter_name=first, autocast_adapter_dtype=False
        )
        for name in others:
            self._peft.load_adapter(self.pack.adapter(name), adapter_name=name, autocast_adapter_dtype=False)
        self._peft.to(dtype).eval()
        for name in {p.direction for p in self.pack.probes}:
            self._dense[name] = {m: self._multiplied(layer, name) for m, layer in self._layers(name)}

    @property
    def dense_bytes(self) -> int:
        """What the matrices take: all directions, and one state's update while the next is made."""
        adapters = {name: load_adapter(self.pack.adapter(name)) for name in self.pack.adapters}
        values = {
            name: sum(len(f.B) * f.A.shape[1] for f in adapter.factors.values()) for name, adapter in adapters.items()
        }
        directions = sum(values[name] for name in {p.direction for p in self.pack.probes})
        update = max(values[p.state] for p in self.pack.probes)
        return (directions + 2 * update) * getattr(torch, self.dtype).itemsize

    def project(self, row: Encoded) -> np.ndarray:
        """Σ_m cos of one row for each probe: (1, probes)."""
        out = np.zeros((1, len(self.pack.probes)))
        for at in dict.fromkeys(p.at for p in self.pack.probes):
            update = self._update(row, *at)
            for k, probe in enumerate(self.pack.probes):
                if probe.at == at:
                    out[0, k] = sum(
                        _cosine(update[m], V) for m, V in self._dense[probe.direction].items() if m in update
                    )
        return out

    def _update(self, row: Encoded, state: str, scaling: float | None) -> dict[str, torch.Tensor]:
        """ΔW of every module that the state adapts, dense."""
        ids = torch.from_numpy(row.ids).to(self.device)
        answer = torch.from_numpy(row.answer).to(self.device)
        layers = dict(self._layers(state))
        with self._sitting_at(state, scaling, layers):
            factors = {m: (layer.lora_A[state].weight, layer.lora_B[state].weight) for m, layer in layers.items()}
            leaves = [w.requires_grad_() for pair in factors.values() for w in pair]
            logits = self._peft(input_ids=ids[None], use_cache=False).logits[0]
            loss = F.cross_entropy(logits[:-1][answer[1:]], ids[1:][answer[1:]])
            grads = iter(torch.autograd.grad(loss, leaves, allow_unused=True))
            update = {}
            for m, (A, B) in factors.items():
                G_A, G_B = next(grads), next(grads)
                if G_A is not None and G_B is not None:
                    update[m] = -(G_B @ A.detach() + B.detach() @ G_A)
        return update

    @contextmanager
    def _sitting_at(self, state: str, scaling: float | None, layers: dict[str, Any]) -> Iterator[None]:
        self._peft.set_adapter(state)
        own = {m: layer.scaling[state] for m, layer in layers.items()}
        try:
            for m, layer in layers.items():
                layer.scaling[state] = own[m] if scaling is None else scaling
            yield
        finally:
            for m, layer in layers.items():
                layer.scaling[state] = own[m]

    def _layers(self, adapter: str) -> Iterator[tuple[str, Any]]:
        for name, module in self._peft.base_model.model.named_modules():
            if adapter in getattr(module, "lora_A", {}):
                yield name, module

    @staticmethod
    def _multiplied(layer: Any, adapter: str) -> torch.Tensor:
        A, B = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
        return (layer.scaling[adapter] * (B @ A)).detach()


def _cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    scale = a.norm() * b.norm()
    return float((a * b).sum() / scale) if scale > 0 else 0.0
