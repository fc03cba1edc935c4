"""Drift is what the textbook says, for every kind of checkpoint, or one clear sentence."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from sqsd_filter.directions.checkpoints import difference, find_checkpoints
from sqsd_filter.directions.drift import Drift, inner, length, load_directions, measure_drift
from sqsd_filter.errors import InputError, ModelError, PackError, SQSDError
from sqsd_filter.scoring.adapters import LoraFactors
from sqsd_filter.scoring.pack import load_pack
from tests.directions.runs import Matrices, full_run, lora_run, minus, multiplied, stored, textbook
from tests.tiny import ARCHITECTURES, make_adapter, make_model, make_pack

TOTALS = ("projection", "cosine", "cosine_sum", "norm")


def compare(drift: Drift, pack: Path, expected: Mapping[int, Matrices]) -> None:
    """Is the drift at each step what the dense change there gives along the pack's directions?"""
    assert [point.step for point in drift.points] == [0, *expected]
    for point in drift.points[1:]:
        for name, along in point.along.items():
            direction = multiplied(pack / name)
            truth = textbook(expected[point.step], direction)
            assert along.totals() == pytest.approx({key: truth[key] for key in TOTALS}, rel=1e-6, abs=1e-12)
            assert along.modules == tuple(sorted(direction))
            assert along.cosines_m == pytest.approx([truth[module] for module in along.modules], rel=1e-6, abs=1e-12)
            assert along.projections_m.sum() == pytest.approx(truth["projection"], rel=1e-6)
        totals = {name: along.totals()["projection"] for name, along in point.along.items()}
        assert point.risk_projection == pytest.approx(totals["danger"] - totals["safety"])


# ---------------------------------------------------------------------------------------------- the maths

shapes = st.tuples(*(st.integers(1, 6) for _ in range(5)))


def product(rank: int, d_out: int, d_in: int, scaling: float, seed: int) -> LoraFactors:
    generator = torch.Generator().manual_seed(seed)
    return LoraFactors(
        torch.randn(rank, d_in, generator=generator), torch.randn(d_out, rank, generator=generator), scaling
    )


def dense(factors: LoraFactors | None) -> torch.Tensor:
    return factors.scaling * factors.B.double() @ factors.A.double() if factors else torch.zeros(())


@given(shapes, st.integers(0, 99))
def test_products_are_measured_as_the_matrices_they_stand_for(sizes: tuple[int, ...], seed: int) -> None:
    r, r_direction, r_0, d_out, d_in = sizes
    now, before, V = (product(rank, d_out, d_in, 2.0 - rank, seed + k) for k, rank in enumerate((r, r_0, r_direction)))
    for change in (now, difference(now, before), difference(None, before), difference(now, None)):
        assert change is not None
        matrix = dense(change)
        assert inner(change, V) == pytest.approx(float((matrix * dense(V)).sum()), rel=1e-9, abs=1e-9)
        assert inner(matrix, V) == pytest.approx(inner(change, V), rel=1e-9, abs=1e-9)
        assert length(change) == pytest.approx(float(matrix.norm()), rel=1e-6, abs=1e-6)
    torch.testing.assert_close(dense(difference(now, before)), dense(now) - dense(before))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_the_length_of_what_is_not_finite_is_no_number(value: float) -> None:
    odd = LoraFactors(torch.full((2, 3), value), torch.ones(4, 2), 1.0)
    assert math.isnan(length(odd))
    assert not math.isfinite(length(dense(odd)))


def test_a_small_change_of_a_large_start_keeps_its_digits() -> None:
    before = product(4, 50, 40, 2.0, 0)
    now = LoraFactors(before.A + 1e-5 * product(4, 1, 40, 1.0, 1).A, before.B, 2.0)
    change = difference(now, before)
    assert change is not None
    exactly = 2.0 * before.B.double() @ (now.A.double() - before.A.double())
    assert length(change) == pytest.approx(float(exactly.norm()), rel=1e-12)
    same = difference(before, before)
    assert same is not None
    assert length(same) == 0.0


def test_large_matrices_are_taken_in_blocks_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    V, matrix = product(3, 50, 8, 2.0, 0), torch.randn(50, 8, dtype=torch.float64)
    whole = inner(matrix, V)
    monkeypatch.setattr("sqsd_filter.directions.drift.ROWS", 7)
    assert inner(matrix, V) == pytest.approx(whole, rel=1e-12)


# ---------------------------------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "phi3"])
def test_lora_checkpoints_are_measured_exactly(packs: dict[str, Path], architecture: str, tmp_path: Path) -> None:
    pack = packs[architecture]
    run = lora_run(tmp_path / "run", pack / "base", (100, 20), r=5)
    expected = {step: multiplied(run / f"checkpoint-{step}") for step in (20, 100)}
    compare(measure_drift(run, load_pack(pack)), pack, expected)


