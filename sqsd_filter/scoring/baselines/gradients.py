"""The gradient of a row's loss with respect to the LoRA matrices of a state, as a vector g over all modules.

    ‖g‖²    = Σ_m ‖G_A‖² + ‖G_B‖²           <g, g'> = Σ_m <G_A, G_A'> + <G_B, G_B'>

The state is that of the pack's first danger probe. The papers take g over all parameters of the model; here it is over
those that LoRA fine-tuning changes, at a state where both A and B have a gradient. A row's products are contracted like
SQSD's, module by module, with r-sized matrices and fixed factors: no matrix of a parameter's size is formed, and no
row's g as a whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from sqsd_filter.scoring.adapters import load_adapter
from sqsd_filter.scoring.batching import next_tokens
from sqsd_filter.scoring.capture import Capture, Collect
from sqsd_filter.scoring.chat_encoder import Encoded
from sqsd_filter.scoring.loss_gradient import LossGradient
from sqsd_filter.scoring.projection import summed
from sqsd_filter.scoring.scoring_model import ModelSettings, ScoringModel

if TYPE_CHECKING:
    from transformers import PreTrainedModel

STATE = "state"
Pair = tuple[torch.Tensor, torch.Tensor]  # a group's G_A (r, i) and G_B (r, o), the latter without its factor s


class GradientModel(ScoringModel):
    """A loaded model at the state, with products of its gradients."""

    def __init__(self, model: PreTrainedModel, settings: ModelSettings) -> None:
        pack = settings.pack
        probe = next((p for p in pack.probes if p.weight > 0), pack.probes[0])
        state = load_adapter(pack.adapter(probe.state)).with_scaling(probe.state_scaling)
        self.capture = Capture(model, {STATE: (state, None)})
        self.gradient = LossGradient(model)
        super().__init__(model, settings)

    def products(self, rows: Sequence[Encoded]) -> tuple[torch.Tensor, torch.Tensor]:
        """<g, g'> (b, p) with each gradient set by `Capture.towards`, and ‖g‖² (b,), float64 on the CPU.

        g is the gradient of the loss *summed* over the answer's tokens.
        """
        self._backward(rows)
        dots_bpm, norms2_bm, _ = self.capture.products()
        return dots_bpm.double().sum(-1).cpu(), norms2_bm.double().sum(-1).cpu()

    def summed(self, rows: Sequence[Encoded], weight_b: torch.Tensor) -> dict[int, Pair]:
        """Σ_b weight_b · g, by group number, as `Capture.towards` expects it."""
        self._backward(rows, lambda group, x, h, d, e, *_: summed(group, weight_b, x, h, d, e))
        return {number: sums for number, sums in self.capture.collected().items() if isinstance(sums, tuple)}

    def _backward(self, rows: Sequence[Encoded], collect: Collect | None = None) -> None:
        ids_bt, targets_bt = next_tokens(rows, self.gradient.device)
        self.capture.use(STATE, (ids_bt.shape[0], ids_bt.shape[1]), collect=collect)
        self.gradient.backward(ids_bt, targets_bt)
