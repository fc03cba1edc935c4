"""LoRA factors of states and directions, read from PEFT adapter folders.

Only plain LoRA on linear layers is a low-rank product on the effective weight. Anything else that PEFT can save in such
a folder (DoRA, trained biases, embeddings, whole modules) is refused by its name.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc
import torch
from safetensors.torch import load_file
from torch import nn

from sqsd_filter.errors import PackError
from sqsd_filter.scoring.pack import Probe

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

_KEY = re.compile(r"^(?:base_model\.model\.)?(?P<module>.+)\.lora_(?P<side>[AB])(?:\.\w+)?\.weight$")

# Settings that change the forward pass beyond y = Wx + s·B(Ax), and the name of each in an error.
_REFUSED: dict[str, str] = {
    "use_dora": "DoRA",
    "lora_bias": "a LoRA bias",
    "modules_to_save": "fully trained modules (modules_to_save)",
    "trainable_token_indices": "trained token embeddings",
    "target_parameters": "LoRA on raw parameters (target_parameters)",
    "layer_replication": "replicated layers",
    "alora_invocation_tokens": "activated LoRA",
    "use_qalora": "QA-LoRA",
    "use_bdlora": "block-diagonal LoRA",
    "arrow_config": "Arrow routing",
    "monteclora_config": "MonteCLoRA",
    "kasa_config": "KaSA",
    "velora_config": "VeLoRA",
}
_AGAIN = "copy or build the adapter again"
_MUTATING_INITS = ("pissa", "olora", "loftq", "corda", "lora_ga")  # these change the base model's tensors, too


@dataclass(frozen=True)
class LoraFactors:
    """One module's side path y += scaling · B(A x): `A` (r, d_in), `B` (d_out, r), float32 on CPU."""

    A: torch.Tensor
    B: torch.Tensor
    scaling: float


@dataclass(frozen=True)
class Adapter:
    """All side paths of one adapter, by module name as in the base model."""

    path: Path
    factors: Mapping[str, LoraFactors]

    def with_scaling(self, scaling: float | None) -> Adapter:
        """The same adapter with every scaling overridden, or itself for None."""
        if scaling is None:
            return self
        return Adapter(self.path, {m: LoraFactors(f.A, f.B, scaling) for m, f in self.factors.items()})


def load_adapter(folder: str | Path) -> Adapter:
    """Read a PEFT LoRA folder (adapter_config.json beside adapter_model.safetensors).

    Raises `PackError` when files are missing or damaged, or the adapter is not plain LoRA on linear layers.
    """
    folder = Path(folder)
    config = read_config(folder)
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        if list(folder.glob("*.bin")):
            raise PackError(
                f"{folder} holds pickled weights (.bin), which are never loaded: save the adapter again with "
                "save_pretrained(..., safe_serialization=True)."
            )
        raise PackError(f"{folder} is not a complete PEFT adapter folder, it has no {WEIGHTS_FILE}: {_AGAIN}.")
    try:
        tensors = load_file(path)
    except Exception as problem:  # safetensors and torch raise what a damaged header leads them to
        raise PackError(f"{path} can't be read ({problem}): {_AGAIN}.") from problem

    sides: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        if key.endswith(".base_layer.weight"):
            continue  # PEFT's copy of a frozen weight beside its LoRA (embeddings and heads, refused as such)
        match = _KEY.match(key)
        if match is None or tensor.ndim != 2:
            kind = "LoRA on embeddings" if "lora_embedding" in key else f"the tensor '{key}'"
            raise PackError(f"{folder} holds {kind}, which is not LoRA on a linear layer: train without it.")
        if tensor.dtype not in DTYPES:
            kind = str(tensor.dtype).removeprefix("torch.")
            raise PackError(f"{folder} holds '{key}' as {kind}: save the adapter again as float32 or bfloat16.")
        sides.setdefault(match["module"], {})[match["side"]] = tensor.float()
    if not sides:
        raise PackError(f"{folder} holds no LoRA weights: {_AGAIN}.")
    factors = {}
    for module, pair in sorted(sides.items()):
        if set(pair) != {"A", "B"} or pair["A"].shape[0] != pair["B"].shape[1]:
            raise PackError(f"{folder} is damaged, lora_A and lora_B of '{module}' don't belong together: {_AGAIN}.")
        rank, most = pair["A"].shape[0], max(pair["A"].shape[1], pair["B"].shape[0])
        if not 0 < rank <= most:
            raise PackError(f"{folder} has rank {rank:,} at '{module}', where 1 to {most:,} make sense: {_AGAIN}.")
        factors[module] = LoraFactors(pair["A"], pair["B"], _scaling(config, module, rank))
    return Adapter(folder, factors)


