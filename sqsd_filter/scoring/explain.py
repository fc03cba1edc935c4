"""Explains a row's risk: which layers, modules and tokens carry it.

For SQSD every figure is a part of the risk. A module's part is a probe's weight times the module's cosine; a token's
part is the weight times one position's part of all cosines (`projection.by_token`). Both kinds of parts sum to the
row's risk, up to the rounding of the scorer's dtype. The row is run alone here. A stored risk was computed in a
micro-batch and may differ from the sum by as much.

At position t the model reads token t and is trained to give token t + 1. The position's part is assigned to the token
that it gives, so that each answer token has exactly one. The positions after which nothing is supervised remain: the
prompt, which takes part in the update through attention.

A linear probe's risk is a bias, an average over the answer's tokens, and an average over the tokens before each answer.
So a layer's part and a token's part are exact. The prompt's part is that of the tokens before each answer, whose hidden
states say what the model makes of the prompt. There are no modules. The parts and the bias sum to the risk.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import chain
from typing import NotRequired, TypedDict, TypeVar

import numpy as np

from sqsd_filter.corpus.conversation import Message
from sqsd_filter.scoring.chat_encoder import Encoded
from sqsd_filter.scoring.scorer import SQSDScorer

Key = TypeVar("Key", int | None, str)

TOP = 10  # modules that are listed one by one
DIGITS = 7  # after the decimal point


class RiskPart(TypedDict):
    """A part of the risk, and each probe's share of it by the probe's name, weighted."""

    risk: float
    probes: dict[str, float]


class LayerPart(RiskPart):
    """The part of a layer's modules; `layer` is None for modules outside of all layers."""

    layer: int | None


class TypePart(RiskPart):
    """The part of all modules of one type: a module's name after its layer's number."""

    type: str


class ModulePart(RiskPart):
    """The part of one module."""

    module: str


class TokenPart(RiskPart):
    """The part of one answer token, with its text."""

    text: str


class Explanation(TypedDict):
    """A row's risk in parts: `layers` and `module_types` cover all modules, `modules` the `TOP` with the largest parts;
    `prompt` and `answer` cover all positions, `tokens` each token of the answers. Only a linear probe has a `bias`."""

    total: RiskPart
    layers: list[LayerPart]
    module_types: list[TypePart]
    modules: list[ModulePart]
    prompt: RiskPart
    answer: RiskPart
    tokens: list[TokenPart]
    bias: NotRequired[float]


def explain(scorer: SQSDScorer, turns: Sequence[Message]) -> Explanation:
    """The parts of the risk of a conversation that can be scored. Loads the model if necessary."""
    from sqsd_filter.scoring.batching import run_parallel

    (row,) = scorer.encoder.encode([turns])
    assert isinstance(row, Encoded)
    if scorer.pack.linear is not None:
        return _of_linear_probe(scorer, row, scorer.encoder.texts(turns))
    model = scorer.model
    parts: list[tuple[np.ndarray, np.ndarray]] = []
    # in one thread, as micro-batches are
    run_parallel(lambda _: parts.extend(model.parts(row)), [[0]], min(1, model.workers))
    weights = np.array([probe.weight for probe in model.probes])
    modules = list(dict.fromkeys(chain(*model.probe_modules.values())))
    by_module = np.zeros((len(modules), len(weights)))
    for k, (names, (cosines_m, _)) in enumerate(zip(model.probe_modules.values(), parts, strict=True)):
        by_module[[modules.index(name) for name in names], k] = weights[k] * cosines_m
    by_token = weights * np.stack([parts_t for _, parts_t in parts], axis=1)
    gives_answer = row.answer[1 : len(by_token) + 1]
    texts = scorer.encoder.texts(turns)

    def part(values: np.ndarray) -> RiskPart:
        """The sum of parts (…, probes)."""
        total = values.reshape(-1, len(weights)).sum(axis=0)
        probes = {probe.name: round(float(value), DIGITS) for probe, value in zip(model.probes, total, strict=True)}
        return {"risk": round(float(total.sum()), DIGITS), "probes": probes}

    def grouped(keys: Sequence[Key]) -> list[tuple[Key, RiskPart]]:
        """The modules' parts summed by these keys, one per module; the riskiest first."""
        groups = [(key, part(by_module[[k == key for k in keys]])) for key in dict.fromkeys(keys)]
        return sorted(groups, key=lambda group: -group[1]["risk"])

    layers_and_types = [layer_and_type(module) for module in modules]
    layers, types = grouped([layer for layer, _ in layers_and_types]), grouped([kind for _, kind in layers_and_types])
    return {
        "total": part(by_module),
        "layers": [{"layer": layer, **own} for layer, own in layers],
        "module_types": [{"type": kind, **own} for kind, own in types],
        "modules": [{"module": module, **own} for module, own in grouped(modules)[:TOP]],
        "prompt": part(by_token[~gives_answer]),
        "answer": part(by_token[gives_answer]),
        "tokens": [{"text": texts[t + 1], **part(by_token[t])} for t in np.flatnonzero(gives_answer)],
    }


def _of_linear_probe(scorer: SQSDScorer, row: Encoded, texts: Sequence[str]) -> Explanation:
    from sqsd_filter.scoring.linear_probe import LinearModel

    model: object = scorer.model
    assert isinstance(model, LinearModel)
    by_layer, by_token = model.parts(row)

    def part(values: np.ndarray | float) -> RiskPart:
        risk = round(float(np.sum(values)), DIGITS)
        return {"risk": risk, "probes": dict.fromkeys(scorer.weights, risk)}

    layers: list[LayerPart] = [
        {"layer": layer, **part(values)} for layer, values in zip(model.layers, by_layer, strict=True)
    ]
    return {
        "total": part(by_layer.sum() + model.bias),
        "layers": sorted(layers, key=lambda each: -each["risk"]),
        "module_types": [],
        "modules": [],
        "prompt": part(by_token[-1]),
        "answer": part(by_token[:-1]),
        "tokens": [
            {"text": texts[t], **part(value)}
            for t, value in zip(np.flatnonzero(row.answer).tolist(), by_token[:-1].tolist(), strict=True)
        ],
        "bias": round(model.bias, DIGITS),
    }


def layer_and_type(module: str) -> tuple[int | None, str]:
    """The number of a module's layer (None outside of all layers) and the module's name within it."""
    match = re.search(r"\.(\d+)\.", module)
    return (int(match[1]), module[match.end() :]) if match else (None, module)
