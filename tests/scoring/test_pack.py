"""Packs: what is one, what is not and why, and what its fingerprint speaks of."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sqsd_filter.errors import PackError
from sqsd_filter.scoring import pack as pack_module
from sqsd_filter.scoring.pack import PACK_FILE, Probe, load_pack

DANGER = {"name": "danger", "weight": 1.0, "direction": "danger", "state": "initial", "state_scaling": None}
SAFETY = {"name": "safety", "weight": -1.0, "direction": "safety", "state": "safety", "state_scaling": 1.0}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A pack whose adapters are only there by name: nothing in this file reads their weights."""
    for name in ("danger", "initial", "safety"):
        (tmp_path / "pack" / name).mkdir(parents=True)
        for file in pack_module.ADAPTER_FILES:
            (tmp_path / "pack" / name / file).write_text(f"{name} {file}")
    write(tmp_path / "pack")
    return tmp_path / "pack"


def write(folder: Path, *without: str, **fields: Any) -> None:
    data = {"format": 1, "name": "tiny", "base_model": "org/model", "probes": [DANGER, SAFETY], **fields}
    (folder / PACK_FILE).write_text(json.dumps({k: v for k, v in data.items() if k not in without}))


def test_a_pack_is_loaded_from_its_folder(folder: Path) -> None:
    write(folder, max_length=512, chat_template_kwargs={"enable_thinking": False}, provenance={"danger": "d"})
    pack = load_pack(folder)
    assert (pack.name, pack.base_model, pack.base_revision, pack.max_length) == ("tiny", "org/model", None, 512)
    assert pack.chat_template_kwargs == {"enable_thinking": False}
    assert pack.probes == (Probe("danger", 1.0, "danger", "initial"), Probe("safety", -1.0, "safety", "safety", 1.0))
    assert pack.adapters == ["danger", "initial", "safety"]
    assert pack.adapter("danger") == folder / "danger"
    assert pack.notes == {"provenance": {"danger": "d"}}


def test_probes_that_share_state_and_scaling_share_a_pass(folder: Path) -> None:
    write(folder, probes=[DANGER, {**DANGER, "name": "other", "direction": "safety"}, SAFETY])
    first, second, third = load_pack(folder).probes
    assert first.at == second.at != third.at


def test_an_embedded_pack_is_loaded_by_its_name(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pack_module, "PACKS_DIR", folder.parent)
    assert pack_module.embedded_packs() == ["pack"]
    assert load_pack("pack").path == folder


