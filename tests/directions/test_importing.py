"""The authors' published layout, in miniature on the local Hub, becomes a pack that scores as their scripts do."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from sqsd_filter.cli.main import main
from sqsd_filter.directions.importing import INITIAL, SAFETY, import_pack
from sqsd_filter.errors import DestinationExists, PackError, UsageError
from sqsd_filter.scoring.pack import ADAPTER_FILES, Pack, Probe
from sqsd_filter.scoring.reference import ReferenceScorer
from sqsd_filter.scoring.scorer import SQSDScorer
from tests.hub import Hub
from tests.tiny import chat, make_adapter, make_model

BEAVER, AEGIS = "Direction/Beaver-Danger", "Direction/Ageis_Danger"
REPO, BASE = "Wxxxx/SQSD", "org/tiny-base"
THINKING = "{% if enable_thinking is not defined or enable_thinking %}<think>{% endif %}"
CHATS = [
    chat("What is the capital of France?", "Paris."),
    chat("Count.", " ".join(str(k) for k in range(30))),
    chat("Name three colours: " + "please " * 20, "red, green, blue"),
]


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Their layout on a tiny model, with all that a trainer leaves beside the adapters; `base` is the model."""
    root = tmp_path_factory.mktemp("published")
    model = make_model(root / "base", "qwen3")
    template = model / "chat_template.jinja"
    template.write_text(template.read_text() + "{% if add_generation_prompt %}" + THINKING + "{% endif %}")
    for seed, folder in enumerate((BEAVER, AEGIS, SAFETY, INITIAL), 1):
        made = make_adapter(model, root / "SQSD" / folder, r=4, alpha=8, seed=seed)
        config = json.loads((made / ADAPTER_FILES[0]).read_text())
        (made / ADAPTER_FILES[0]).write_text(json.dumps({**config, "base_model_name_or_path": BASE}))
        (made / "optimizer.pt").write_bytes(b"pickle")
    (root / "SQSD" / "README.md").write_text("---\nlicense: mit\n---\nDirections.\n")
    return root


@pytest.fixture
def layout(published: Path, tmp_path: Path) -> Path:
    """A copy of the layout to change."""
    return shutil.copytree(published / "SQSD", tmp_path / "copy")


def files(folder: Path) -> dict[str, bytes | None]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def reconfigure(folder: Path, **values: Any) -> None:
    path = folder / ADAPTER_FILES[0]
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def for_all(folder: Path, **values: Any) -> None:
    for adapter in (BEAVER, SAFETY, INITIAL):
        reconfigure(folder / adapter, **values)


