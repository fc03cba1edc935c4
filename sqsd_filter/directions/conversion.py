"""Convert a fully fine-tuned checkpoint to a low-rank direction: the best approximation of θ - θ0 per linear layer.

With D = W - W0 and U its r leading left singular vectors, U Uᵀ D is the nearest matrix of rank r. U comes from the
eigenvectors of the Gram matrix on D's smaller side, in float64: as exact as float32 weights allow, at a fraction of the
cost of a full decomposition (4096 × 14336: 33 s of one core and 1.3 GB). The adapter is B = U √S, A = √S⁻¹ Uᵀ D with
the scaling 1. The share of ‖D‖² that it keeps is measured on the result, ‖Uᵀ D‖² / ‖D‖².
"""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from sqsd_filter.directions.adapter_folder import whole_folder, write_adapter
from sqsd_filter.directions.model_files import Layout, StoredModel, open_model
from sqsd_filter.errors import PackError, UsageError
from sqsd_filter.progress import Progress, Silent
from sqsd_filter.scoring.models import weights_folder
from sqsd_filter.scoring.placement import check_device, choose_device

RANK = 8
CONVERSION_FILE = "conversion.json"
_NOTE_EVERY = 30.0  # seconds
_CHUNK = 1 << 24  # values of a tensor squared at a time


@dataclass(frozen=True)
class Truncated:
    """The nearest matrix B A of rank r, `A` (r, d_in), `B` (d_out, r), float32; squared norms kept and in total."""

    A: torch.Tensor
    B: torch.Tensor
    kept: float
    total: float


