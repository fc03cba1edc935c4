"""Whatever a user may name as a source: folders, splits, URLs, standard input, datasets from Python."""

from __future__ import annotations

import io
import json
import os
import re
import sys
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import datasets
import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFile

from sqsd_filter.corpus.addresses import Opener, expand
from sqsd_filter.corpus.sources import Corpus
from sqsd_filter.errors import InputError, UsageError

ROWS: list[dict[str, Any]] = [{"n": k, "prompt": f"é {k}", "completion": "yes" * k} for k in range(20)]


def lines(rows: list[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def read(*given: Any, **how: Any) -> dict[str, list[int]]:
    """The numbers of all rows, by split."""
    opener = Opener(**how)
    corpus = Corpus.scan(opener.open(expand(given)))
    found: dict[str, list[int]] = {}
    for chunk in corpus.chunks():
        found.setdefault(chunk.split, []).extend(int(n) for n in chunk.table["n"].to_pylist())
    assert [row.value["n"] for row in corpus.read(0, corpus.n_rows) if row.value] == list(chain(*found.values()))
    opener.close()
    return found


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path


def numbers(start: int, stop: int) -> list[int]:
    return list(range(start, stop))


def save(where: str) -> None:
    splits = {"train": ROWS[:7], "test": ROWS[7:9], "odd": ROWS[9:]}
    datasets.DatasetDict({name: datasets.Dataset.from_list(rows) for name, rows in splits.items()}).save_to_disk(where)


def test_a_saved_folder_of_splits_is_read_with_all_of_them_or_those_named() -> None:
    save("saved")
    assert read("saved") == {"train": numbers(0, 7), "test": [7, 8], "odd": numbers(9, 20)}
    assert read("saved:odd") == {"odd": numbers(9, 20)}
    assert read("saved:test+train") == {"test": [7, 8], "train": numbers(0, 7)}
    assert read("saved/test") == {"train": [7, 8]}
    with pytest.raises(InputError, match="saved has no split 'dev'; it has train, test, odd"):
        read("saved:dev")
    with pytest.raises(InputError, match="a single saved split"):
        read("saved/test:test")


def test_a_saved_split_without_rows_is_read_with_its_columns() -> None:
    features = datasets.Features({"n": datasets.Value("int8"), "label": datasets.ClassLabel(names=["a", "b"])})
    train = datasets.Dataset.from_list([{"n": 1, "label": 0}], features=features)
    datasets.DatasetDict({"test": train.select([]), "train": train}).save_to_disk("saved")
    assert not json.loads(Path("saved/test/state.json").read_bytes())["_data_files"]
    assert read("saved") == {"train": [1]}
    assert read("saved:test") == {}
    corpus = Corpus.scan(Opener().open(["saved:test"]), visit=lambda row: None)
    assert (corpus.n_rows, datasets.Features.from_arrow_schema(corpus.schema)) == (0, features)
    assert Corpus.scan(Opener().open(["saved"])).splits == ["test", "train"]


BAD_SPLITS = ["a-b", "../../esc", "a b", "", "a.", ".a", "all", "a\n"]


@pytest.mark.parametrize("name", BAD_SPLITS)
def test_a_split_that_datasets_can_not_load_is_refused_before_anything_is_read(name: str) -> None:
    rows = datasets.Dataset.from_list(ROWS)
    lazy = datasets.IterableDataset.from_generator(lambda: iter([1 // 0]))
    said = f"has a split named {re.escape(repr(name))}, which `datasets` can't load: rename it"
    with pytest.raises(InputError, match=said):
        Opener().open([{"a": lazy, name: rows}])
    rows.save_to_disk("saved/a")
    Path("saved/dataset_dict.json").write_text(json.dumps({"splits": ["a", name]}))
    with pytest.raises(InputError, match=said):
        Opener().open(["saved"])
    assert read("saved:a") == {"a": numbers(0, 20)}


def test_a_split_of_a_folders_card_that_datasets_can_not_load_is_refused() -> None:
    Path("d").mkdir()
    header = "configs:\n- config_name: c\n  data_files:\n  - split: all\n    path: a.jsonl\n"
    Path("d/README.md").write_text(f"---\n{header}---\n")
    Path("d/a.jsonl").write_bytes(lines(ROWS))
    with pytest.raises(ValueError, match="all"):
        datasets.load_dataset("d")
    with pytest.raises(InputError, match="d has a split named 'all', which `datasets` can't load"):
        read("d")


@pytest.mark.parametrize("name", ["a", "a_b", "é9", "a.b.c", "_"])
def test_a_split_that_datasets_loads_is_taken(name: str) -> None:
    rows = datasets.Dataset.from_list(ROWS)
    assert read({name: rows}) == {name: numbers(0, 20)}
    datasets.DatasetDict({name: rows}).save_to_disk("saved")
    assert read("saved") == {name: numbers(0, 20)}


def test_a_folder_of_files_is_read_as_load_dataset_would() -> None:
    Path("corpus").mkdir()
    Path("corpus/train.jsonl").write_bytes(lines(ROWS[:5]))
    Path("corpus/test.jsonl").write_bytes(lines(ROWS[5:8]))
    Path("corpus/notes.md").write_text("not data")
    assert read("corpus") == {"train": numbers(0, 5), "test": [5, 6, 7]}
    assert {name: part["n"][:] for name, part in datasets.load_dataset("corpus").items()} == read("corpus")
    assert read("corpus:default/test") == read("corpus:test") == {"test": [5, 6, 7]}
    with pytest.raises(InputError, match="has no split 'dev'; it has train, test"):
        read("corpus:default/dev")
    with pytest.raises(InputError, match="has no configuration 'big'; it has default"):
        read("corpus:big/train")


def test_types_that_datasets_inferred_before_are_not_taken_for_declared_ones() -> None:
    Path("corpus").mkdir()
    Path("corpus/train.csv").write_text("n,code\n0,007\n")
    before = Corpus.scan(Opener().open(["corpus"]))
    assert [row["code"] for row in datasets.load_dataset("corpus", split="train")] == [7]
    after = Corpus.scan(Opener().open(["corpus"]))
    assert (after.inputs, after.schema) == (before.inputs, before.schema)
    assert [row.value for row in after.read(0, 1)] == [{"n": "0", "code": "007"}]


def configured(where: str) -> None:
    Path(where).mkdir()
    header = "---\nconfigs:\n- config_name: small\n  data_files: a.jsonl\n- config_name: large\n  data_files:\n"
    header += "  - split: train\n    path: a.jsonl\n  - split: dev\n    path: b.jsonl\n---\n"
    Path(where, "README.md").write_text(header)
    Path(where, "a.jsonl").write_bytes(lines(ROWS[:5]))
    Path(where, "b.jsonl").write_bytes(lines(ROWS[5:8]))


def test_configurations_of_a_folder_are_named_and_when_missing_listed() -> None:
    configured("corpus")
    assert read("corpus:small") == {"train": numbers(0, 5)}
    assert read("corpus:large") == {"train": numbers(0, 5), "dev": [5, 6, 7]}
    assert read("corpus:large/dev") == {"dev": [5, 6, 7]}
    with pytest.raises(InputError, match=r"has the configurations .*name one of them: corpus:"):
        read("corpus")
    with pytest.raises(InputError, match="has no configuration 'medium'; it has"):
        read("corpus:medium")


def test_a_split_of_the_default_configuration_is_named_without_it() -> None:
    Path("d").mkdir()
    header = "configs:\n- config_name: dropped\n  data_files: b.jsonl\n- config_name: default\n  data_files:\n"
    header += "  - split: train\n    path: a.jsonl\n  - split: dropped\n    path: c.jsonl\n"
    Path("d/README.md").write_text(f"---\n{header}---\n")
    for name, start in {"a": 0, "b": 5, "c": 10}.items():
        Path("d", f"{name}.jsonl").write_bytes(lines(ROWS[start : start + 5]))
    assert read("d:train") == read("d:default/train") == {"train": numbers(0, 5)}
    assert read("d:train+dropped") == read("d") == {"train": numbers(0, 5), "dropped": numbers(10, 15)}
    assert read("d:dropped") == {"train": numbers(5, 10)}  # a configuration comes before a split
    with pytest.raises(InputError, match="has no configuration 'test'; it has dropped, default"):
        read("d:test")
    with pytest.raises(InputError, match=r"has no configuration 'train\+test'; it has dropped, default"):
        read("d:train+test")


def test_an_existing_folder_is_itself_though_its_name_has_the_signs_of_a_pattern() -> None:
    save("d[1]")
    save("d1")
    assert expand(["d[1]:odd", "d[1]"]) == ["d[1]:odd", "d[1]"]
    assert read("d[1]:test") == {"test": [7, 8]}
    assert read("d[1]")["test"] == [7, 8]


def test_an_empty_string_is_no_source() -> None:
    Path("a.jsonl").write_bytes(lines(ROWS))
    with pytest.raises(InputError, match="A source is an empty string"):
        read("a.jsonl", "")


def test_standard_input_is_refused_twice_and_when_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines(ROWS))))
    with pytest.raises(UsageError, match="Standard input can be read only once"):
        read("-", Path("-"))
    assert read("-") == {"train": numbers(0, 20)}  # of which nothing was taken
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(UsageError, match="Standard input is closed"):
        read("-")


def test_types_that_a_folders_card_declares_are_those_of_its_rows() -> None:
    Path("corpus").mkdir()
    header = "---\ndataset_info:\n  features:\n  - name: n\n    dtype: int16\n  - name: kind\n    dtype:\n"
    header += "      class_label:\n        names:\n          '0': a\n          '1': b\n---\n"
    Path("corpus/README.md").write_text(header)
    pq.write_table(pa.table({"n": [3, 4], "kind": [1, 0]}), "corpus/train.parquet")
    [source] = Opener().open(["corpus"])
    expected = datasets.load_dataset("corpus", split="train")
    corpus = Corpus.scan([source])
    assert datasets.Features.from_arrow_schema(corpus.schema) == expected.features
    assert [row.value for row in corpus.read(0, 2, ["kind"])] == [{"kind": 1}, {"kind": 0}]
    [chunk] = corpus.chunks()
    assert chunk.table.to_pylist() == expected.with_format("arrow")[:].to_pylist()


@pytest.mark.parametrize("files", [[], ["notes.md", "a.bin"]], ids=["empty", "of unknown kinds"])
def test_a_folder_without_data_is_told_to_hold_none(files: list[str]) -> None:
    Path("d").mkdir()
    for name in files:
        Path("d", name).write_bytes(b"x")
    with pytest.raises(InputError, match=r"^d holds no data files that can be read: .*\.jsonl"):
        read("d")


def test_a_folder_whose_card_is_wrong_is_not_said_to_need_the_network() -> None:
    Path("d").mkdir()
    Path("d/README.md").write_text("---\nconfigs:\n- config_name: a\n  data_files: missing.csv\n---\n")
    with pytest.raises(InputError, match=r"^d can't be read \(.*missing\.csv.*\): check its files\.$"):
        read("d")


def test_what_only_datasets_can_read_is_read_by_it() -> None:
    Path("corpus").mkdir()
    Path("corpus/README.md").write_text("---\nconfigs:\n- config_name: default\n  data_files: a.csv\n  sep: ';'\n---\n")
    Path("corpus/a.csv").write_text("n;prompt\n0;x\n1;y\n")
    assert read("corpus") == {"train": [0, 1]}


def test_the_output_of_a_run_is_only_read_by_naming_what_of_it() -> None:
    configured("out")
    Path("out/_sqsd").mkdir()
    Path("out/_sqsd/run.json").write_text("{}")
    with pytest.raises(InputError, match="earlier run: name what to read, as 'out:default'"):
        read("out")
    assert read("out:large/dev") == {"dev": [5, 6, 7]}


@pytest.mark.parametrize("footer", [False, True])
def test_arrow_files_are_read_from_any_row_on(footer: bool) -> None:
    table = datasets.Dataset.from_list(ROWS).data.table
    with (pa.ipc.new_file if footer else pa.ipc.new_stream)("a.arrow", table.schema) as writer:
        writer.write_table(table, max_chunksize=3)
    corpus = Corpus.scan(Opener().open(["a.arrow"]))
    assert (corpus.n_rows, corpus.schema) == (20, table.schema)
    for start, stop in [(0, 20), (2, 3), (2, 11), (18, 25), (20, 30)]:
        assert [row.value for row in corpus.read(start, stop)] == ROWS[start:stop]
    assert [row.value for row in corpus.read(5, 7, ["n"])] == [{"n": 5}, {"n": 6}]


def test_standard_input_is_json_lines_told_by_its_dash(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines(ROWS) + b"broken\n")))
    opener = Opener()
    corpus = Corpus.scan(opener.open(["-"]))
    rows = list(corpus.read(0, 99))
    assert [row.value for row in rows] == [*ROWS, None]
    assert {row.file for row in rows} == {"-"}
    assert corpus.inputs[0]["path"] == "-"
    assert list(folder.glob("sqsd-filter-*"))
    opener.close()
    assert not list(folder.glob("sqsd-filter-*"))


