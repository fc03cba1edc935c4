"""The vector of a row's update is the update: checked against the dense form, which knows nothing of vectors."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from sqsd_filter.directions.adapter_folder import write_adapter
from sqsd_filter.directions.contrast.updates import UpdateModel, UpdateSpace, as_adapter
from sqsd_filter.scoring.adapters import load_adapter, norm
from sqsd_filter.scoring.chat_encoder import Encoded
from sqsd_filter.scoring.pack import PACK_FILE, Pack, load_pack
from sqsd_filter.scoring.reference import ReferenceScorer
from sqsd_filter.scoring.scorer import SQSDScorer
from tests.tiny import CONVERSATIONS, make_adapter, make_model, make_pack


def encoded(pack: Pack) -> list[Encoded]:
    return [row for row in SQSDScorer(pack).encoder.encode(CONVERSATIONS) if isinstance(row, Encoded)]


def vectors_of(pack: Pack) -> tuple[UpdateModel, np.ndarray]:
    model = UpdateModel.load(SQSDScorer(pack))
    return model, np.concatenate([model.project([row]) for row in encoded(pack)])


def with_directions(pack: Path, target: Path, directions: dict[str, np.ndarray], state: str = "initial") -> Pack:
    """A copy of the pack whose probes are these coordinates as directions."""
    shutil.copytree(pack, target)
    space = UpdateSpace(load_adapter(target / state))
    for name, vector in directions.items():
        write_adapter(target / name, *as_adapter(space.factors(vector), 1.0))
    page = json.loads((target / PACK_FILE).read_text())
    page["probes"] = [{"name": name, "weight": 1.0, "direction": name, "state": state} for name in directions]
    (target / PACK_FILE).write_text(json.dumps(page))
    return load_pack(target)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "phi3"])
def test_a_vector_is_the_update_of_its_row(tmp_path: Path, architecture: str) -> None:
    base = make_model(tmp_path / "pack" / "base", architecture)
    pack = load_pack(make_pack(tmp_path / "pack", base))
    model, vectors = vectors_of(pack)
    named = {f"row{k}": vector for k, vector in enumerate(vectors)}
    dense = ReferenceScorer(with_directions(pack.path, tmp_path / "rows", named)).score(CONVERSATIONS)
    cosines = np.stack([dense.probes[name] for name in named], axis=1)
    count = len(model.space.modules)
    assert np.allclose(np.diag(cosines), count, rtol=0, atol=2e-2)  # directions are stored in bfloat16
    assert np.allclose(cosines, vectors @ vectors.T, rtol=0, atol=0.05)
    assert np.ptp(cosines) > 1  # the rows differ by far more than that


def test_vectors_have_length_one_in_every_module_and_sums_of_them_are_directions(
    tmp_path: Path, tiny_pack: Path
) -> None:
    model, vectors = vectors_of(load_pack(tiny_pack))
    assert vectors.shape == (len(CONVERSATIONS), model.space.width)
    for space in model.space.modules.values():
        assert np.allclose(np.linalg.norm(vectors[:, space.where], axis=1), 1, atol=1e-5)
    weights = np.random.default_rng(0).normal(size=len(vectors))
    combined = (weights @ vectors).astype(np.float32)
    scored = SQSDScorer(with_directions(tiny_pack, tmp_path / "pack", {"combined": combined})).score(CONVERSATIONS)
    expected = [
        sum(
            float(v[s.where] @ combined[s.where] / np.linalg.norm(combined[s.where]))
            for s in model.space.modules.values()
        )
        for v in vectors
    ]
    assert np.allclose(scored.risk, expected, rtol=0, atol=0.03)


def test_a_row_has_the_same_vector_among_others(tiny_pack: Path) -> None:
    pack = load_pack(tiny_pack)
    model, alone = vectors_of(pack)
    assert np.allclose(model.project(encoded(pack)), alone, rtol=0, atol=1e-5)


def test_a_fresh_state_has_updates_of_B_alone(tmp_path: Path) -> None:
    base = make_model(tmp_path / "pack" / "base")
    pack = load_pack(make_pack(tmp_path / "pack", base))
    make_adapter(base, pack.path / "initial", r=6, fresh=True)
    model, vectors = vectors_of(load_pack(pack.path))
    named = {f"row{k}": vector for k, vector in enumerate(vectors)}
    dense = ReferenceScorer(with_directions(pack.path, tmp_path / "rows", named)).score(CONVERSATIONS)
    assert np.allclose([dense.probes[n][k] for k, n in enumerate(named)], len(model.space.modules), rtol=0, atol=2e-2)


def test_an_adapter_has_the_norm_that_was_asked_for(tmp_path: Path, tiny_pack: Path) -> None:
    model, vectors = vectors_of(load_pack(tiny_pack))
    write_adapter(tmp_path / "direction", *as_adapter(model.space.factors(vectors[0]), 3.0))
    whole = np.hypot.reduce([norm(each) for each in load_adapter(tmp_path / "direction").factors.values()])
    assert whole == pytest.approx(3.0, rel=1e-2)