def convert(
    checkpoint: str,
    target: str | Path,
    *,
    base: str,
    rank: int | None = None,
    energy: float | None = None,
    device: str | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write the change from `base` to `checkpoint` as a PEFT adapter into the folder `target`.

    Both are folders or Hub repositories of safetensors; `base` may also be an embedded model. Each linear layer but the
    head gets `rank` (default 8), or with `energy` the lowest rank that keeps this share of its ‖D‖², but at most `rank`
    if both are given. The report has each module's rank, norm and share of energy kept, and the changed tensors that an
    adapter can't hold, with their share of ‖θ - θ0‖². It is also written beside the adapter.

    Raises `PackError` if the two don't belong together, `InputError` if they can't be read, `ModelError` if they can't
    be found or fetched, `UsageError`, `DestinationExists`.
    """
    if rank is not None and rank < 1:
        raise UsageError("rank (--rank) must be at least 1.")
    if energy is not None and not 0 < energy <= 1:
        raise UsageError("energy (--energy) must be above 0 and at most 1.")
    device, progress = choose_device(device), progress or Silent()
    check_device(device)
    with whole_folder(Path(target)) as folder:
        folders = [weights_folder(where) for where in (base, checkpoint)]
        layout = Layout(base)
        with (
            open_model(base, folders[0], layout) as before,
            open_model(checkpoint, folders[1], layout) as after,
        ):
            unmatched = _compare(before, after, layout)
            held: dict[str, Truncated] = {}
            squares: dict[str, float] = {}  # ‖change‖² of every tensor
            names = sorted((before.names & after.names) - set(unmatched))
            noted = time.monotonic()
            for number, name in enumerate(names):
                if time.monotonic() - noted > _NOTE_EVERY:
                    noted = time.monotonic()
                    progress.note(f"converting: {number:,} of {len(names):,} tensors")
                pair = (after.read(name), before.read(name))
                squares[name] = _squared_change(*pair, device)
                if not math.isfinite(squares[name]):
                    raise PackError(f"'{name}' is not finite in {checkpoint} or {base}: name another checkpoint.")
                if name in layout.linears and squares[name]:
                    new, old = (tensor.to(device, torch.float64) for tensor in pair)
                    D = (new - old).T if name in layout.transposed else new - old
                    most = rank or (RANK if energy is None else None)
                    held[layout.linears[name]] = truncate(D, most, energy)
        if not held:
            raise PackError(f"The linear layers of {checkpoint} and {base} are the same: name a fine-tuned checkpoint.")
        report = _report(held, squares, layout) | {"unmatched": unmatched}
        report = {"checkpoint": _name(checkpoint), "base": _name(base)} | report
        write_adapter(folder, _config(held, layout), _tensors(held))
        (folder / CONVERSION_FILE).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return report


def truncate(D: torch.Tensor, rank: int | None, energy: float | None = None) -> Truncated:
    """The nearest matrix to D (float64) of at most `rank`, or the lowest that keeps the share `energy` of ‖D‖²."""
    wide = D.shape[0] <= D.shape[1]
    D_mn = D if wide else D.T
    values, vectors = torch.linalg.eigh(D_mn @ D_mn.T)  # ascending
    total = float(D.square().sum())
    keep = min(rank or len(values), len(values))
    if energy is not None:
        sums = values.flip(0).clamp_min(0).cumsum(0)
        keep = min(keep, 1 + int((sums < energy * total).sum()))
    U_mr = vectors.flip(1)[:, :keep]
    P_rn = U_mr.T @ D_mn
    root_r = P_rn.norm(dim=1).sqrt()
    left, right = U_mr * root_r, torch.where(root_r[:, None] > 0, P_rn / root_r[:, None], 0)
    A, B = (right, left) if wide else (left.T, right.T)
    return Truncated(A.float().cpu(), B.float().cpu(), float(P_rn.square().sum()), total)


def _name(where: str) -> str:
    """The name of a Hub repository, or the last part of a folder's path."""
    return Path(where).resolve().name if Path(where).is_dir() else where


def _compare(before: StoredModel, after: StoredModel, layout: Layout) -> list[str]:
    """The tensors that only one model has, or that differ in shape. Raises `PackError` if a linear layer is one."""
    fix = f"--base must be the model that {after.where} was trained from."
    for name in layout.linears:
        for model in (before, after):
            if name not in model.names:
                raise PackError(f"{model.where} has no '{name}': {fix}")
    common = before.names & after.names
    unlike = {name for name in common if before.shape(name) != after.shape(name)}
    for name in sorted(unlike & set(layout.linears)):
        shapes = " × ".join(map(str, before.shape(name))), " × ".join(map(str, after.shape(name)))
        raise PackError(f"'{name}' is {shapes[1]} in {after.where} but {shapes[0]} in {before.where}: {fix}")
    return sorted((before.names ^ after.names) | unlike)


def _squared_change(new: torch.Tensor, old: torch.Tensor, device: str) -> float:
    """‖new - old‖² in float64, in parts, because a whole embedding in float64 is large."""
    parts = zip(new.reshape(-1).split(_CHUNK), old.reshape(-1).split(_CHUNK), strict=True)
    wide = ((a.to(device, torch.float64), b.to(device, torch.float64)) for a, b in parts)
    return sum(float((a - b).square().sum()) for a, b in wide)


def _report(held: Mapping[str, Truncated], squares: Mapping[str, float], layout: Layout) -> dict[str, Any]:
    total, linear = sum(squares.values()), sum(t.total for t in held.values())
    kinds: dict[str, dict[str, float]] = {}
    for name, square in squares.items():
        if name not in layout.linears and square:
            kinds.setdefault(layout.kind(name), {})[name] = square / total
    ranks = [len(t.A) for t in held.values()]
    return {
        "norm": math.sqrt(total),
        "energy": sum(t.kept for t in held.values()) / linear,
        "linear_share": linear / total,
        "rank": {"min": min(ranks), "median": median(ranks), "max": max(ranks)},
        "modules": {
            module: {"rank": len(t.A), "norm": math.sqrt(t.total), "energy": t.kept / t.total}
            for module, t in held.items()
        },
        "unchanged": sorted(set(layout.linears.values()) - set(held)),
        "not_held": {
            kind: {"share": sum(tensors.values()), "tensors": tensors} for kind, tensors in sorted(kinds.items())
        },
    }


def _config(held: Mapping[str, Truncated], layout: Layout) -> dict[str, Any]:
    """The adapter's config for PEFT: α is the rank in every module, so that the scaling is 1."""
    from peft import LoraConfig

    ranks = {module: len(t.A) for module, t in held.items()}
    usual = Counter(ranks.values()).most_common(1)[0][0]
    others = {module: rank for module, rank in ranks.items() if rank != usual}
    config = LoraConfig(
        r=usual,
        lora_alpha=usual,
        rank_pattern=dict(others),
        alpha_pattern=dict(others),
        target_modules=list(ranks),
        fan_in_fan_out=bool(layout.transposed),
        inference_mode=True,
        task_type="CAUSAL_LM",
    )
    settings: dict[str, Any] = config.to_dict()
    return settings


def _tensors(held: Mapping[str, Truncated]) -> dict[str, torch.Tensor]:
    sides = {f"{module}.lora_{side}": getattr(t, side) for module, t in held.items() for side in ("A", "B")}
    return {f"base_model.model.{name}.weight": tensor for name, tensor in sides.items()}
