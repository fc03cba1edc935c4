"""Building a pack: trained from a recipe, the same bytes each time, also when it is killed and started again."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sqsd_filter.cli.main import cli
from sqsd_filter.directions import training
from sqsd_filter.directions.build import build_pack
from sqsd_filter.directions.data import read_data
from sqsd_filter.directions.recipe import PackRecipe
from sqsd_filter.directions.training import take_checkpoint
from sqsd_filter.errors import DestinationExists, InputError, SQSDError, UsageError
from sqsd_filter.progress import Silent
from sqsd_filter.scoring.adapters import load_adapter
from sqsd_filter.scoring.pack import ADAPTER_FILES, PACK_FILE, load_pack
from sqsd_filter.scoring.scorer import SQSDScorer
from tests.corpora import write_jsonl
from tests.directions.recipes import STATES, files, with_choice, write_recipe
from tests.tiny import CONVERSATIONS


def test_a_built_pack_loads_and_scores(built: Path) -> None:
    names = {f"{adapter}/{f}" for adapter in ("initial", "danger", "safety") for f in (*ADAPTER_FILES, "training.json")}
    assert set(files(built)) == {PACK_FILE, *names}
    scores = SQSDScorer(built).score(CONVERSATIONS[:4])
    assert set(scores.status) == {"scored"}
    assert len(set(scores.risk)) == 4


def test_a_pack_says_what_it_was_trained_on_and_how(built: Path) -> None:
    provenance = json.loads((built / PACK_FILE).read_text())["provenance"]
    assert provenance["initial"]["licence"] == "CC0-1.0"
    assert provenance["initial"]["data"]["files"][0]["path"] == "benign.jsonl"
    assert (provenance["initial"]["rows"], provenance["initial"]["steps"]) == (16, 2)
    assert (provenance["danger"]["rows"], provenance["danger"]["steps"]) == (12, 6)  # the bad half
    assert provenance["safety"]["settings"]["method"] == "dpo"
    assert provenance["safety"]["settings"]["lora"]["r"] == 2
    for name, steps in (("initial", 4), ("danger", 6), ("safety", 6)):
        assert [e["step"] for e in provenance[name]["losses"]] == list(range(1, steps + 1))
        assert all(0 < e["loss"] < 20 for e in provenance[name]["losses"])


def test_training_moves_a_model_towards_its_rows(built: Path) -> None:
    losses = [e["loss"] for e in json.loads((built / PACK_FILE).read_text())["provenance"]["danger"]["losses"]]
    assert losses[-1] < losses[0]


def test_a_base_adapter_is_trained_first_and_lies_under_the_others(recipe: Path, built: Path, tmp_path: Path) -> None:
    aligned = replace(PackRecipe.load(recipe), base_adapter="initial")
    pack = build_pack(aligned, tmp_path / "aligned")
    assert pack.base_adapter == "initial"
    assert load_pack(pack.path) == pack
    same = {name: (pack.path / name).read_bytes() == (built / name).read_bytes() for name in files(built)}
    assert same["initial/adapter_model.safetensors"]
    assert not same["danger/adapter_model.safetensors"]
    first = [json.loads((p / "danger" / "training.json").read_text())["losses"][0]["loss"] for p in (built, pack.path)]
    assert first[1] < first[0]  # the base has been moved towards such rows


@pytest.mark.slow
def test_a_build_that_is_killed_goes_on_from_its_checkpoint_to_the_same_bytes(recipe: Path, built: Path) -> None:
    out = recipe.parent / "pack"
    command = [sys.executable, "-m", "sqsd_filter", "pack", "build", str(recipe), str(out)]
    for checkpoint in ("danger/checkpoint-4", "safety/checkpoint-2"):
        state = out / ".build" / checkpoint / "trainer_state.json"
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 600
        while not state.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        assert state.exists()
        assert not (out / PACK_FILE).exists()
    kept = {p: p.stat().st_mtime_ns for p in (out / "danger").iterdir()}
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert f"pack tiny ({load_pack(built).fingerprint})" in done.stdout
    assert "training 'safety' by DPO" in done.stderr
    assert "training 'danger'" not in done.stderr
    assert {p: p.stat().st_mtime_ns for p in (out / "danger").iterdir()} == kept
    assert files(out) == files(built)


def test_a_finished_build_is_not_done_again(recipe: Path, built: Path) -> None:
    out = recipe.parent / "pack"
    shutil.copytree(built, out)
    before = files(out)
    assert build_pack(PackRecipe.load(recipe), out).fingerprint == load_pack(built).fingerprint
    assert files(out) == before


def test_another_seed_gives_another_pack(recipe: Path, built: Path) -> None:
    other = build_pack(replace(PackRecipe.load(recipe), seed=1), recipe.parent / "pack")
    assert other.fingerprint != load_pack(built).fingerprint


def test_a_folder_with_something_else_is_left_alone(recipe: Path, built: Path, tmp_path: Path) -> None:
    loaded = replace(PackRecipe.load(recipe), seed=3)
    before = files(built)
    with pytest.raises(DestinationExists, match="not an unfinished build"):
        build_pack(loaded, built)
    (tmp_path / "begun" / ".build").mkdir(parents=True)
    (tmp_path / "begun" / ".build" / "recipe.json").write_text("{}")
    with pytest.raises(DestinationExists, match="another recipe"):
        build_pack(loaded, tmp_path / "begun")
    assert files(built) == before


BROKEN: dict[str, tuple[str, str, type[SQSDError], str]] = {
    "not toml": ("name =", "name ==", InputError, "not valid TOML"),
    "unknown key": ("max_length = 64", "max_lenght = 64", UsageError, "unknown keys: max_lenght"),
    "unknown method": ('"dpo"', '"ppo"', UsageError, "'sft' or 'dpo'"),
    "a column of the other method": ('answer = "output"', 'chosen = "output"', UsageError, "'sft' can't have chosen"),
    "no such column": ('chosen = "good"', 'chosen = "best"', InputError, "lacks the columns best"),
    "no such file": ('"answers.jsonl"', '"none.jsonl"', InputError, "none.jsonl"),
    "no number": ("learning_rate = 1e-3", 'learning_rate = "fast"', UsageError, "'learning_rate' can't be 'fast'"),
    "no whole number": ("rows = 16", "rows = 2.5", UsageError, r"'rows' can't be 2\.5"),
    "no column's name": ('name = "danger"', 'name = "risk"', UsageError, "'risk' can't be a probe's name"),
    "no text": ('answer = "output"', 'answer = "id"', SQSDError, "line 1: column 'id' holds int, not text"),
    "no rows": ("bad = true", 'instruction = "?"', SQSDError, "No row"),
    "no such adapter": ('state = "initial"', 'state = "begin"', UsageError, "begin"),
    "a pack's own notes": (
        "[lora]",
        "[notes]\nrecipe = 1\nprobes = []\nother = 2\n[lora]",
        UsageError,
        r"\[notes\] can't have probes, recipe, which",
    ),
    "no such checkpoint": ("take_step = 2", "take_step = 3", UsageError, "multiple of save_steps"),
    "no rows for states": (
        "take_step = 2",
        'take_step = "sensitive"',
        UsageError,
        r"\[states\] and an adapter .* need",
    ),
    "no such choice": ("take_step = 2", 'take_step = "best"', UsageError, "take_step must be a number of updates or"),
    "a direction's choice": (
        'method = "dpo"',
        'method = "dpo"\ntake_step = "sensitive"',
        UsageError,
        r"adapters\.safety.*is for an adapter that is only a state",
    ),
    "no such step": ("take_step = 2", "take_step = 6", UsageError, "trained for 4 steps: its take_step can't be 6"),
}


@pytest.mark.parametrize(("said", "instead", "kind", "complaint"), BROKEN.values(), ids=BROKEN)
def test_a_recipe_that_makes_no_sense_says_why(
    recipe: Path, said: str, instead: str, kind: type[SQSDError], complaint: str
) -> None:
    text = recipe.read_text()
    assert said in text
    recipe.write_text(text.replace(said, instead))
    with pytest.raises(kind, match=complaint):
        build_pack(PackRecipe.load(recipe), recipe.parent / "pack")
    for trained in ("*/training.json", ".build/*/checkpoint-*"):
        assert not list(recipe.parent.glob(f"pack/{trained}"))  # nothing in vain


def test_a_recipe_that_is_not_there_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere\.toml can't be read"):
        PackRecipe.load(tmp_path / "nowhere.toml")


def test_adapters_on_a_base_in_bfloat16_are_trained_in_float32(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[set[torch.dtype]] = []
    in_float32 = training.make_trainable_float32

    def look(model: Any) -> None:
        seen.append({p.dtype for p in model.parameters() if p.requires_grad})
        assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}
        in_float32(model)

    monkeypatch.setattr(training, "make_trainable_float32", look)
    build_pack(replace(PackRecipe.load(recipe), dtype="bfloat16"), recipe.parent / "pack")
    assert seen == [{torch.float32}] * 3


def test_without_trl_the_extra_to_install_is_named(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(SQSDError, match=r"sqsd-filter\[train\]"):
        build_pack(PackRecipe.load(recipe), recipe.parent / "pack")


def test_progress_is_told_of_every_update(recipe: Path) -> None:
    phases: list[Any] = []

    class Listener(Silent):
        def start(self, phase: str, rows: int | None) -> None:
            phases.append([phase, rows, 0])

        def advance(self, rows: int, tokens: int = 0) -> None:
            phases[-1][2] += rows

    build_pack(PackRecipe.load(recipe), recipe.parent / "pack", Listener())
    assert phases == [["training initial", 16, 16], ["training danger", 24, 24], ["training safety", 24, 24]]


def test_a_broken_data_file_is_an_input_error(recipe: Path) -> None:
    (recipe.parent / "pairs.jsonl").write_text('{"prompt": "a", "good": "b"\n[')
    with pytest.raises(InputError, match=r"pairs\.jsonl has no readable row"):
        build_pack(PackRecipe.load(recipe), recipe.parent / "pack")


# ---------------------------------------------------------------------------------------------- the choice of a state


@pytest.fixture(scope="module")
def chosen(tmp_path_factory: pytest.TempPathFactory, tiny_pack: Path) -> Path:
    folder = tmp_path_factory.mktemp("chosen")
    recipe = PackRecipe.load(with_choice(write_recipe(folder, tiny_pack / "base")))
    return build_pack(recipe, folder / "pack").path


def test_the_most_sensitive_checkpoint_is_published_with_the_figures_of_all(chosen: Path, built: Path) -> None:
    manifest = json.loads((chosen / PACK_FILE).read_text())
    (record,) = manifest["validation"]["states"].values()
    assert list(manifest["validation"]["states"]) == ["initial"]
    steps = {entry["state"]: entry["step"] for entry in record["candidates"]}
    assert steps == {"fresh": 0, "checkpoint-2": 2, "checkpoint-4": 4}
    best = max(record["candidates"][1:], key=lambda entry: entry["sensitivity"])
    assert record["chosen"] == best["state"]
    assert manifest["provenance"]["initial"]["steps"] == best["step"]
    published = load_adapter(chosen / "initial").factors
    taken = load_adapter(chosen / ".build" / "initial" / best["state"]).factors
    assert all(torch.equal(published[m].B, taken[m].B.bfloat16().float()) for m in taken)
    assert (record["rows"], record["settings"]["dtype"]) == (20, "float32")
    assert 0 < record["positive"] < 20
    assert record["data"]["files"][0]["path"] == "answers.jsonl"
    assert record["asked"]["positive"] == {"bad": True}
    assert "validation" not in json.loads((built / PACK_FILE).read_text())


def test_the_record_is_a_note_and_the_command_finds_the_same_again(
    chosen: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = shutil.copytree(chosen, tmp_path / "pack")
    manifest = json.loads((out / PACK_FILE).read_text())
    record = manifest.pop("validation")["states"]["initial"]
    (out / PACK_FILE).write_text(json.dumps(manifest))
    assert load_pack(out).fingerprint == load_pack(chosen).fingerprint
    recipe = PackRecipe.load(chosen.parent / "choice.toml")
    assert recipe.states is not None
    sample = read_data(recipe, recipe.states.source, recipe.states.positive)  # the same of the file's rows
    marked = zip(sample.examples, sample.positive or [], strict=True)
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"messages": turns, "bad": bad} for (turns,), bad in marked])
    words = ["pack", "states", out, "--run", out / ".build" / "initial", "--rows", rows, "--positive", "bad=true"]
    cli.main(args=[*map(str, words), "--json"], standalone_mode=False)
    assert json.loads(capsys.readouterr().out) == {k: v for k, v in record.items() if k not in ("data", "asked")}


@pytest.mark.slow
@pytest.mark.parametrize("left", ["last", "half"])
def test_a_build_that_is_killed_while_states_are_compared_ends_in_the_same_bytes(
    chosen: Path, tmp_path: Path, left: str
) -> None:
    """Begun with what training leaves in the chosen one's place, or with what an earlier kill left of it."""
    out = shutil.copytree(chosen, tmp_path / "pack")
    (out / PACK_FILE).unlink()
    if left == "last":
        take_checkpoint(out, "initial", out / ".build" / "initial" / "last", 4)
    else:
        (out / "initial" / ADAPTER_FILES[1]).write_bytes(b"half")
    command = [sys.executable, "-m", "sqsd_filter", "pack", "build", str(chosen.parent / "choice.toml"), str(out)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        said = next(line for line in process.stderr if line.startswith("measuring"))
        process.send_signal(signal.SIGKILL)
    assert said == "measuring 3 states on 20 rows\n"
    assert process.returncode == -signal.SIGKILL
    assert not (out / PACK_FILE).exists()
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "measuring 3 states" in done.stderr
    assert "training '" not in done.stderr
    assert files(out) == files(chosen)


CHOICES: dict[str, tuple[str, str, type[SQSDError], str]] = {
    "unknown key": ("rows = 20", "sample = 20", UsageError, r"\[states\] has unknown keys: sample"),
    "no column": ('answer = "output"', 'answer = "reply"', InputError, "answers.jsonl lacks the columns reply"),
    "no label": ("{ bad = true }", "{ worse = true }", InputError, "answers.jsonl lacks the columns worse"),
    "all alike": ("{ bad = true }", '{ bad = "?" }', InputError, "None of the 20 rows are positive"),
    "too few rows": ("rows = 20", "rows = 7", InputError, "Only 7 of 7 rows can be measured"),
    "too short rows": ("rows = 20", "answer_tokens = 999", InputError, r"can be measured \(24 too_short\)"),
}


@pytest.mark.parametrize(("said", "instead", "kind", "complaint"), CHOICES.values(), ids=CHOICES)
def test_a_choice_that_makes_no_sense_says_why_before_anything_is_trained(
    recipe: Path, said: str, instead: str, kind: type[SQSDError], complaint: str
) -> None:
    assert said in STATES
    with pytest.raises(kind, match=complaint):
        build_pack(PackRecipe.load(with_choice(recipe, STATES.replace(said, instead))), recipe.parent / "pack")
    assert not list(recipe.parent.glob("pack/*/training.json"))


def test_rows_to_choose_by_without_a_choice_are_refused(recipe: Path) -> None:
    recipe.write_text(recipe.read_text() + STATES)
    with pytest.raises(UsageError, match="need each other"):
        PackRecipe.load(recipe)
