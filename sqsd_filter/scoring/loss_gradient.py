"""The backward pass from a causal model's loss: input gradients only, and logits only at supervised positions."""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING

import torch

from sqsd_filter.scoring.models import input_device, output_head

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.utils.generic import ModelOutput

log = logging.getLogger(__name__)

LOGITS_AT_ONCE = 1 << 25  # values in one chunk of logits: 128 MiB in float32
FEWEST_POSITIONS = 16  # in a chunk: with fewer than 4, BLAS sums over the vocabulary with up to 30 times the error


class LossGradient:
    """A frozen causal model and the backward pass from its loss."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.device = input_device(model)
        # The embedding's output is the only leaf: backward computes input gradients and nothing else.
        model.get_input_embeddings().register_forward_hook(
            lambda _module, _input, output: output.detach().requires_grad_(torch.is_grad_enabled())
        )
        vocabulary = output_head(model).weight
        assert isinstance(vocabulary, torch.Tensor)
        self.chunk = max(FEWEST_POSITIONS, LOGITS_AT_ONCE // len(vocabulary))
        self._output_type: type[ModelOutput] | None = None
        self._given = threading.local()
        self._let_logits_in()
        self._head_apart = self._can_run_head_apart()

    @torch.inference_mode(False)
    @torch.enable_grad()
    def backward(self, ids_bt: torch.Tensor, targets_bt: torch.Tensor) -> None:
        """Backward from the sum over all rows of the cross entropy at the supervised positions."""
        if not self._head_apart:
            logits_btv = self.model(input_ids=ids_bt, use_cache=False).logits
            targets_bt = targets_bt.to(logits_btv.device)
            logits_nv = logits_btv[targets_bt >= 0]
            logits_nv.backward(_loss_gradient(logits_nv, targets_bt[targets_bt >= 0]))
            return
        output = self.model.base_model(input_ids=ids_bt, use_cache=False)
        self._output_type = type(output)
        hidden_bth = output.last_hidden_state
        targets_bt = targets_bt.to(hidden_bth.device)
        supervised_bt = targets_bt >= 0
        grad_bth = torch.zeros_like(hidden_bth)
        grad_bth[supervised_bt] = self.head_gradient(hidden_bth.detach()[supervised_bt], targets_bt[supervised_bt])
        hidden_bth.backward(grad_bth)

    @torch.no_grad()
    def losses(self, ids_bt: torch.Tensor, targets_bt: torch.Tensor) -> torch.Tensor:
        """Each row's cross entropy, summed over its supervised positions: (b,) float64. No backward pass."""
        output_bth = self._output(ids_bt)
        supervised_bt = (targets_bt := targets_bt.to(output_bth.device)) >= 0
        losses = []
        for output, targets in zip(
            output_bth[supervised_bt].split(self.chunk), targets_bt[supervised_bt].split(self.chunk), strict=True
        ):
            logits_nv = self._head(output)
            exact = torch.promote_types(logits_nv.dtype, torch.float32)
            losses.append(torch.nn.functional.cross_entropy(logits_nv.to(exact), targets, reduction="none"))
        by_row = torch.cat(losses).double().split(supervised_bt.sum(-1).tolist())
        return torch.stack([own.sum() for own in by_row])

    @torch.no_grad()
    def logits(self, ids_bt: torch.Tensor, chosen_bt: torch.Tensor) -> torch.Tensor:
        """The logits (n, v) at the n chosen positions, row by row, at least in float32. No backward pass."""
        output_bth = self._output(ids_bt)
        logits_nv = self._head(output_bth[chosen_bt.to(output_bth.device)])
        return logits_nv.to(torch.promote_types(logits_nv.dtype, torch.float32))

    def _output(self, ids_bt: torch.Tensor) -> torch.Tensor:
        """What `_head` takes, at all positions: hidden states (b, t, h), or where these don't do, logits (b, t, v)."""
        if self._head_apart:
            hidden_bth: torch.Tensor = self.model.base_model(input_ids=ids_bt, use_cache=False).last_hidden_state
            return hidden_bth
        logits_btv: torch.Tensor = self.model(input_ids=ids_bt, use_cache=False).logits
        return logits_btv

    def _head(self, output_nh: torch.Tensor) -> torch.Tensor:
        """The logits (n, v) at positions of `_output`."""
        return self._logits(_padded(output_nh))[: len(output_nh)] if self._head_apart else output_nh

    def head_gradient(self, hidden_nh: torch.Tensor, targets_n: torch.Tensor) -> torch.Tensor:
        """∂L/∂hidden (n, h) of the summed cross entropy; logits are computed `chunk` positions at a time."""
        grads = []
        for hidden, targets in zip(hidden_nh.split(self.chunk), targets_n.split(self.chunk), strict=True):
            n = len(targets)
            hidden = _padded(hidden).requires_grad_()
            logits_nv = self._logits(hidden)[:n]
            grads.append(torch.autograd.grad(logits_nv, hidden, _loss_gradient(logits_nv, targets))[0][:n])
        return torch.cat(grads)

    def _logits(self, hidden_nh: torch.Tensor) -> torch.Tensor:
        """The model's own logits (n, v) of hidden states.

        Its forward pass runs on them in place of its backbone's output, so that whatever it does besides the head
        (scaling, soft caps) is done.
        """
        ids = torch.zeros((1, len(hidden_nh)), dtype=torch.long, device=hidden_nh.device)
        assert self._output_type is not None
        self._given.output = self._output_type(last_hidden_state=hidden_nh.unsqueeze(0))
        try:
            logits: torch.Tensor = self.model(input_ids=ids, use_cache=False).logits[0]
        finally:
            self._given.output = None
        return logits

    def _let_logits_in(self) -> None:
        """Make the backbone return `_given.output` where this thread has set it."""
        backbone = self.model.base_model
        run = backbone.forward  # the class's, or one that moves tensors between devices

        def forward(*args: object, **kwargs: object) -> object:
            given = getattr(self._given, "output", None)
            return run(*args, **kwargs) if given is None else given

        backbone.forward = forward

    @torch.no_grad()
    def _can_run_head_apart(self) -> bool:
        """Does the model's head give the same logits from hidden states alone? Not where its forward pass bypasses its
        `base_model`: then logits are computed at all positions."""
        ids = torch.arange(4, device=self.device)[None]
        expected = self.model(input_ids=ids, use_cache=False).logits[0]
        output = self.model.base_model(input_ids=ids, use_cache=False)
        hidden = getattr(output, "last_hidden_state", None)
        if hidden is None:
            return False
        self._output_type = type(output)
        try:
            logits = self._logits(hidden[0])
        except (RuntimeError, ValueError, TypeError, AttributeError) as problem:
            log.info("%s computes the logits of all positions: %s", type(self.model).__name__, problem)
            return False
        same_shape = logits.shape == expected.shape
        return same_shape and torch.allclose(logits, expected, rtol=1e-2, atol=1e-3, equal_nan=True)


def _padded(hidden_nh: torch.Tensor) -> torch.Tensor:
    """The hidden states, padded to `FEWEST_POSITIONS`."""
    return torch.nn.functional.pad(hidden_nh, (0, 0, 0, max(0, FEWEST_POSITIONS - len(hidden_nh))))


def _loss_gradient(logits_nv: torch.Tensor, targets_n: torch.Tensor) -> torch.Tensor:
    """∂L/∂logits (n, v) of the summed cross entropy: softmax minus one-hot.

    The target's entry, p - 1, is computed as minus the sum of the others: near p = 1 the difference would be mostly
    rounding error.
    """
    exact = logits_nv.dtype if logits_nv.dtype == torch.float64 else torch.float32
    error_nv = torch.softmax(logits_nv.detach(), dim=-1, dtype=exact)
    at = torch.arange(len(targets_n), device=targets_n.device)
    error_nv[at, targets_n] = 0
    error_nv[at, targets_n] = -error_nv.sum(-1)
    return error_nv.to(logits_nv.dtype)