@pytest.mark.parametrize("where", ["nothing-of-the-kind", "./nowhere", "../nowhere", "a/b/c", "/no/where", ""])
def test_an_unknown_name_or_folder_says_what_there_is(
    where: str, folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(pack_module, "PACKS_DIR", folder.parent)
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    with pytest.raises(PackError, match=r"pack\.json") as problem:
        load_pack(where)
    if where:
        assert f"no pack '{where}': give one of pack, a folder" in str(problem.value)


@pytest.mark.parametrize("where", ["org/no-such-pack", "org/no--such..pack", "org/pack@v1"])
def test_a_pack_that_the_hub_cannot_give_is_one_sentence(where: str) -> None:
    with pytest.raises(PackError, match="can't be fetched from the Hub") as problem:
        load_pack(where)
    assert where in str(problem.value)
    assert "\n" not in str(problem.value)


BROKEN: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {  # what is done to it, what the error names
    "no-page": (lambda f: (f / PACK_FILE).unlink(), ("is not a pack", PACK_FILE)),
    "broken-json": (lambda f: (f / PACK_FILE).write_text('{"format": 1,'), ("can't be read as JSON",)),
    "not-text": (lambda f: (f / PACK_FILE).write_bytes(b"\xff\xfe"), ("can't be read as JSON",)),
    "not-an-object": (lambda f: (f / PACK_FILE).write_text("[]"), ("must hold a JSON object",)),
    "later-format": (lambda f: write(f, format=2), ("format 2", "reads format 1")),
    "no-format": (lambda f: write(f, "format"), ("format None",)),
    "no-name": (lambda f: write(f, "name"), ("lacks 'name'",)),
    "no-base-model": (lambda f: write(f, "base_model"), ("lacks 'base_model'",)),
    "base-model-number": (lambda f: write(f, base_model=7), ("'base_model'", "str", "7")),
    "max-length-text": (lambda f: write(f, max_length="long"), ("'max_length'", "int", "'long'")),
    "max-length-true": (lambda f: write(f, max_length=True), ("'max_length'", "int")),
    "max-length-one": (lambda f: write(f, max_length=1), ("at least 2",)),
    "kwargs-list": (lambda f: write(f, chat_template_kwargs=[]), ("'chat_template_kwargs'", "dict")),
    "no-probes": (lambda f: write(f, probes=[]), ("needs a list of probes",)),
    "probes-object": (lambda f: write(f, probes={"danger": DANGER}), ("needs a list of probes",)),
    "probe-text": (lambda f: write(f, probes=["danger"]), ("must be an object", "'danger'")),
    "probe-without-state": (
        lambda f: write(f, probes=[{k: v for k, v in DANGER.items() if k != "state"}]),
        ("lacks 'state'",),
    ),
    "weight-text": (lambda f: write(f, probes=[{**DANGER, "weight": "1"}]), ("'weight'", "float")),
    "weight-nan": (lambda f: write(f, probes=[{**DANGER, "weight": float("nan")}]), ("'weight'", "nan")),
    "scaling-text": (lambda f: write(f, probes=[{**DANGER, "state_scaling": "own"}]), ("'state_scaling'", "'own'")),
    "two-probes-of-a-name": (lambda f: write(f, probes=[DANGER, {**SAFETY, "name": "danger"}]), ("twice", "danger")),
    "missing-adapter": (lambda f: shutil.rmtree(f / "initial"), ("'initial'", "adapter_config.json", "missing")),
    "missing-weights": (
        lambda f: (f / "safety" / "adapter_model.safetensors").unlink(),
        ("'safety'", "adapter_model.safetensors", "missing"),
    ),
}


@pytest.mark.parametrize(("breaks", "named"), BROKEN.values(), ids=BROKEN)
def test_what_is_not_a_valid_pack_says_why(
    folder: Path, breaks: Callable[[Path], object], named: tuple[str, ...]
) -> None:
    breaks(folder)
    with pytest.raises(PackError) as problem:
        load_pack(folder)
    for text in named:
        assert text in str(problem.value)
    assert str(folder) in str(problem.value)


@pytest.mark.parametrize(
    "name", ["", "Danger", "2nd", "a-b", "a b", "risk", "status", "percentile", "weight", "danger\n", "é"]
)
def test_a_probe_name_must_make_a_column(folder: Path, name: str) -> None:
    write(folder, probes=[{**DANGER, "name": name}])
    with pytest.raises(PackError, match=r"can't be a probe's name|text that can be printed"):
        load_pack(folder)


@pytest.mark.parametrize("key", ["direction", "state"])
@pytest.mark.parametrize("place", ["../outside", "danger/../../outside", "/etc"])
def test_an_adapter_outside_the_pack_is_refused_even_if_it_is_there(folder: Path, place: str, key: str) -> None:
    shutil.copytree(folder / "danger", folder.parent / "outside")
    write(folder, probes=[{**DANGER, key: place}])
    with pytest.raises(PackError, match="must be a folder inside the pack"):
        load_pack(folder)


# ---------------------------------------------------------------------------------------------- fingerprint


def probes(**changes: Any) -> list[dict[str, Any]]:
    return [{**DANGER, **changes}, SAFETY]


COUNTS: dict[str, Callable[[Path], object]] = {
    "base-model": lambda f: write(f, base_model="org/another"),
    "base-revision": lambda f: write(f, base_revision="abc"),
    "template-settings": lambda f: write(f, chat_template_kwargs={"enable_thinking": False}),
    "weight": lambda f: write(f, probes=probes(weight=2.0)),
    "direction": lambda f: write(f, probes=probes(direction="safety")),
    "state": lambda f: write(f, probes=probes(state="danger")),
    "state-scaling": lambda f: write(f, probes=probes(state_scaling=1.0)),
    "one-probe-less": lambda f: write(f, probes=[DANGER]),
    "base-adapter": lambda f: write(f, base_adapter="safety"),
    "weights": lambda f: (f / "danger" / "adapter_model.safetensors").write_text("other"),
    "adapter-settings": lambda f: (f / "initial" / "adapter_config.json").write_text("other"),
}
COUNTS_NOT: dict[str, Callable[[Path], object]] = {
    "nothing": lambda f: None,
    "name": lambda f: write(f, name="another"),
    "notes": lambda f: write(f, provenance={"danger": "elsewhere"}, licence="MIT"),
    "layout": lambda f: (f / PACK_FILE).write_text(json.dumps(json.loads((f / PACK_FILE).read_text()), indent=4)),
    "defaults-spelled-out": lambda f: write(f, base_revision=None, chat_template_kwargs={}),
    "whole-numbers": lambda f: write(f, probes=[{**DANGER, "weight": 1}, {**SAFETY, "weight": -1, "state_scaling": 1}]),
    "other-files": lambda f: (f / "danger" / "README.md").write_text("hello"),
}


def changed(folder: Path, change: Callable[[Path], object], tmp_path: Path) -> bool:
    copy = shutil.copytree(folder, tmp_path / "elsewhere" / "copy")
    change(copy)
    return load_pack(copy).fingerprint != load_pack(folder).fingerprint


@pytest.mark.parametrize("change", COUNTS.values(), ids=COUNTS)
def test_the_fingerprint_changes_with_what_can_change_a_score(
    folder: Path, tmp_path: Path, change: Callable[[Path], object]
) -> None:
    assert changed(folder, change, tmp_path)


@pytest.mark.parametrize("change", COUNTS_NOT.values(), ids=COUNTS_NOT)
def test_the_fingerprint_does_not_change_with_what_cannot(
    folder: Path, tmp_path: Path, change: Callable[[Path], object]
) -> None:
    assert not changed(folder, change, tmp_path)


def test_a_fingerprint_is_sixteen_hex_digits(folder: Path) -> None:
    fingerprint = load_pack(folder).fingerprint
    assert len(fingerprint) == 16
    assert int(fingerprint, 16) >= 0
