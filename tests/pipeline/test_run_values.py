"""Whole runs on all file formats and on unusual values, which come out as they went in."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from sqsd_filter import Scoring, SQSDScorer, filter_dataset, score_dataset
from sqsd_filter.corpus.row_formats import Columns
from sqsd_filter.errors import RowErrorBudgetExceeded
from tests.corpora import BIG, ids_of, make_rows, rows_of, split_file, write_jsonl

datasets.disable_progress_bars()

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


# ---------------------------------------------------------------------------------------------- unusual values


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
