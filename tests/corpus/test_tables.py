"""Rows that are Arrow already: each is visited, whatever is asked of it, and declared types are those of `datasets`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sqsd_filter import SQSDScorer, filter_dataset
from sqsd_filter.corpus.addresses import Opener
from sqsd_filter.corpus.sources import Corpus, Row
from sqsd_filter.corpus.table_formats import Table
from sqsd_filter.errors import InputError, SQSDError
from tests.corpora import make_rows

datasets.disable_progress_bars()
ROWS = [{"n": k, "text": f"é {k}"} for k in range(5)]
DECLARED = "---\ndataset_info:\n  features:\n  - name: n\n    dtype: int16\n  - name: text\n    dtype: string\n---\n"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SQSD_FILTER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    return tmp_path


def declared(**shards: dict[str, list[Any]]) -> str:
    """A folder whose card declares its columns n and text."""
    Path("declared").mkdir()
    Path("declared/README.md").write_text(DECLARED)
    for name, columns in shards.items():
        pq.write_table(pa.table(columns), f"declared/{name}.parquet")
    return "declared"


def in_memory() -> datasets.Dataset:
    return datasets.Dataset.from_list(ROWS)


def shuffled() -> datasets.Dataset:
    return datasets.Dataset.from_list(ROWS[::-1]).select(range(4, -1, -1))


def saved() -> str:
    shuffled().save_to_disk("saved")
    return "saved"


def parquet() -> str:
    in_memory().to_parquet("a.parquet")
    return "a.parquet"


def arrow() -> str:
    table = in_memory().data.table
    with pa.ipc.new_stream("a.arrow", table.schema) as writer:
        writer.write_table(table)
    return "a.arrow"


def recast() -> str:
    return declared(a={"n": list(range(5)), "text": [row["text"] for row in ROWS]})


@pytest.mark.parametrize("make", [in_memory, shuffled, saved, parquet, arrow, recast])
def test_every_row_is_visited_whatever_columns_are_asked_for(make: Callable[[], Any]) -> None:
    sources = Opener().open([make()])
    for columns in ([], ["other"], ["text"], ["text", "other"], ["text", "n"], None):
        visited: list[Row] = []
        corpus = Corpus.scan(sources, visit=visited.append, columns=columns)
        expected = [{name: row[name] for name in row if columns is None or name in columns} for row in ROWS]
        assert [row.value for row in visited] == expected
        assert [row.value for row in corpus.read(1, 9, columns)] == expected[1:]
        assert [row.line for row in visited] == [1, 2, 3, 4, 5]


def test_a_table_of_other_rows_than_it_tells_of_is_a_bug() -> None:
    [source] = Opener().open([parquet()])
    assert isinstance(source.reader, Table)
    source.reader.n_rows += 1
    with pytest.raises(SQSDError, match=r"Of the 6 rows of a\.parquet 5 were read: report this as a bug"):
        Corpus.scan([source], visit=lambda row: None)


@pytest.mark.parametrize("order", ["ab", "ba"])
def test_a_split_without_any_column_of_the_conversation_is_all_errors(order: str, tiny_pack: Path) -> None:
    splits = {"a": in_memory(), "b": datasets.Dataset.from_list(make_rows(20))}
    given = datasets.DatasetDict({name: splits[name] for name in order})
    report = filter_dataset(given, "out", drop_count=3, scorer=SQSDScorer(tiny_pack))
    assert [report["rows"][name] for name in ("total", "kept", "dropped", "errors")] == [25, 17, 3, 5]
    errors = datasets.load_dataset("out", "errors", split="a")
    assert [{"n": row["n"], "text": row["text"]} for row in errors] == ROWS
    kept = datasets.load_dataset("out", split="b")
    assert len(kept) == 17
    assert all(row["text"] is None and row["sqsd_risk"] is not None for row in kept)


def test_splits_whose_columns_can_not_be_one_are_refused_by_their_names() -> None:
    splits = {"a": in_memory(), "b": datasets.Dataset.from_list([{"n": "one"}])}
    with pytest.raises(InputError, match=r"Column 'n' of the split a and of the split b can't be one .* apart"):
        Corpus.scan(Opener().open([datasets.DatasetDict(splits)]))


def test_a_declared_column_that_a_shard_lacks_is_null_there_as_in_datasets() -> None:
    where = declared(a={"n": [1, 2], "text": ["x", "y"]}, b={"n": [3]})
    expected = datasets.load_dataset(where, split="train")
    corpus = Corpus.scan(Opener().open([where]))
    assert datasets.Features.from_arrow_schema(corpus.schema) == expected.features
    assert [row.value for row in corpus.read(0, 3)] == list(expected)
    for columns in (["text"], ["n"], ["text", "n"]):
        assert [row.value for row in corpus.read(0, 3, columns)] == [
            {name: row[name] for name in row if name in columns} for row in expected
        ]


def test_a_column_that_is_not_declared_is_refused_as_by_datasets() -> None:
    where = declared(a={"n": [1]}, b={"n": [2], "text": ["x"], "other": [1]})
    with pytest.raises(datasets.exceptions.DatasetGenerationError):
        datasets.load_dataset(where)
    with pytest.raises(
        InputError, match=r"Column 'other' of declared/b\.parquet is not among those .* declare it there"
    ):
        Opener().open([where])


@pytest.mark.parametrize("values", [[1 << 20], [["a list"]]], ids=["too large", "of another kind"])
def test_a_value_of_no_declared_type_is_refused_as_by_datasets(values: list[Any]) -> None:
    where = declared(a={"n": values})
    with pytest.raises(datasets.exceptions.DatasetGenerationError):
        datasets.load_dataset(where)
    with pytest.raises(
        InputError, match=r"The types of declared/a\.parquet are not those that its dataset declares"
    ) as raised:
        Corpus.scan(Opener().open([where]), visit=lambda row: None)
    assert "\n" not in str(raised.value)
