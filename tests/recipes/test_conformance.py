"""What trainers learn of common conversations, and what is scored of them here: recipes/conformance."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.recipes.scripts import RECIPES, load_script

FOLDER = RECIPES / "conformance"
DOCS = (RECIPES.parent / "docs" / "rows.md").read_text(encoding="utf-8")
TRAINERS = ("trl", "llamafactory", "axolotl")
END, LINE_END = 8, 9  # tokens


@pytest.fixture(scope="module")
def compare() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        yield load_script("conformance/compare.py", patch)


@pytest.fixture(scope="module")
def found(compare: ModuleType) -> Any:
    return compare.compare_all()


def test_the_golden_files_are_small_and_have_many_rows_of_three_trainers() -> None:
    assert sum(path.stat().st_size for path in FOLDER.rglob("*.json*")) < 300_000
    golden = {name: json.loads((FOLDER / "golden" / f"{name}.json").read_text(encoding="utf-8")) for name in TRAINERS}
    for name, file in golden.items():
        assert {name, "transformers", "tokenizers", "datasets"} == file["versions"].keys()
        for template in ("chatml", "llama3"):
            assert sum("ids" in result for result in file[template].values()) >= 40
    rows = (FOLDER / "rows.jsonl").read_text(encoding="utf-8").splitlines()
    assert f"`recipes/conformance` has {len(rows)} small conversations" in DOCS


def test_what_is_scored_is_what_the_trainers_learn_or_differs_for_a_reason(
    compare: ModuleType, found: dict[Any, Any]
) -> None:
    assert not [case for case, (kind, _) in found.items() if kind == "other" and not compare.reasons(case)]


def test_every_reason_has_rows_that_differ(compare: ModuleType, found: dict[Any, Any]) -> None:
    differing = {(trainer, row.partition(":")[0]) for (trainer, _, row), (kind, _) in found.items() if kind == "other"}
    named = {(name, row) for difference in compare.DIFFERENCES for name in TRAINERS for row in difference.rows(name)}
    assert named == differing


def test_the_tables_of_the_docs_are_those_of_the_golden_files(compare: ModuleType, found: dict[Any, Any]) -> None:
    lines = [*compare.count_lines(found), *compare.difference_lines()]
    assert [line for line in DOCS.splitlines() if line in lines] == lines


OURS: dict[str, Any] = {"ids": [1, 2, END, 3, 4], "learned": [[1, 3], [4, 5]]}
RESULTS: dict[str, tuple[dict[str, Any], str, bool]] = {  # theirs, what is found, are the ids the same
    "same": (OURS, "same", True),
    "more-after-the-answer": ({**OURS, "ids": [*OURS["ids"], 5, 6]}, "same", True),
    "another-token": ({**OURS, "ids": [7, 2, END, 3, 4]}, "other", False),
    "a-token-less": ({"ids": [1, 2, END, 3], "learned": [[1, 3]]}, "other", False),
    "a-label-less": ({**OURS, "learned": [[1, 2], [4, 5]]}, "other", True),
    "a-label-more": ({**OURS, "learned": [[1, 5]]}, "other", True),
    "learns-more-at-the-end": ({"ids": [*OURS["ids"], 5], "learned": [[1, 3], [4, 6]]}, "other", False),
    "line-end": ({"ids": [1, 2, END, 3, 4, LINE_END], "learned": [[1, 3], [4, 6]]}, "other", False),
    "nothing": ({"nothing": "dropped"}, "other", False),
}


@pytest.mark.parametrize("name", RESULTS)
def test_results_are_compared_token_by_token(compare: ModuleType, name: str) -> None:
    theirs, kind, same_ids = RESULTS[name]
    assert compare.compare(theirs, OURS, END, LINE_END) == (kind, same_ids)


def test_a_line_end_after_a_turn_is_told_from_other_tokens(compare: ModuleType) -> None:
    ours: dict[str, Any] = {"ids": [1, 2, END, LINE_END, 3, END], "learned": [[1, 3], [4, 6]]}
    theirs = {"ids": [*ours["ids"], LINE_END], "learned": [[1, 7]]}
    assert compare.compare(theirs, ours, END, LINE_END) == ("line end", True)
    assert compare.compare(theirs, ours, END, LINE_END + 1)[0] == "other"
    assert compare.compare({"nothing": "refused"}, {"nothing": "bad_row"}, END, LINE_END) == ("nothing", False)


def test_golden_files_of_other_rows_are_refused(compare: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare.trainers, "digest", lambda: "other")
    with pytest.raises(ValueError, match=r"golden/trl.json is of other rows or templates: run trainers.py trl again"):
        compare.read_golden("trl")


def test_it_prints_the_tables_and_what_has_no_reason(
    compare: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(compare, "compare_all", lambda: {("trl", "chatml", "plain"): ("other", True)})
    compare.main()
    out, err = capsys.readouterr()
    assert "| chatml | 1 | 1 | 0 | 0 | 0 | 1 |" in out
    assert compare.difference_lines()[-1] in out
    assert err == "trl chatml plain differs without a reason\n"


# ---------- what runs in the trainers' environments


def test_a_golden_file_has_what_a_trainer_gives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = load_script("conformance/trainers.py", monkeypatch)

    def learn(tokenizer: Any, row: dict[str, Any]) -> Any:
        if row["name"] == "plain":
            return {"answer": ([5, 6, 7], [-100, 6, -100])}
        if row["form"] == "preference":
            return {"chosen": ([5, 6], [-100, -100]), "rejected": "dropped"}
        raise KeyError(row["name"])

    monkeypatch.setitem(script.TRAINERS, "trl", learn)
    monkeypatch.setattr(script, "version", lambda name: "1")
    monkeypatch.setattr(script, "GOLDEN", tmp_path / "golden")
    script.main("trl")
    made = json.loads((tmp_path / "golden" / "trl.json").read_text(encoding="utf-8"))
    assert made["versions"]["trl"] == "1"
    assert made["inputs"] == script.digest()
    assert made["chatml"]["plain"] == {"ids": [5, 6, 7], "learned": [[1, 2]]}
    assert made["chatml"]["preference:chosen"] == {"nothing": "no label"}
    assert made["chatml"]["preference:rejected"] == {"nothing": "dropped"}
    assert made["llama3"]["one-word"] == {"nothing": "refused (KeyError)"}
    assert "alpaca" not in made["chatml"]  # of a form that TRL does not take


def test_labels_of_other_tokens_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    script = load_script("conformance/trainers.py", monkeypatch)
    with pytest.raises(ValueError, match="not those of the tokens"):
        script.learned_ranges([5, 6], [-100, 7])


def test_the_tokenizer_is_that_of_the_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = load_script("conformance/trainers.py", monkeypatch)
    for path in FOLDER.iterdir():
        if path.is_file():
            (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "tokenizer.json").unlink()
    monkeypatch.setattr(script, "HERE", tmp_path)
    script.write_tokenizer()
    text = "Übersetze: <|im_start|>the weather in Rome"
    made = script.make_tokenizer("chatml")
    monkeypatch.undo()
    assert made.decode(made(text)["input_ids"]) == text
    committed = load_script("conformance/trainers.py", monkeypatch).make_tokenizer("llama3")
    assert committed("hi")["input_ids"][0] == committed.bos_token_id
    assert len(committed) == len(made)


@pytest.mark.slow
def test_trl_still_gives_what_its_golden_file_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("trl")
    script = load_script("conformance/trainers.py", monkeypatch)
    monkeypatch.chdir(tmp_path)
    rows = [row for row in script.read_rows() if row["name"] in ("system-two-turns", "preference", "long-answer")]
    golden = json.loads((FOLDER / "golden" / "trl.json").read_text(encoding="utf-8"))
    made = dict(script.results_of("trl", "chatml", rows))
    assert made.keys() == {"system-two-turns", "preference:chosen", "preference:rejected", "long-answer"}
    assert made == {name: golden["chatml"][name] for name in made}
