"""The likelihood of given answers under a model: the mean log-probability of their tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import numpy as np
import torch

from sqsd_filter.scoring.batching import micro_batches, next_tokens
from sqsd_filter.scoring.chat_encoder import Encoded

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TOKENS_AT_ONCE = 1024  # padded, in one forward pass with all its logits


@torch.inference_mode()
def log_probabilities(model: PreTrainedModel, rows: Sequence[Encoded]) -> np.ndarray:
    """(n,) float64: each row's mean log-probability (nats) of its supervised tokens, given all tokens before them."""
    device = cast(torch.Tensor, model.get_input_embeddings().weight).device
    means = np.empty(len(rows))
    for members in micro_batches([len(row) for row in rows], TOKENS_AT_ONCE):
        ids_bt, targets_bt = next_tokens([rows[k] for k in members], device)
        logits_btv = model(input_ids=ids_bt, use_cache=False).logits
        targets_bt = targets_bt.to(logits_btv.device)
        supervised_bt = targets_bt >= 0
        logits_nv, targets_n = logits_btv[supervised_bt], targets_bt[supervised_bt]
        exact = torch.promote_types(logits_nv.dtype, torch.float32)
        logs_n = torch.log_softmax(logits_nv, dim=-1, dtype=exact).gather(-1, targets_n[:, None])[:, 0]
        ends_b = supervised_bt.sum(-1).cumsum(0).cpu()
        for k, logs in zip(members, torch.tensor_split(logs_n, ends_b[:-1]), strict=True):
            means[k] = float(logs.double().mean())
    return means
