"""`select` on everything that `datasets` has: the same three parts, wherever the rows are."""

from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import PIL.Image
import pyarrow as pa
import pytest
from datasets import (
    ClassLabel,
    Dataset,
    DatasetDict,
    Features,
    Image,
    IterableDataset,
    IterableDatasetDict,
    Json,
    Value,
    load_from_disk,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from sqsd_filter import select
from sqsd_filter.corpus import spool
from sqsd_filter.errors import InputError, SQSDError, UsageError
from tests.disks import small_disk

RISK = [0.5, 0.1, 0.9, 0.5, None, 0.5, -0.2]
CUTS: list[tuple[dict[str, Any], list[list[int]]]] = [
    ({"drop_count": 2}, [[1, 3, 5, 6], [0, 2], [4]]),
    ({"drop_top": "50%"}, [[1, 5, 6], [0, 2, 3], [4]]),
    ({"keep_lowest": 2}, [[1, 6], [0, 2, 3, 5], [4]]),
    ({"max_risk": 0.5}, [[0, 1, 3, 5, 6], [2], [4]]),
    ({"max_risk": 0.4999}, [[1, 6], [0, 2, 3, 5], [4]]),
    ({"drop_top": "0%"}, [[0, 1, 2, 3, 5, 6], [], [4]]),
]
FORMATS = (None, "arrow", "numpy", "pandas", "torch")
TYPES = Features({"id": Value("int64"), "sqsd_risk": Value("float64"), "sqsd_status": Value("string")})

Kind = Callable[[Dataset], Any]
KINDS: dict[str, Kind] = {
    "dataset": lambda dataset: dataset,
    "stream": lambda dataset: dataset.to_iterable_dataset(),
    "stream without types": lambda dataset: IterableDataset.from_generator(partial(iter, dataset.to_list())),
}
every_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
every_cut = pytest.mark.parametrize(("cut", "parts"), CUTS, ids=[str(cut) for cut, _ in CUTS])


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache"


def scored(risk: list[float | None] = RISK, start: int = 0) -> Dataset:
    status = ["no_answer" if r is None else "scored" for r in risk]
    rows = {"id": list(range(start, start + len(risk))), "sqsd_risk": risk, "sqsd_status": status}
    return Dataset.from_dict(rows, features=TYPES)


def ids(part: Any) -> list[int]:
    return [row["id"] for row in part.with_format(None)]


# ---------------------------------------------------------------------------------------------- one dataset


@every_kind
@every_cut
def test_each_kind_of_dataset_is_cut_in_three_in_row_order(
    kind: Kind, cut: dict[str, Any], parts: list[list[int]]
) -> None:
    dataset = kind(scored())
    cut_apart = select(dataset, **cut)
    assert {type(part) for part in cut_apart} == {type(dataset)}
    assert [ids(part) for part in cut_apart] == parts


@every_kind
@pytest.mark.parametrize(("cut", "parts"), CUTS[::3], ids=[str(cut) for cut, _ in CUTS[::3]])
@pytest.mark.parametrize("form", FORMATS)
def test_the_format_of_the_rows_stays(
    kind: Kind, cut: dict[str, Any], parts: list[list[int]], form: str | None
) -> None:
    dataset = kind(scored()).with_format(form)
    for part, expected in zip(select(dataset, **cut), parts, strict=True):
        assert (part.format["type"] if isinstance(part, Dataset) else spool.format_of(part)) == form
        assert type(next(iter(part))) is type(next(iter(dataset)))
        assert ids(part) == expected


@every_kind
@pytest.mark.parametrize("cut", [{"drop_count": 1}, {"max_risk": 0.1}], ids=str)
def test_risks_that_differ_in_their_last_bits_are_not_equal(kind: Kind, cut: dict[str, Any]) -> None:
    dataset = kind(scored([0.1, 0.1 + 1e-12, 0.1])).with_format("torch")  # whose floats have 32 bits
    assert ids(select(dataset, **cut)[1]) == [1]


def test_a_shuffled_dataset_is_cut_as_it_stands() -> None:
    shuffled = scored().shuffle(seed=3)
    order = shuffled["id"][:]
    assert order != sorted(order)
    flat = select(Dataset.from_list(shuffled.to_list(), features=TYPES), drop_count=2)
    assert [ids(part) for part in select(shuffled, drop_count=2)] == [ids(part) for part in flat]
    assert [k for k in order if k in ids(flat[0])] == ids(flat[0])


@every_kind
@pytest.mark.parametrize("cut", [{"drop_top": "5%"}, {"max_risk": 0.1}], ids=str)
def test_where_no_row_has_a_score_all_are_errors(kind: Kind, cut: dict[str, Any]) -> None:
    assert [ids(part) for part in select(kind(scored([None, None])), **cut)] == [[], [], [0, 1]]


def test_a_status_counts_for_more_than_the_risk_beside_it() -> None:
    rows = {"id": [0, 1, 2], "sqsd_risk": [0.1, float("nan"), 0.3], "sqsd_status": ["no_answer", "scored", None]}
    assert [ids(part) for part in select(Dataset.from_dict(rows), drop_count=1)] == [[], [], [0, 1, 2]]


@pytest.mark.parametrize(
    "empty",
    [
        scored([]),
        scored().select([]),
        scored([]).remove_columns(["sqsd_risk", "sqsd_status"]),  # `map` adds none where there are no rows
        scored([]).to_iterable_dataset(num_shards=0),
        IterableDataset.from_generator(partial(iter, [])),
    ],
    ids=["dataset", "selection", "unscored", "stream", "stream without types"],
)
@pytest.mark.parametrize("cut", [{"drop_top": "5%"}, {"max_risk": 0.1}], ids=str)
def test_nothing_is_cut_in_three_nothings(empty: Any, cut: dict[str, Any]) -> None:
    parts = select(empty, **cut)
    assert [list(part) for part in parts] == [[], [], []]
    assert {type(part) for part in parts} == {type(empty)}


@every_kind
@pytest.mark.parametrize("cut", [{"drop_count": 1}, {"max_risk": 0.1}], ids=str)
def test_a_dataset_without_scores_is_refused(kind: Kind, cut: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="no column sqsd_risk and no sqsd_status"):
        next(iter(select(kind(scored().select_columns("id")), **cut)[0]))


@every_kind
@pytest.mark.parametrize("cut", [{"drop_count": 1}, {"max_risk": 0.1}], ids=str)
@pytest.mark.parametrize("column", [{"sqsd_risk": ["low", "high"]}, {"sqsd_status": [["scored"], []]}], ids=str)
def test_columns_that_hold_no_scores_are_refused(kind: Kind, cut: dict[str, Any], column: dict[str, list[Any]]) -> None:
    rows = {"id": [0, 1], "sqsd_risk": [0.1, 0.2], "sqsd_status": ["scored", "scored"], **column}
    with pytest.raises(InputError, match="sqsd_risk and sqsd_status hold no scores"):
        next(iter(select(kind(Dataset.from_dict(rows)), **cut)[0]))


def test_what_datasets_has_not_loaded_is_refused() -> None:
    with pytest.raises(UsageError, match="not str"):
        select("in.jsonl", drop_count=1)


# ---------------------------------------------------------------------------------------------- several splits


@pytest.mark.parametrize("streamed", [False, True], ids=["stored", "streamed"])
def test_each_split_is_cut_on_its_own_unless_they_are_cut_together(streamed: bool) -> None:
    splits = DatasetDict(train=scored([0.1, 0.9, 0.8, None]), test=scored([0.2, 0.3], start=4))
    dataset: Any = splits
    if streamed:
        dataset = IterableDatasetDict({name: split.to_iterable_dataset() for name, split in splits.items()})
    apart, together = select(dataset, drop_count=1), select(dataset, drop_count=1, together=True)
    assert {type(part) for part in (*apart, *together)} == {type(dataset)}
    assert [{name: ids(split) for name, split in part.items()} for part in apart] == [
        {"train": [0, 2], "test": [4]},
        {"train": [1], "test": [5]},
        {"train": [3], "test": []},
    ]
    assert [{name: ids(split) for name, split in part.items()} for part in together] == [
        {"train": [0, 2], "test": [4, 5]},
        {"train": [1], "test": []},
        {"train": [3], "test": []},
    ]


risks = st.lists(st.integers(-3, 3).map(lambda k: k / 7) | st.none(), max_size=12)


@settings(max_examples=30, deadline=None)
@given(risks=st.lists(risks, max_size=3), count=st.integers(0, 12))
def test_splits_cut_together_are_cut_as_if_they_were_one(risks: list[list[float | None]], count: int) -> None:
    starts = np.cumsum([0, *map(len, risks)])
    splits = {f"s{k}": scored(risk, start=int(starts[k])) for k, risk in enumerate(risks)}
    joined = select(scored([*chain.from_iterable(risks)]), drop_count=count)
    parts = select(DatasetDict(splits), drop_count=count, together=True)
    assert [[k for split in part.values() for k in ids(split)] for part in parts] == [ids(part) for part in joined]
    assert all(set(part) == set(splits) for part in parts)


# ---------------------------------------------------------------------------------------------- streams


def counted(read: list[int], rows: list[dict[str, Any]]) -> IterableDataset:
    """A stream that notes each row when it is read, as a scorer would spend time on it."""

    def generate() -> Iterator[dict[str, Any]]:
        for row in rows:
            read.append(row["id"])
            yield row

    return IterableDataset.from_generator(generate, features=TYPES)


def test_a_stream_that_must_be_seen_whole_is_read_once() -> None:
    read: list[int] = []
    parts = select(counted(read, scored().to_list()), drop_count=2)
    assert read == list(range(7))
    assert [ids(part) for part in parts] == [[1, 3, 5, 6], [0, 2], [4]]
    assert [ids(part) for part in parts] == [[1, 3, 5, 6], [0, 2], [4]]
    assert len(read) == 7


def test_a_stream_that_is_cut_at_a_risk_is_read_when_its_parts_are() -> None:
    read: list[int] = []
    kept, dropped, _ = select(counted(read, scored().to_list()), max_risk=0.5)
    assert read == []
    assert (ids(kept), len(read)) == ([0, 1, 3, 5, 6], 7)
    assert (ids(dropped), len(read)) == ([2], 14)


def media() -> Dataset:
    """Values that would not survive being decoded: an image that is none, JSON that reads as something else."""
    labels = Features({**TYPES, "image": Image(), "json": Json(), "label": ClassLabel(names=["no", "yes"])})
    image = {"bytes": b"no image", "path": None}
    table = scored([0.5, 0.1, None]).data.table
    table = table.append_column("image", pa.array([image] * 3, labels["image"].pa_type))
    texts = pa.array(['"123"', "1e400", '{"a":  1}'])
    table = table.append_column("json", pa.ExtensionArray.from_storage(pa.json_(), texts))
    table = table.append_column("label", pa.array([1, 0, None], pa.int64()))
    return Dataset(table.replace_schema_metadata(labels.arrow_schema.metadata))


@pytest.mark.parametrize("form", [None, "arrow"])
@pytest.mark.parametrize("cut", [{"drop_count": 1}, {"max_risk": 0.1}], ids=str)
def test_values_and_types_go_through_a_stream_untouched(cut: dict[str, Any], form: str | None) -> None:
    source = media()
    for part, row in zip(select(source.to_iterable_dataset().with_format(form), **cut), (1, 0, 2), strict=True):
        assert part.features == source.features
        (table,) = part.with_format("arrow").iter(10)
        assert table.equals(source.with_format("arrow")[row : row + 1])


@pytest.mark.parametrize("threads", [None, 2], ids=["plain", "threads"])
@pytest.mark.parametrize("cut", [{"drop_count": 1}, {"max_risk": 0.1}], ids=str)
def test_images_in_plain_rows_keep_their_bytes(cut: dict[str, Any], threads: int | None) -> None:
    jpeg = io.BytesIO()
    PIL.Image.new("RGB", (8, 8), (200, 10, 30)).save(jpeg, "JPEG", quality=35)
    image = {"bytes": jpeg.getvalue(), "path": None}
    rows = [{**row, "image": image, "more": [image]} for row in scored([0.5, 0.1, None]).to_list()]
    types = Features({**TYPES, "image": Image(), "more": datasets.List(Image())})
    stream = IterableDataset.from_generator(partial(iter, rows), features=types)
    if threads:
        stream = stream.decode(num_threads=threads)
    for part, row in zip(select(stream, **cut), (1, 0, 2), strict=True):
        assert part.features == types
        assert list(part.decode(False)) == [rows[row]]
        [shown] = part
        assert shown["image"].size == shown["more"][0].size == (8, 8)


def late(n: int) -> list[dict[str, Any]]:
    """Rows whose types show late, as those of a JSON Lines file may."""
    rows = []
    for k in range(n):
        young = k < 0.7 * n
        row = {
            "id": k,
            "note": None if young else "x",
            "deep": {"a": None if young else 0.5, "l": [] if young else [k]},
        }
        rows.append({**row, "sqsd_risk": k / n, "sqsd_status": "scored"} | ({} if young else {"late": True}))
    return rows


def test_types_that_show_late_in_a_stream_are_those_of_all_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spool, "ROWS", 16)
    rows = late(100)
    kept, dropped, _ = select(IterableDataset.from_generator(partial(iter, rows)), drop_top="10%")
    assert [*kept, *dropped] == [{**row, "late": row.get("late")} for row in rows]
    assert kept.features["deep"] == {"a": Value("float64"), "l": datasets.List(Value("int64"))}


