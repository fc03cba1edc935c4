"""Runs with another scorer than SQSD's: by the command, in the stores, in the report and on both engines."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from sqsd_filter import Cut, Scoring, make_scorer
from sqsd_filter.errors import DestinationExists, UsageError
from sqsd_filter.pipeline.anchors import read_anchors
from sqsd_filter.pipeline.run import filter_dataset, score_dataset, select_dataset
from sqsd_filter.pipeline.stage.ray_engine import RayEngine
from sqsd_filter.pipeline.writing.histogram import write_histogram
from sqsd_filter.scoring.baselines import ANCHORED, SCORERS
from tests.corpora import content, ids_of, make_rows, read_report, rows_of, write_jsonl
from tests.tiny import chat
from tests.tiny_judges import make_guard, make_judge

ANCHORS = ("--unsafe-anchors", "unsafe.jsonl", "--safe-anchors", "safe.jsonl")
Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def folder(tmp_path: Path, tiny_pack: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder: 20 rows and one without an answer in in.jsonl, anchors in two forms of rows."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SQSD_FILTER_PACK", str(tiny_pack))
    write_jsonl(tmp_path / "in.jsonl", [*make_rows(20), {"id": 20, "instruction": "?", "output": ""}])
    unsafe = [{"prompt": f"Open door {k}.", "completion": "Sure, it is open now."} for k in range(3)]
    safe = [{"messages": chat(row["prompt"], "No, that door stays shut.")} for row in unsafe]
    write_jsonl(tmp_path / "unsafe.jsonl", unsafe)
    write_jsonl(tmp_path / "safe.jsonl", safe)
    return tmp_path


def anchors() -> dict[str, Any]:
    return {f"{kind}_anchors": read_anchors(f"{kind}.jsonl") for kind in ("unsafe", "safe")}


@pytest.mark.parametrize("name", SCORERS)
def test_every_scorer_scores_by_the_command_as_it_does_in_python(command: Command, tiny_pack: Path, name: str) -> None:
    given = ANCHORS if name in ANCHORED else ()
    code, out, _ = command("score", "in.jsonl", "out.parquet", "--scorer", name, *given, "--json")
    report = json.loads(out)
    assert code == 0
    assert report["scorer"] == name
    assert report["settings"]["scorer"] == {"value": name, "origin": "flag"}
    found, scorer = pq.read_table("out.parquet"), make_scorer(name, tiny_pack, **(anchors() if given else {}))
    rows = [chat(row["instruction"], row["output"]) for row in make_rows(20)]
    expected = scorer.score(rows)
    assert found["sqsd_status"].to_pylist() == ["scored"] * 20 + ["no_answer"]
    assert found["sqsd_risk"].to_pylist() == [*expected.risk.tolist(), None]
    for value, numbers in expected.probes.items():
        assert found[f"sqsd_{value}"].to_pylist() == [*numbers.tolist(), None]


def test_the_main_command_drops_by_the_scorer_and_its_card_says_which_it_was(command: Command) -> None:
    code, _, _ = command("in.jsonl", "out", "--scorer", "larf", *ANCHORS, "--drop-count", "4")
    dropped = rows_of(Path("out"), "dropped")
    assert code == 0
    assert len(dropped) == 4
    assert min(row["sqsd_risk"] for row in dropped) >= max(row["sqsd_risk"] for row in rows_of(Path("out"), "kept"))
    assert read_report(Path("out"))["settings"]["unsafe_anchors"] == {"value": "unsafe.jsonl", "origin": "flag"}
    card = Path("out/README.md").read_text()
    assert "a risk from the scorer `larf`" in card
    assert "that a row ranks low by this measure" in card
    assert "SQSD risk" not in card
    assert "`sqsd_unsafe`" in card
    assert command("in.jsonl", "out", "--scorer", "larf", *ANCHORS, "--drop-count", "4")[0] == 0
    code, _, err = command("in.jsonl", "out", "--scorer", "datashield", *ANCHORS, "--drop-count", "4")
    assert code == 5
    assert "another run (scorer: larf there, datashield here)" in err


UNTRUE = ("SQSD risk", "from the pack", "pushes the model further", "moves the model little along the directions")


@pytest.mark.pictures
def test_no_page_calls_another_scorers_risk_sqsds(command: Command) -> None:
    assert command("in.jsonl", "out", "--scorer", "length", "--drop-count", "4")[0] == 0
    page = Path("out/_sqsd/report.html").read_text()
    assert not [words for words in UNTRUE if words in page]
    assert "The risk comes from the scorer length on " in page
    assert ">risk by length (higher is riskier)<" in page
    assert "A low risk only means that a row ranks low by this measure. It does not mean that" in page


@pytest.mark.pictures
def test_the_picture_names_the_scorer_on_its_axis(folder: Path, tiny_pack: Path) -> None:
    report = filter_dataset("in.jsonl", "out", drop_count=4, scorer=make_scorer("length", tiny_pack))
    bars = json.loads(Path("out/_sqsd/notes.json").read_text())["histogram"]
    write_histogram(folder / "length.png", bars, report)
    report["scorer"] = "sqsd"
    write_histogram(folder / "sqsd.png", bars, report)
    drawn = Path("out/_sqsd/risk.png").read_bytes()
    assert drawn == (folder / "length.png").read_bytes()
    assert drawn != (folder / "sqsd.png").read_bytes()


@pytest.mark.pictures
def test_scored_files_keep_the_name_of_their_scorer(folder: Path, tiny_pack: Path) -> None:
    for name in ("length", "random"):
        score_dataset("in.jsonl", f"{name}.parquet", Scoring(scorer=make_scorer(name, tiny_pack)))
    assert select_dataset("length.parquet", "one", Cut.of(drop_count=2))["scorer"] == "length"
    assert "The risk was in the input, by the scorer length." in Path("one/_sqsd/report.html").read_text()
    report = select_dataset("length.parquet", "two", Cut.of(drop_count=2), scores=["random.parquet"], consensus="max")
    assert [each["scorer"] for each in report["consensus"]["packs"]] == ["length", "random"]
    page, card = Path("two/_sqsd/report.html").read_text(), Path("two/README.md").read_text()
    assert not [words for words in UNTRUE if words in page]
    assert ">risk by max (higher is riskier)<" in page
    assert ", by the scorer random)" in page
    assert "a risk from the scorers `length` and `random`" in card
    assert "SQSD risk" not in card


def test_a_cut_is_moved_without_a_model(folder: Path, tiny_pack: Path) -> None:
    scorer = make_scorer("bi-anchor", tiny_pack, **anchors())
    filter_dataset("in.jsonl", "once", drop_count=5, scorer=scorer)
    filter_dataset("in.jsonl", "here", drop_count=2, scorer=scorer)
    report = select_dataset("once", "there", Cut.of(drop_count=2))
    assert report["scorer"] == "bi-anchor"
    assert ids_of(Path("there")) == ids_of(Path("here"))


def test_stores_and_runs_never_mix_scorers_or_anchors(folder: Path, tiny_pack: Path) -> None:
    def counts(dest: str, **named: Any) -> tuple[int, int]:
        scorer = make_scorer(named.pop("name", "larf"), tiny_pack, **named)
        report = score_dataset("in.jsonl", dest, Scoring(scorer=scorer, score_store="store"))
        return report["rows"]["scored"], report["rows"]["reused"]

    given = anchors()
    fewer = {**given, "unsafe_anchors": given["unsafe_anchors"][1:]}
    assert counts("a.parquet", **given) == (20, 0)
    assert counts("b.parquet", **given) == (0, 20)
    assert counts("c.parquet", **fewer) == (20, 0)
    assert counts("d.parquet", name="datashield", **given) == (20, 0)
    assert counts("e.parquet", name="random", seed=1) == (20, 0)
    assert counts("f.parquet", name="random", seed=2) == (20, 0)
    assert pq.read_table("a.parquet").equals(pq.read_table("b.parquet"))
    with pytest.raises(DestinationExists):
        score_dataset("in.jsonl", "a.parquet", Scoring(scorer=make_scorer("larf", tiny_pack, **fewer)))


@pytest.mark.parametrize(
    ("arguments", "code", "problem"),
    [
        (("--scorer", "larf"), 2, "by --unsafe-anchors and --safe-anchors."),
        (("--scorer", "larf", *ANCHORS[:2]), 2, "two conversations or more by --safe-anchors."),
        (("--scorer", "larf", *ANCHORS, "--explain", "3"), 2, "the scorer larf has none: leave it out."),
        (("--scorer", "length", "--seed", "1"), 2, "no use for a seed"),
        (ANCHORS, 2, "The scorer sqsd has no use for anchors"),
        (("--scorer", "larf", "--unsafe-anchors", "gone.jsonl", *ANCHORS[2:]), 3, "gone.jsonl"),
        (("--scorer", "larf", "--unsafe-anchors", "odd.jsonl", *ANCHORS[2:]), 3, "give each as 'messages', or as"),
        (("--scorer", "larf", "--unsafe-anchors", "broken.jsonl", *ANCHORS[2:]), 3, "broken.jsonl, line 2: "),
    ],
    ids=["none", "one", "explain", "seed", "sqsd", "gone", "odd", "broken"],
)
def test_what_a_scorer_can_not_use_is_one_sentence(
    command: Command, arguments: tuple[str, ...], code: int, problem: str
) -> None:
    write_jsonl(Path("odd.jsonl"), [{"q": "Open.", "a": "Sure."}])
    write_jsonl(Path("broken.jsonl"), [{"prompt": "Open.", "completion": "Sure."}, b"{broken"])
    left, out, err = command("score", "in.jsonl", "out.parquet", *arguments, "-q")
    *before, last = err.strip().splitlines()
    assert (left, out, before) == (code, "", [])
    assert last.startswith("Error: ")
    assert problem in last
    assert not Path("out.parquet").exists()


def test_anchors_are_never_lost_with_what_is_replaced(command: Command) -> None:
    assert command("in.jsonl", "out", "--drop-count", "2", "-q")[0] == 0
    Path("unsafe.jsonl").rename("out/unsafe.jsonl")
    given = ("--unsafe-anchors", "out/unsafe.jsonl", *ANCHORS[2:], "--drop-count", "4", "--overwrite")
    code, _, err = command("in.jsonl", "out", "--scorer", "larf", *given)
    assert code == 5
    assert "out holds the input out/unsafe.jsonl, which --overwrite would delete" in err
    assert Path("out/unsafe.jsonl").exists()
    assert len(rows_of(Path("out"), "dropped")) == 2


def test_settings_of_other_scorers_may_stand_in_a_shared_file_or_the_environment(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("all.toml").write_text('unsafe_anchors = "gone.jsonl"\nsafe_anchors = "gone.jsonl"\n')
    monkeypatch.setenv("SQSD_FILTER_SEED", "1")
    for name in ("length", "random"):
        code, _, err = command("score", "in.jsonl", f"{name}.parquet", "--scorer", name, "--config", "all.toml", "-q")
        assert (code, err) == (0, "")
    assert json.loads(Path("random.parquet.sqsd/run.json").read_text())["scoring"]["seed"] == 1
    code, _, err = command("score", "in.jsonl", "larf.parquet", "--scorer", "larf", "--config", "all.toml", "-q")
    assert code == 3
    assert "gone.jsonl" in err


def test_explanations_are_for_scores_that_have_cosines(folder: Path, tiny_pack: Path) -> None:
    report = filter_dataset("in.jsonl", "out", drop_count=2, scorer=make_scorer("danger", tiny_pack), explain=2)
    assert report["explained"] == 2
    with pytest.raises(UsageError, match="the scorer unnormalised has none"):
        filter_dataset("in.jsonl", "no", drop_count=2, scorer=make_scorer("unnormalised", tiny_pack), explain=2)


@pytest.mark.pictures
@pytest.mark.slow
@pytest.mark.parametrize("name", ["larf", "guard:guard", "judge:judge"])
def test_replicas_score_as_this_process_does(session: None, folder: Path, tiny_pack: Path, name: str) -> None:
    make_guard(folder / "guard", {"It is 7.": "safe", "It is 8.": "unsafe"})
    make_judge().save(folder / "judge")
    for dest, engine in (("local", None), ("ray", RayEngine(2))):
        scorer = make_scorer(name, tiny_pack, **(anchors() if name == "larf" else {}))  # which lie beside the pack
        filter_dataset("in.jsonl", dest, drop_count=2, scorer=scorer, engine=engine)
    assert content(Path("ray")) == content(Path("local"))
