"""A linear probe: a risk that is read off the hidden states of the pack's model, by one forward pass per row.

At each of the probe's layers two vectors (h,) are read: the mean hidden state over the answer's tokens, and the mean
over the tokens before each answer, which predict its beginning. The risk is their weighted sum

    risk(z) = b + Σ_l <u_l, answer_l(z)> + <v_l, start_l(z)>

and has no unit. It grows with what the model's own features say about the content of the row; an update that the row
would induce is not computed. The weights were fitted on known rows (`directions.linear_probe`). The model is the pack's
base model with its base adapter, if it has one; no state is added. `hidden_states` says how layers are numbered.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from sqsd_filter.errors import PackError, first_line
from sqsd_filter.scoring.chat_encoder import Encoded
from sqsd_filter.scoring.hidden_states import HiddenStates, answer_mean, exact, starts
from sqsd_filter.scoring.pack import LINEAR_FILE, LinearProbe
from sqsd_filter.scoring.scoring_model import ModelSettings, ScoringModel
from sqsd_filter.storage.folder import write_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

READ = 2  # vectors per layer


class ReadingModel(ScoringModel):
    """A loaded model that reads hidden states at the layers of the pack's linear probe."""

    def __init__(self, model: PreTrainedModel, settings: ModelSettings) -> None:
        """Raises `PackError` where the model has too few layers."""
        super().__init__(model, settings)
        probe = settings.pack.linear
        assert probe is not None
        config = model.config.get_text_config()
        if max(probe.layers) > config.num_hidden_layers:
            raise PackError(
                f"The probe '{probe.name}' reads layer {max(probe.layers)}, but {settings.base_model} has "
                f"{config.num_hidden_layers}: it was fitted on another model. Leave out --model."
            )
        self.layers, self.hidden = probe.layers, HiddenStates(model)
        self.shape = (len(probe.layers), READ, int(config.hidden_size))

    def read(self, rows: Sequence[Encoded]) -> torch.Tensor:
        """The vectors of the rows: (b, layers, 2, h), in float32 at least, on the CPU."""
        hidden, answer_bt = self.hidden.of(rows)
        read = []
        for layer in self.layers:
            states_bth = exact(hidden[layer])
            masks = (answer_bt.to(states_bth.device), starts(answer_bt).to(states_bth.device))
            read.append(torch.stack([answer_mean(states_bth, mask_bt) for mask_bt in masks], dim=1))
        return torch.stack([each.cpu() for each in read], dim=1)

    def project(self, rows: Sequence[Encoded]) -> np.ndarray:
        """The vectors as one, (b, layers · 2 · h) float64."""
        vectors: np.ndarray = self.read(rows).flatten(1).double().numpy()
        return vectors


class LinearModel(ReadingModel):
    """A loaded model with the weights of the pack's linear probe."""

    def __init__(self, model: PreTrainedModel, settings: ModelSettings) -> None:
        """Raises `PackError` where the weights can't be read or are those of another model."""
        super().__init__(model, settings)
        probe = settings.pack.linear
        assert probe is not None
        self.weight_lsh, self.bias = load_weights(settings.pack.path, probe)
        if self.weight_lsh.shape != self.shape:
            raise PackError(
                f"The probe '{probe.name}' has weights of the shape {self.weight_lsh.shape}, and {settings.base_model} "
                f"needs {self.shape}: it was fitted on another model. Leave out --model."
            )

    def project(self, rows: Sequence[Encoded]) -> np.ndarray:
        """The risk of each row: (b, 1) float64."""
        products_b = self.read(rows).flatten(1).double() @ torch.from_numpy(self.weight_lsh).flatten()
        risks: np.ndarray = (products_b + self.bias).numpy()[:, None]
        return risks

    def parts(self, row: Encoded) -> tuple[np.ndarray, np.ndarray]:
        """The parts of a row's risk without the bias, in two ways that both sum to it: those of each layer (layers, 2),
        as `weight_lsh` orders them, and those of each answer token (n,) with that of all starts at the end (n + 1,)."""
        hidden, answer_1t = self.hidden.of([row])
        masks = [mask_1t[0].cpu().numpy() for mask_1t in (answer_1t, starts(answer_1t))]
        by_layer, by_token = [], [np.zeros(mask.sum()) for mask in masks]
        for layer, weight_sh in zip(self.layers, self.weight_lsh, strict=True):
            states_th = exact(hidden[layer][0]).cpu().double().numpy()
            parts = [states_th[mask] @ own / mask.sum() for mask, own in zip(masks, weight_sh, strict=True)]
            by_layer.append([part.sum() for part in parts])
            for total, part in zip(by_token, parts, strict=True):
                total += part
        answer_n, starts_n = by_token
        return np.array(by_layer), np.append(answer_n, starts_n.sum())


def load_weights(folder: Path, probe: LinearProbe) -> tuple[np.ndarray, float]:
    """The weights (layers, 2, h) float64 and the bias of a pack's probe. Raises `PackError` for a damaged file."""
    path = folder / probe.name / LINEAR_FILE
    try:
        tensors = load_file(path)
        weight, bias = tensors["weight"], tensors["bias"]
    except (OSError, KeyError, ValueError, SafetensorError) as problem:
        raise PackError(f"{path} can't be read ({first_line(problem)}): get the pack again.") from problem
    if (
        weight.shape[:2] != (len(probe.layers), READ)
        or weight.ndim != 3
        or bias.shape != (1,)
        or not (np.issubdtype(weight.dtype, np.floating) and np.isfinite(weight).all() and np.isfinite(bias).all())
    ):
        raise PackError(f"{path} does not hold finite weights for {len(probe.layers)} layers: get the pack again.")
    return weight.astype(np.float64), float(bias[0])


def save_weights(folder: Path, weight_lsh: np.ndarray, bias: float) -> None:
    """Write a probe's weights, in float32, into its folder. Raises `OSError`."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {"weight": weight_lsh.astype(np.float32), "bias": np.array([bias], np.float32)}
    write_bytes(folder / LINEAR_FILE, save(tensors))
