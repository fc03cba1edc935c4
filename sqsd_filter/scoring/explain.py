"""Why a row's risk is what it is: which layers, modules and tokens carry it.

Every figure is a part of the risk. By module it is a probe's weight times the module's cosine; by token it is the
weight times what one position adds to all cosines (`projection.by_token`). Both ways the parts sum to the row's risk,
up to the rounding of the scorer's dtype. The row is run alone here: the risk that a run stored was taken in a batch,
and may differ from the parts' sum by as much.

At position t the model reads token t and is trained to give token t + 1. The position's part is put down to the token
that it gives, so that each answer token has exactly one. What is left are the positions after which nothing is
supervised: the prompt, whose part of the update is what the answers read there through attention.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np

from sqsd_filter.corpus.conversation import Message
from sqsd_filter.scoring.chat_encoder import Encoded
from sqsd_filter.scoring.scorer import SQSDScorer

TOP = 10  # modules that are named one by one
DIGITS = 7  # after the point


def explain(scorer: SQSDScorer, turns: Sequence[Message]) -> dict[str, Any]:
    """The parts of the risk of a conversation that can be scored. Loads the model if it isn't.

    Each part has its "risk" and what the "probes" add to that, weighted; `total` is such a sum of all modules. `layers`
    and `module_types` (a module's name behind its layer's number) have all modules, `modules` the `TOP` that add most;
    `prompt` and `answer` have all positions, `tokens` those of the answers, one by one with their text.
    """
    from sqsd_filter.scoring.engine import run_parallel

    engine, (row,) = scorer.engine, scorer.encoder.encode([turns])
    assert isinstance(row, Encoded)
    found: list[tuple[np.ndarray, np.ndarray]] = []
    run_parallel(lambda _: found.extend(engine.parts(row)), [[0]], min(1, engine.workers))  # in one thread, as bins are
    weights = np.array([probe.weight for probe in engine.probes])
    modules = list(dict.fromkeys(chain(*engine.probe_modules.values())))
    by_module = np.zeros((len(modules), len(weights)))
    for k, (names, (cosines_m, _)) in enumerate(zip(engine.probe_modules.values(), found, strict=True)):
        by_module[[modules.index(name) for name in names], k] = weights[k] * cosines_m
    by_token = weights * np.stack([parts_t for _, parts_t in found], axis=1)
    gives_answer = row.answer[1 : len(by_token) + 1]
    texts = scorer.encoder.texts(turns)

    def told(parts: np.ndarray) -> dict[str, Any]:
        """The sum of parts (…, probes)."""
        total = parts.reshape(-1, len(weights)).sum(axis=0)
        each = {probe.name: round(float(value), DIGITS) for probe, value in zip(engine.probes, total, strict=True)}
        return {"risk": round(float(total.sum()), DIGITS), "probes": each}

    def grouped(what: str, keys: Sequence[Any]) -> list[dict[str, Any]]:
        """The modules' parts summed by these keys, one a module; the riskiest first."""
        groups = [{what: key, **told(by_module[[k == key for k in keys]])} for key in dict.fromkeys(keys)]
        return sorted(groups, key=lambda group: -group["risk"])

    places = [layer_and_type(module) for module in modules]
    return {
        "total": told(by_module),
        "layers": grouped("layer", [layer for layer, _ in places]),
        "module_types": grouped("type", [kind for _, kind in places]),
        "modules": grouped("module", modules)[:TOP],
        "prompt": told(by_token[~gives_answer]),
        "answer": told(by_token[gives_answer]),
        "tokens": [{"text": texts[t + 1], **told(by_token[t])} for t in np.flatnonzero(gives_answer)],
    }


def layer_and_type(module: str) -> tuple[int | None, str]:
    """The number of a module's layer, None outside of all, and the module's name within it."""
    found = re.search(r"\.(\d+)\.", module)
    return (int(found[1]), module[found.end() :]) if found else (None, module)
