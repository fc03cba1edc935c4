"""Files of each format: how big they get, what they are called, and that nothing is left of attempts that failed."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import tempfile
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sqsd_filter.corpus.json_schema import JSON_TEXT, is_json_text
from sqsd_filter.errors import InputError, SQSDError, UsageError
from sqsd_filter.pipeline.report import WrittenFile
from sqsd_filter.pipeline.writing.json_lines import lines
from sqsd_filter.pipeline.writing.writers import (
    FORMATS,
    OF_LINES,
    JsonLinesWriter,
    Output,
    ParquetWriter,
    ShardedWriter,
    describe,
)
from tests.disks import small_disk

datasets.disable_progress_bars()


def write(root: Path, output: Output, batches: list[Any], name: str = "data/train") -> list[WrittenFile]:
    with output.files(root, name) as files:
        files.prepare()
        for batch in batches:
            files.write(batch)
        assert files.rows == sum(len(batch) for batch in batches)
        return files.publish()


def batches_of(to: str, sizes: list[int]) -> list[Any]:
    """Batches of so many different rows, as the format takes them."""
    numbers = itertools.count()
    columns = [[next(numbers) for _ in range(size)] for size in sizes]
    if to in OF_LINES:
        return [[b"%d" % n for n in column] for column in columns]
    return [pa.table({"n": pa.array(column, pa.int64())}) for column in columns]


def numbers_in(to: str, path: Path) -> list[int]:
    if to == "jsonl":
        return [int(line) for line in path.read_bytes().splitlines()]
    if to == "json":
        return list(json.loads(path.read_bytes()))
    if to == "parquet":
        return list(pq.read_table(path)["n"].to_pylist())
    with pa.memory_map(str(path)) as source:
        return list(pa.ipc.open_stream(source).read_all()["n"].to_pylist())


@pytest.mark.parametrize("to", FORMATS)
@settings(deadline=None)
@given(sizes=st.lists(st.integers(0, 200), min_size=1, max_size=8), shard_size=st.integers(1, 5000))
def test_a_file_ends_with_the_batch_that_fills_it(to: str, sizes: list[int], shard_size: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        batches = batches_of(to, sizes)
        files = write(Path(folder), Output(to, shard_size, False), batches)
        assert [n for f in files for n in numbers_in(to, Path(folder, f["path"]))] == list(range(sum(sizes)))
        assert [f["rows"] for f in files] == [len(numbers_in(to, Path(folder, f["path"]))) for f in files]
        stops = set(itertools.accumulate(sizes))
        assert set(itertools.accumulate(f["rows"] for f in files)) <= stops
        assert all(f["bytes"] >= shard_size for f in files[:-1])
        assert len(files) == 1 or all(f["rows"] for f in files)
        if to == "jsonl":  # whose sizes are known beforehand
            expected, room = [0], shard_size
            for batch in batches:
                if batch and room <= 0:
                    expected.append(0)
                    room = shard_size
                expected[-1] += len(batch)
                room -= sum(len(line) + 1 for line in batch)
            assert [f["rows"] for f in files] == expected


@pytest.mark.parametrize("to", FORMATS)
def test_files_are_what_is_said_of_them_and_the_same_every_time(to: str, tmp_path: Path) -> None:
    batches = batches_of(to, [30, 0, 30, 30])
    both = [write(tmp_path / name, Output(to, 1, False), batches) for name in ("a", "b")]
    assert both[0] == both[1]
    assert len(both[0]) == 3
    for file in both[0]:
        content = (tmp_path / "a" / file["path"]).read_bytes()
        assert file["bytes"] == len(content)
        assert file["sha256"] == hashlib.sha256(content).hexdigest()
    [path] = {Path(file["path"]).parent for file in both[0]}
    assert path == Path("data")
    assert [f["path"] for f in both[0]] == sorted(str(p.relative_to(tmp_path / "a")) for p in tmp_path.glob("a/*/*"))


@pytest.mark.parametrize("to", FORMATS)
def test_only_files_of_the_same_kind_make_way_for_new_ones(to: str, tmp_path: Path) -> None:
    batches = batches_of(to, [30, 30, 30])
    write(tmp_path, Output(to, 1, False), batches)
    for other in ("data/test", "_sqsd/dropped/train"):
        write(tmp_path, Output(to, 1, False), batches[:2], other)
    before = {p for p in tmp_path.rglob("*") if p.is_file()}
    assert len(before) == 7
    old = set((tmp_path / "data").glob("train-*"))
    notes = old.pop().parent / "train-notes-of-mine.txt"
    notes.touch()
    [new] = write(tmp_path, Output(to, 10**6, False), batches)
    after = {p for p in tmp_path.rglob("*") if p.is_file()}
    assert len(after) == 4 + 1 + 1
    assert notes in after
    assert tmp_path / new["path"] in after - before


@pytest.mark.parametrize("to", FORMATS)
def test_files_that_were_not_finished_are_gone(to: str, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()

    def write_until_interrupted() -> None:
        with Output(to, 1, False).files(tmp_path, "data/train") as files:
            for batch in batches_of(to, [30, 30]):
                files.write(batch)
            assert len([p for p in tmp_path.rglob("*") if p.is_file()]) == 2
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_until_interrupted()
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


@pytest.mark.parametrize("to", FORMATS)
def test_a_full_disk_is_one_sentence(to: str, tmp_path: Path) -> None:
    sentence = r"^\S*data/train can't be written \([^\n]*File too large[^\n]*\): free some space [^\n]*\.$"
    with pytest.raises(SQSDError, match=sentence), small_disk(4000):
        write(tmp_path, Output(to, 10**6, False), batches_of(to, [2000] * 9))
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


def test_without_a_size_there_is_one_file_of_the_very_name(tmp_path: Path) -> None:
    for path, name in ((tmp_path / "a[b]{}.parquet", "."), (tmp_path, "x.parquet")):
        with ShardedWriter(ParquetWriter, path, name) as files:
            for batch in batches_of("parquet", [3, 4]):
                files.write(batch)
            assert [file["path"] for file in files.publish()] == [name]
        assert numbers_in("parquet", path / name) == list(range(7))
    with ShardedWriter(JsonLinesWriter, tmp_path, "never.jsonl") as files:
        assert files.publish() == []


split_names = st.from_regex(r"\w+(\.\w+)*", fullmatch=True)  # what `datasets` allows


@settings(max_examples=50, deadline=None)
@given(st.lists(split_names, min_size=1, max_size=4, unique=True))
def test_the_glob_of_one_split_finds_no_file_of_another(splits: list[str]) -> None:
    for name in splits:
        assert [other for other in splits if fnmatchcase(f"{other}-00000-of-00001.jsonl", f"{name}-*.jsonl")] == [name]


# ---------------------------------------------------------------------------------------------- options


def test_sizes_are_read_as_decimal_or_binary_units_whatever_their_case() -> None:
    sizes: dict[str | int, int] = {"100MB": 10**8, "1gb": 10**9, "500Mb": 5 * 10**8, "2KiB": 2048, 7: 7}
    assert {size: Output.of("parquet", size, False).shard_size for size in sizes} == sizes


@pytest.mark.parametrize("size", ["", "10", "1.5GB", "MB", "-1MB", "0KB", 0, "lots"])
def test_what_is_no_size_is_refused(size: str | int) -> None:
    with pytest.raises(UsageError, match=f"'{size}' is not a file size: write it like 100MB or 1GB"):
        Output.of("parquet", size, False)


def test_scores_are_asked_for_only_where_they_would_be_missing() -> None:
    for to in ("parquet", "arrow"):
        with pytest.raises(UsageError, match=rf"{to} files always hold scores: leave out with_scores \(--with"):
            Output.of(to, "1GB", True)
    assert Output.of("jsonl", "1GB", True).with_scores
    with pytest.raises(UsageError, match="parquet, arrow, jsonl, json, not to 'csv'"):
        Output.of("csv", "1GB", False)


@pytest.mark.parametrize(
    ("to", "kind", "fix"),
    [
        ("jsonl", pa.binary(), "use --to parquet or arrow."),
        ("arrow", pa.map_(pa.string(), pa.int8()), "use --to jsonl or json."),
        ("parquet", pa.map_(pa.string(), pa.int8()), "use --to jsonl or json."),
        ("arrow", pa.decimal32(5, 2), "use --to jsonl or json."),
        ("parquet", pa.uuid(), "give it another type, or leave it out."),
        ("parquet", pa.struct([]), "use --to arrow or jsonl or json."),
        ("parquet", pa.binary(0), "use --to arrow."),
        ("parquet", pa.dictionary(pa.int32(), pa.list_(pa.int8())), "use --to jsonl or json."),
        ("parquet", pa.month_day_nano_interval(), "give it another type, or leave it out."),
    ],
    ids=str,
)
def test_a_column_that_a_format_can_t_hold_is_named_with_the_formats_that_can(
    to: str, kind: pa.DataType, fix: str, tmp_path: Path
) -> None:
    schema = pa.schema({"good": pa.string(), "bad": pa.list_(kind)})
    rows = pa.table({"good": ["a", None], "bad": pa.nulls(2, pa.list_(kind))})
    assert not FORMATS[to].holds(pa.list_(kind))
    for name, writer in FORMATS.items():
        if writer.holds(pa.list_(kind)):
            Output(name, 1, False).check(schema)
            write(tmp_path, Output(name, 1, False), [lines(rows) if name in OF_LINES else rows])
            continue
        with pytest.raises(InputError) as refused:
            Output(name, 1, False).check(schema)
        for_whom = "" if name in OF_LINES else " for `datasets` to read"
        assert re.match(
            rf"Column 'bad' holds list<.*>, which can't be written to {name}{for_whom}: ", str(refused.value)
        )
        assert name != to or str(refused.value).endswith(f": {fix}")


def test_a_type_without_nulls_can_be_written(tmp_path: Path) -> None:
    table = pa.table({"a": pa.array([{"n": 1}], pa.struct([pa.field("n", pa.int8(), nullable=False)]))})
    Output("parquet", 1, False).check(table.schema)
    [file] = write(tmp_path, Output("parquet", 1, False), [table])
    assert pq.read_table(tmp_path / file["path"]).equals(table)


# ---------------------------------------------------------------------------------------------- Arrow


def test_arrow_files_load_as_a_dataset_dict_mapped_into_memory(tmp_path: Path) -> None:
    features = datasets.Features(
        {"label": datasets.ClassLabel(names=["a", "b"]), "image": datasets.Image(), "text": datasets.Value("string")}
    )
    rows = [{"label": k % 2, "image": {"bytes": b"\x89PNG", "path": None}, "text": "[7]"} for k in range(20)]
    marked = pa.field("text", pa.string(), metadata=JSON_TEXT)
    table = pa.Table.from_pylist(rows, features.arrow_schema.set(2, marked))
    files = {
        "train": write(tmp_path, Output("arrow", 1, False), [table, table]),
        "test": write(tmp_path, Output("arrow", 1, False), [table.slice(0, 0)], "data/test"),
    }
    extra = describe(tmp_path, "meta", files)
    assert sorted([*extra, *(file["path"] for part in files.values() for file in part)]) == sorted(
        str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()
    )
    loaded = datasets.load_from_disk(str(tmp_path / "meta"))
    assert list(loaded) == ["train", "test"]
    assert loaded["train"].features == features == loaded["test"].features
    assert len(loaded["train"].cache_files) == 2
    assert len(loaded["test"]) == 0
    assert loaded["train"].with_format("arrow")[:].to_pylist() == rows + rows
    assert is_json_text(loaded["train"].data.schema.field("text"))


def test_the_fingerprint_of_arrow_files_is_their_contents(tmp_path: Path) -> None:
    prints = []
    for name, sizes in (("a", [3, 4]), ("b", [3, 4]), ("c", [3, 5])):
        files = write(tmp_path / name, Output("arrow", 1, False), batches_of("arrow", sizes))
        describe(tmp_path / name, ".", {"train": files})
        prints.append(json.loads((tmp_path / name / "train" / "state.json").read_text())["_fingerprint"])
    assert prints[0] == prints[1] != prints[2]


def test_types_that_datasets_loads_as_others_are_written_as_those(tmp_path: Path) -> None:
    words = pa.array(["a", "b", "a", None]).dictionary_encode()
    lists = pa.array([["x"], [], None, ["y"]], pa.list_(pa.field("item", pa.string(), nullable=False)))
    table = pa.table({"words": words, "lists": lists})
    describe(tmp_path, ".", {"train": write(tmp_path, Output("arrow", 1, False), [table])})
    loaded = datasets.load_from_disk(str(tmp_path))["train"]
    assert loaded.to_list() == table.to_pylist()
    assert len(loaded.cache_files) == 1  # a cast would have copied it
