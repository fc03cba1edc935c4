"""Whole runs through the API: every row in one place and unchanged, the same bytes each time, no row scored twice."""

from __future__ import annotations

import gzip
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
import zstandard

from sqsd_filter import Cut, Scoring, SQSDScorer, Writing, filter_dataset, score_dataset, select_dataset
from sqsd_filter.corpus.row_formats import Columns
from sqsd_filter.errors import DestinationExists, InputError, RowErrorBudgetExceeded, SQSDError, UsageError
from sqsd_filter.pipeline.stage import shards
from tests.corpora import SPLITS, content, ids_of, make_rows, read_report, rows_of, split_file, write_jsonl
from tests.disks import small_disk

datasets.disable_progress_bars()

BIG = 2**70
VALUES: list[dict[str, Any]] = [
    {
        "output": f"Answer {k}.",
        "id": k,
        "zip": "007",
        "when": "2024-01-31T12:00:00Z",
        "big": BIG + k,
        "text": "line\u2028separator, é, 👩, \u0000",
        "nested": {"b": [1, None, {"c": "x"}], "a": None},
        "none": None,
        "mixed": k if k % 2 else str(k),
        "instruction": f"Question {k}?",
    }
    for k in range(6)
]
NASTY: list[dict[str, Any] | bytes] = [
    *VALUES,
    b'{"instruction": "broken", "output": "x"',
    b'{"instruction": "\xff", "output": "x"}',
    b"[1, 2]",
    b"",
    {"id": 10, "instruction": "no answer", "output": "  "},
    {"id": 11, "instruction": 5, "output": "wrong type"},
    {"id": 12, "instruction": "far too long " * 200, "output": "x"},
    {"id": 13, "instruction": "no such column"},
    {**VALUES[0], "id": 14},
    {**VALUES[1], "id": 15},
]
REASONS = {"bad_json": 4, "no_answer": 2, "bad_row": 1, "prompt_too_long": 1}


