"""From any source to any destination and back: a dataset of which nothing is dropped equals itself."""

from __future__ import annotations

import datetime
import io
import json
import sys
from decimal import Decimal
from pathlib import Path
from typing import Any

import datasets
import fsspec
import numpy as np
import pyarrow as pa
import pytest

from sqsd_filter import Cut, PushTo, Scoring, SQSDScorer, filter_dataset, score_dataset, select_dataset
from sqsd_filter.cli.main import main
from sqsd_filter.errors import DestinationExists, InputError, UsageError
from sqsd_filter.pipeline.forecast import estimate
from sqsd_filter.pipeline.job import stage_of
from sqsd_filter.pipeline.writing.destination import lock_run
from tests.corpora import FOLDERS, make_rows, unnamed, write_jsonl
from tests.hub import Hub

datasets.disable_progress_bars()
SCORES = ["sqsd_risk", "sqsd_danger", "sqsd_safety", "sqsd_status"]
EVERY_TYPE = datasets.Features(
    {
        "instruction": datasets.Value("string"),
        "output": datasets.Value("large_string"),
        "label": datasets.ClassLabel(names=["good", "bad"]),
        "turns": datasets.List({"role": datasets.Value("string"), "weights": datasets.List(datasets.Value("float32"))}),
        "pair": datasets.List(datasets.Value("int8"), length=2),
        "matrix": datasets.Array2D((2, 2), "int32"),
        "anything": datasets.Json(),
        "meta": {"id": datasets.Value("uint64"), "tags": datasets.List(datasets.Value("string"))},
        "at": datasets.Value("timestamp[ns, tz=UTC]"),
        "day": datasets.Value("date32"),
        "for": datasets.Value("duration[s]"),
        "price": datasets.Value("decimal128(10, 2)"),
        "raw": datasets.Value("binary"),
        "yes": datasets.Value("bool"),
        "half": datasets.Value("float16"),
        "nothing": datasets.Value("string"),
        "picture": datasets.Image(),
        "sound": datasets.Audio(),
    }
)


def rich_row(k: int) -> dict[str, Any]:
    if k % 5 == 4:
        return dict.fromkeys(EVERY_TYPE) | {"instruction": f"ask {k}", "output": f"answer {k}"}
    return {
        "instruction": f"ask {k}",
        "output": f"answer {k}",
        "label": k % 2,
        "turns": [{"role": "user", "weights": [0.5, float(k)]}] * (k % 3),
        "pair": [k, -k],
        "matrix": [[k, 1], [2, 3]],
        "anything": [{"a": k}, "007", 1.5, None][k % 4],
        "meta": {"id": 2**63 + k, "tags": ["é", None]},
        "at": datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC) + datetime.timedelta(seconds=k),
        "day": datetime.date(2026, 1, 1 + k),
        "for": datetime.timedelta(seconds=k),
        "price": Decimal(f"{k}.25"),
        "raw": bytes([k, 0, 255]),
        "yes": k % 2 == 0,
        "half": np.float16(0.5),
        "nothing": None,
        "picture": {"bytes": b"no picture", "path": None},
        "sound": {"bytes": b"no sound", "path": None},
    }


@pytest.fixture
def rich() -> datasets.Dataset:
    columns = {name: [rich_row(k)[name] for k in range(12)] for name in EVERY_TYPE}
    columns["anything"] = [None if value is None else json.dumps(value) for value in columns["anything"]]
    schema = EVERY_TYPE.arrow_schema
    arrays = []
    for field in schema:
        storage = field.type.storage_type if isinstance(field.type, pa.BaseExtensionType) else field.type
        arrays.append(pa.array(columns[field.name], storage).cast(field.type))
    return datasets.Dataset(pa.Table.from_arrays(arrays, schema=schema))


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SQSD_FILTER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr("sqsd_filter.storage.retries.FIRST_WAIT", 0.01)
    return tmp_path


def rows(dataset: datasets.Dataset) -> list[Any]:
    """As Arrow has them: nothing is decoded."""
    undecoded: list[Any] = dataset.with_format("arrow")[:].to_pylist()
    return undecoded


def kept(where: str, to: str = "parquet", **how: Any) -> datasets.Dataset:
    if to == "arrow":
        return datasets.load_from_disk(where)["train"].remove_columns(SCORES)
    return datasets.load_dataset(where, split="train", **how).remove_columns(SCORES)


@pytest.mark.parametrize("to", ["parquet", "arrow"])
def test_a_dataset_of_every_type_equals_itself(to: str, rich: datasets.Dataset, scorer: SQSDScorer) -> None:
    filter_dataset(rich, "out", drop_count=0, scorer=scorer, to=to)
    found = kept("out", to)
    assert found.features == rich.features
    assert rows(found) == rows(rich)


