"""`sqsd-filter drift`: its table, its files, its picture, its refusals, its errors."""

from __future__ import annotations

import csv
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from PIL import Image
from transformers import AutoModelForCausalLM, AutoTokenizer

from sqsd_filter.cli.main import main
from sqsd_filter.directions.drift import measure_drift
from sqsd_filter.directions.refusals import Refusals
from sqsd_filter.judges import is_refusal
from sqsd_filter.judges.generation import answer
from sqsd_filter.scoring.pack import load_pack
from tests.corpora import write_jsonl
from tests.directions.runs import full_run, lora_run

PROMPTS = [f"What is {k} plus {k}?" for k in range(6)]
ORANGE, BLUE = (0xD5, 0x5E, 0x00), (0x00, 0x72, 0xB2)
Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(tmp_path: Path, tiny_pack: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Any:
    """Runs `drift` in this process, on the tiny pack: exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SQSD_FILTER_PACK", str(tiny_pack))
    logger = logging.getLogger("sqsd_filter")
    level = logger.level

    def run(*arguments: object) -> tuple[int, str, str]:
        capfd.readouterr()
        with pytest.raises(SystemExit) as left:
            main(["drift", *map(str, arguments)])
        out, err = capfd.readouterr()
        assert "Traceback" not in out + err
        return int(left.value.code or 0), out, err

    yield run
    logger.setLevel(level)  # the command set another


@pytest.fixture
def run(tmp_path: Path, tiny_pack: Path) -> Path:
    return lora_run(tmp_path / "run", tiny_pack / "base")


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "prompts.jsonl", [{"id": k, "prompt": prompt} for k, prompt in enumerate(PROMPTS)])


def test_a_table_is_all_there_is_unless_files_are_asked_for(command: Command, run: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    code, out, err = command(run)
    assert (code, err) == (0, "")
    head, columns, *lines = out.splitlines()
    assert str(run) in head
    assert "pack tiny (" in head
    assert columns.split("  ")[-1].strip() == "risk projection"
    assert "refusals" not in columns
    assert [line.split()[:2] for line in lines] == [
        ["0", "danger"],
        ["safety", "0"],
        ["10", "danger"],
        ["safety", lines[3].split()[1]],
        ["20", "danger"],
        ["safety", lines[5].split()[1]],
    ]
    assert len({len(line) for line in lines if line.startswith("  ")}) <= 2  # in columns
    assert sorted(tmp_path.rglob("*")) == before


def test_json_is_one_object_with_the_librarys_figures(command: Command, run: Path, tiny_pack: Path) -> None:
    code, out, err = command(run, "--json")
    assert code == 0
    assert err == ""
    assert json.loads(out) == measure_drift(run, load_pack(tiny_pack)).report()


def test_the_tables_on_disk_hold_every_digit(command: Command, run: Path, tiny_pack: Path, tmp_path: Path) -> None:
    assert command(run, "--out", "drift")[0] == 0
    assert sorted(p.name for p in (tmp_path / "drift").iterdir()) == [
        "drift.csv",
        "drift.json",
        "drift.png",
        "modules.csv",
    ]
    drift = measure_drift(run, load_pack(tiny_pack))
    assert json.loads((tmp_path / "drift" / "drift.json").read_text()) == drift.report()
    with (tmp_path / "drift" / "drift.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows == [
        {"step": str(point.step), "checkpoint": point.name, "direction": name}
        | {key: repr(value) for key, value in along.totals().items()}
        | {"risk_projection": repr(point.risk_projection)}
        for point in drift.points
        for name, along in point.along.items()
    ]
    with (tmp_path / "drift" / "modules.csv").open(newline="") as file:
        modules = list(csv.DictReader(file))
    along = drift.points[2].along["safety"]
    own = [row for row in modules if (row["step"], row["direction"]) == ("20", "safety")]
    assert [row["module"] for row in own] == list(along.modules)
    assert [float(row["projection"]) for row in own] == along.projections_m.tolist()
    assert [float(row["cosine"]) for row in own] == along.cosines_m.tolist()
    assert len(modules) == 3 * 2 * 14


def test_the_run_itself_gets_files_only_where_it_is_named(command: Command, run: Path) -> None:
    assert command(run, "--out", run / "drift")[0] == 0
    assert (run / "drift" / "drift.png").is_file()


def test_later_checkpoints_are_added_and_other_files_left_alone(
    command: Command, run: Path, tiny_pack: Path, tmp_path: Path
) -> None:
    command(run, "--out", "drift")
    (tmp_path / "drift" / "notes.txt").write_text("mine")
    lora_run(run, tiny_pack / "base", (30,))
    assert command(run, "--out", "drift")[0] == 0
    assert (tmp_path / "drift" / "drift.csv").read_text().count("\n") == 1 + 2 * 4
    assert (tmp_path / "drift" / "notes.txt").read_text() == "mine"


def test_files_on_another_run_or_pack_are_left_alone(
    command: Command, run: Path, tiny_pack: Path, tmp_path: Path
) -> None:
    assert command(run, "--out", "drift")[0] == 0
    assert command(run.relative_to(tmp_path), "--out", "drift")[0] == 0  # it is the same
    before = {p: p.read_bytes() for p in (tmp_path / "drift").iterdir()}
    other = lora_run(tmp_path / "other", tiny_pack / "base")
    changed = shutil.copytree(tiny_pack, tmp_path / "pack")
    page = json.loads((changed / "pack.json").read_text())
    page["probes"][0]["weight"] = 2.0
    (changed / "pack.json").write_text(json.dumps(page))
    for words in ([other], [run, "--pack", changed]):
        code, out, err = command(*words, "--out", "drift")
        assert (code, out) == (5, "")
        assert "drift.json is about another run or pack" in err
    assert {p: p.read_bytes() for p in (tmp_path / "drift").iterdir()} == before
    (tmp_path / "drift" / "drift.json").write_text("[]")
    assert command(run, "--out", "drift")[0] == 5


def test_an_interruption_while_prompts_are_asked_leaves_the_projections(
    command: Command, run: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert command(run, "--out", "plain")[0] == 0

    def interrupted(*_: Any, **__: Any) -> list[str]:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("sqsd_filter.directions.refusals.answer", interrupted)
        code, out, err = command(run, "--out", "drift", "--refusals", prompts)
    assert (code, out) == (130, "")
    assert "What was written is kept" in err
    for file in (tmp_path / "plain").iterdir():
        assert file.read_bytes() == (tmp_path / "drift" / file.name).read_bytes()
    assert command(run, "--out", "drift", "--refusals", prompts)[0] == 0
    assert "refusal_rate" in (tmp_path / "drift" / "drift.csv").read_text()


# ---------------------------------------------------------------------------------------------- the picture


def area(picture: np.ndarray, colour: tuple[int, int, int]) -> int:
    """How many pixels have this colour, but for the legend's at the top."""
    return int((picture[60:, :, :3] == colour).all(axis=2).sum())


@pytest.mark.pictures
def test_the_picture_shows_every_direction_in_both_panels(command: Command, run: Path, tmp_path: Path) -> None:
    command(run, "--out", "drift")
    picture = np.asarray(Image.open(tmp_path / "drift" / "drift.png"))
    assert picture.shape == (500, 1200, 4)
    assert (picture[..., 3] == 255).all()
    for half in (picture[:, :600], picture[:, 600:]):
        assert min(area(half, ORANGE), area(half, BLUE)) > 100


@pytest.mark.pictures
def test_the_same_run_gives_the_same_bytes_whatever_the_users_own_style(
    command: Command, run: Path, tmp_path: Path
) -> None:
    command(run, "--out", "one")
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "black", "savefig.dpi": 50}):
        command(run, "--out", "two")
    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes()