@pytest.fixture(scope="module")
def scorer(tiny_pack: Path) -> SQSDScorer:
    return SQSDScorer(tiny_pack)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, with 60 plain rows in in.jsonl."""
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "in.jsonl", make_rows(60))
    return tmp_path


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "shard_size", lambda rows: 16)


def segments(home: Path) -> dict[str, tuple[int, int]]:
    return {p.name: (p.stat().st_ino, p.stat().st_mtime_ns) for p in (home / "scores").iterdir()}


# ---------------------------------------------------------------------------------------------- every row in one place


def test_sixty_rows_lose_their_three_riskiest_and_keep_order_and_values(folder: Path, scorer: SQSDScorer) -> None:
    report = filter_dataset("in.jsonl", "out", drop_top="5%", scorer=scorer)
    assert report["status"] == "ok"
    assert report["rows"] == {
        "total": 60,
        "kept": 57,
        "dropped": 3,
        "errors": 0,
        "scored": 60,
        "reused": 0,
        "duplicates": 0,
    }
    kept, dropped = rows_of(Path("out"), "kept"), rows_of(Path("out"), "dropped")
    both = sorted([*kept, *dropped], key=lambda row: row["id"])
    assert [{key: row[key] for key in ("id", "instruction", "output")} for row in both] == make_rows(60)
    assert ids_of(Path("out")) == sorted(ids_of(Path("out")))
    assert min(row["sqsd_risk"] for row in dropped) == report["threshold"] > max(row["sqsd_risk"] for row in kept)
    assert list(kept[0])[-4:] == ["sqsd_risk", "sqsd_danger", "sqsd_safety", "sqsd_status"]
    assert all(row["sqsd_risk"] == row["sqsd_danger"] - row["sqsd_safety"] for row in both)


def test_nasty_lines_are_all_accounted_for_and_their_values_intact(folder: Path, scorer: SQSDScorer) -> None:
    write_jsonl(folder / "nasty.jsonl", NASTY)
    report = filter_dataset("nasty.jsonl", "out", drop_count=2, scorer=scorer)
    rows, out = report["rows"], Path("out")
    assert (rows["total"], rows["kept"], rows["dropped"], rows["errors"]) == (len(NASTY), 6, 2, 8)
    assert report["unscored"] == REASONS
    assert (rows["scored"], rows["duplicates"]) == (6, 2)

    inputs = {row["id"]: row for row in NASTY if isinstance(row, dict)}
    for split in SPLITS:
        for row in rows_of(out, split):
            own = {name: value for name, value in row.items() if not name.startswith("sqsd_")}
            assert list(own) == list(VALUES[0])
            assert own == {name: inputs.get(row["id"], {}).get(name) for name in own}
    errors = rows_of(out, "errors")
    assert [e["sqsd_line"] for e in errors] == [7, 8, 9, 10, 11, 12, 13, 14]
    assert {e["sqsd_file"] for e in errors} == {"nasty.jsonl"}
    assert [e["sqsd_raw"] for e in errors] == [*NASTY[6:10], None, None, None, None]
    assert errors[1]["sqsd_reason"] == "not UTF-8: byte 18"
    assert errors[5]["sqsd_reason"] == "column 'instruction' holds int, not text"
    assert all(e["sqsd_reason"] for e in errors)


def test_duplicates_are_scored_once_and_share_their_fate(folder: Path, scorer: SQSDScorer) -> None:
    write_jsonl(folder / "twice.jsonl", [*make_rows(5), *make_rows(5)])
    rows = filter_dataset("twice.jsonl", "out", max_risk=1e9, scorer=scorer)["rows"]
    assert (rows["scored"], rows["duplicates"], rows["kept"]) == (5, 5, 10)
    kept = rows_of(Path("out"), "kept")
    assert kept[:5] == kept[5:]


def test_several_inputs_and_globs_are_one_corpus(folder: Path, scorer: SQSDScorer) -> None:
    write_jsonl(folder / "b1.jsonl", make_rows(60)[20:40])
    write_jsonl(folder / "b0.jsonl", make_rows(60)[:20])
    write_jsonl(folder / "z.jsonl", make_rows(60)[40:])
    several = filter_dataset(["b*.jsonl", "z.jsonl"], "several", drop_top="5%", scorer=scorer)
    filter_dataset("in.jsonl", "one", drop_top="5%", scorer=scorer)
    assert [i["path"] for i in several["inputs"]] == ["b0.jsonl", "b1.jsonl", "z.jsonl"]
    for split in SPLITS:
        assert split_file(Path("several"), split).read_bytes() == split_file(Path("one"), split).read_bytes()


def test_a_limit_takes_the_first_rows(folder: Path, scorer: SQSDScorer) -> None:
    report = filter_dataset(["in.jsonl", "in.jsonl"], "out", drop_count=0, limit=7, scorer=scorer)
    assert report["rows"]["total"] == 7
    assert ids_of(Path("out")) == list(range(7))
    assert len(report["inputs"]) == 1


def test_rows_too_bad_to_score_can_be_kept_but_not_lines_that_are_no_rows(folder: Path, scorer: SQSDScorer) -> None:
    write_jsonl(folder / "nasty.jsonl", NASTY)
    rows = filter_dataset("nasty.jsonl", "out", drop_count=2, on_error="keep", scorer=scorer)["rows"]
    assert (rows["kept"], rows["dropped"], rows["errors"]) == (10, 2, 4)
    statuses = [row["sqsd_status"] for row in rows_of(Path("out"), "kept")]
    assert sorted(set(statuses)) == ["bad_row", "no_answer", "prompt_too_long", "scored"]


@pytest.mark.parametrize(
    ("options", "match"),
    [({"on_error": "fail"}, r"\(--on-error\) fail"), ({"max_error_rate": "40%"}, r"\(--max-error-rate\) 0\.4 ")],
    ids=["fail", "budget"],
)
def test_too_many_bad_rows_fail_with_a_report_and_keep_the_scores(
    options: dict[str, Any], match: str, folder: Path, scorer: SQSDScorer
) -> None:
    write_jsonl(folder / "nasty.jsonl", NASTY)
    with pytest.raises(RowErrorBudgetExceeded, match=rf"8 of 16 rows .*4 bad_json.*{match}.*nasty\.jsonl, line 7"):
        filter_dataset("nasty.jsonl", "out", drop_count=2, scorer=scorer, **options)
    failed = read_report(Path("out"))
    assert failed["status"] == "failed"
    assert "8 of 16 rows" in failed["error"]
    assert sorted(p.name for p in Path("out").iterdir()) == ["sqsd"]
    before = segments(Path("out/sqsd"))
    assert len(before) == 1

    if "max_error_rate" in options:  # not part of what the run is
        report = filter_dataset("nasty.jsonl", "out", drop_count=2, max_error_rate="50%", scorer=scorer)
        assert report["status"] == "ok"
        assert segments(Path("out/sqsd")) == before


@pytest.mark.parametrize(
    "options",
    [
        {"on_error": "ignore"},
        {"max_error_rate": "5"},
        {"drop_top": "5%"},
        {"to": "csv"},
        {"shard_size": "5"},
        {"with_scores": True},
    ],
    ids=["on_error", "max_error_rate", "two cuts", "to", "shard_size", "with_scores"],
)
def test_senseless_options_are_usage_errors_before_anything_is_read(
    options: dict[str, Any], folder: Path, scorer: SQSDScorer
) -> None:
    with pytest.raises(UsageError):
        filter_dataset("missing.jsonl", "out", drop_count=2, scorer=scorer, **options)
    assert not Path("out").exists()


# ---------------------------------------------------------------------------------------------- formats


def save_to_disk(path: Path) -> str:
    datasets.Dataset.from_list(make_rows(60)).save_to_disk(str(path / "saved"))
    return "saved"


def write(path: Path, data: bytes) -> str:
    path.write_bytes(data)
    return path.name


FORMATS: dict[str, Callable[[Path], str]] = {
    "jsonl.gz": lambda at: write(at / "a.jsonl.gz", gzip.compress((at / "in.jsonl").read_bytes())),
    "jsonl.zst": lambda at: write(at / "a.jsonl.zst", zstandard.compress((at / "in.jsonl").read_bytes())),
    "json": lambda at: write(at / "a.json", json.dumps(make_rows(60)).encode()),
    "csv": lambda at: write(
        at / "a.csv",
        b"id,instruction,output\n"
        + b"".join('{id},"{instruction}","{output}"\n'.format(**row).encode() for row in make_rows(60)),
    ),
    "parquet": lambda at: str(pq.write_table(pa.Table.from_pylist(make_rows(60)), at / "a.parquet") or "a.parquet"),
    "save_to_disk": save_to_disk,
}


@pytest.mark.parametrize("make", FORMATS.values(), ids=FORMATS)
def test_every_format_gives_the_same_scores_and_cut(
    make: Callable[[Path], str], folder: Path, scorer: SQSDScorer
) -> None:
    report = filter_dataset(make(folder), "out", drop_top="5%", scorer=scorer)
    plain = filter_dataset("in.jsonl", "plain", drop_top="5%", scorer=scorer)
    assert report["risk_quantiles"] == plain["risk_quantiles"]
    for split in ("kept", "dropped"):
        assert [int(k) for k in ids_of(Path("out"), split)] == ids_of(Path("plain"), split)


@pytest.mark.parametrize("kind", ["parquet", "save_to_disk"])
def test_features_of_a_dataset_survive(kind: str, folder: Path, scorer: SQSDScorer) -> None:
    features = datasets.Features(
        {
            "id": datasets.Value("int32"),
            "instruction": datasets.Value("string"),
            "output": datasets.Value("string"),
            "label": datasets.ClassLabel(names=["bad", "good"]),
            "sizes": datasets.List(datasets.Value("int16"), length=2),
        }
    )
    rows = [{**row, "label": row["id"] % 2, "sizes": [1, 2]} for row in make_rows(10)]
    dataset = datasets.Dataset.from_list(rows, features=features)
    if kind == "parquet":
        dataset.to_parquet("a.parquet")
    else:
        dataset.save_to_disk("saved")
    filter_dataset("a.parquet" if kind == "parquet" else "saved", "out", drop_count=3, scorer=scorer)
    for name, count in (("default", 7), ("dropped", 3)):
        loaded = datasets.load_dataset("out", name, split="train", cache_dir=str(folder / "cache"))
        assert {n: f for n, f in loaded.features.items() if not n.startswith("sqsd_")} == features
        assert loaded.features["sqsd_risk"] == datasets.Value("float64")
        assert len(loaded) == count


def test_load_dataset_never_answers_with_another_runs_rows(folder: Path, scorer: SQSDScorer) -> None:
    for place in ("one", "two"):  # both called out, of the same shape
        (folder / place).mkdir()
        rows = [{**row, "output": f"{place} {row['output']}"} for row in make_rows(20)]
        filter_dataset(write_jsonl(folder / f"{place}.jsonl", rows), f"{place}/out", drop_count=3, scorer=scorer)
        for name, split in (("default", "kept"), ("dropped", "dropped")):
            loaded = datasets.load_dataset(f"{place}/out", name, split="train", cache_dir="cache")
            assert [{n: row[n] for n in rows[0]} for row in loaded] == [
                {n: row[n] for n in rows[0]} for row in rows_of(folder / place / "out", split)
            ]


def test_columns_can_be_named(folder: Path, scorer: SQSDScorer) -> None:
    write_jsonl(folder / "odd.jsonl", [{"q": row["instruction"], "a": row["output"]} for row in make_rows(60)])
    report = filter_dataset("odd.jsonl", "out", drop_count=3, columns=Columns(prompt="q", answer="a"), scorer=scorer)
    plain = filter_dataset("in.jsonl", "plain", drop_count=3, scorer=scorer)
    assert report["format"] == "custom (q, a)"
    assert report["risk_quantiles"] == plain["risk_quantiles"]


# ---------------------------------------------------------------------------------------------- what a run leaves


def test_all_three_configs_load_and_empty_ones_can_be_streamed(folder: Path, scorer: SQSDScorer) -> None:
    write_jsonl(folder / "bad.jsonl", [*make_rows(9), b"broken"])
    cases = {
        "full": ("bad.jsonl", 2, (7, 2, 1)),
        "bare": ("in.jsonl", 60, (0, 60, 0)),
        "whole": ("in.jsonl", 0, (60, 0, 0)),
    }
    for out, (source, drop, counts) in cases.items():
        filter_dataset(source, out, drop_count=drop, scorer=scorer)
        card = Path(out, "README.md").read_text()
        for name, count in zip(("", ', "dropped"', ', "errors"'), counts, strict=True):
            how = "" if count else ", streaming=True"  # datasets raises for a split without rows
            assert f"`load_dataset(path{name}{how})`" in card
            config = name.strip(', "') or "default"
            options = {} if count else {"streaming": True}
            loaded = datasets.load_dataset(out, config, split="train", cache_dir=str(folder / "cache"), **options)
            assert len(list(loaded)) == count
            assert set(loaded.features) >= {"id", "instruction", "output", "sqsd_status"}


def test_the_card_says_what_was_done_in_valid_yaml_and_no_path_of_the_machine(folder: Path, scorer: SQSDScorer) -> None:
    report = filter_dataset("in.jsonl", "out", drop_top="5%", scorer=scorer)
    _, header, body = Path("out/README.md").read_text().split("---\n", 2)
    configs = yaml.safe_load(header)["configs"]
    assert [c["config_name"] for c in configs] == ["default", "dropped", "errors"]
    assert [list(Path("out").glob(f["path"])) for c in configs for f in c["data_files"]] == [
        [split_file(Path("out"), split)] for split in SPLITS
    ]
    assert "57 of 60 rows" in body
    assert "drop-top 5%" in body
    assert f"{report['threshold']:.6g}" in body
    written = body + Path("out/sqsd/report.json").read_text()
    assert str(folder) not in written


def test_a_finished_run_leaves_these_files_and_no_others(folder: Path, scorer: SQSDScorer) -> None:
    filter_dataset("in.jsonl", "out", drop_top="5%", scorer=scorer)
    score_dataset("in.jsonl", "scored.parquet", Scoring(scorer=scorer))
    names = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    segment = f"{next(Path('out/sqsd/scores').iterdir()).name}"
    assert names == {
        "in.jsonl",
        "out/README.md",
        *(f"out/data/{split}-00000-of-00001.parquet" for split in SPLITS),
        "out/sqsd/notes.json",
        "out/sqsd/report.html",
        "out/sqsd/report.json",
        "out/sqsd/risk.png",
        "out/sqsd/run.json",
        f"out/sqsd/scores/{segment}",
        "scored.parquet",
        "scored.parquet.sqsd/notes.json",
        "scored.parquet.sqsd/report.html",
        "scored.parquet.sqsd/report.json",
        "scored.parquet.sqsd/run.json",
        f"scored.parquet.sqsd/scores/{segment}",
    }


def test_the_same_run_in_two_places_gives_the_same_bytes(
    folder: Path, scorer: SQSDScorer, tiny_pack: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for name, own in (("a", scorer), ("b", SQSDScorer(tiny_pack))):
        (folder / name).mkdir()
        monkeypatch.chdir(folder / name)
        write_jsonl(Path("nasty.jsonl"), NASTY)
        filter_dataset("nasty.jsonl", "out", drop_count=2, scorer=own)
        found.append(content(Path("out")))
    assert found[0] == found[1]


def test_the_time_of_reading_counts(folder: Path, scorer: SQSDScorer, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(1000))
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "0")  # else matplotlib looks at the clock, too
    monkeypatch.setattr("sqsd_filter.pipeline.run.time.time", lambda: next(clock))
    monkeypatch.setattr(
        Columns, "choose", lambda self, paths, choose=Columns.choose: (next(clock), choose(self, paths))[1]
    )
    timing = filter_dataset("in.jsonl", "out", drop_top="5%", scorer=scorer)["timing"]
    assert list(timing["phases"]) == ["reading", "lookup", "scoring", "writing"]
    assert timing == {"seconds": 2, "started": 0, "engine": "local", "phases": timing["phases"]}


# ---------------------------------------------------------------------------------------------- scored once


def test_a_finished_run_is_not_done_again(folder: Path, scorer: SQSDScorer) -> None:
    filter_dataset("in.jsonl", "out", drop_top="5%", scorer=scorer)
    before = {p: p.stat().st_mtime_ns for p in Path("out").rglob("*") if p.is_file()}
    again = filter_dataset("in.jsonl", "out", drop_top="5%", scorer=scorer)
    assert again["already_done"]
    assert again["rows"]["kept"] == 57
    assert {p: p.stat().st_mtime_ns for p in Path("out").rglob("*") if p.is_file()} == before


def test_a_run_that_replaces_another_scores_new_rows_only(folder: Path, scorer: SQSDScorer) -> None:
    filter_dataset("in.jsonl", "out", drop_top="5%", scorer=scorer)
    write_jsonl(folder / "in.jsonl", make_rows(63))
    with pytest.raises(DestinationExists, match="other input files or contents"):
        filter_dataset("in.jsonl", "out", drop_top="5%", scorer=scorer)
    rows = filter_dataset("in.jsonl", "out", drop_top="5%", overwrite=True, scorer=scorer)["rows"]
    assert (rows["total"], rows["scored"], rows["reused"]) == (63, 3, 60)
    assert sorted(p.name for p in folder.iterdir()) == ["in.jsonl", "out"]


@pytest.mark.parametrize("spoil", ["truncated", "lost"])
def test_only_a_spoiled_shard_is_scored_again(spoil: str, folder: Path, scorer: SQSDScorer, small_shards: None) -> None:
    filter_dataset("in.jsonl", "out", drop_top="5%", scorer=scorer)
    done, before = content(Path("out")), segments(Path("out/sqsd"))
    assert len(before) == 4
    victim = sorted(Path("out/sqsd/scores").iterdir())[1]
    Path("out/README.md").unlink()
    if spoil == "lost":
        victim.unlink()
    else:
        victim.write_bytes(victim.read_bytes()[:100])
    filter_dataset("in.jsonl", "out", drop_top="5%", scorer=scorer)
    after = segments(Path("out/sqsd"))
    assert content(Path("out")) == done
    assert {name for name in before if before[name] != after[name]} == {victim.name}


def test_shards_and_batches_change_no_score(
    folder: Path, tiny_pack: Path, scorer: SQSDScorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = filter_dataset("in.jsonl", "whole", drop_top="5%", scorer=scorer)
    monkeypatch.setattr(shards, "shard_size", lambda rows: 16)
    cut = filter_dataset("in.jsonl", "cut", drop_top="5%", scorer=SQSDScorer(tiny_pack, token_budget=1))
    assert ids_of(Path("cut"), "dropped") == ids_of(Path("whole"), "dropped")
    assert cut["risk_quantiles"] == pytest.approx(whole["risk_quantiles"], abs=1e-5)


# ---------------------------------------------------------------------------------------------- score, then select


@pytest.fixture
def nasty(folder: Path, scorer: SQSDScorer) -> Path:
    """nasty.jsonl, filtered into `run` and scored into scored.parquet."""
    write_jsonl(folder / "nasty.jsonl", NASTY)
    filter_dataset("nasty.jsonl", "run", drop_count=1, scorer=scorer)
    score_dataset("nasty.jsonl", "scored.parquet", Scoring(scorer=scorer))
    return folder


def test_score_writes_every_row_in_order_with_its_columns(nasty: Path) -> None:
    table = pq.read_table("scored.parquet")
    scores = ["sqsd_risk", "sqsd_danger", "sqsd_safety", "sqsd_status"]
    assert table.column_names == [*VALUES[0], *scores, "sqsd_reason", "sqsd_file", "sqsd_line", "sqsd_raw"]
    assert table["id"].to_pylist() == [*range(6), *[None] * 4, *range(10, 16)]
    assert [r for r in table["sqsd_raw"].to_pylist() if r is not None] == NASTY[6:10]
    risk, status = table["sqsd_risk"].to_pylist(), table["sqsd_status"].to_pylist()
    assert all((r is not None) == (s == "scored") for r, s in zip(risk, status, strict=True))
    report = json.loads(Path("scored.parquet.sqsd/report.json").read_text())
    assert report["rows"]["total"] == 16
    assert "kept" not in report["rows"]
    assert report["unscored"] == REASONS


CUTS: list[dict[str, Any]] = [{"drop_top": "30%"}, {"drop_count": 3}, {"max_risk": 0.0}, {"keep_lowest": 2}]


@pytest.mark.parametrize("cut", CUTS, ids=str)
@pytest.mark.parametrize("source", ["run", "scored.parquet"])
def test_selecting_from_scores_equals_filtering_with_that_cut(
    source: str, cut: dict[str, Any], nasty: Path, scorer: SQSDScorer
) -> None:
    selected = select_dataset(source, "selected", Cut.of(**cut))
    filtered = filter_dataset("nasty.jsonl", "filtered", **cut, scorer=scorer)
    for key in ("threshold", "ties", "cut", "unscored", "risk_quantiles"):
        assert selected[key] == filtered[key]
    for split in SPLITS:
        assert rows_of(Path("selected"), split) == rows_of(Path("filtered"), split)
        ours, theirs = (pq.read_table(split_file(Path(name), split)) for name in ("selected", "filtered"))
        assert source != "run" or ours.equals(theirs)  # a scored file has one schema for all of its rows


def test_a_row_that_is_no_conversation_leaves_the_columns_of_the_others_alone(folder: Path, scorer: SQSDScorer) -> None:
    odd = {"prompt": "q3", "completion": BIG, "n": "many"}
    rows = [{"prompt": f"q{k}", "completion": f"a{k}", "n": k} for k in range(3)] + [odd]
    write_jsonl(folder / "odd.jsonl", rows)
    report = filter_dataset("odd.jsonl", "out", drop_count=1, scorer=scorer)
    loaded = [datasets.load_dataset("out", n, split="train", cache_dir="cache") for n in ("default", "dropped")]
    own = [{name: row[name] for name in odd} for dataset in loaded for row in dataset]
    assert sorted(own, key=lambda row: row["n"]) == rows[:3]
    assert [{name: row[name] for name in odd} for row in rows_of(Path("out"), "errors")] == [odd]
    assert report["json_columns"] == []
    assert "JSON" not in Path("out/README.md").read_text()

    kept = filter_dataset("odd.jsonl", "all", drop_count=1, on_error="keep", scorer=scorer)
    assert odd in [{name: row[name] for name in odd} for row in rows_of(Path("all"), "kept")]
    assert kept["json_columns"] == ["completion", "n"]
    assert "`completion`, `n`" in Path("all/README.md").read_text()


def test_an_odd_list_of_messages_leaves_the_others_lists(folder: Path, scorer: SQSDScorer) -> None:
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    write_jsonl(folder / "odd.jsonl", [{"messages": turns}, {"messages": BIG}, {"messages": "none"}])
    filter_dataset("odd.jsonl", "out", drop_count=0, max_error_rate="100%", scorer=scorer)
    assert pq.read_table(split_file(Path("out"), "kept"))["messages"].to_pylist() == [turns]
    assert [row["messages"] for row in rows_of(Path("out"), "errors")] == [BIG, "none"]


MINE = {"sqsd_notes": "mine", "sqsd_raw": 5, "sqsd_line": "x"}


def test_columns_of_the_user_may_begin_with_sqsd(folder: Path, scorer: SQSDScorer) -> None:
    rows = [{**row, **MINE} for row in make_rows(3)] + [{"id": 3, "instruction": "q", "output": "", **MINE}]
    write_jsonl(folder / "own.jsonl", rows)
    score_dataset("own.jsonl", "scored.parquet", Scoring(scorer=scorer))
    filter_dataset("own.jsonl", "out", drop_count=0, scorer=scorer)
    assert [{name: row[name] for name in rows[0]} for row in rows_of(Path("out"), "kept")] == rows[:3]
    [error] = rows_of(Path("out"), "errors")
    assert (error["sqsd_notes"], error["sqsd_raw"], error["sqsd_line"]) == ("mine", None, 4)
    assert pq.read_table("scored.parquet")["sqsd_notes"].to_pylist() == ["mine"] * 4


def test_scores_of_an_earlier_run_make_way_whatever_its_probes_were(folder: Path, scorer: SQSDScorer) -> None:
    earlier = {"sqsd_risk": 9.0, "sqsd_other": 9.0, "sqsd_status": "scored", "sqsd_notes": "mine"}
    write_jsonl(folder / "earlier.jsonl", [{**row, **earlier} for row in make_rows(3)])
    score_dataset("earlier.jsonl", "again.parquet", Scoring(scorer=scorer))
    table = pq.read_table("again.parquet")
    scores = ["sqsd_risk", "sqsd_danger", "sqsd_safety", "sqsd_status"]
    assert table.column_names == ["id", "instruction", "output", "sqsd_notes", *scores]
    assert 9.0 not in table["sqsd_risk"].to_pylist()


def test_a_value_that_python_does_not_have_passes_through_a_run(folder: Path, scorer: SQSDScorer) -> None:
    source = pa.Table.from_pylist([*make_rows(3), {"id": 3, "instruction": "q", "output": ""}])
    source = source.append_column("when", pa.array([10**15, 1, None, 10**14], pa.timestamp("ms")))
    pq.write_table(source, "a.parquet")
    filter_dataset("a.parquet", "out", drop_count=0, scorer=scorer)
    assert pq.read_table(split_file(Path("out"), "kept"))["when"].equals(source["when"][:3])
    assert pq.read_table(split_file(Path("out"), "errors"))["when"].equals(source["when"][3:])
    with pytest.raises(RowErrorBudgetExceeded, match=r"a\.parquet, line 4"):
        filter_dataset("a.parquet", "strict", drop_count=0, on_error="fail", scorer=scorer)


def test_a_file_name_that_is_not_utf8_is_spelled_out(folder: Path, scorer: SQSDScorer) -> None:
    name = os.fsdecode(b"odd\xff.jsonl")
    write_jsonl(folder / name, [*make_rows(2), {}])
    filter_dataset(name, "out", drop_count=0, scorer=scorer)
    assert [row["sqsd_file"] for row in rows_of(Path("out"), "errors")] == ["odd\\xff.jsonl"]


def test_scoring_a_scored_file_again_replaces_its_scores_and_nothing_else(nasty: Path, scorer: SQSDScorer) -> None:
    score_dataset("scored.parquet", "again.parquet", Scoring(max_error_rate="100%", scorer=scorer))
    first, again = pq.read_table("scored.parquet"), pq.read_table("again.parquet")
    assert again.column_names == first.column_names
    assert again.drop_columns(["sqsd_status"]).equals(first.drop_columns(["sqsd_status"]))


def test_a_score_that_is_not_finite_is_an_error_row(folder: Path) -> None:
    rows = [{"id": k, "sqsd_risk": r, "sqsd_status": "scored"} for k, r in enumerate([0.1, math.nan, 0.3])]
    pq.write_table(pa.Table.from_pylist(rows), "a.parquet")
    report = select_dataset("a.parquet", "out", Cut.of(drop_count=1))
    assert report["unscored"] == {"nonfinite": 1}
    assert [ids_of(Path("out"), split) for split in SPLITS] == [[0], [2], [1]]


def test_rows_without_scores_cannot_be_selected_from(folder: Path) -> None:
    with pytest.raises(InputError, match=r"no columns sqsd_risk and sqsd_status \(line 1\): score it first"):
        select_dataset("in.jsonl", "out", Cut.of(drop_count=1))


def test_selecting_from_what_was_selected_or_from_half_a_run_says_what_to_do(nasty: Path, scorer: SQSDScorer) -> None:
    select_dataset("run", "selected", Cut.of(drop_count=1))
    with pytest.raises(InputError, match="was made by select"):
        select_dataset("selected", "again", Cut.of(drop_count=1))
    Path("run/sqsd/report.json").unlink()
    with pytest.raises(InputError, match="holds an unfinished run"):
        select_dataset("run", "other", Cut.of(drop_count=1))


def test_selecting_from_a_run_works_from_any_folder(nasty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    select_dataset("run", "here", Cut.of(drop_count=3))
    (nasty / "deep" / "er").mkdir(parents=True)
    monkeypatch.chdir(nasty / "deep" / "er")
    report = select_dataset("../../run", "there", Cut.of(drop_count=3))
    assert [i["path"] for i in report["inputs"]] == ["../../nasty.jsonl"]
    for split in ("kept", "dropped"):
        assert rows_of(Path("there"), split) == rows_of(nasty / "here", split)
    assert str(nasty) not in (nasty / "run/sqsd/run.json").read_text()
    with pytest.raises(DestinationExists, match="holds the input"):
        select_dataset("../../run", "../..", Cut.of(drop_count=2), Writing(overwrite=True))


def test_selecting_from_a_run_whose_input_has_changed_is_refused(nasty: Path) -> None:
    write_jsonl(nasty / "nasty.jsonl", NASTY[1:])
    with pytest.raises(InputError, match="changed since it was scored"):
        select_dataset("run", "other", Cut.of(drop_count=1))


@pytest.mark.parametrize("source", ["run", "run/data/kept-00000-of-00001.parquet", "scored.parquet"])
def test_nothing_is_ever_filtered_in_place(source: str, nasty: Path) -> None:
    dest = source.split("/")[0]
    before = {p: p.read_bytes() for p in nasty.rglob("*") if p.is_file()}
    with pytest.raises(DestinationExists, match="which --overwrite would delete"):
        select_dataset(source, dest, Cut.of(drop_count=3), Writing(overwrite=True))
    assert {p: p.read_bytes() for p in nasty.rglob("*") if p.is_file()} == before


# ---------------------------------------------------------------------------------------------- destinations


class Unused(SQSDScorer):
    """Fails the test when anything is scored."""

    def score(self, *_: Any) -> Any:
        raise AssertionError("scored before the destination was looked at")


@pytest.mark.parametrize("dest", [".", "..", "/proc"])
def test_what_can_not_be_swapped_is_refused_before_scoring(
    dest: str,
    folder: Path,
    tiny_pack: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (folder / "work").mkdir()
    (folder / "work" / "notes.txt").touch()
    outside = write_jsonl(tmp_path_factory.mktemp("elsewhere") / "in.jsonl", make_rows(3))
    monkeypatch.chdir(folder / "work")
    with pytest.raises(DestinationExists, match="can't be replaced, since it"):
        filter_dataset(outside, dest, drop_count=0, overwrite=True, scorer=Unused(tiny_pack))


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_in_the_place_of_a_scored_file_is_refused_before_scoring(
    overwrite: bool, folder: Path, tiny_pack: Path
) -> None:
    (folder / "d.parquet").mkdir()
    with pytest.raises(DestinationExists, match="is a folder, but the output is a file"):
        score_dataset("in.jsonl", "d.parquet", Scoring(scorer=Unused(tiny_pack)), overwrite=overwrite)


def test_a_glob_that_finds_the_destination_finds_the_same_inputs(folder: Path, scorer: SQSDScorer) -> None:
    (folder / "data").mkdir()
    (folder / "in.jsonl").rename("data/in.jsonl")
    for again in (False, True):
        typed = [str(path) for path in sorted(Path("data").iterdir())]
        for sources in (typed, "data/*"):
            report = filter_dataset(sources, "data/out", drop_count=1, scorer=scorer)
        assert [i["path"] for i in report["inputs"]] == ["data/in.jsonl"]
        assert again == ("data/out" in typed)
    for _ in range(2):
        score_dataset("data/in.*", "data/in.parquet", Scoring(scorer=scorer))
    with pytest.raises(InputError, match=r"data/out holds the output of an earlier run"):
        filter_dataset("data/out", "data/out", drop_count=1, scorer=scorer)


def test_a_scored_file_that_is_not_the_reports_is_written_again(folder: Path, scorer: SQSDScorer) -> None:
    score_dataset("in.jsonl", "scored.parquet", Scoring(scorer=scorer))
    done = Path("scored.parquet").read_bytes()
    score_dataset("in.jsonl", "other.parquet", Scoring(limit=7, scorer=scorer))
    shutil.copy("other.parquet", "scored.parquet")
    report = score_dataset("in.jsonl", "scored.parquet", Scoring(scorer=scorer))
    assert not report.get("already_done")
    assert Path("scored.parquet").read_bytes() == done


def test_a_kill_between_two_swaps_leaves_nothing_that_counts_as_done(folder: Path, scorer: SQSDScorer) -> None:
    score_dataset("in.jsonl", "scored.parquet", Scoring(scorer=scorer))
    done = Path("scored.parquet").read_bytes()
    Path("scored.parquet").rename(".scored.parquet.sqsd-old")
    pq.write_table(pq.read_table(".scored.parquet.sqsd-old").select(["id", "sqsd_risk"]), "scored.parquet")
    score_dataset("in.jsonl", "scored.parquet", Scoring(scorer=scorer))
    assert Path("scored.parquet").read_bytes() == done
    assert not Path(".scored.parquet.sqsd-old").exists()


# ---------------------------------------------------------------------------------------------- disks that refuse


@pytest.mark.parametrize("size", [100, 3000, 4500], ids=["start", "scores", "export"])
def test_a_full_disk_gives_one_clear_sentence_and_room_finishes_the_run(
    size: int, folder: Path, scorer: SQSDScorer, capfd: pytest.CaptureFixture[str]
) -> None:
    scorer.score([])  # nothing of the model is written
    sentence = r"^[^\n]* can't (be written|go on) [^\n]*File too large[^\n]*\.$"
    with pytest.raises(SQSDError, match=sentence), small_disk(size):
        filter_dataset("in.jsonl", "out", drop_top="5%", scorer=scorer)
    assert not [p for p in Path("out").rglob("*") if p.name.endswith(".tmp") or p.name == "lock"]
    assert "Traceback" not in capfd.readouterr().err
    assert filter_dataset("in.jsonl", "out", drop_top="5%", scorer=scorer)["status"] == "ok"
    filter_dataset("in.jsonl", "straight", drop_top="5%", scorer=scorer)
    assert content(Path("out")) == content(Path("straight"))


@pytest.fixture
def nobody(scorer: SQSDScorer, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder where this process may read and not write, as for anyone but root."""
    scorer.score([])
    scorer.settings()  # what lies in root's folders has been read
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_jsonl(folder / "in.jsonl", make_rows(3))
        write_jsonl(folder / "secret.jsonl", make_rows(3)).chmod(0)
        (folder / "closed").mkdir(0o700)
        folder.chmod(0o555)
        monkeypatch.chdir(folder)
        root = os.geteuid() == 0
        if root:
            os.seteuid(65534)
        yield folder
        if root:
            os.seteuid(0)
        folder.chmod(0o755)


@pytest.mark.parametrize(
    ("source", "dest"),
    [("in.jsonl", "out"), ("in.jsonl", "closed/out"), ("secret.jsonl", "out"), ("closed/a.jsonl", "out")],
)
def test_what_may_not_be_read_or_written_is_an_input_error(
    source: str, dest: str, scorer: SQSDScorer, nobody: Path
) -> None:
    with pytest.raises(InputError, match=r"^[^\n]*(secret|closed|out)[^\n]*Permission denied[^\n]*\.$"):
        filter_dataset(source, dest, drop_count=1, scorer=scorer)