@pytest.mark.parametrize("way", ["saved", "parquet", "hub", "iterable"])
def test_a_dataset_equals_itself_by_any_way_in(way: str, rich: datasets.Dataset, scorer: SQSDScorer, hub: Hub) -> None:
    given: Any = "in"
    if way == "saved":
        rich.save_to_disk("in")
    elif way == "parquet":
        given = "in.parquet"
        rich.to_parquet(given)
    elif way == "hub":
        given = "org/rich"
        rich.push_to_hub(given)
    else:
        given = rich.to_iterable_dataset(num_shards=3)
    report = filter_dataset(given, "out", drop_count=0, scorer=scorer)
    found = kept("out")
    assert found.features == rich.features
    assert rows(found) == rows(rich)
    assert [d["id"] for d in report["datasets"]] == (["org/rich"] if way == "hub" else [])


@pytest.mark.parametrize("to", ["parquet", "jsonl", "arrow"])
def test_the_kept_rows_of_a_run_are_read_by_naming_them(to: str, scorer: SQSDScorer, folder: Path) -> None:
    write_jsonl(folder / "in.jsonl", make_rows(40))
    filter_dataset("in.jsonl", "out", drop_top="10%", scorer=scorer, to=to)
    with pytest.raises(InputError, match="name what to read, as 'out:default'"):
        filter_dataset("out", "again", drop_top="10%", scorer=scorer)
    for k, named in enumerate(("out:default", "out:train", "out/data", *(["out/train"] if to == "arrow" else []))):
        assert filter_dataset(named, f"again-{k}", drop_top="10%", scorer=scorer)["rows"]["total"] == 36


def test_splits_stay_splits(scorer: SQSDScorer) -> None:
    given = datasets.DatasetDict(
        {"train": datasets.Dataset.from_list(make_rows(20)), "test": datasets.Dataset.from_list(make_rows(30)[20:])}
    )
    filter_dataset(given, "out", drop_count=5, scorer=scorer)
    found = datasets.load_dataset("out")
    dropped = datasets.load_dataset("out", "dropped")
    assert set(found) == {"train", "test"}
    for split in given:
        ids = sorted([*found[split]["id"][:], *dropped[split]["id"][:]])
        assert ids == given[split]["id"][:]
    assert sum(len(part) for part in dropped.values()) == 5


def test_a_split_without_rows_leaves_the_others_to_be_loaded(scorer: SQSDScorer) -> None:
    rows = make_rows(20)
    given = datasets.DatasetDict(
        {"a": datasets.Dataset.from_list(rows[:10]), "b": datasets.Dataset.from_list(rows[10:])}
    )
    report = filter_dataset(given, "out", max_risk=1e9, scorer=scorer)
    assert (report["rows"]["dropped"], set(datasets.load_dataset("out"))) == (0, {"a", "b"})
    found = filter_dataset(given, "one", drop_count=1, scorer=scorer)
    [split] = {file["split"] for file in found["files"] if file["config"] == "dropped" and file["rows"]}
    assert set(datasets.load_dataset("one", "dropped")) == {split}


def test_standard_input_comes_out_as_lines_byte_for_byte(
    folder: Path, tiny_pack: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = write_jsonl(
        folder / "in.jsonl", [*make_rows(30), b'{"instruction":"a",  "output":"\\u00e9"}\r', b"bad"]
    ).read_bytes()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text)))
    with pytest.raises(SystemExit) as left:
        main(["-", "out", "--drop-top", "10%", "--to", "jsonl", "--pack", str(tiny_pack), "-q"])
    assert left.value.code == 0
    parts = [Path("out", folder, "train-00000-of-00001.jsonl").read_bytes() for folder in FOLDERS.values()]
    kept, dropped, errors = (part.splitlines() for part in parts)
    lines = text.splitlines()
    numbers = [int(json.loads(line)["sqsd_row"].removeprefix("-:")) for line in dropped]
    assert kept == [line for k, line in enumerate(lines[:-1], 1) if k not in numbers]
    assert [unnamed(line, "-", k) for line, k in zip(dropped, numbers, strict=True)] == [lines[k - 1] for k in numbers]
    assert (len(dropped), errors) == (4, [b"bad"])
    with pytest.raises(InputError, match="made from standard input"):
        select_dataset("out", "other", Cut.of(drop_top="5%"))


