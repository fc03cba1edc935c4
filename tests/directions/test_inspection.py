"""`pack inspect`: norms and cosines as the dense matrices have them, and every flag where it belongs."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sqsd_filter.cli.main import main
from sqsd_filter.directions.flags import flags
from sqsd_filter.directions.inspection import inspect_pack
from sqsd_filter.errors import PackError
from sqsd_filter.scoring.adapters import load_adapter
from sqsd_filter.scoring.pack import ADAPTER_FILES, PACK_FILE, load_pack
from tests.tiny import make_adapter, make_pack

TRAINED = {"data": {"file": "a.jsonl"}, "licence": "CC0-1.0", "rows": 16, "steps": 2}


@pytest.fixture
def folder(tiny_pack: Path, tmp_path: Path) -> Path:
    """A pack with nothing to complain of."""
    copy = shutil.copytree(tiny_pack, tmp_path / "pack", ignore=shutil.ignore_patterns("base"))
    rewrite(copy, provenance=dict.fromkeys(("danger", "initial", "safety"), TRAINED))
    steered(danger=True, safety=True)(copy)
    return copy


def steered(**found: bool | None) -> Callable[[Path], None]:
    directions = [{"adapter": name, "steers": steers} for name, steers in found.items()]

    def change(folder: Path) -> None:
        on = {"pack": load_pack(folder).fingerprint}
        rewrite(folder, validation={"steering": {"settings": on, "directions": directions}})

    return change


def rewrite(folder: Path, **fields: Any) -> None:
    data = json.loads((folder / PACK_FILE).read_text())
    (folder / PACK_FILE).write_text(json.dumps(data | fields))


def reprobe(folder: Path, number: int, **fields: Any) -> None:
    probes = json.loads((folder / PACK_FILE).read_text())["probes"]
    probes[number] |= fields
    rewrite(folder, probes=probes)


def retensor(adapter: Path, change: Callable[[str, torch.Tensor], torch.Tensor]) -> None:
    tensors = load_file(adapter / ADAPTER_FILES[1])
    save_file({name: change(name, tensor) for name, tensor in tensors.items()}, adapter / ADAPTER_FILES[1])


def dense(adapter: Path, scaling: float | None = None) -> dict[str, torch.Tensor]:
    factors = load_adapter(adapter).with_scaling(scaling).factors
    return {m: f.scaling * (f.B.double() @ f.A.double()) for m, f in factors.items()}


def cosine(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> dict[str, float]:
    """The figures of two adapters, from their matrices written out."""
    common = [m for m in a if m in b]
    each = [float(torch.cosine_similarity(a[m].flatten(), b[m].flatten(), 0)) for m in common]
    whole = [torch.cat([v[m].flatten() for m in common]) for v in (a, b)]
    overall = float(torch.cosine_similarity(whole[0], whole[1], 0))
    return {"global": overall, "sum": sum(each), "mean": sum(each) / len(each)}


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "phi3"])
def test_norms_and_cosines_are_those_of_the_dense_matrices(packs: dict[str, Path], architecture: str) -> None:
    folder = packs[architecture]
    report = inspect_pack(load_pack(folder))
    V = {name: dense(folder / name) for name in ("danger", "initial", "safety")}
    for name, matrices in V.items():
        found = report["adapters"][name]
        assert found["norms"] == pytest.approx({m: float(v.norm()) for m, v in matrices.items()})
        assert found["norm"] == pytest.approx(math.sqrt(sum(float(v.norm()) ** 2 for v in matrices.values())))
    (pair,) = report["cosines"]
    assert pair.pop("directions") == ["danger", "safety"]
    assert pair.pop("modules") == len(V["danger"])
    assert pair == pytest.approx(cosine(V["danger"], V["safety"]))
    danger, safety = (probe["cosine_to_state"] for probe in report["probes"])
    assert danger == pytest.approx(cosine(V["danger"], V["initial"]))
    assert safety["global"] == pytest.approx(1)
    assert safety["mean"] == pytest.approx(1)


def test_only_common_modules_count_and_a_states_scaling_is_the_probes(folder: Path, tiny_pack: Path) -> None:
    patterns: dict[str, Any] = {"target_modules": ["q_proj", "up_proj"], "alpha_pattern": {"up_proj": 160}}
    make_adapter(tiny_pack / "base", folder / "initial", alpha=16, **patterns)
    for scaling in (None, 1.0):
        reprobe(folder, 0, state_scaling=scaling)
        probe = inspect_pack(load_pack(folder))["probes"][0]
        assert probe["modules"] == {"direction": 14, "state": 4, "common": 4}
        assert probe["cosine_to_state"] == pytest.approx(
            cosine(dense(folder / "danger"), dense(folder / "initial", scaling))
        )


def test_norms_are_summed_up_by_type_and_layer(folder: Path) -> None:
    found = inspect_pack(load_pack(folder))["adapters"]["danger"]
    assert (found["modules"], found["layers"], found["rank"], found["scaling"]) == (14, 2, [4], [4.0])
    q = [found["norms"][f"model.layers.{layer}.self_attn.q_proj"] for layer in (0, 1)]
    expected = {"modules": 2, "min": min(q), "median": pytest.approx(sum(q) / 2), "max": max(q)}
    assert found["by_type"]["self_attn.q_proj"] == expected
    assert len(found["by_type"]) == 7
    first = sorted(n for m, n in found["norms"].items() if m.startswith("model.layers.0."))
    assert found["by_layer"][0] == {"modules": 7, "min": first[0], "median": first[3], "max": first[6]}
    assert found["bytes"] == sum((folder / "danger" / file).stat().st_size for file in ADAPTER_FILES)


def test_a_pack_in_order_has_no_flags_and_says_where_it_comes_from(folder: Path) -> None:
    report = inspect_pack(load_pack(folder))
    assert report["flags"] == []
    assert not report["shared_state"]
    assert report["states"] == [
        {"adapter": "initial", "scaling": None, "probes": ["danger"]},
        {"adapter": "safety", "scaling": 1.0, "probes": ["safety"]},
    ]
    assert report["adapters"]["initial"]["provenance"] == TRAINED
    assert report["fingerprint"] == load_pack(folder).fingerprint
    assert report["validation"]["steering"]
    assert [probe["steers"] for probe in report["probes"]] == [True, True]


def zero(name: str, tensor: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(tensor) if "lora_B" in name else tensor


def broken(name: str, tensor: torch.Tensor) -> torch.Tensor:
    return tensor.fill_(math.nan) if "layers.0.mlp.up_proj.lora_A" in name else tensor


def nearly(folder: Path) -> None:
    """Makes safety danger's opposite, but for a little noise."""
    shutil.rmtree(folder / "safety")
    shutil.copytree(folder / "danger", folder / "safety")
    noise = torch.Generator().manual_seed(0)
    retensor(
        folder / "safety",
        lambda n, t: t * (-1 if "lora_B" in n else 1) + torch.randn(t.shape, generator=noise) * 0.01,
    )


