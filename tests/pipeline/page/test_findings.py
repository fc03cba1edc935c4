"""What other commands found, on the page: drawn from the files that they leave, and damaged ones told of."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sqsd_filter.cli.main import main
from sqsd_filter.directions.drift import measure_drift
from sqsd_filter.directions.drift_files import write_drift
from sqsd_filter.pipeline.page.page import write_page
from sqsd_filter.scoring.pack import load_pack
from tests.corpora import make_rows
from tests.directions.runs import lora_run
from tests.pages import Seen, noted

WINDOWS = {
    "asr": [0.5, 0.25, 0.1],
    "ci": [[0.4, 0.6], [0.2, 0.3], [0.0, 0.2]],
    "spread": 0.4,
    "monotone": True,
    "outcomes": {"refused": [0.25, 0.5, 0.75], "unsafe": [0.5, 0.25, 0.1], "degenerate": [0.25, 0.25, 0.15]},
    "over_refusal": [0.02, 0.03, 0.04],
    "loss": [1.25, 1.5, None],
    "rows": [100, 100, 100],
    "tokens": [2345, 2000, 1900],
}
ARM = {"asr": 0.33, "ci": [0.25, 0.5], "over_refusal": None, "loss": 2.5, "rows": 950, "tokens": 12345}
MIX = {"precision": {"mean": 0.75, "ci": [0.5, 1]}, "auc": {"mean": 0.9, "ci": [0.8, 1]}}
MIX |= {"average_precision": {"mean": 0.7, "ci": [0.6, 0.8]}}
RESULTS: dict[str, Any] = {
    "model": {"name": "tiny & <small>", "pack": "tiny", "fingerprint": "0"},
    "corpus": [{"name": "in.jsonl", "rows": 60}],
    "seeds": [0, 1],
    "prompts": {"harmful": 100, "harmless": 1},
    "warnings": ["Most answers only repeat themselves."],
    "scorers": {"sqsd": WINDOWS, "$x^": {**WINDOWS, "monotone": False}},
    "untuned": {"asr": 0.03, "ci": [0.0, 0.1], "over_refusal": 0.15},
    "judges": {"asr": "phrases", "agreement": [{"judges": ["phrases", "guard"], "answers": 1200, "share": 0.875}]},
    "arms": {"sqsd": {"kept": ARM, "random_minus_kept": {"asr": 0.1, "ci": [-0.05, 0.2]}}},
    "poisoned": {"sqsd": {"0.05": MIX}},
    "curves": {"roc": {"sqsd": [[0, 0], [0.2, 0.8], [1, 1]]}, "pr": {"sqsd": [[0, 1], [1, 0.3]]}},
}


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """A finished run, as far as `report` looks at it."""
    home = tmp_path / "out" / "sqsd"
    home.mkdir(parents=True)
    report, notes = noted(tmp_path, make_rows(30))
    write_page(home, report, notes)
    (home / "report.json").write_text(json.dumps({"status": "ok", **report}))
    return home.parent


def run(*arguments: object, capfd: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    capfd.readouterr()
    logger = logging.getLogger("sqsd_filter")
    level = logger.level
    with pytest.raises(SystemExit) as left:
        main(["report", *map(str, arguments)])
    logger.setLevel(level)  # the command set another
    out, err = capfd.readouterr()
    assert "Traceback" not in out + err
    return int(left.value.code or 0), out, err


def test_an_evaluation_is_shown_with_its_intervals(out: Path, tmp_path: Path, capfd: Any) -> None:
    (tmp_path / "results.json").write_text(json.dumps(RESULTS))
    code, told, err = run(out, "--evaluation", tmp_path / "results.json", "--json", capfd=capfd)
    assert (code, err) == (0, "")
    found = json.loads(told)
    assert [Path(path).stem for path in found["plots"]] == ["risk", "length", "asr", "roc", "pr"]
    page = Path(found["page"]).read_text(encoding="utf-8")
    assert len(page.encode()) == found["bytes"] < 1_000_000
    assert "tiny &amp; &lt;small&gt;, as pack tiny aligns it, was fine-tuned on sets of in.jsonl" in page
    assert '<td>sqsd</td><td class="number">50% (40% to 60%)</td>' in page
    assert '<td class="number">40%</td><td>yes</td>' in page
    assert '<td class="number">40%</td><td>no</td>' in page
    assert '<td class="number">5%</td><td class="number">75% (50% to 100%)</td>' in page
    first = ("50%", "25%", "2%", "1.250", "100", "2,345")
    assert "<td>sqsd</td><td>S1</td>" + "".join(f'<td class="number">{x}</td>' for x in ("25%", *first)) in page
    assert '<td>kept</td><td class="number">33% (25% to 50%)</td>' in page
    assert '<td>random minus kept</td><td class="number">10% (-5% to 20%)</td>' in page
    before = "Before that its attack success rate, by the judge phrases, was 3% (0% to 10%), and it refused 15%"
    assert f"{before} of the harmless prompts." in page
    assert "Most answers only repeat themselves." in page
    assert "and then asked 100 harmful prompts and 1 harmless prompt." in page
    assert "The judges phrases and guard agree on 88% of 1,200 answers." in page
    assert Seen(page).requests == []
    assert ">$x^</text>" in page
    assert run(out, "--evaluation", tmp_path, capfd=capfd)[0] == 0  # the folder of results.json
    assert Path(found["page"]).read_text(encoding="utf-8") == page
    assert run(out, capfd=capfd)[0] == 0
    assert "Evaluation" not in Path(found["page"]).read_text(encoding="utf-8")
    assert not (out / "sqsd/plots/asr.png").exists()


def test_a_drift_folder_is_drawn_from_its_report(out: Path, tiny_pack: Path, tmp_path: Path, capfd: Any) -> None:
    folder = tmp_path / "drift"
    write_drift(measure_drift(lora_run(tmp_path / "run", tiny_pack / "base"), load_pack(tiny_pack)), folder)
    assert run(out, "--drift", folder, capfd=capfd)[0] == 0
    page = (out / "sqsd/report.html").read_text(encoding="utf-8")
    assert "Drift by training step" in page
    assert "Speed of drift by training step" in page
    assert "Refusals by" not in page
    last = json.loads((folder / "drift.json").read_text())["checkpoints"][-1]
    assert f'<td class="number">{last["step"]}</td>' in page
    assert f'<td class="number">{last["risk_projection"]:.4g}</td>' in page


def test_steering_is_drawn_a_picture_a_direction(out: Path, tmp_path: Path, capfd: Any) -> None:
    point = {"refusal_rate": 0.5, "refusal_low": 0.4, "refusal_high": 0.6, "degenerate_rate": 0}
    point |= {"safe": None, "unsafe": -2.0, "margin": None}
    curve = {"points": [{"alpha": a, **point} for a in (-1, 0, 1)], "steers": False, "random": []}
    report = {"pack": "tiny", "settings": {"rows": {"pairs": 3}}}
    report |= {"directions": [{"name": name, **curve} for name in ("danger", "safety")]}
    (tmp_path / "steer.json").write_text(json.dumps(report))
    code, told, _ = run(out, "--steering", tmp_path, "--json", capfd=capfd)
    assert code == 0
    assert [Path(path).stem for path in json.loads(told)["plots"]][2:] == ["steer-0", "steer-1"]
    assert "Steering along safety: does not steer" in (out / "sqsd/report.html").read_text(encoding="utf-8")


DAMAGED = {
    "no JSON": "{",
    "no object": "[]",
    "nothing in it": json.dumps({**RESULTS, "scorers": {}, "arms": {}, "poisoned": {}}),
    "no scorers": json.dumps({"model": {}}),
    "no share": json.dumps({**RESULTS, "scorers": {"a": {**WINDOWS, "asr": [50, 25, 10]}}}),
    "NaN": json.dumps({**RESULTS, "scorers": {"a": {**WINDOWS, "asr": [float("nan")] * 3}}}),
    "an interval short": json.dumps({**RESULTS, "scorers": {"a": {**WINDOWS, "ci": [[0, 1]]}}}),
    "text for a number": json.dumps({**RESULTS, "scorers": {"a": {**WINDOWS, "spread": "wide"}}}),
    "half a point": json.dumps({**RESULTS, "curves": {"roc": {"sqsd": [[0.5]]}}}),
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_evaluation_is_one_sentence_and_leaves_the_page(
    content: str, out: Path, tmp_path: Path, capfd: Any
) -> None:
    (tmp_path / "results.json").write_text(content)
    before = (out / "sqsd/report.html").read_bytes()
    code, told, err = run(out, "--evaluation", tmp_path / "results.json", capfd=capfd)
    assert (code, told, err.count("\n")) == (3, "", 1)
    assert "results.json is damaged, or not what 'sqsd-filter evaluate' left" in err
    assert (out / "sqsd/report.html").read_bytes() == before


@pytest.mark.parametrize("option", ["--evaluation", "--drift", "--steering"])
def test_a_file_that_is_not_there_is_an_input_error(option: str, out: Path, tmp_path: Path, capfd: Any) -> None:
    code, told, err = run(out, option, tmp_path / "none", capfd=capfd)
    assert (code, told) == (3, "")
    assert "can't be read (No such file or directory)" in err


def test_what_cannot_be_drawn_is_told_of_its_file_without_assertions_too(tmp_path: Path) -> None:
    point = {"alpha": "wide", "refusal_rate": 0.5, "refusal_low": 0.4, "refusal_high": 0.6, "degenerate_rate": 0}
    curve = {"name": "danger", "points": [point], "steers": False, "random": []}
    report = {"pack": "tiny", "settings": {"rows": {"pairs": 0}}, "directions": [curve, curve | {"points": None}]}
    (tmp_path / "steer.json").write_text(json.dumps(report))
    script = f"""
from pathlib import Path
from sqsd_filter.errors import InputError
from sqsd_filter.pipeline.page.findings import steering
try:
    steering(Path({str(tmp_path)!r}))
except InputError as problem:
    print(problem)
"""
    done = subprocess.run([sys.executable, "-O", "-c", script], capture_output=True, text=True, check=True)
    assert "steer.json is damaged, or not what 'sqsd-filter steer' left" in done.stdout
