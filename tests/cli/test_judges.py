"""Runs with `--scorer guard:MODEL` and `--scorer judge:FOLDER`: every row accounted for, stores never mixed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from sqsd_filter import make_scorer
from tests.corpora import FOLDERS, read_report, rows_of, write_jsonl
from tests.tiny import chat
from tests.tiny_judges import QUESTION, make_guard, make_judge

Command = Callable[..., tuple[int, str, str]]
VERDICTS = {
    **dict.fromkeys(("Bake the pie.", "Eat the pie.", "Take the pie, then."), "\n\nunsafe"),
    **dict.fromkeys(("We saw a heron.", "Take the road.", "The sea is deep."), "\n\nsafe"),
}
TEXTS = [answer for answer in VERDICTS for _ in range(3)]


@pytest.fixture(scope="module")
def judges(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a guard, pie-guard, and a trained judge, pies."""
    root = tmp_path_factory.mktemp("judges")
    make_guard(root / "pie-guard", VERDICTS)
    make_judge().save(root / "pies")
    return root


@pytest.fixture
def folder(tmp_path: Path, tiny_pack: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder: in.jsonl with 18 rows, of which half are about pies, and two without an answer."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SQSD_FILTER_PACK", str(tiny_pack))
    rows = [{"id": k, "instruction": f"{k}. {QUESTION}", "output": text} for k, text in enumerate([*TEXTS, "", " "])]
    write_jsonl(tmp_path / "in.jsonl", rows)
    return tmp_path


@pytest.mark.parametrize("name", ["guard:pie-guard", "judge:pies"])
def test_rows_are_dropped_by_the_judge_and_all_are_accounted_for(
    command: Command, judges: Path, tiny_pack: Path, name: str
) -> None:
    kind, _, judge = name.partition(":")
    scorer = f"{kind}:{judges / judge}"
    code, _, _ = command("in.jsonl", "out", "--scorer", scorer, "--drop-top", "20%")
    assert code == 0
    splits = {split: rows_of(Path("out"), split) for split in FOLDERS}
    assert sorted(row["id"] for rows in splits.values() for row in rows) == list(range(20))
    assert [len(rows) for rows in splits.values()] == [14, 4, 2]
    assert all("pie" in row["output"] for row in splits["dropped"])
    assert min(row["sqsd_unsafe"] for row in splits["dropped"]) >= max(row["sqsd_unsafe"] for row in splits["kept"])
    assert {row["sqsd_status"] for row in splits["errors"]} == {"no_answer"}
    report = read_report(Path("out"))
    assert report["scorer"] == name
    assert report["settings"]["scorer"] == {"value": scorer, "origin": "flag"}
    assert f"a risk from the scorer `{name}`" in Path("out/README.md").read_text()
    kept = {row["id"]: row["sqsd_risk"] for split in ("kept", "dropped") for row in splits[split]}
    expected = make_scorer(scorer, tiny_pack).score([chat(f"{k}. {QUESTION}", text) for k, text in enumerate(TEXTS)])
    np.testing.assert_array_equal([kept[k] for k in range(18)], expected.risk)


def test_stored_scores_are_reused_by_the_same_judge_alone(command: Command, judges: Path, tmp_path: Path) -> None:
    def counts(dest: str, scorer: str) -> tuple[int, int]:
        given = ("--scorer", scorer, "--score-store", "store", "--json")
        code, out, _ = command("score", "in.jsonl", dest, *given)
        assert code == 0
        rows = json.loads(out)["rows"]
        return rows["scored"], rows["reused"]

    other = make_guard(tmp_path / "pie-guard", dict.fromkeys(VERDICTS, "safe"))
    assert counts("a.parquet", f"guard:{judges / 'pie-guard'}") == (18, 0)
    assert counts("b.parquet", f"guard:{judges / 'pie-guard'}") == (0, 18)
    assert counts("c.parquet", f"guard:{other}") == (18, 0)
    assert counts("d.parquet", f"judge:{judges / 'pies'}") == (18, 0)
    assert counts("e.parquet", f"judge:{judges / 'pies'}") == (0, 18)
    assert pq.read_table("a.parquet").equals(pq.read_table("b.parquet"))
    code, _, err = command("score", "in.jsonl", "a.parquet", "--scorer", f"guard:{other}")
    assert code == 5
    assert "another run" in err


@pytest.mark.parametrize(
    ("scorer", "more", "code", "problem"),
    [
        ("larff", (), 2, "There is no scorer 'larff': choose one of sqsd, danger, "),
        ("length:x", (), 2, "There is no scorer 'length:x': choose one of sqsd, danger, "),
        ("guard", (), 2, "The scorer guard needs the name of a model: write guard:MODEL."),
        ("guard:", (), 2, "The scorer guard needs the name of a model: write guard:MODEL."),
        ("judge:", (), 2, "The scorer judge needs the name of a folder: write judge:FOLDER."),
        ("guard:org/guard", ("--model", "org/other"), 2, "guard:org/guard is a model itself: leave out --model."),
        ("guard:org/guard", ("--seed", "1"), 2, "no use for a seed"),
        ("judge:nowhere", (), 1, "nowhere does not hold a whole judge"),
    ],
)
def test_a_scorer_that_is_not_there_is_one_sentence(
    command: Command, scorer: str, more: tuple[str, ...], code: int, problem: str
) -> None:
    left, out, err = command("score", "in.jsonl", "out.parquet", "--scorer", scorer, *more, "-q")
    last = err.strip().splitlines()[-1]
    assert (left, out) == (code, "")
    assert last.startswith("Error: ")
    assert problem in last
    assert not Path("out.parquet").exists()


def test_a_judge_may_be_named_in_a_settings_file_and_its_cost_is_estimated(command: Command, judges: Path) -> None:
    Path("guard.toml").write_text(f'scorer = "guard:{judges / "pie-guard"}"\n')
    code, out, _ = command("in.jsonl", "out", "--drop-top", "20%", "--config", "guard.toml", "--dry-run")
    assert code == 0
    assert "; one pass through the model" in out
    code, out, _ = command("in.jsonl", "out", "--drop-top", "20%", "--scorer", f"judge:{judges / 'pies'}", "--dry-run")
    assert code == 0
    assert "; no pass through the model" in out
    Path("unknown.toml").write_text('scorer = "larff"\n')
    code, _, err = command("in.jsonl", "out", "--drop-top", "20%", "--config", "unknown.toml")
    assert code == 2
    assert "There is no scorer 'larff'" in err