@pytest.mark.parametrize("shards", ["1GB", "20KB"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_full_checkpoints_are_measured_exactly(
    packs: dict[str, Path], architecture: str, shards: str, tmp_path: Path
) -> None:
    pack = packs[architecture]
    run = full_run(tmp_path / "run", pack / "base", shards=shards)
    assert (len(list((run / "checkpoint-10").glob("*.safetensors"))) > 1) == (shards == "20KB")
    base = stored(pack / "base")
    expected = {step: minus(stored(run / f"checkpoint-{step}"), base) for step in (10, 20)}
    compare(measure_drift(run, load_pack(pack)), pack, expected)


def test_a_run_on_some_modules_leaves_the_others_where_they_were(tiny_pack: Path, tmp_path: Path) -> None:
    run = lora_run(tmp_path / "run", tiny_pack / "base", (5,), target_modules=["q_proj", "v_proj"])
    drift = measure_drift(run, load_pack(tiny_pack))
    compare(drift, tiny_pack, {5: multiplied(run / "checkpoint-5")})
    along = drift.points[1].along["danger"]
    assert {m.rpartition(".")[2] for m, norm in zip(along.modules, along.norms_m, strict=True) if norm} == {
        "q_proj",
        "v_proj",
    }


def test_the_origin_is_zero(tiny_pack: Path, tmp_path: Path) -> None:
    run = lora_run(tmp_path / "run", tiny_pack / "base")
    origin = measure_drift(run, load_pack(tiny_pack)).points[0]
    assert (origin.step, origin.name, origin.risk_projection) == (0, "start", 0.0)
    assert [along.totals() for along in origin.along.values()] == [dict.fromkeys(TOTALS, 0.0)] * 2


def test_the_direction_itself_has_cosine_one_and_its_length_as_norm(tiny_pack: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_pack / "danger", tmp_path / "run" / "checkpoint-1")
    along = measure_drift(tmp_path / "run", load_pack(tiny_pack)).points[1].along["danger"]
    assert along.cosines_m == pytest.approx(np.ones(len(along.modules)))
    assert along.totals()["cosine"] == pytest.approx(1.0)
    assert along.projections_m == pytest.approx(along.lengths_m)


def test_a_run_that_went_on_from_an_adapter_counts_from_there(tiny_pack: Path, tmp_path: Path) -> None:
    base = tiny_pack / "base"
    start = make_adapter(base, tmp_path / "start", r=3, alpha=9, seed=7)
    run = lora_run(tmp_path / "run", base, r=5)
    shutil.copytree(start, run / "checkpoint-1")
    drift = measure_drift(run, load_pack(tiny_pack), base=str(start))
    assert drift.report()["started_from"] == str(start)
    changes = {step: minus(multiplied(run / f"checkpoint-{step}"), multiplied(start)) for step in (1, 10, 20)}
    compare(drift, tiny_pack, changes)
    assert drift.points[1].along["danger"].totals() == dict.fromkeys(TOTALS, 0.0)


def test_full_checkpoints_count_from_the_packs_base_adapter(tmp_path: Path) -> None:
    pack = make_pack(tmp_path / "pack", architecture="gpt2", aligned=True)
    run, base = full_run(tmp_path / "run", pack / "base", (10,)), stored(pack / "base")
    moved = minus(stored(run / "checkpoint-10"), base)
    compare(measure_drift(run, load_pack(pack)), pack, {10: minus(moved, multiplied(pack / "aligned"))})
    start = make_adapter(pack / "base", tmp_path / "start", seed=9)
    both = minus(minus(moved, multiplied(pack / "aligned")), multiplied(start))
    compare(measure_drift(run, load_pack(pack), base=str(start)), pack, {10: both})
    # of another model nothing is known but its weights
    compare(measure_drift(run, load_pack(pack), base=str(pack / "base")), pack, {10: moved})


def test_weights_are_found_whatever_prefix_a_trainer_gave_their_names(tiny_pack: Path, tmp_path: Path) -> None:
    run = full_run(tmp_path / "run", tiny_pack / "base", (10,))
    expected = {10: minus(stored(run / "checkpoint-10"), stored(tiny_pack / "base"))}
    weights = run / "checkpoint-10" / "model.safetensors"
    tensors = load_file(weights)
    for rename in (lambda key: f"module.{key}", lambda key: key.removeprefix("model.")):
        save_file({rename(key): tensor for key, tensor in tensors.items()}, weights)
        compare(measure_drift(run, load_pack(tiny_pack)), tiny_pack, expected)


def test_half_precision_checkpoints_are_compared_without_further_rounding(tiny_pack: Path, tmp_path: Path) -> None:
    run = full_run(tmp_path / "run", tiny_pack / "base", (10,))
    weights = run / "checkpoint-10" / "model.safetensors"
    save_file({key: tensor.bfloat16() for key, tensor in load_file(weights).items()}, weights)
    expected = {10: minus(stored(run / "checkpoint-10"), stored(tiny_pack / "base"))}
    compare(measure_drift(run, load_pack(tiny_pack)), tiny_pack, expected)


def test_probes_that_share_a_direction_are_one_with_both_weights(tiny_pack: Path, tmp_path: Path) -> None:
    pack = shutil.copytree(tiny_pack, tmp_path / "pack")
    settings = json.loads((pack / "pack.json").read_text())
    settings["probes"].append({"name": "again", "weight": 0.5, "direction": "danger", "state": "safety"})
    (pack / "pack.json").write_text(json.dumps(settings))
    assert [(d.name, d.weight) for d in load_directions(load_pack(pack))] == [("danger", 1.5), ("safety", -1.0)]


# ---------------------------------------------------------------------------------------------- which there are


def found(run: Path) -> list[tuple[int, str]]:
    return [(c.step, c.folder.name) for c in find_checkpoints(run)]


def write_state(folder: Path, step: int, most: int) -> None:
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": step, "max_steps": most}))


def test_the_final_model_counts_where_its_step_is_known_and_new(
    tiny_pack: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = lora_run(tmp_path / "run", tiny_pack / "base", (9, 100))
    make_adapter(tiny_pack / "base", run)
    write_state(run / "checkpoint-100", 100, 120)
    assert found(run) == [(9, "checkpoint-9"), (100, "checkpoint-100")]
    assert "is left out: no trainer_state.json" in caplog.text
    caplog.clear()
    write_state(run / "checkpoint-100", 100, 100)  # then the final model is the same
    assert found(run) == [(9, "checkpoint-9"), (100, "checkpoint-100")]
    write_state(run, 100, 100)
    assert found(run) == [(9, "checkpoint-9"), (100, "checkpoint-100")]
    write_state(run, 120, 120)
    assert found(run) == [(9, "checkpoint-9"), (100, "checkpoint-100"), (120, "run")]
    assert caplog.text == ""
    shutil.rmtree(run / "checkpoint-9")
    shutil.rmtree(run / "checkpoint-100")
    assert found(run) == [(120, "run")]


def test_what_is_no_checkpoint_is_passed_over(
    tiny_pack: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = lora_run(tmp_path / "run", tiny_pack / "base", (0, 3))
    (run / "checkpoint-best").mkdir()
    (run / "checkpoint-5").write_text("no folder")
    (run / "checkpoint-7").mkdir()  # of a trainer that was killed while it saved
    (run / "checkpoint-7" / "pytorch_model.bin").write_bytes(b"pickled")
    assert found(run) == [(3, "checkpoint-3")]
    assert [record.getMessage() for record in caplog.records] == [
        f"{run / 'checkpoint-7'} is left out: it has no weights in safetensors"
    ]


@pytest.mark.parametrize(
    ("named", "warned"),
    [
        ("org/other-7b", True),
        ("org/Tiny-Base", False),
        ("/cache/models--org--tiny-base/snapshots/12ab", False),
        ("unsloth/tiny-base-bnb-4bit", False),
        (None, False),
    ],
)
def test_a_run_on_clearly_another_base_model_is_warned_of(
    named: str | None, warned: bool, tiny_pack: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = lora_run(tmp_path / "run", tiny_pack / "base")
    for config in run.glob("*/adapter_config.json"):
        config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": named}))
    base = tmp_path / "tiny-base"
    base.symlink_to(tiny_pack / "base")
    measure_drift(run, load_pack(tiny_pack), base=str(base))
    expected = [f"the run was trained on '{named}', but the directions belong to '{base}'"] * warned
    assert [record.getMessage() for record in caplog.records] == expected


# ---------------------------------------------------------------------------------------------- errors


def fails(run: Path, pack: Path, kind: type[SQSDError], base: str | None = None) -> str:
    with pytest.raises(kind) as problem:
        measure_drift(run, load_pack(pack), base=base)
    assert str(problem.value).endswith(".")
    return str(problem.value)


def test_a_run_without_checkpoints_says_what_is_looked_for(tiny_pack: Path, tmp_path: Path) -> None:
    assert "is not a folder" in fails(tmp_path / "none", tiny_pack, InputError)
    assert "has no folder checkpoint-<step> with adapter_model.safetensors" in fails(tmp_path, tiny_pack, InputError)


def test_a_run_of_another_architecture_is_refused(packs: dict[str, Path], tmp_path: Path) -> None:
    pack = packs["llama"]
    lora = lora_run(tmp_path / "lora", packs["gpt2"] / "base", (1,), fan_in_fan_out=True)
    assert "trains no module of the pack ('model.layers.0." in fails(lora, pack, PackError)
    full = full_run(tmp_path / "full", packs["gpt2"] / "base", (1,))
    said = fails(full, pack, InputError)
    assert "checkpoint-1 has no weight for 'model.layers.0.mlp.down_proj': it has another architecture" in said
    said = fails(full, pack, PackError, base=str(packs["gpt2"] / "base"))
    assert f"'{packs['gpt2'] / 'base'}' has no module 'model.layers.0.mlp.down_proj'" in said


def test_a_run_of_another_size_is_refused(tiny_pack: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ARCHITECTURES, "wide", {**ARCHITECTURES["llama"], "hidden_size": 64})
    wide = make_model(tmp_path / "wide", "wide")
    lora = lora_run(tmp_path / "lora", wide, (1,))
    assert "in the run and (32, 48) in the pack: the pack belongs to another model" in fails(lora, tiny_pack, PackError)
    full = full_run(tmp_path / "full", wide, (1,))
    assert "in the base model" in fails(full, tiny_pack, InputError)
    assert "(32, 48) in the pack" in fails(full, tiny_pack, PackError, base=str(wide))
    start = str(make_adapter(wide, tmp_path / "start"))
    run = lora_run(tmp_path / "run", tiny_pack / "base", (1,))
    assert "have different shapes: name the right one" in fails(run, tiny_pack, PackError, base=start)
    full = full_run(tmp_path / "again", tiny_pack / "base", (1,))
    assert "has different shapes in the base model" in fails(full, tiny_pack, PackError, base=start)


def test_damaged_checkpoints_are_named(tiny_pack: Path, tmp_path: Path) -> None:
    run = full_run(tmp_path / "run", tiny_pack / "base", (1,), shards="20KB")
    index = run / "checkpoint-1" / "model.safetensors.index.json"
    text = index.read_text()
    index.write_text("[]")
    assert "is not an index of safetensors files" in fails(run, tiny_pack, InputError)
    index.write_text(text)
    for shard in (run / "checkpoint-1").glob("*.safetensors"):
        shard.write_bytes(shard.read_bytes()[:-40])
    assert "safetensors can't be read" in fails(run, tiny_pack, InputError)
    for shard in (run / "checkpoint-1").glob("*.safetensors"):
        shard.unlink()
    assert "No such file" in fails(run, tiny_pack, InputError)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn], ids=str)
def test_quantised_weights_are_refused(tiny_pack: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    run = full_run(tmp_path / "run", tiny_pack / "base", (1,))
    file = run / "checkpoint-1" / "model.safetensors"
    save_file({name: tensor.to(dtype) for name, tensor in load_file(file).items()}, file)
    assert f"is quantised ({dtype})" in fails(run, tiny_pack, InputError)


def test_one_file_is_taken_before_an_index(tiny_pack: Path, tmp_path: Path) -> None:
    """As `from_pretrained` does; an index may be left over from an earlier saving."""
    run = full_run(tmp_path / "run", tiny_pack / "base", (1,))
    expected = measure_drift(run, load_pack(tiny_pack)).report()
    (run / "checkpoint-1" / "model.safetensors.index.json").write_text("[]")
    assert measure_drift(run, load_pack(tiny_pack)).report() == expected


@pytest.mark.parametrize("text", ["{", "[]", ""])
def test_a_damaged_adapter_is_named(tiny_pack: Path, tmp_path: Path, text: str) -> None:
    run = lora_run(tmp_path / "run", tiny_pack / "base", (1,))
    (run / "checkpoint-1" / "adapter_config.json").write_text(text)
    assert "checkpoint-1/adapter_config.json" in fails(run, tiny_pack, PackError)


@pytest.mark.parametrize("kind", [lora_run, full_run])
def test_a_start_that_is_nowhere_is_named(kind: Callable[..., Path], tiny_pack: Path, tmp_path: Path) -> None:
    run = kind(tmp_path / "run", tiny_pack / "base", (1,))
    assert "'org/none' can't be loaded" in fails(run, tiny_pack, ModelError, base="org/none")
    assert "can't be loaded" in fails(run, tiny_pack, ModelError, base=str(run))
