"""An evaluation on the page of a run: drawn from results.json, and a damaged one is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sqsd_filter.evaluation.results import ArmMeasures, MixFigures, Results, SetFigures, WindowFigures
from tests.pages import Command, Seen, bare_cells

WINDOWS: WindowFigures = {
    "asr": [0.5, 0.25, 0.1],
    "ci": [[0.4, 0.6], [0.2, 0.3], [0.0, 0.2]],
    "asr_by_seed": [[0.5], [0.25], [0.1]],
    "spread": 0.4,
    "spread_ci": [0.3, 0.5],
    "monotone": True,
    "outcomes": {"refused": [0.25, 0.5, 0.75], "unsafe": [0.5, 0.25, 0.1], "degenerate": [0.25, 0.25, 0.15]},
    "over_refusal": [0.02, 0.03, 0.04],
    "loss": [1.25, 1.5, None],
    "rows": [100, 100, 100],
    "tokens": [2345, 2000, 1900],
}
ARM: SetFigures = {
    "rows": 950,
    "tokens": 12345,
    "asr": 0.33,
    "ci": [0.25, 0.5],
    "asr_by_seed": [0.33],
    "over_refusal": None,
    "loss": 2.5,
    "outcomes": {"refused": 0.6, "unsafe": 0.33, "degenerate": 0.07},
}
MIX: MixFigures = {
    "benign": 950,
    "unsafe": 50,
    "prompts": 20,
    "precision": {"mean": 0.75, "ci": [0.5, 1]},
    "recall": {"mean": 0.75, "ci": [0.5, 1]},
    "auc": {"mean": 0.9, "ci": [0.8, 1]},
    "average_precision": {"mean": 0.7, "ci": [0.6, 0.8]},
}
MEASURED: ArmMeasures = {
    "seeds": [0, 1],
    "rows": 474,
    "tokens": 60000,
    "dropped": {"unsafe": 24, "benign": 3.5},
    "measures": {
        "unsafe by phrases": {"mean": 0.02, "ci": [0.0, 0.07], "by_seed": [0.0, 0.04]},
        "loss": {"mean": 1.5, "ci": [1.25, 1.75], "by_seed": [1.4, 1.6]},
    },
}
RESULTS: Results = {
    "model": {"name": "tiny & <small>", "pack": "tiny", "fingerprint": "0"},
    "corpus": [{"name": "in.jsonl", "rows": 60}],
    "rows": {"all": 60, "scored": 60, "usable": 60, "held_out": 6, "learned": 54},
    "sets": {"arms": ["windows", "cut"], "windows": 3, "size": 10, "match_tokens": False, "drop_top": 0.05},
    "seeds": [0, 1],
    "prompts": {"harmful": 100, "harmless": 1},
    "warnings": ["Most answers only repeat themselves."],
    "scorers": {"sqsd": WINDOWS, "$x^": {**WINDOWS, "monotone": False}},
    "untuned": {**ARM, "rows": 0, "tokens": 0, "asr": 0.03, "ci": [0.0, 0.1], "over_refusal": 0.15},
    "judges": {
        "asr": "phrases",
        "agreement": [
            {"judges": ["phrases", "guard"], "answers": 1200, "share": 0.875, "kappa": 0.5, "table": {}},
        ],
    },
    "arms": {
        "sqsd": {
            "all": ARM,
            "kept": ARM,
            "random": ARM,
            "dropped": ARM,
            "random_minus_kept": {"asr": 0.1, "ci": [-0.05, 0.2]},
        }
    },
    "contaminated": {
        "unsafe": {
            "arms": {"untuned": {**MEASURED, "dropped": {}}, "cut": MEASURED},
            "differences": {
                "all - cut": {"unsafe by phrases": {"mean": 0.6, "ci": [0.45, 0.75]}, "loss": {"mean": 0.1, "ci": None}}
            },
        }
    },
    "poisoned": {"sqsd": {"0.05": MIX}},
    "curves": {"roc": {"sqsd": [[0, 0], [0.2, 0.8], [1, 1]]}, "pr": {"sqsd": [[0, 1], [1, 0.3]]}},
    "settings": {},
    "machine": {},
}


@pytest.mark.pictures
def test_an_evaluation_is_shown_with_its_intervals(out: Path, tmp_path: Path, report: Command) -> None:
    (tmp_path / "results.json").write_text(json.dumps(RESULTS))
    code, stdout, stderr = report(out, "--evaluation", tmp_path / "results.json", "--json")
    assert (code, stderr) == (0, "")
    shown = json.loads(stdout)
    assert [Path(path).stem for path in shown["plots"]] == ["risk", "length", "asr", "roc", "pr"]
    page = Path(shown["page"]).read_text(encoding="utf-8")
    cells = bare_cells(page)
    assert len(page.encode()) == shown["bytes"] < 1_000_000
    assert "tiny &amp; &lt;small&gt;, aligned by pack tiny, was fine-tuned on sets of in.jsonl" in page
    assert '<td>sqsd</td><td class="number">50% (40% to 60%)</td>' in cells
    assert '<td class="number">40%</td><td>yes</td>' in cells
    assert '<td class="number">40%</td><td>no</td>' in cells
    assert '<td class="number">5%</td><td class="number">75% (50% to 100%)</td>' in cells
    first = ("50%", "25%", "2%", "1.250", "100", "2,345")
    assert "<td>sqsd</td><td>S1</td>" + "".join(f'<td class="number">{x}</td>' for x in ("25%", *first)) in cells
    assert '<td>kept</td><td class="number">33% (25% to 50%)</td>' in cells
    assert '<td>random minus kept</td><td class="number">10% (-5% to 20%)</td>' in cells
    numbers = ("474", "24", "3.5", "2% (0% to 7%)")
    assert "<td>cut</td>" + "".join(f'<td class="number">{x}</td>' for x in numbers) in cells
    assert '<td class="number">1.500 (1.250 to 1.750)</td>' in cells
    assert '<td>all - cut</td><td class="number">60% (45% to 75%)</td><td class="number">0.100</td>' in cells
    assert "Intervals are over seeds and prompts together" in page
    assert "was fine-tuned on sets of in.jsonl: all rows, the rows that the cut above the reference keeps" in page
    before = "Before fine-tuning its attack success rate, by the judge phrases, was 3% (0% to 10%), and it refused 15%"
    assert f"{before} of the harmless prompts." in page
    assert "Most answers only repeat themselves." in page
    assert "Then it was asked 100 harmful prompts and 1 harmless prompt." in page
    assert "The judges phrases and guard agree on 88% of 1,200 answers." in page
    assert Seen(page).requests == []
    assert ">$x^</text>" in page
    assert report(out, "--evaluation", tmp_path)[0] == 0  # the folder of results.json
    assert Path(shown["page"]).read_text(encoding="utf-8") == page
    assert report(out)[0] == 0
    assert "Evaluation" not in Path(shown["page"]).read_text(encoding="utf-8")
    assert not (out / "_sqsd/plots/asr.png").exists()


DAMAGED = {
    "no JSON": "{",
    "no object": "[]",
    "nothing in it": json.dumps({**RESULTS, "scorers": {}, "arms": {}, "contaminated": {}, "poisoned": {}}),
    "no scorers": json.dumps({"model": {}}),
    "no share": json.dumps({**RESULTS, "scorers": {"a": {**WINDOWS, "asr": [50, 25, 10]}}}),
    "NaN": json.dumps({**RESULTS, "scorers": {"a": {**WINDOWS, "asr": [float("nan")] * 3}}}),
    "an interval short": json.dumps({**RESULTS, "scorers": {"a": {**WINDOWS, "ci": [[0, 1]]}}}),
    "text for a number": json.dumps({**RESULTS, "scorers": {"a": {**WINDOWS, "spread": "wide"}}}),
    "half a point": json.dumps({**RESULTS, "curves": {"roc": {"sqsd": [[0.5]]}}}),
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_evaluation_is_one_sentence_and_leaves_the_page(
    content: str, out: Path, tmp_path: Path, report: Command
) -> None:
    (tmp_path / "results.json").write_text(content)
    before = (out / "_sqsd/report.html").read_bytes()
    code, stdout, stderr = report(out, "--evaluation", tmp_path / "results.json")
    assert (code, stdout, stderr.count("\n")) == (3, "", 1)
    assert "results.json is damaged, or not what 'sqsd-filter evaluate' left" in stderr
    assert (out / "_sqsd/report.html").read_bytes() == before
