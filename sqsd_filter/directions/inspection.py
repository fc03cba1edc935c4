"""Facts on a pack from its files alone. Norms and cosines come from r-sized Gram matrices; no model is loaded.

    ⟨V, V'⟩ = ⟨B_Vᵀ B_V', A_V A_V'ᵀ⟩ (scalings included)      ‖V‖² = ⟨V, V⟩

A module's cosine is 0 where either norm is 0, as it is in a score.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import combinations
from statistics import median
from typing import Any

import numpy as np
import torch

from sqsd_filter.directions.flags import flags
from sqsd_filter.directions.validation import verdicts
from sqsd_filter.scoring.adapters import Adapter, inner, load_adapter, norm
from sqsd_filter.scoring.linear_probe import load_weights
from sqsd_filter.scoring.models import is_here
from sqsd_filter.scoring.pack import ADAPTER_FILES, Pack, Probe, Risk
from sqsd_filter.scoring.reference_rows import Reference

_LAYER = re.compile(r"(?:^|\.)(\d+)\.(.+)")  # the first number in a module's name, and the name below that layer
_SHOWN = ("data", "licence", "rows", "steps", "source")


def inspect_pack(pack: Pack) -> dict[str, Any]:
    """A report on a pack without its model. Numbers that are not finite are None.

    It has `probes`, `states` (adapter, scaling, and the probes that share the pass), `adapters` with norms per module,
    `cosines` between each two directions, `risks` (the pack's others, with their probes), `linear` (how a linear
    probe was fitted), `validation` as recorded, and `flags`: likely problems, each with a code and a sentence
    that names the fix. Raises `PackError` if adapters can't be read or don't fit together.
    """
    adapters = {name: load_adapter(pack.adapter(name)) for name in pack.folders}
    norms = {name: {m: norm(f) for m, f in a.factors.items()} for name, a in adapters.items()}
    report: dict[str, Any] = {
        "name": pack.name,
        "path": str(pack.path),
        "fingerprint": pack.fingerprint,
        "base": {
            "model": pack.base_model,
            "revision": pack.base_revision,
            "adapter": pack.base_adapter,
            "here": is_here(pack.base_model, pack.base_revision),
        },
        "max_length": pack.max_length,
        "chat_template_kwargs": dict(pack.chat_template_kwargs),
        "probes": [_probe(pack, probe, adapters) for probe in pack.probes],
        "states": [
            {"adapter": state, "scaling": scaling, "probes": [p.name for p in pack.probes if p.at == (state, scaling)]}
            for state, scaling in dict.fromkeys(p.at for p in pack.probes)
        ],
        "adapters": {name: _adapter(pack, adapters[name], norms[name], name) for name in pack.folders},
        "cosines": [
            {"directions": [a, b], **_cosine(adapters[a], adapters[b])}
            for a, b in combinations(dict.fromkeys(p.direction for p in pack.probes), 2)
        ],
        "validation": pack.notes.get("validation"),
    }
    report["risk"] = pack.risk
    report["risks"] = {name: _risk(risk) for name, risk in pack.risks.items()}
    report["beside"] = [each.risk for each in pack.beside]
    report["linear"] = _linear(pack)
    report["reference"] = _reference(pack)
    report["shared_state"] = pack.shared_state is not None
    return {**report, "flags": flags(report)}


def _risk(risk: Risk) -> dict[str, Any]:
    """The probes of another risk, or the layers that its linear probe reads."""
    if risk.linear is not None:
        return {"layers": list(risk.linear.layers)}
    return {"probes": [{key: getattr(p, key) for key in ("name", "weight", "direction", "state")} for p in risk.probes]}


def _linear(pack: Pack) -> dict[str, Any] | None:
    """How the pack's linear probe was fitted, and how it scores unsafe sources that a fit has not seen. None where the
    risk has none. Raises `PackError` if its weights can't be read."""
    if pack.linear is None:
        return None
    weight_lsh, bias = load_weights(pack.path, pack.linear)
    record = (pack.notes.get("provenance") or {}).get(pack.linear.name)
    return {
        **{"name": pack.linear.name, "layers": list(pack.linear.layers), "weights": weight_lsh.size, "bias": bias},
        **{"norms": np.linalg.norm(weight_lsh, axis=(1, 2)).tolist()},
        **{"record": record if isinstance(record, dict) else None},
    }


def _reference(pack: Pack) -> dict[str, Any]:
    """The pack's reference rows, None where it has none, and why they do not apply to its scores, if so."""
    known = Reference.of(pack)
    if known is None:
        return {"record": None, "mismatch": None}
    return {"record": known.record, "mismatch": known.outdated(pack)}