def elsewhere(folder: Path) -> None:
    """Leaves danger the q_proj, and its state the others."""
    for adapter, keep in (("danger", True), ("initial", False)):
        tensors = load_file(folder / adapter / ADAPTER_FILES[1])
        kept = {n: t for n, t in tensors.items() if ("q_proj" in n) is keep}
        save_file(kept, folder / adapter / ADAPTER_FILES[1])


FLAGS: dict[str, tuple[Callable[[Path], object], list[tuple[str, str]]]] = {
    "never-steered": (lambda f: rewrite(f, validation={}), [("not-steered", "danger"), ("not-steered", "safety")]),
    "odd-validation": (lambda f: rewrite(f, validation=7), [("not-steered", "danger"), ("not-steered", "safety")]),
    "not-judged": (steered(danger=None, safety=True), [("not-steered", "danger")]),
    "does-not-steer": (steered(danger=False, safety=True), [("does-not-steer", "danger")]),
    "fresh-state": (lambda f: retensor(f / "initial", zero), [("insensitive-state", "initial")]),
    "zero-direction": (lambda f: retensor(f / "danger", zero), [("zero-direction", "danger")]),
    "nan": (lambda f: retensor(f / "danger", broken), [("not-finite", "danger")]),
    "negative-danger": (lambda f: reprobe(f, 0, weight=-1), [("unusual-weight", "danger")]),
    "positive-safety": (lambda f: reprobe(f, 1, weight=1), [("unusual-weight", "safety")]),
    "no-weight": (lambda f: reprobe(f, 0, weight=0), [("unusual-weight", "danger")]),
    "parallel": (nearly, [("parallel-directions", "danger, safety")]),
    "apart": (elsewhere, [("no-overlap", "danger")]),
    "no-licence": (
        lambda f: rewrite(f, provenance={"danger": TRAINED, "initial": {**TRAINED, "licence": None}}),
        [("no-licence", "initial"), ("no-licence", "safety")],
    ),
    "no-provenance": (
        lambda f: rewrite(f, provenance=[]),
        [("no-licence", n) for n in ("danger", "initial", "safety")],
    ),
    "no-folder": (lambda f: rewrite(f, base_model="./nowhere"), [("no-base-weights", "./nowhere")]),
    "not-from-the-hub": (lambda f: rewrite(f, base_model="org/model"), [("no-base-weights", "org/model")]),
    "not-fetched": (
        lambda f: rewrite(f, base_model="smollm2-135m-instruct"),
        [("no-base-weights", "smollm2-135m-instruct")],
    ),
}


