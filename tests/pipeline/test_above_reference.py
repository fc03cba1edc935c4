"""The cut with a reason: every row that is riskier than a share of the pack's benign reference rows is dropped."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from sqsd_filter import Cut, Scoring, Writing, filter_dataset, make_scorer, score_dataset, select, select_dataset
from sqsd_filter.errors import DestinationExists, SQSDError, UsageError
from sqsd_filter.pipeline.meaning import Meaning, percent
from sqsd_filter.pipeline.selecting.groups import Groups
from sqsd_filter.pipeline.selecting.selection import DROPPED, cut_rows
from sqsd_filter.scoring.pack import load_pack
from sqsd_filter.scoring.scorer import SQSDScorer
from tests.commands import one_sentence
from tests.corpora import ids_of, make_rows, rows_of, write_jsonl
from tests.references import calibrated

datasets.disable_progress_bars()

Command = Callable[..., tuple[int, str, str]]
BENIGN = [[k / 100 for k in range(-100, 50)], [k / 50 for k in range(-50, 25)]]  # 150 and 75 rows
UNSAFE = [[k / 50 for k in range(-20, 80)]]
ROWS = [{**row, "kind": "ab"[k % 2]} for k, row in enumerate(make_rows(60))]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "in.jsonl", ROWS)
    return tmp_path


@pytest.fixture
def pack(tiny_pack: Path, folder: Path) -> Path:
    return calibrated(tiny_pack, folder / "pack", BENIGN, UNSAFE)


def level_of(share: float) -> float:
    return float(np.quantile(np.concatenate(BENIGN), share, method="inverted_cdf"))


def all_risks(pack: Path) -> dict[int, float]:
    score_dataset("in.jsonl", "all.parquet", Scoring(pack=pack))
    table = pq.read_table("all.parquet")
    return dict(zip(table["id"].to_pylist(), table["sqsd_risk"].to_pylist(), strict=True))


def test_filter_drops_what_is_above_the_quantile_of_all_benign_rows(pack: Path) -> None:
    risks = all_risks(pack)
    report = filter_dataset("in.jsonl", "out", above_reference="80%", pack=pack)
    level = level_of(0.8)
    gone = [row for row, risk in risks.items() if risk > level]
    assert 0 < len(gone) < 60
    assert ids_of(Path("out"), "dropped") == gone
    assert report["reference"]["threshold"] == level
    assert report["cut"] == "above-reference 80%"
    card = Path("out/README.md").read_text()
    assert "riskier than 80% of the benign reference rows" in card
    assert f"a risk above {level:.6g}" in card


@pytest.mark.parametrize("source", ["run", "all.parquet"])
def test_select_knows_the_pack_from_the_scores(pack: Path, source: str) -> None:
    risks = all_risks(pack)
    filter_dataset("in.jsonl", "run", drop_count=0, pack=pack)
    report = select_dataset(source, "out", Cut.of(above_reference="90%"))
    assert ids_of(Path("out"), "dropped") == [row for row, risk in risks.items() if risk > level_of(0.9)]
    assert report["reference"]["threshold"] == level_of(0.9)


def test_select_with_a_pack_that_was_calibrated_or_moved_later(tiny_pack: Path, folder: Path) -> None:
    own = shutil.copytree(tiny_pack, folder / "own", ignore=shutil.ignore_patterns("base"))
    filter_dataset("in.jsonl", "run", drop_count=0, pack=own)
    cut = Cut.of(above_reference="90%")
    with pytest.raises(UsageError, match=r"^The pack tiny has no reference rows .* calibrate"):
        select_dataset("run", "out", cut)
    calibrated(own, own, BENIGN)
    here = select_dataset("run", "out", cut)
    shutil.move("own", "moved")
    with pytest.raises(UsageError, match=r"not here: name it with pack \(--pack\)\.$"):
        select_dataset("run", "other", cut)
    there = select_dataset("run", "other", cut, pack="moved")
    assert ids_of(Path("other"), "dropped") == ids_of(Path("out"), "dropped")
    assert there["reference"] == here["reference"]


def test_scores_of_an_unknown_pack_need_its_name(pack: Path) -> None:
    risks = all_risks(pack)
    shutil.rmtree("all.parquet.sqsd")
    cut = Cut.of(above_reference="90%")
    with pytest.raises(UsageError, match=r"^It is not known which pack"):
        select_dataset("all.parquet", "out", cut)
    select_dataset("all.parquet", "out", cut, pack=pack)
    assert ids_of(Path("out"), "dropped") == [row for row, risk in risks.items() if risk > level_of(0.9)]


@pytest.mark.parametrize("stream", [False, True], ids=["dataset", "stream"])
def test_select_of_a_dataset(pack: Path, stream: bool) -> None:
    risks = all_risks(pack)
    scored: Any = Dataset.from_parquet("all.parquet")
    scored = scored.to_iterable_dataset() if stream else scored
    kept, dropped, errors = select(scored, above_reference=0.9, pack=pack)
    assert isinstance(kept, type(scored))
    assert [row["id"] for row in dropped] == [row for row, risk in risks.items() if risk > level_of(0.9)]
    assert len(list(kept)) + len(list(dropped)) == 60
    assert not list(errors)
    with pytest.raises(UsageError, match=r"name it with pack \(--pack\)"):
        select(scored, above_reference="90%")


def test_a_finished_run_is_not_done_once_the_pack_is_calibrated_anew(pack: Path) -> None:
    filter_dataset("in.jsonl", "out", above_reference="90%", pack=pack)
    filter_dataset("in.jsonl", "top", drop_top="5%", pack=pack)
    assert filter_dataset("in.jsonl", "out", above_reference="90%", pack=pack)["already_done"]
    calibrated(pack, pack, [[risk + 0.1 for risk in BENIGN[0]]], UNSAFE)
    assert filter_dataset("in.jsonl", "top", drop_top="5%", pack=pack)["already_done"]
    with pytest.raises(DestinationExists, match="reference"):
        filter_dataset("in.jsonl", "out", above_reference="90%", pack=pack)
    again = filter_dataset("in.jsonl", "out", above_reference="90%", pack=pack, overwrite=True)
    assert (again["rows"]["scored"], again["rows"]["reused"]) == (0, 60)
    assert again["reference"]["threshold"] != level_of(0.9)


@pytest.mark.parametrize("apart", [{"per_group": "kind"}, {"per_split": True}, {"weights": True}], ids=str)
def test_the_threshold_is_the_same_for_all(pack: Path, apart: dict[str, Any]) -> None:
    risks = all_risks(pack)
    level = level_of(0.8)
    gone = [row for row, risk in risks.items() if risk > level]
    report = filter_dataset("in.jsonl", "out", above_reference="80%", pack=pack, **apart)
    if "weights" in apart:
        assert report["weights"]["threshold"] == level
        above = [row["id"] for row in rows_of(Path("out"), "kept") if row["sqsd_weight"] < 0.5]
        assert above == gone
        assert "planted" not in report["reference"]
    else:
        assert ids_of(Path("out"), "dropped") == gone
        assert report["groups"]["spared"] == 0
        assert sum(group["dropped"] for group in report["groups"]["groups"]) == len(gone)
        assert report["reference"]["planted"] is not None


@settings(deadline=None)
@given(
    risks=st.lists(st.integers(-5, 5).map(float), min_size=1, max_size=40),
    level=st.integers(-6, 6).map(float),
    codes=st.lists(st.integers(0, 3), min_size=40, max_size=40),
)
def test_groups_and_splits_change_no_fate(risks: list[float], level: float, codes: list[int]) -> None:
    risk = np.array(risks)
    everyone = np.ones(len(risk), bool)
    groups = Groups(np.array(codes[: len(risk)], np.int32), list("abcd"))
    cut = Cut.of(above_reference="50%").at(level)
    apart = Cut.of(above_reference="50%", per_group="g", per_split=True).at(level)
    plain = cut_rows(risk, everyone, cut)
    assert (plain.fate == DROPPED).tolist() == (risk > level).tolist()
    selection = cut_rows(risk, everyone, apart, splits=groups, groups=groups)
    assert selection.fate.tolist() == plain.fate.tolist()
    assert selection.spared == 0


@pytest.mark.parametrize(
    ("share", "words"),
    [
        ("99.9%", "225 benign reference rows, which can't show 99.9%: that needs at least 1,000"),
        ("100%", "smaller share"),
        ("99", "write above_reference (--above-reference) 99%"),
        ("-1%", "not a share"),
    ],
)
def test_a_share_that_the_reference_can_not_show_is_an_error_before_any_work(
    pack: Path, share: str, words: str
) -> None:
    with pytest.raises(UsageError) as problem:
        filter_dataset("in.jsonl", "out", above_reference=share, pack=pack)
    assert words in str(problem.value)
    assert not Path("out").exists()


def test_a_pack_without_a_reference_changes_nothing_and_can_not_be_asked(tiny_pack: Path, folder: Path) -> None:
    with pytest.raises(UsageError, match=r"^The pack tiny has no reference rows .* 'sqsd-filter pack calibrate'"):
        filter_dataset("in.jsonl", "out", above_reference="99%", pack=tiny_pack)
    report = filter_dataset("in.jsonl", "out", drop_top="5%", pack=tiny_pack)
    assert "reference" not in report
    assert "reference" not in (folder / "out/README.md").read_text()
    assert "reference" not in json.loads(Path("out/_sqsd/run.json").read_text())


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda pack: SQSDScorer(pack, max_length=100), "max_length 256, these rows by max_length 100"),
        (lambda pack: SQSDScorer(load_pack(pack).at_one_state("initial")), "the shared state initial"),
        (lambda pack: make_scorer("length", pack), "these rows by the scorer length"),
    ],
    ids=["length limit", "shared state", "scorer"],
)
def test_a_reference_that_does_not_apply_is_named_and_not_used(
    pack: Path, make: Callable[[Path], Any], words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        filter_dataset("in.jsonl", "out", above_reference="99%", scorer=make(pack))
    report = filter_dataset("in.jsonl", "out", drop_count=2, scorer=make(pack))
    assert report["reference"].keys() == {"mismatch"}
    assert words in report["reference"]["mismatch"]
    assert words in Path("out/README.md").read_text()
    assert words in select_dataset("out", "again", Cut.of(drop_count=3))["reference"]["mismatch"]


def test_ranks_of_several_packs_have_no_reference(pack: Path) -> None:
    all_risks(pack)
    shutil.copytree("all.parquet.sqsd", "b.parquet.sqsd")
    shutil.copy("all.parquet", "b.parquet")
    how: dict[str, Any] = {"scores": ["b.parquet"], "consensus": "max"}
    with pytest.raises(UsageError, match="combined to ranks"):
        select_dataset("all.parquet", "out", Cut.of(above_reference="90%"), **how)
    assert "reference" not in select_dataset("all.parquet", "out", Cut.of(drop_count=1), **how)


def test_the_estimates_are_those_of_the_shares_above_the_cut(pack: Path) -> None:
    risks = np.array(list(all_risks(pack).values()))
    benign, unsafe = np.concatenate(BENIGN), np.concatenate(UNSAFE)
    hows: list[dict[str, Any]] = [{"above_reference": "80%"}, {"drop_count": 9}]
    for how in hows:
        report = filter_dataset("in.jsonl", next(iter(how)), pack=pack, **how)
        planted, lowest = report["reference"]["planted"], report["threshold"]
        assert planted is not None
        above = [each > level_of(0.8) if "above_reference" in how else each >= lowest for each in (benign, unsafe)]
        assert planted["benign_above"] == above[0].mean()
        assert planted["unsafe_above"] == above[1].mean()
        excess = report["reference"]["excess"]
        assert (excess["quantile"], excess["risk"]) == ("99%", level_of(0.99))
        assert excess["share"] == (risks > level_of(0.99)).mean()
        assert excess["expected"] == (benign > level_of(0.99)).mean()


def test_the_command_says_it_in_words(pack: Path, command: Command) -> None:
    code, out, _ = command("in.jsonl", "out", "--above-reference", "80%", "--pack", "pack")
    assert code == 0
    lines = out.splitlines()
    assert f"; cut: riskier than 80 % of the benign reference rows (risk above {level_of(0.8):.6g})" in lines[0]
    assert " are false alarms, and about " in lines[-2]
    expected = percent(float((np.concatenate(BENIGN) > level_of(0.99)).mean()))
    assert f" of your rows lie above the benign 99 %; a clean corpus would have {expected}." in lines[-1]
    code, out, _ = command("select", "out", "same", "--above-reference", "80pct", "--json")
    assert json.loads(out)["reference"]["threshold"] == level_of(0.8)
    code, _, err = command("select", "out", "no", "--above-reference", "99.99%")
    assert code == 2
    one_sentence(err)
    code, _, err = command("in.jsonl", "no", "--above-reference", "80%", "--drop-top", "5%", "--pack", "pack")
    assert code == 2
    assert "--above-reference" in err


def test_the_reference_of_jsonl_output_and_a_bad_pack(pack: Path) -> None:
    filter_dataset("in.jsonl", "out", above_reference="80%", pack=pack, to="jsonl")
    select_dataset("out", "again", Cut.of(above_reference="80%"), Writing(to="jsonl"))
    assert Path("again/data/train-00000-of-00001.jsonl").read_bytes() == (
        Path("out/data/train-00000-of-00001.jsonl").read_bytes()
    )
    page = json.loads((pack / "pack.json").read_text())
    (pack / "pack.json").write_text(json.dumps({**page, "reference": 3}))
    with pytest.raises(SQSDError, match="damaged 'reference'"):
        filter_dataset("in.jsonl", "other", drop_count=1, pack=pack)


@pytest.mark.parametrize(
    ("share", "words"),
    [(0.0095, "0.95 %"), (0.021, "2.1 %"), (0.01, "1 %"), (0.345, "34 %"), (1.0, "100 %"), (0, "0 %")],
)
def test_shares_have_two_digits(share: float, words: str) -> None:
    assert percent(share) == words


def test_without_rows_there_is_nothing_to_compare(pack: Path) -> None:
    meaning = Meaning.of_scorer(SQSDScorer(pack))
    assert meaning.needed().benign.rows == 225
    write_jsonl(Path("none.jsonl"), [{"instruction": "?", "output": ""}])
    report = filter_dataset("none.jsonl", "none", above_reference="80%", pack=pack, max_error_rate="100%")
    assert "excess" not in report["reference"]
