"""Hidden states of a loaded causal model, from forward passes only, and what is read of them.

Layers are numbered like the hidden states of transformers: layer l is the output of block l, the last one normalised.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from sqsd_filter.scoring.chat_encoder import Encoded
from sqsd_filter.scoring.models import input_device

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class HiddenStates:
    """The hidden states of a model. Threads may read them at once: transformers records them in a context variable."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    def of(self, rows: Sequence[Encoded]) -> tuple[Sequence[torch.Tensor], torch.Tensor]:
        """The hidden states (b, t, h) of every layer and the answer mask (b, t), up to the last answer token."""
        ids_bt, answer_bt = whole(rows, input_device(self.model))
        with torch.no_grad():
            output = self.model.base_model(input_ids=ids_bt, use_cache=False, output_hidden_states=True)
        hidden_states: Sequence[torch.Tensor] = output.hidden_states
        return hidden_states, answer_bt


def whole(rows: Sequence[Encoded], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Right-padded inputs and answer masks (b, t) of all tokens up to the last one of the answer."""
    ends = [int(np.flatnonzero(row.answer)[-1]) + 1 for row in rows]

    def padded(sides: Sequence[np.ndarray]) -> torch.Tensor:
        cut = [torch.from_numpy(side[:end]) for side, end in zip(sides, ends, strict=True)]
        return torch.nn.utils.rnn.pad_sequence(cut, batch_first=True).to(device)

    return padded([row.ids for row in rows]), padded([row.answer for row in rows])


def exact(hidden_bth: torch.Tensor) -> torch.Tensor:
    """In float32 at least."""
    return hidden_bth.to(torch.promote_types(hidden_bth.dtype, torch.float32))


def answer_mean(hidden_bth: torch.Tensor, answer_bt: torch.Tensor) -> torch.Tensor:
    """(b, h): the mean over the answer's tokens. Pads never enter, whatever they hold."""
    return torch.stack([own[mask].mean(0) for own, mask in zip(hidden_bth, answer_bt, strict=True)])


def starts(answer_bt: torch.Tensor) -> torch.Tensor:
    """(b, t): the positions that predict the first token of an answer."""
    after_bt = torch.nn.functional.pad(answer_bt[:, 1:], (0, 1))
    return after_bt & ~answer_bt