@pytest.fixture
def bucket() -> Iterator[Any]:
    memory = fsspec.filesystem("memory")
    memory.pipe("/bucket/in/a.jsonl", lines(ROWS[:4]))
    memory.pipe("/bucket/in/b.jsonl", lines(ROWS[4:6]))
    memory.pipe("/bucket/in/deep/c.jsonl", lines(ROWS[6:9]))
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(ROWS), sink, row_group_size=3)
    memory.pipe("/bucket/in/d.parquet", sink.getvalue())
    yield memory
    memory.rm("/bucket", recursive=True)


def test_files_behind_urls_are_read_and_globs_found(bucket: Any) -> None:
    assert read("memory://bucket/in/b.jsonl") == {"train": [4, 5]}
    assert read("memory://bucket/in/*.jsonl") == {"train": numbers(0, 6)}
    assert read("memory://bucket/in/**/*.jsonl") == {"train": numbers(0, 9)}
    assert read("memory://bucket/in/d.parquet", "memory://bucket/in/b.jsonl") == {"train": [*numbers(0, 20), 4, 5]}
    with pytest.raises(InputError, match="No file matches memory://bucket/in/x"):
        read("memory://bucket/in/x*.jsonl")
    with pytest.raises(InputError, match=r"Cannot read memory://bucket/in/z\.jsonl"):
        read("memory://bucket/in/z.jsonl")
    with pytest.raises(UsageError, match="can't be used"):
        read("nowhere://bucket/in/z.jsonl")