def scripts_projection(
    base: Path, state: Path, direction: Path, scaling: float | None, turns: list[dict[str, str]]
) -> float:
    """The reference scripts' formula for one row: Σ_m cos(-(G_B A + B G_A), V), by autograd and dense matrices."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
    model = PeftModel.from_pretrained(model, state, is_trainable=True).double().eval()
    sides = {n: m for n, m in model.named_modules() if hasattr(m, "lora_A")}
    for side in sides.values():
        side.scaling["default"] = side.scaling["default"] if scaling is None else scaling
    prompt = tokenizer.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True, enable_thinking=False)
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, turns[1]["content"])]
    answer = torch.tensor([-100] * len(ids[0]) + ids[1] + [tokenizer.eos_token_id])
    row = torch.where(answer < 0, torch.tensor([*ids[0], *ids[1], 0]), answer)
    model(input_ids=row[None], labels=answer[None]).loss.backward()
    V = {k.removesuffix(".lora_A.weight"): v.double() for k, v in load_file(direction / ADAPTER_FILES[1]).items()}
    total = 0.0
    for name, side in sides.items():
        A, B = side.lora_A["default"].weight, side.lora_B["default"].weight
        update = -(B.grad @ A + B @ A.grad).detach()
        total += float(torch.cosine_similarity(update.flatten(), (V[f"{name}.lora_B.weight"] @ V[name]).flatten(), 0))
    return total


@pytest.mark.parametrize("danger", ["Beaver-Danger", "both"])
def test_an_imported_pack_scores_as_the_authors_scripts_do(
    hub: Hub, published: Path, tmp_path: Path, danger: str
) -> None:
    hub.add(BASE, files(published / "base"), kind="models")
    hub.add(REPO, files(published / "SQSD"), kind="models")
    pack = import_pack(REPO, "tiny", tmp_path / "pack", danger=danger)
    fast, dense = (kind(pack, dtype="float64").score(CHATS) for kind in (SQSDScorer, ReferenceScorer))
    np.testing.assert_allclose(fast.risk, dense.risk, rtol=0, atol=1e-6)
    root = published / "SQSD"
    for k, turns in enumerate(CHATS):
        dangers = [
            scripts_projection(published / "base", root / INITIAL, root / folder, None, turns)
            for folder in ([BEAVER] if danger == "Beaver-Danger" else [BEAVER, AEGIS])
        ]
        safety = scripts_projection(published / "base", root / SAFETY, root / SAFETY, 1.0, turns)
        assert fast.risk[k] == pytest.approx(np.mean(dangers) - safety, abs=1e-6)
        assert [fast.probes[p.name][k] for p in pack.probes] == pytest.approx([*dangers, safety], abs=1e-6)


def test_a_pack_is_pinned_to_the_commit_and_fetches_no_other_file(hub: Hub, published: Path, tmp_path: Path) -> None:
    commit = hub.add(REPO, files(published / "SQSD"), kind="models")
    hub.add(REPO, {f"{BEAVER}/{ADAPTER_FILES[1]}": b"later"}, kind="models")
    pack = import_pack(f"{REPO}@{commit}", "qwen3-8b", tmp_path / "pack")
    assert (pack.name, pack.base_model, pack.max_length) == ("qwen3-8b", BASE, 1024)
    assert pack.chat_template_kwargs == {"enable_thinking": False}
    assert pack.probes == (Probe("danger", 1.0, "danger", "initial"), Probe("safety", -1.0, "safety", "safety", 1.0))
    provenance = pack.notes["provenance"]["danger"]
    assert provenance["source"]["repository"] == REPO
    assert provenance["source"]["commit"] == commit
    assert provenance["licence"] == "mit"
    assert provenance["source"]["path"] == BEAVER
    assert provenance["rows"] == 3000
    asked = {r.path.partition(f"/resolve/{commit}/")[2] for m in ("HEAD", "GET") for r in hub.seen(m, "/resolve/")}
    assert asked == {f"{folder}/{file}" for folder in (BEAVER, SAFETY, INITIAL) for file in ADAPTER_FILES}


def test_a_pack_holds_plain_copies_without_paths_of_a_machine(layout: Path, tmp_path: Path) -> None:
    reconfigure(layout / INITIAL, base_model_name_or_path="/home/someone/models/Qwen3-8B")
    pack = import_pack(str(layout), "tiny", tmp_path / "pack")
    assert set(files(pack.path)) == {"pack.json", *(f"{a}/{f}" for a in pack.adapters for f in ADAPTER_FILES)}
    for name, folder in (("danger", BEAVER), ("initial", INITIAL), ("safety", SAFETY)):
        before, after = (load_file(p / ADAPTER_FILES[1]) for p in (layout / folder, pack.adapter(name)))
        assert before.keys() == after.keys()
        assert all(torch.equal(before[k], after[k]) for k in before)
        assert len({(pack.adapter(name) / file).stat().st_mode for file in ADAPTER_FILES}) == 1
    assert not any(b"someone" in data or str(tmp_path).encode() in data for data in files(pack.path).values() if data)


def test_an_import_that_broke_off_goes_on_and_one_that_is_done_stays(
    hub: Hub, published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    hub.add(REPO, files(published / "SQSD"), kind="models")
    hub.fail("GET", rf"/resolve/.*{SAFETY}/adapter_model", status=403)
    with pytest.raises(PackError, match="can't be fetched from the Hub"):
        import_pack(REPO, "tiny", tmp_path / "pack")
    assert not [p for p in tmp_path.iterdir() if p.name != "huggingface"]
    first = len(hub.requests)
    pack = import_pack(REPO, "tiny", tmp_path / "pack")
    again = [r.path for r in hub.requests[first:] if r.method == "GET" and ADAPTER_FILES[1] in r.path]
    assert len(again) == 1
    assert SAFETY in again[0]
    state = (pack.path / "pack.json").stat()
    assert import_pack(REPO, "tiny", tmp_path / "pack") == pack
    assert (pack.path / "pack.json").stat() == state
    with pytest.raises(DestinationExists, match="holds something else"):
        import_pack(REPO, "tiny", tmp_path / "pack", danger="both")


def test_an_import_with_notes_of_later_is_there_already(layout: Path, tmp_path: Path) -> None:
    pack = import_pack(str(layout), "tiny", tmp_path / "pack")
    page = json.loads((pack.path / "pack.json").read_text())
    page["provenance"]["danger"]["licence"] = "CC-BY-NC-4.0"
    noted = json.dumps({**page, "validation": {"steering": {}}, "remark": "mine"})
    (pack.path / "pack.json").write_text(noted)
    assert import_pack(str(layout), "tiny", pack.path).fingerprint == pack.fingerprint
    assert (pack.path / "pack.json").read_text() == noted
    changes: list[dict[str, Any]] = [{"max_length": 512}, {"provenance": {}}, {"provenance": [1]}, {"name": "other"}]
    for change in changes:
        (pack.path / "pack.json").write_text(json.dumps({**page, **change}))
        with pytest.raises(DestinationExists, match="holds something else"):
            import_pack(str(layout), "tiny", pack.path)


def test_an_adapter_that_does_not_name_its_modules_is_imported(layout: Path, tmp_path: Path) -> None:
    path = layout / BEAVER / ADAPTER_FILES[0]
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "target_modules"}))
    pack = import_pack(str(layout), "tiny", tmp_path / "pack")
    assert "target_modules" not in json.loads((pack.adapter("danger") / ADAPTER_FILES[0]).read_text())


def test_a_busy_hub_is_asked_again(hub: Hub, published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    hub.add(REPO, files(published / "SQSD"), kind="models")
    hub.fail("GET", "/api/models/", status=503, times=2)
    assert import_pack(REPO, "tiny", tmp_path / "pack").name == "tiny"


def to_pickle(layout: Path) -> None:
    (layout / SAFETY / ADAPTER_FILES[1]).rename(layout / SAFETY / "adapter_model.bin")


BROKEN: dict[str, tuple[Callable[[Path], object], type[Exception], tuple[str, ...]]] = {
    "pickled": (to_pickle, PackError, ("pickled weights", SAFETY, "safetensors")),
    "no-state": (lambda f: shutil.rmtree(f / INITIAL), PackError, (f"has no {INITIAL}", "layout of Wxxxx/SQSD")),
    "no-config": (lambda f: (f / BEAVER / ADAPTER_FILES[0]).unlink(), PackError, (ADAPTER_FILES[0], BEAVER)),
    "dora": (lambda f: reconfigure(f / SAFETY, use_dora=True), PackError, ("DoRA",)),
    "cut-off": (lambda f: (f / BEAVER / ADAPTER_FILES[1]).write_bytes(b"{"), PackError, ("can't be read",)),
    "two-bases": (
        lambda f: reconfigure(f / SAFETY, base_model_name_or_path="org/other"),
        UsageError,
        ("org/other, org/tiny-base", "--base-model"),
    ),
    "no-base": (
        lambda f: for_all(f, base_model_name_or_path="/models/x"),
        UsageError,
        ("name no base model", "--base-model"),
    ),
}


@pytest.mark.parametrize(("breaks", "kind", "named"), BROKEN.values(), ids=BROKEN)
def test_what_cannot_be_imported_says_why_and_leaves_nothing(
    layout: Path, tmp_path: Path, breaks: Callable[[Path], object], kind: type[Exception], named: tuple[str, ...]
) -> None:
    breaks(layout)
    with pytest.raises(kind) as problem:
        import_pack(str(layout), "tiny", tmp_path / "pack")
    assert all(text in str(problem.value) for text in named)
    assert [p.name for p in tmp_path.iterdir()] == ["copy"]


def test_the_published_repository_has_its_base_model_even_if_its_adapters_name_a_path(
    hub: Hub, layout: Path, tmp_path: Path
) -> None:
    for folder in (BEAVER, SAFETY, INITIAL):
        reconfigure(layout / folder, base_model_name_or_path="/data/models/Qwen3-8B")
    hub.add(REPO, files(layout), kind="models")
    assert import_pack(REPO, "a", tmp_path / "a").base_model == "Qwen/Qwen3-8B"
    assert import_pack(REPO, "b", tmp_path / "b", base_model="org/mine").base_model == "org/mine"


@pytest.mark.parametrize("source", ["nowhere", "org/nothing", "org/nothing@v1"])
def test_a_source_that_is_not_there_is_one_sentence(hub: Hub, tmp_path: Path, source: str) -> None:
    with pytest.raises(PackError, match=source) as problem:
        import_pack(source, "tiny", tmp_path / "pack")
    assert "\n" not in str(problem.value)


@pytest.mark.parametrize("arguments", [["--danger", "both"], []])
def test_the_command_prints_one_object(
    layout: Path, tmp_path: Path, arguments: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    for code in (0, 0):
        with pytest.raises(SystemExit) as left:
            main(["pack", "import", str(layout), "--as", "mine", *arguments, "--json"])
        assert left.value.code == code
        report = json.loads(capsys.readouterr().out)
    pack: Pack = SQSDScorer(tmp_path / "mine").pack
    assert report["fingerprint"] == pack.fingerprint
    assert report["base_model"] == BASE
    assert [p.weight for p in pack.probes] == ([0.5, 0.5, -1.0] if arguments else [1.0, -1.0])
    (tmp_path / "mine" / "pack.json").write_text("{}")
    with pytest.raises(SystemExit) as left:
        main(["pack", "import", str(layout), "--as", "mine"])
    assert left.value.code == 5