def test_a_run_is_pushed_and_loads_from_the_hub(hub: Hub, scorer: SQSDScorer, folder: Path) -> None:
    write_jsonl(folder / "in.jsonl", make_rows(40))
    report = filter_dataset("in.jsonl", "out", drop_top="10%", scorer=scorer, push=PushTo("org/out"))
    assert report["published"]["rows"] == ["kept", "dropped", "errors"]
    here, there = (datasets.load_dataset(where, split="train") for where in ("out", "org/out"))
    assert rows(there) == rows(here)
    assert there.features == here.features
    assert list(datasets.load_dataset("org/out", split="train", streaming=True)) == list(here)
    assert len(datasets.load_dataset("org/out", "dropped", split="train")) == 4
    commits = len(hub.seen("POST", "/commit/"))
    again = filter_dataset("in.jsonl", "out", drop_top="10%", scorer=scorer, push=PushTo("org/out"))
    assert again["already_done"]
    assert len(hub.seen("POST", "/commit/")) == commits
    with pytest.raises(DestinationExists, match="org/out holds another run"):
        filter_dataset("in.jsonl", "other", drop_top="20%", scorer=scorer, push=PushTo("org/out"))
    filter_dataset("in.jsonl", "other", drop_top="20%", scorer=scorer, push=PushTo("org/out", overwrite=True))
    assert len(datasets.load_dataset("org/out", split="train")) == 32


@pytest.mark.parametrize("to", ["arrow", "jsonl"])
def test_each_format_loads_from_the_hub(to: str, hub: Hub, scorer: SQSDScorer, folder: Path) -> None:
    write_jsonl(folder / "in.jsonl", make_rows(40))
    filter_dataset("in.jsonl", "hf://datasets/org/out", drop_top="10%", scorer=scorer, to=to)
    counts = {config: len(datasets.load_dataset("org/out", config, split="train")) for config in ("default", "dropped")}
    assert counts == {"default": 36, "dropped": 4}
    assert not [name for name in hub.files("org/out") if name.endswith(("state.json", "dataset_info.json"))]


def test_the_hub_may_be_the_destination_itself(hub: Hub, scorer: SQSDScorer, folder: Path) -> None:
    write_jsonl(folder / "in.jsonl", make_rows(40))
    for _ in range(2):
        report = filter_dataset("in.jsonl", "hf://datasets/org/out@v1", drop_top="10%", scorer=scorer)
    assert report["already_done"]
    assert report["rows"]["dropped"] == 4
    assert len(datasets.load_dataset("org/out", revision="v1", split="train")) == 36
    assert [path.name for path in folder.glob("cache/stages/*")] == []
    assert not (folder / "hf:").exists()


def test_a_refused_push_keeps_the_run_and_goes_on_from_it(
    hub: Hub, tiny_pack: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_jsonl(folder / "in.jsonl", make_rows(40))
    hub.fail("POST", "/commit/", status=403)
    command = ["in.jsonl", "out", "--drop-top", "10%", "--pack", str(tiny_pack), "--push-to", "org/out", "--public"]
    with pytest.raises(SystemExit) as left:
        main(command)
    assert left.value.code == 1
    assert "can't be pushed to with this token" in capsys.readouterr().err
    with pytest.raises(SystemExit) as left:
        main([*command, "--json"])
    report = json.loads(capsys.readouterr().out)
    assert (left.value.code, report["published"]["rows"], report["rows"]["scored"]) == (0, ["kept"], 40)
    assert not any("dropped" in name or "errors" in name for name in hub.files("org/out"))
    assert str(folder) not in hub.files("org/out")["_sqsd/report.json"].decode()


def test_a_bucket_gets_what_a_folder_would(scorer: SQSDScorer, folder: Path) -> None:
    write_jsonl(folder / "in.jsonl", make_rows(40))
    try:
        filter_dataset("in.jsonl", "out", drop_top="10%", scorer=scorer)
        for _ in range(2):
            report = filter_dataset("in.jsonl", "memory://bucket/out", drop_top="10%", scorer=scorer)
        memory = fsspec.filesystem("memory")
        for path in sorted(Path("out").rglob("*.parquet")):
            assert memory.cat(f"/bucket/{path}") == path.read_bytes()
        assert report["already_done"]
        with pytest.raises(DestinationExists, match="memory://bucket/out holds another run"):
            filter_dataset("in.jsonl", "memory://bucket/out", drop_top="20%", scorer=scorer)
        again = select_dataset("memory://bucket/out/data/*.parquet", "memory://bucket/cut", Cut.of(drop_top="20%"))
        assert again["rows"]["dropped"] == 8
        assert list(folder.glob("cache/stages/*")) == []
    finally:
        fsspec.filesystem("memory").rm("/bucket", recursive=True)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"dest": "memory://bucket/out", "push": PushTo("org/out")}, "are two destinations"),
        ({"dest": "hf://datasets/org/out", "push": PushTo("org/other")}, "are two destinations"),
    ],
)
def test_what_can_not_be_published_is_refused_before_scoring(
    arguments: dict[str, Any], said: str, hub: Hub, folder: Path
) -> None:
    write_jsonl(folder / "in.jsonl", make_rows(4))
    with pytest.raises(UsageError, match=said):
        filter_dataset("in.jsonl", drop_top="10%", **arguments)