def exact(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in float64, or in float32 on a device without float64."""
    return tensor.to(torch.float32 if tensor.device.type == "mps" else torch.float64)


def inner(a: LoraFactors, b: LoraFactors) -> float:
    """⟨s_a B_a A_a, s_b B_b A_b⟩ = s_a s_b ⟨B_aᵀ B_b, A_a A_bᵀ⟩, from r-sized matrices, on the device of `a`.

    Raises `PackError` where the two belong to modules of different shapes.
    """
    if a.A.shape[1] != b.A.shape[1] or a.B.shape[0] != b.B.shape[0]:
        raise PackError(
            "Two adapters of the pack have different shapes in one module: they belong to different models."
        )
    return a.scaling * b.scaling * _gram(a, b)


def norm(factors: LoraFactors) -> float:
    """‖s B A‖, the Frobenius norm; NaN where it is not finite."""
    squared = _gram(factors, factors)
    return abs(factors.scaling) * math.sqrt(max(squared, 0.0)) if math.isfinite(squared) else math.nan


def _gram(a: LoraFactors, b: LoraFactors) -> float:
    device = a.A.device
    gram_B, gram_A = exact(a.B).T @ exact(b.B.to(device)), exact(a.A) @ exact(b.A.to(device)).T
    return float((gram_B * gram_A).sum())


def probe_modules(probes: Iterable[Probe], adapters: Mapping[str, Adapter]) -> dict[str, list[str]]:
    """The modules over which each probe sums cosines: those that its state and its direction both adapt.

    They are sorted by name, with numbers in a name sorted by value. Raises `PackError` for a direction that has no
    length, or one that is not finite, in the modules of its state.
    """
    probes = tuple(probes)

    def order(name: str) -> list[int | str]:
        return [int(p) if p.isdigit() else p for p in re.split(r"(\d+)", name)]

    both = {p.name: set(adapters[p.state].factors) & set(adapters[p.direction].factors) for p in probes}
    for probe in probes:
        direction = adapters[probe.direction]
        norms = [norm(direction.factors[name]) for name in both[probe.name]]
        if norms and not (any(norms) and all(map(math.isfinite, norms))):
            what = "not finite" if any(norms) else "zero in every module"
            raise PackError(f"The direction '{probe.direction}' in {direction.path} is {what}: {_AGAIN}.")
    return {probe: sorted(names, key=order) for probe, names in both.items()}


def adapted(model: nn.Module, adapter: Adapter) -> Iterator[tuple[nn.Module, LoraFactors]]:
    """The modules of the model that the adapter adapts, each with its factors.

    Raises `PackError` where the adapter does not fit the model.
    """
    modules = dict(model.named_modules())
    for name, factors in adapter.factors.items():
        module = modules.get(name)
        weight = getattr(module, "weight", None)
        if module is None or weight is None:
            raise PackError(f"{adapter.path} adapts '{name}', which {type(model).__name__} does not have.")
        shape = [factors.B.shape[0], factors.A.shape[1]]
        if list(weight.shape) != (shape if isinstance(module, nn.Linear) else shape[::-1]):
            raise PackError(f"{adapter.path} does not fit the model: '{name}' has a different shape there.")
        yield module, factors


def merge(model: PreTrainedModel, adapter: Adapter, dtype: torch.dtype) -> PreTrainedModel:
    """Replace W by W + s·B·A and convert the model to `dtype`, each sum computed in float32 at least and rounded once.

    Buffers stay as they are: the frequencies of rotary embeddings are float32 in every dtype. Returns the model. Raises
    `PackError` where the adapter does not fit it.
    """
    with torch.no_grad():
        for module, factors in adapted(model, adapter):
            weight = module.weight
            assert isinstance(weight, torch.Tensor)
            exact = torch.promote_types(torch.promote_types(weight.dtype, dtype), torch.float32)
            change = factors.scaling * (factors.B.to(weight.device, exact) @ factors.A.to(weight.device, exact))
            if not isinstance(module, nn.Linear):
                change = change.t()  # GPT-2's Conv1D stores the transposed weight
            weight.data = (weight.to(exact) + change).to(dtype)
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype
    return model


def read_config(folder: Path) -> dict[str, Any]:
    """The settings of a PEFT LoRA folder. Raises `PackError` where they can't be read or are not plain LoRA."""
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise PackError(f"{folder} is not a PEFT adapter folder, it has no {CONFIG_FILE}: {_AGAIN}.")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as problem:
        raise PackError(f"{path} can't be read as JSON ({problem}): {_AGAIN}.") from problem
    if not isinstance(config, dict):
        raise PackError(f"{path} does not hold a JSON object: {_AGAIN}.")
    if config.get("peft_type") != "LORA":
        raise PackError(f"{folder} is an adapter of type {config.get('peft_type')}, not LORA: train a LoRA adapter.")
    for key, name in _REFUSED.items():
        if config.get(key):
            raise PackError(f"{folder} uses {name}, which is not plain LoRA on linear layers: train without it.")
    if config.get("bias", "none") != "none":
        raise PackError(f"{folder} has trained biases (bias={config['bias']!r}): train with bias='none'.")
    patterns = config.get("alpha_pattern") or {}
    numbers = [config.get("lora_alpha", 8), *(patterns.values() if isinstance(patterns, dict) else [None])]
    if not all(isinstance(n, int | float) and not isinstance(n, bool) and math.isfinite(n) for n in numbers):
        raise PackError(f"{path} has no number for lora_alpha or in alpha_pattern: {_AGAIN}.")
    for pattern in patterns:
        try:
            _matches(pattern, "")
        except pa.ArrowInvalid as problem:
            raise PackError(
                f"{path} has an alpha_pattern that is not a valid pattern, '{pattern}' ({problem}): {_AGAIN}."
            ) from problem
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.startswith(_MUTATING_INITS):
        raise PackError(
            f"{folder} was initialised by {init}, which also changes the base weights: convert it to plain LoRA "
            "(save_pretrained with path_initial_model_for_weight_conversion)."
        )
    return config


def _scaling(config: Mapping[str, Any], module: str, rank: int) -> float:
    alpha: float = config.get("lora_alpha", 8)
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if _matches(pattern, module):
            alpha = value
            break
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


def _matches(pattern: str, module: str) -> bool:
    """Does a pattern of PEFT match the end of a module's name? By RE2, which never backtracks: with Python's, a
    stranger's pattern may take for ever. Raises `pa.ArrowInvalid`."""
    matches: bool = pc.match_substring_regex(pa.scalar(module), rf"^(.*\.)?({pattern})$").as_py()
    return matches