# ---------------------------------------------------------------------------------------------- refusals


@pytest.mark.pictures
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_every_checkpoint_is_asked_as_the_model_that_it_is(
    kind: str, command: Command, tiny_pack: Path, tmp_path: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = lora_run if kind == "lora" else full_run
    run = train(tmp_path / "trained", tiny_pack / "base")
    asked: list[list[str]] = []

    def judged(text: str) -> bool:  # random models refuse nothing: here, what is said with an even length counts
        asked[-1].append(text)
        return len(text) % 2 == 0

    def heard(*arguments: Any, **options: Any) -> list[str]:
        asked.append([])
        return answer(*arguments, **options)

    monkeypatch.setattr("sqsd_filter.directions.refusals.is_refusal", judged)
    monkeypatch.setattr("sqsd_filter.directions.refusals.answer", heard)
    code, out, _ = command(run, "--refusals", prompts, "--limit", 4, "--out", "drift", "--json")
    assert code == 0
    tokenizer = AutoTokenizer.from_pretrained(tiny_pack / "base")
    for k, step in enumerate((0, 10, 20)):
        folder = run / f"checkpoint-{step}" if step else tiny_pack / "base"
        model = AutoModelForCausalLM.from_pretrained(folder)  # PEFT's own way, where it is an adapter
        assert asked[k] == answer(model, tokenizer, PROMPTS[:4])
        point = json.loads(out)["checkpoints"][k]
        assert point["answers"] == 4
        assert point["refusal_rate"] == sum(len(text) % 2 == 0 for text in asked[k]) / 4
    assert asked[0] != asked[2]
    with (tmp_path / "drift" / "drift.csv").open(newline="") as file:
        rates = [(row["step"], float(row["refusal_rate"])) for row in csv.DictReader(file)]
    assert rates == [(str(p["step"]), p["refusal_rate"]) for p in json.loads(out)["checkpoints"] for _ in range(2)]
    assert np.asarray(Image.open(tmp_path / "drift" / "drift.png")).shape == (500, 1800, 4)


def test_refusals_are_told_with_their_interval(command: Command, run: Path, prompts: Path) -> None:
    code, out, err = command(run, "--refusals", prompts)
    assert code == 0
    assert out.splitlines()[1].endswith("refusals")
    assert out.splitlines()[2].endswith("0.0% (0.0-39.0)")
    assert not is_refusal("Paris.")
    assert [line for line in err.splitlines() if line.endswith("checkpoint-20 6 prompts")] == err.splitlines()[2:]


@pytest.mark.parametrize(("refused", "answers"), [(0, 1), (1, 1), (0, 50), (3, 10), (50, 100), (520, 520)])
def test_the_interval_is_wilsons(refused: int, answers: int) -> None:
    """Its ends are the true rates from which the one found is 1.96 standard errors away."""
    found = Refusals(refused, answers)
    low, high = found.interval
    assert 0 <= low <= found.rate <= high <= 1
    for end in (low, high):
        deviation = (end * (1 - end) / answers) ** 0.5
        assert abs(found.rate - end) == pytest.approx(1.959964 * deviation, rel=1e-5, abs=1e-7)
    assert low < found.rate or refused == 0
    assert high > found.rate or refused == answers


# ---------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["none"], 3, "none is not a folder: give the output folder of a training run."),
        (["run", "--limit", "3"], 2, "add --refusals."),
        (["run", "--refusals", "none.jsonl"], 3, "none.jsonl can't be read as JSON Lines"),
        (["run", "--refusals", "odd.jsonl"], 3, "Line 2 of odd.jsonl has no text under 'prompt'"),
        (["run", "--refusals", "empty.jsonl"], 3, "empty.jsonl has no prompts"),
        (["run", "--out", "odd.jsonl"], 5, "odd.jsonl is a file: name a folder."),
        (["run", "--pack", "none"], 1, "There is no pack 'none'"),
        (["run", "--refusals", "good.jsonl", "--device", "cuda:7"], 2, "The device 'cuda:7' can't be used"),
    ],
)
def test_mistakes_get_one_sentence(
    arguments: list[str], code: int, said: str, command: Command, run: Path, tmp_path: Path
) -> None:
    (tmp_path / "odd.jsonl").write_text('{"prompt": "a"}\n{"prompt": 3}\n')
    (tmp_path / "good.jsonl").write_text('{"prompt": "a"}\n')
    (tmp_path / "empty.jsonl").write_text("")
    found, out, err = command(*arguments)
    assert (found, out) == (code, "")
    assert err.strip().splitlines()[-1].startswith("Error: ")
    assert said in err
    assert err.strip().endswith(".")


def test_what_is_left_out_is_told_unless_quiet(command: Command, run: Path, caplog: pytest.LogCaptureFixture) -> None:
    shutil.move(run / "checkpoint-20" / "adapter_model.safetensors", run / "checkpoint-20" / "adapter_model.bin")
    assert command(run)[0] == 0
    assert [r.getMessage() for r in caplog.records] == [
        f"{run / 'checkpoint-20'} is left out: it has no weights in safetensors"
    ]
    caplog.clear()
    assert command(run, "-q") == (0, "", "")
    assert caplog.records == []