@pytest.mark.parametrize("at", [3, 60], ids=["at once", "later"])
def test_types_that_do_not_go_together_are_named(monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    monkeypatch.setattr(spool, "ROWS", 16)
    rows = [{**row, "note": k if k < at else "x"} for k, row in enumerate(scored([0.1] * 100).to_list())]
    with pytest.raises(InputError, match=r"types don't go together .*features="):
        select(IterableDataset.from_generator(partial(iter, rows)), drop_top="10%")


def test_an_error_of_the_stream_itself_comes_through() -> None:
    def generate() -> Iterator[dict[str, Any]]:
        yield scored()[0]
        raise ConnectionError("the network is gone")

    with pytest.raises(ConnectionError, match="the network is gone"):
        select(IterableDataset.from_generator(generate), drop_top="10%")


def test_a_full_disk_is_one_sentence() -> None:
    stream = scored([0.1] * 10_000).to_iterable_dataset()
    with pytest.raises(SQSDError, match=r"can't be stored in .*cache .*HF_DATASETS_CACHE"), small_disk(50_000):
        select(stream, drop_top="10%")


def test_the_file_of_a_stream_goes_with_the_process(cache: Path) -> None:
    code = (
        "from pathlib import Path; from sqsd_filter import select\n"
        "from tests.pipeline.selecting.test_select import scored\n"
        "kept, _, _ = select(scored().to_iterable_dataset(), drop_count=2)\n"
        f"print(len(list(kept)), len(list(Path({str(cache)!r}).rglob('*.arrow'))))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], env={"HF_DATASETS_CACHE": str(cache), "PYTHONPATH": ":".join(sys.path)},
        capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    assert run.stdout.split() == ["4", "1"]
    assert list(cache.rglob("*.arrow")) == []


def test_a_saved_dataset_is_cut_too(tmp_path: Path) -> None:
    scored().save_to_disk(tmp_path / "saved")
    parts = select(load_from_disk(tmp_path / "saved"), drop_count=2)
    assert [ids(part) for part in parts] == [[1, 3, 5, 6], [0, 2], [4]]
