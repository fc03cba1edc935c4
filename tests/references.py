"""References for tests: of risks that no model gave, and put into a tiny pack."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from sqsd_filter.scoring.pack import PACK_FILE, load_pack
from sqsd_filter.scoring.reference_rows import Reference, ReferenceSettings, settings_of, summarise_rows
from sqsd_filter.scoring.scorer import SCORING, SQSDScorer

OWN: ReferenceSettings = {
    "pack": "f" * 16,
    "base_model": "base",
    "base_content": "content",
    "shared_state": None,
    "scorer": "sqsd",
    "scoring": SCORING,
    "dtype": "float32",
    "max_length": 256,
}


def make_reference(
    benign: Sequence[Sequence[float]], unsafe: Sequence[Sequence[float]] = (), settings: ReferenceSettings = OWN
) -> Reference:
    """The reference of a pack called tiny, with the risks of each corpus."""
    kinds = {"benign": benign, "unsafe": unsafe}
    corpora = [
        summarise_rows(f"{kind}-{k}", kind, f"{k:064x}", {"risk": np.array(risks, np.float64)})
        for kind, each in kinds.items()
        for k, risks in enumerate(each)
    ]
    return Reference("tiny", {"settings": settings, "corpora": corpora})


def calibrated(
    pack: Path, target: Path, benign: Sequence[Sequence[float]], unsafe: Sequence[Sequence[float]] = ()
) -> Path:
    """A copy of a pack with this reference, as if its rows had been scored by the pack's own settings."""
    if not target.exists():
        shutil.copytree(pack, target, ignore=shutil.ignore_patterns("base"))
    reference = make_reference(benign, unsafe, settings_of(SQSDScorer(load_pack(target))))
    page = json.loads((target / PACK_FILE).read_text())
    (target / PACK_FILE).write_text(json.dumps({**page, "reference": reference.record}))
    return target