@pytest.mark.parametrize(("change", "expected"), FLAGS.values(), ids=FLAGS)
def test_what_is_wrong_is_flagged_and_nothing_else(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], object], expected: list[Any]
) -> None:
    monkeypatch.setenv("SQSD_FILTER_CACHE", str(tmp_path / "cache"))
    before = load_pack(folder).fingerprint
    change(folder)
    pack = load_pack(folder)
    if pack.fingerprint != before:
        steered(danger=True, safety=True)(folder)
    found = inspect_pack(load_pack(folder))["flags"]
    assert [(flag["code"], flag["about"]) for flag in found] == expected
    for flag in found:
        assert flag["message"].endswith(".")
        assert all(name in flag["message"] for name in flag["about"].split(", "))


def test_verdicts_on_what_the_pack_was_before_are_outdated(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    retensor(folder / "initial", lambda _, tensor: tensor * 2)
    report = inspect_pack(load_pack(folder))
    assert [(f["code"], f["about"]) for f in report["flags"]] == [
        ("steering-outdated", "danger"),
        ("steering-outdated", "safety"),
    ]
    assert [(p["steers"], p["steering_outdated"]) for p in report["probes"]] == [(None, True)] * 2
    lines = [x.split() for x in run(capsys, str(folder))[1].splitlines()]
    assert [line[-1] for line in lines if line[:2] in (["danger", "+1"], ["safety", "-1"])] == ["outdated"] * 2


@pytest.mark.parametrize(
    ("data", "shown"),
    [
        ({"files": [{"path": "b.jsonl", "rows": 3}]}, "b.jsonl"),
        ({"files": [{"path": "b.jsonl"}, {"path": "c.jsonl"}, {"path": "d.jsonl"}]}, "b.jsonl and 2 more"),
        (
            {"files": [{"path": "x"}], "dataset": {"id": "org/set", "revision": "0123456789abcdef"}},
            "org/set@0123456789ab",
        ),
        ({"files": [{"path": "x"}], "dataset": {"id": "org/set", "revision": None}}, "org/set"),
        ("BeaverTails, unsafe rows", "BeaverTails, unsafe rows"),
    ],
    ids=["file", "files", "dataset", "no-revision", "text"],
)
def test_what_an_adapter_was_trained_on_is_named(
    data: Any, shown: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rewrite(folder, provenance={"danger": {**TRAINED, "data": data}})
    assert f"\ndanger   {shown}, 16 rows, 2 steps  " in run(capsys, str(folder))[1]


@pytest.mark.parametrize(("value", "flagged"), [(0.951, True), (-0.951, True), (0.949, False), (None, False)])
def test_directions_are_nearly_parallel_from_a_cosine_of_095(value: float | None, flagged: bool, folder: Path) -> None:
    report = inspect_pack(load_pack(folder))
    report["cosines"][0]["global"] = value
    assert [f["code"] for f in flags(report)] == ["parallel-directions"] * flagged


def test_a_direction_is_flagged_once_however_many_probes_use_it(folder: Path) -> None:
    probes = json.loads((folder / PACK_FILE).read_text())["probes"]
    rewrite(folder, probes=[probes[0], {**probes[0], "name": "again", "weight": -1.0}], validation={})
    report = inspect_pack(load_pack(folder))
    assert report["shared_state"]
    assert report["states"][0]["probes"] == ["danger", "again"]
    assert report["cosines"] == []
    assert [(f["code"], f["about"]) for f in report["flags"]] == [("not-steered", "danger")]


def test_a_base_adapter_is_inspected_too(tmp_path: Path, tiny_pack: Path) -> None:
    report = inspect_pack(load_pack(make_pack(tmp_path / "pack", tiny_pack / "base", aligned=True)))
    assert report["base"]["adapter"] == "aligned"
    assert report["adapters"]["aligned"]["roles"] == ["base"]
    assert report["adapters"]["safety"]["roles"] == ["direction", "state"]


def test_adapters_of_different_models_are_one_sentence(folder: Path) -> None:
    retensor(folder / "danger", lambda n, t: torch.cat([t, t], 1) if "q_proj.lora_A" in n else t)
    with pytest.raises(PackError, match="belong to different models"):
        inspect_pack(load_pack(folder))


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as left:
        main(["pack", "inspect", *arguments])
    return (int(left.value.code or 0), *capsys.readouterr())


def strict(constant: str) -> None:
    raise AssertionError(f"{constant} is no JSON")


def test_json_is_one_object_even_where_numbers_are_not_finite(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    retensor(folder / "danger", broken)
    code, out, err = run(capsys, str(folder), "--json")
    report = json.loads(out, parse_constant=strict)
    assert (code, err) == (0, "")
    assert report["adapters"]["danger"]["norm"] is None
    assert report["cosines"][0]["global"] is None
    assert report["adapters"]["danger"]["norms"]["model.layers.0.mlp.up_proj"] is None
    assert report["adapters"]["danger"]["not_finite"] == ["model.layers.0.mlp.up_proj"]
    assert run(capsys, str(folder))[0] == 0


def test_the_text_has_what_there_is_and_every_norm_only_if_asked(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rewrite(folder, base_model="org/model", base_revision="abc")
    steered(danger=True, safety=True)(folder)
    code, out, _ = run(capsys, str(folder))
    report = inspect_pack(load_pack(folder))
    flag = report["flags"][0]
    for text in (report["fingerprint"], "org/model at abc", "a.jsonl, 16 rows, 2 steps", "CC0-1.0", "self_attn.q_proj"):
        assert text in out
    assert code == 0
    assert out.endswith(f"! no-base-weights: {flag['message']}\n")
    assert "model.layers.1.mlp.down_proj" not in out
    value = report["adapters"]["safety"]["norms"]["model.layers.1.mlp.down_proj"]
    (line,) = [x for x in run(capsys, str(folder), "--modules")[1].splitlines() if "layers.1.mlp.down_proj" in x]
    assert line.split()[-1] == f"{value:.6f}"


def test_a_pack_that_is_not_there_is_a_failure(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "./nowhere")
    assert code == 1
    assert out == ""
    assert err.startswith("Error: There is no pack './nowhere'")


def test_the_embedded_pack_is_what_its_recipe_says(capsys: pytest.CaptureFixture[str]) -> None:
    report = json.loads(run(capsys, "smollm2-135m", "--json")[1])
    assert {name: (a["rank"], a["modules"], a["layers"]) for name, a in report["adapters"].items()} == dict.fromkeys(
        ("aligned", "danger", "initial", "safety"), ([8], 210, 30)
    )
    assert report["base"]["adapter"] == "aligned"
    assert all(p["modules"]["common"] == 210 for p in report["probes"])
    assert {f["code"] for f in report["flags"]} <= {"no-base-weights"}