class Dropping(MemoryFile):  # type: ignore[misc]  # fsspec has no types
    """A remote file whose connection breaks at every other read, and sometimes ends too early."""

    broken = 0

    def read(self, size: int = -1) -> bytes:
        type(self).broken += 1
        if type(self).broken % 4 == 1:
            raise ConnectionResetError("the connection was reset")
        return b"" if type(self).broken % 4 == 3 else super().read(min(size, 50) if size >= 0 else size)


def test_a_connection_that_breaks_again_and_again_costs_no_row(bucket: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sqsd_filter.storage.retries.FIRST_WAIT", 0.0)
    content = bucket.cat("/bucket/in/a.jsonl")

    def dropping(path: str, *args: Any, **kwargs: Any) -> Any:
        return Dropping(bucket, path, content)

    monkeypatch.setattr(type(bucket), "_open", lambda self, path, *args, **kwargs: dropping(path))
    assert read("memory://bucket/in/a.jsonl") == {"train": numbers(0, 4)}
    assert Dropping.broken > 8


def test_datasets_from_python_are_sources() -> None:
    dataset = datasets.Dataset.from_list(ROWS)
    assert read(dataset) == {"train": numbers(0, 20)}
    assert read(dataset.select([5, 3])) == {"train": [5, 3]}
    assert read(datasets.DatasetDict({"a": dataset.select(range(2)), "b": dataset.select(range(2, 4))})) == {
        "a": [0, 1],
        "b": [2, 3],
    }
    assert read(dataset.to_iterable_dataset(num_shards=2)) == {"train": numbers(0, 20)}
    lazy = datasets.IterableDataset.from_generator(lambda: iter(ROWS))
    assert read(datasets.IterableDatasetDict({"x": lazy.map(lambda row: {"n": row["n"] + 1})})) == {"x": numbers(1, 21)}
    with pytest.raises(InputError, match="A set can't be filtered"):
        read({1, 2})


def test_equal_datasets_in_memory_have_equal_fingerprints() -> None:
    def fingerprint(rows: list[dict[str, Any]]) -> str:
        return str(Corpus.scan(Opener().open([datasets.Dataset.from_list(rows)])).inputs[0]["blake2b"])

    assert fingerprint(ROWS) == fingerprint(list(ROWS))
    assert fingerprint(ROWS) != fingerprint([*ROWS[:-1], {**ROWS[-1], "n": 21}])
    assert fingerprint(ROWS) != fingerprint(ROWS[:-1])


def test_pictures_and_sounds_are_never_decoded() -> None:
    features = datasets.Features({"n": datasets.Value("int64"), "picture": datasets.Image(), "sound": datasets.Audio()})
    broken = {"bytes": b"neither picture nor sound", "path": None}
    table = pa.table(
        {"n": [0, 1], "picture": [broken] * 2, "sound": [broken] * 2},
    ).cast(features.arrow_schema)
    dataset = datasets.Dataset(table)
    for given in (dataset, dataset.to_iterable_dataset()):
        opener = Opener()
        corpus = Corpus.scan(opener.open([given]))
        assert datasets.Features.from_arrow_schema(corpus.schema) == features
        [chunk] = corpus.chunks()
        assert chunk.table["picture"].to_pylist() == [broken] * 2
        opener.close()


@pytest.mark.parametrize("given", ["nothing/here.jsonl", "nothing.parquet", "./nothing", "/nothing/at/all", "a:b"])
def test_what_is_not_there_is_one_sentence(given: str) -> None:
    with pytest.raises(InputError, match="does not exist; check the path"):
        read(given)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_what_may_not_be_read_is_one_sentence() -> None:
    Path("a.json").write_bytes(b"{}")
    Path("a.json").chmod(0)
    with pytest.raises(InputError, match=r"Cannot read a\.json: Permission denied"):
        read("a.json")