def corpus(where: str, *, parts: int = 2) -> None:
    """A folder that `datasets` reads: the split train in several files, and typed by its card."""
    Path(where).mkdir()
    for k in range(parts):
        write_jsonl(Path(where) / f"train-{k}.jsonl", make_rows(30)[k * 10 : k * 10 + 10])


def test_another_cut_of_a_run_over_a_split_in_several_files(scorer: SQSDScorer, hub: Hub) -> None:
    corpus("in", parts=3)
    datasets.load_dataset("in").push_to_hub("org/in", num_shards={"train": 3})
    for number, given in enumerate(["in", "in:default/train", "org/in", ["in", "in"]]):
        filter_dataset(given, f"out-{number}", drop_top="10%", scorer=scorer)
        report = select_dataset(f"out-{number}", f"cut-{number}", Cut.of(drop_top="20%"))
        assert report["rows"]["dropped"] == (12 if isinstance(given, list) else 6)


def test_an_input_is_never_replaced(scorer: SQSDScorer, folder: Path) -> None:
    corpus("in")
    Path("in/README.md").write_text(
        "---\ndataset_info:\n  features:\n  - name: id\n    dtype: int64\n  - name: "
        "instruction\n    dtype: string\n  - name: output\n    dtype: string\n---\n"
    )
    before = {path: path.read_bytes() for path in Path("in").iterdir()}
    for given, dest in [("in", "in"), (f"file://{folder}/in/train-0.jsonl", "in"), ("in/*.jsonl", "in")]:
        with pytest.raises(DestinationExists, match="which --overwrite would delete"):
            filter_dataset(given, dest, drop_top="10%", scorer=scorer, overwrite=True)
    assert {path: path.read_bytes() for path in Path("in").iterdir()} == before


def test_a_destination_inside_a_source_folder_is_refused(scorer: SQSDScorer) -> None:
    corpus("in")
    with pytest.raises(UsageError, match="in/out lies in the source in, and would be read with it"):
        filter_dataset("in", "in/out", drop_top="10%", scorer=scorer)
    Path("plain").mkdir()
    write_jsonl(Path("plain/a.jsonl"), make_rows(20))
    filter_dataset("plain/*.jsonl", "plain/out", drop_top="10%", scorer=scorer, to="jsonl")
    with pytest.raises(InputError, match="plain holds out, the output of an earlier run"):
        filter_dataset("plain", "other", drop_top="10%", scorer=scorer)


def test_one_stage_and_one_place_have_one_run_at_a_time(scorer: SQSDScorer, folder: Path) -> None:
    write_jsonl(folder / "in.jsonl", make_rows(20))
    filter_dataset("in.jsonl", "out", drop_top="5%", scorer=scorer)
    for dest, overwrite in (("memory://bucket/x", False), ("out", True)):
        lock = stage_of(dest) / "lock" if "://" in dest else Path("out/_sqsd/lock")
        lock.parent.mkdir(parents=True, exist_ok=True)
        held = lock_run(lock, dest)
        with pytest.raises(DestinationExists, match="right now: wait for it"):
            filter_dataset("in.jsonl", dest, drop_top="10%", scorer=scorer, overwrite=overwrite)
        held.close()


def test_another_run_in_the_repository_is_found_before_scoring(scorer: SQSDScorer, hub: Hub, folder: Path) -> None:
    write_jsonl(folder / "in.jsonl", make_rows(20))
    filter_dataset("in.jsonl", "out", drop_top="5%", scorer=scorer, push=PushTo("org/out"))
    with pytest.raises(DestinationExists, match="org/out holds another run"):
        filter_dataset("in.jsonl", "other", drop_top="10%", scorer=scorer, push=PushTo("org/out"))
    assert not Path("other/data").exists()


def test_a_forecast_is_made_for_a_url_too(scorer: SQSDScorer, folder: Path) -> None:
    write_jsonl(folder / "in.jsonl", make_rows(20))
    assert estimate("in.jsonl", "memory://bucket/out", Scoring(scorer=scorer))["to_score"] == 20


def test_what_parquet_does_not_hold_is_refused_before_scoring(folder: Path) -> None:
    table = pa.Table.from_pylist(make_rows(3)).append_column("empty", pa.array([{}] * 3, pa.struct([])))
    with pa.ipc.new_stream("in.arrow", table.schema) as sink:
        sink.write_table(table)
    with pytest.raises(InputError, match=r"Column 'empty' holds struct<>, which a parquet file can't hold"):
        score_dataset("in.arrow", "scored.parquet")
    with pytest.raises(InputError, match=r"Column 'empty' holds .* can't be written to parquet"):
        filter_dataset("in.arrow", "out", drop_top="5%")
