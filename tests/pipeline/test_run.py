"""Whole runs through the API: every row in one place, the same bytes each time, no row scored twice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest
import yaml

from sqsd_filter import Scoring, SQSDScorer, filter_dataset, score_dataset
from sqsd_filter.corpus.row_formats import Columns
from sqsd_filter.errors import DestinationExists, RowErrorBudgetExceeded, UsageError
from sqsd_filter.pipeline.report import CONFIGS
from sqsd_filter.pipeline.stage import shards
from tests.corpora import (
    NASTY,
    REASONS,
    VALUES,
    content,
    ids_of,
    make_rows,
    read_report,
    rows_of,
    segments,
    split_file,
    write_jsonl,
)

datasets.disable_progress_bars()


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "shard_size", lambda rows: 16)


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
    for config in CONFIGS:
        for row in rows_of(out, config):
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
    assert split_file(Path("several"), "kept").read_bytes() == split_file(Path("one"), "kept").read_bytes()
    for config in CONFIGS:
        ours, theirs = (rows_of(Path(where), config) for where in ("several", "one"))
        for row, other in zip(ours, theirs, strict=True):
            assert row.get("sqsd_row") != other.get("sqsd_row") or config == "kept"  # each names its own file
            assert {**row, "sqsd_row": None, "sqsd_file": None, "sqsd_line": None} == {
                **other,
                **{"sqsd_row": None, "sqsd_file": None, "sqsd_line": None},
            }


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
    assert sorted(p.name for p in Path("out").iterdir()) == ["_sqsd"]
    before = segments(Path("out/_sqsd"))
    assert len(before) == 1

    if "max_error_rate" in options:  # not part of what the run is
        report = filter_dataset("nasty.jsonl", "out", drop_count=2, max_error_rate="50%", scorer=scorer)
        assert report["status"] == "ok"
        assert segments(Path("out/_sqsd")) == before


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
        [split_file(Path("out"), config)] for config in CONFIGS
    ]
    assert "57 of 60 rows" in body
    assert "drop-top 5%" in body
    assert f"{report['threshold']:.6g}" in body
    written = body + Path("out/_sqsd/report.json").read_text()
    assert str(folder) not in written


def test_a_finished_run_leaves_these_files_and_no_others(folder: Path, scorer: SQSDScorer) -> None:
    filter_dataset("in.jsonl", "out", drop_top="5%", scorer=scorer)
    score_dataset("in.jsonl", "scored.parquet", Scoring(scorer=scorer))
    names = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    segment = f"{next(Path('out/_sqsd/scores').iterdir()).name}"
    assert names == {
        "in.jsonl",
        "out/README.md",
        *(str(split_file(Path("out"), config)) for config in CONFIGS),
        "out/_sqsd/notes.json",
        "out/_sqsd/report.html",
        "out/_sqsd/report.json",
        "out/_sqsd/risk.png",
        "out/_sqsd/run.json",
        f"out/_sqsd/scores/{segment}",
        "scored.parquet",
        "scored.parquet.sqsd/notes.json",
        "scored.parquet.sqsd/report.html",
        "scored.parquet.sqsd/report.json",
        "scored.parquet.sqsd/run.json",
        f"scored.parquet.sqsd/scores/{segment}",
    }


@pytest.mark.pictures
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
    done, before = content(Path("out")), segments(Path("out/_sqsd"))
    assert len(before) == 4
    victim = sorted(Path("out/_sqsd/scores").iterdir())[1]
    Path("out/README.md").unlink()
    if spoil == "lost":
        victim.unlink()
    else:
        victim.write_bytes(victim.read_bytes()[:100])
    filter_dataset("in.jsonl", "out", drop_top="5%", scorer=scorer)
    after = segments(Path("out/_sqsd"))
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
