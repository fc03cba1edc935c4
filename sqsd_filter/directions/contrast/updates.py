"""The update that a row causes, as one vector: its coordinates in every module, of unit length there.

A module's update is ΔW = -(G_B A + B G_A) (see `scoring.projection`). All updates at one state lie in the same small
space of matrices, which has an orthonormal basis. With A = L_A Q_A and B = Q_B R_B, Q_A and Q_B with orthonormal rows
and columns, and P = -G_B L_A and S = -R_B G_A:

    ΔW = P⊥ Q_A + Q_B S⊥ + Q_B M Q_A,      M = Q_Bᵀ P + S Q_Aᵀ,      P⊥ = P - Q_B Q_Bᵀ P,      S⊥ = S - S Q_Aᵀ Q_A

The three terms are orthogonal to each other, and each keeps the length of its coordinates. So the product of two rows'
vectors is Σ_m cos(ΔW_m, ΔW'_m), exactly, and any sum of vectors is a LoRA of twice the state's rank:

    V = [P⊥, Q_B] [Q_A; S⊥ + M Q_A]

Shapes, as suffixes: b rows, r the state's rank, i = d_in, o = d_out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from sqsd_filter.scoring.adapters import Adapter, LoraFactors, load_adapter, norm
from sqsd_filter.scoring.batching import next_tokens
from sqsd_filter.scoring.capture import Capture
from sqsd_filter.scoring.chat_encoder import Encoded
from sqsd_filter.scoring.loss_gradient import LossGradient
from sqsd_filter.scoring.projection import each_gradient
from sqsd_filter.scoring.scoring_model import ModelSettings, ScoringModel

if TYPE_CHECKING:
    from transformers import PreTrainedModel

STATE = "state"


@dataclass(frozen=True)
class ModuleSpace:
    """The updates of one module at a state: its orthonormal bases, and where its coordinates lie in a vector."""

    Q_A_ri: torch.Tensor
    Q_B_or: torch.Tensor
    L_A_rr: torch.Tensor
    R_B_rr: torch.Tensor
    scaling: float
    start: int

    @classmethod
    def of(cls, factors: LoraFactors, start: int) -> ModuleSpace:
        """The space of a state's module. Its coordinates begin at `start`."""
        Q_A_ir, R_A_rr = torch.linalg.qr(factors.A.double().T)
        Q_B_or, R_B_rr = torch.linalg.qr(factors.B.double())
        matrices = (Q_A_ir.T, Q_B_or, R_A_rr.T, R_B_rr)
        Q_A_ri, Q_B_or, L_A_rr, R_B_rr = (each.float().contiguous() for each in matrices)
        return cls(Q_A_ri, Q_B_or, L_A_rr, R_B_rr, factors.scaling, start)

    @property
    def widths(self) -> tuple[int, int, int]:
        """The numbers of coordinates of P⊥, S⊥ and M."""
        r = len(self.Q_A_ri)
        return len(self.Q_B_or) * r, self.Q_A_ri.shape[1] * r, r * r

    @property
    def where(self) -> slice:
        """The coordinates of this module in a vector."""
        return slice(self.start, self.start + sum(self.widths))

    def coordinates(self, G_A_bri: torch.Tensor, G_B_bro: torch.Tensor) -> torch.Tensor:
        """Unit vectors (b, width) of the updates of rows with these gradients, G_B without its factor s; 0 for a row
        without an update."""
        P_bor = -self.scaling * (G_B_bro.transpose(1, 2) @ self.L_A_rr)
        S_bri = -(self.R_B_rr @ G_A_bri)
        inside_brr = self.Q_B_or.T @ P_bor
        across_brr = S_bri @ self.Q_A_ri.T
        parts = P_bor - self.Q_B_or @ inside_brr, S_bri - across_brr @ self.Q_A_ri, inside_brr + across_brr
        vectors = torch.cat([part.flatten(1) for part in parts], dim=1)
        norms_b1 = torch.linalg.vector_norm(vectors, dim=1, keepdim=True)
        return torch.where(norms_b1 == 0, 0, vectors / norms_b1)

    def factors(self, vector: torch.Tensor) -> LoraFactors:
        """The LoRA product with these coordinates (width,)."""
        r, i, o = len(self.Q_A_ri), self.Q_A_ri.shape[1], len(self.Q_B_or)
        P_or, S_ri, M_rr = vector.split(self.widths)
        A = torch.cat([self.Q_A_ri, S_ri.view(r, i) + M_rr.view(r, r) @ self.Q_A_ri])
        return LoraFactors(A, torch.cat([P_or.view(o, r), self.Q_B_or], dim=1), 1.0)