def _cosine(a: Adapter, b: Adapter) -> dict[str, Any]:
    """The cosine over all common modules as one vector, and the sum and mean of the cosines per module."""
    common = [(factors, b.factors[m]) for m, factors in a.factors.items() if m in b.factors]
    dots = [inner(x, y) for x, y in common]
    norms = [(norm(x), norm(y)) for x, y in common]
    each = [dot / (x * y) if x * y else 0.0 for dot, (x, y) in zip(dots, norms, strict=True)]
    length = math.hypot(*(x for x, _ in norms)) * math.hypot(*(y for _, y in norms))
    mean = _ratio(sum(each), len(each))
    return {"modules": len(each), "global": _ratio(sum(dots), length), "sum": _finite(sum(each)), "mean": mean}


def _probe(pack: Pack, probe: Probe, adapters: Mapping[str, Adapter]) -> dict[str, Any]:
    direction, state = adapters[probe.direction], adapters[probe.state].with_scaling(probe.state_scaling)
    cosine = _cosine(direction, state)
    steered, steers = verdicts(pack.notes.get("validation"))
    outdated = probe.direction in steers and steered != pack.fingerprint
    return {
        "name": probe.name,
        "weight": probe.weight,
        "direction": probe.direction,
        "state": probe.state,
        "state_scaling": probe.state_scaling,
        "modules": {
            "direction": len(direction.factors),
            "state": len(state.factors),
            "common": cosine.pop("modules"),
        },
        "cosine_to_state": cosine,
        "steers": None if outdated else steers.get(probe.direction),
        "steering_outdated": outdated,
    }


def _adapter(pack: Pack, adapter: Adapter, norms: Mapping[str, float], name: str) -> dict[str, Any]:
    """One adapter: its shape, norms and provenance."""
    files = [pack.adapter(name) / file for file in ADAPTER_FILES]
    config = json.loads(files[0].read_text(encoding="utf-8"))
    factors = adapter.factors
    provenance = pack.notes.get("provenance")
    entry = provenance.get(name) if isinstance(provenance, dict) else None
    kinds = {module: _layer_and_type(module) for module in factors}
    layers = {layer for layer, _ in kinds.values() if layer is not None}
    return {
        "roles": list(_roles(pack, name)),
        "rank": sorted({f.A.shape[0] for f in factors.values()}),
        "alpha": config.get("lora_alpha"),
        "scaling": sorted({f.scaling for f in factors.values()}),
        "modules": len(factors),
        "layers": len(layers),
        "bytes": sum(file.stat().st_size for file in files),
        "provenance": {k: entry[k] for k in _SHOWN if k in entry} if isinstance(entry, dict) else None,
        "norm": _finite(math.hypot(*norms.values())),
        "norms": {module: _finite(n) for module, n in norms.items()},
        "by_type": _summaries((kind, norms[m]) for m, (_, kind) in kinds.items()),
        "by_layer": _summaries((layer, norms[m]) for m, (layer, _) in kinds.items() if layer is not None),
        "zero_B": [m for m, f in factors.items() if not f.B.any()],
        "not_finite": [m for m, f in factors.items() if not (torch.isfinite(f.A).all() and torch.isfinite(f.B).all())],
    }


def _roles(pack: Pack, name: str) -> Iterator[str]:
    if name == pack.base_adapter:
        yield "base"
    for role in ("direction", "state"):
        if any(getattr(probe, role) == name for probe in pack.probes):
            yield role


def _layer_and_type(module: str) -> tuple[int | None, str]:
    """A module's layer and type: `model.layers.3.mlp.up_proj` is an `mlp.up_proj` in layer 3."""
    match = _LAYER.search(module)
    return (int(match[1]), re.sub(r"\b\d+\b", "*", match[2])) if match else (None, module)


def _summaries(norms: Iterable[tuple[Any, float]]) -> dict[Any, dict[str, Any]]:
    """Count, minimum, median and maximum of the norms of each kind. Norms that are not finite are only counted."""
    kinds: dict[Any, list[float]] = {}
    for kind, value in norms:
        kinds.setdefault(kind, []).append(value)
    return {kind: {"modules": len(kinds[kind]), **_spread(kinds[kind])} for kind in sorted(kinds)}


def _spread(values: Sequence[float]) -> dict[str, float | None]:
    finite = [v for v in values if math.isfinite(v)]
    if not finite:
        return dict.fromkeys(("min", "median", "max"))
    return {"min": min(finite), "median": median(finite), "max": max(finite)}


def _ratio(value: float, scale: float) -> float | None:
    return _finite(value / scale) if scale else None


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