class UpdateSpace:
    """The updates of all modules at a state: a row's vector is those of its modules, one after the other."""

    def __init__(self, state: Adapter) -> None:
        self.modules: dict[str, ModuleSpace] = {}
        self.width = 0
        for name, factors in state.factors.items():
            self.modules[name] = space = ModuleSpace.of(factors, self.width)
            self.width = space.where.stop

    def factors(self, vector: np.ndarray) -> dict[str, LoraFactors]:
        """The direction with these coordinates (width,), by module."""
        whole = torch.from_numpy(vector.astype(np.float32))
        return {name: space.factors(whole[space.where]) for name, space in self.modules.items()}


class UpdateModel(ScoringModel):
    """A loaded model at the state of the pack's first probe: rows in, their vectors out."""

    def __init__(self, model: PreTrainedModel, settings: ModelSettings) -> None:
        pack = settings.pack
        state = load_adapter(pack.adapter(pack.probes[0].state)).with_scaling(pack.probes[0].state_scaling)
        self.space = UpdateSpace(state)
        self.capture = Capture(model, {STATE: (state, None)})
        self.gradient = LossGradient(model)
        super().__init__(model, settings)

    def project(self, rows: Sequence[Encoded]) -> np.ndarray:
        """The rows' vectors: (b, width) float32."""
        ids_bt, targets_bt = next_tokens(rows, self.gradient.device)
        self.capture.use(STATE, (ids_bt.shape[0], ids_bt.shape[1]), collect=each_gradient)
        self.gradient.backward(ids_bt, targets_bt)
        vectors = np.empty((len(rows), self.space.width), np.float32)
        for number, pair in self.capture.collected().items():
            assert isinstance(pair, tuple)
            self._fill(vectors, number, pair)
        return vectors

    def _fill(self, vectors: np.ndarray, number: int, gradients: tuple[torch.Tensor, torch.Tensor]) -> None:
        """Write the coordinates of a group's modules into the rows' vectors."""
        G_A_bri, G_B_bro = (each.float().cpu() for each in gradients)
        group = self.capture.groups[number]
        r0 = o0 = 0
        for name, width in zip(group.names, group.widths, strict=True):
            if (space := self.space.modules.get(name)) is not None:
                ranks, columns = slice(r0, r0 + len(space.Q_A_ri)), slice(o0, o0 + width)
                found = space.coordinates(G_A_bri[:, ranks], G_B_bro[:, ranks, columns])
                vectors[:, space.where] = found.numpy()
                r0 = ranks.stop
            o0 += width


def as_adapter(factors: Mapping[str, LoraFactors], length: float) -> tuple[dict[str, object], dict[str, torch.Tensor]]:
    """The config and the tensors, in bfloat16, of a PEFT adapter folder with these products, scaled so that all of them
    together have this norm."""
    scale = length / math.hypot(*(norm(each) for each in factors.values()))
    ranks = {name: len(each.A) for name, each in factors.items()}
    rank = max(ranks.values())
    config: dict[str, object] = {
        **{"peft_type": "LORA", "task_type": "CAUSAL_LM", "bias": "none", "inference_mode": True},
        **{"r": rank, "lora_alpha": rank, "lora_dropout": 0.0, "target_modules": list(factors)},
        "rank_pattern": {name: own for name, own in ranks.items() if own != rank},
        "alpha_pattern": {name: own for name, own in ranks.items() if own != rank},
    }
    tensors = {
        f"base_model.model.{name}.lora_{side}.weight": matrix.to(torch.bfloat16)
        for name, each in factors.items()
        for side, matrix in (("A", each.A), ("B", scale * each.B))
    }
    return config, tensors
