"""Datasets of the Hub as sources, against a Hub on this machine."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sqsd_filter.corpus.addresses import Opener, Source
from sqsd_filter.corpus.sources import Corpus
from sqsd_filter.errors import InputError
from tests.hub import Hub

ROWS: list[dict[str, Any]] = [{"n": k, "prompt": f"é {k}", "completion": "yes" * k} for k in range(20)]
CARD = b"""---
license: mit
configs:
- config_name: en
  data_files:
  - split: train
    path: en/train-*.jsonl
  - split: test
    path: en/test.jsonl
- config_name: fr
  data_files: fr.parquet
---
# Sums
"""


def lines(rows: list[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def parquet(rows: list[dict[str, Any]]) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows), sink, row_group_size=4)
    return bytes(sink.getvalue())


FILES = {
    "README.md": CARD,
    "en/train-1.jsonl": lines(ROWS[:5]),
    "en/train-2.jsonl": lines(ROWS[5:8]),
    "en/test.jsonl": lines(ROWS[8:10]),
    "fr.parquet": parquet(ROWS),
}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("sqsd_filter.storage.retries.FIRST_WAIT", 0.01)
    monkeypatch.chdir(tmp_path)


def opened(*given: str, streaming: bool = False) -> list[Source]:
    return Opener(streaming=streaming).open(given)


def read(*given: str, streaming: bool = False) -> dict[str, list[int]]:
    corpus = Corpus.scan(opened(*given, streaming=streaming))
    found: dict[str, list[int]] = {}
    for chunk in corpus.chunks():
        found.setdefault(chunk.split, []).extend(chunk.table["n"].to_pylist())
    return found


@pytest.mark.parametrize("streaming", [False, True])
def test_a_dataset_is_read_by_its_name_with_configuration_and_splits(hub: Hub, streaming: bool) -> None:
    hub.add("org/sums", FILES)
    assert read("org/sums:en", streaming=streaming) == {"train": list(range(8)), "test": [8, 9]}
    assert read("org/sums:en/test", streaming=streaming) == {"test": [8, 9]}
    assert read("org/sums:fr", streaming=streaming) == {"train": list(range(20))}
    assert read("org/sums:en/test", "org/sums:fr/train", streaming=streaming) == {
        "test": [8, 9],
        "train": list(range(20)),
    }
    assert read("hf://datasets/org/sums:en/test", streaming=streaming) == {"test": [8, 9]}
    assert read("hf://datasets/org/sums@main/en/*.jsonl", streaming=streaming) == {"train": [8, 9, *range(8)]}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", ["a%20b.jsonl", "a b.jsonl", "ü.jsonl", "a#b.jsonl", "x#/a?b.jsonl", "a+%.jsonl"])
def test_a_file_of_any_name_is_read(hub: Hub, name: str, streaming: bool) -> None:
    sha = hub.add("org/odd", {name: lines(ROWS)})
    for given in ("org/odd", f"hf://datasets/org/odd/{name}"):
        [source] = opened(given, streaming=streaming)
        assert source.reader.name == f"hf://datasets/org/odd@{sha}/{name}"
        assert Corpus.scan([source]).n_rows == 20


def test_a_split_of_the_default_configuration_is_named_without_it(hub: Hub) -> None:
    rows = datasets.Dataset.from_list(ROWS)
    rows.push_to_hub("org/out", split="train")
    rows.select(range(3)).push_to_hub("org/out", "dropped", split="test")
    assert read("org/out:train") == read("org/out") == {"train": list(range(20))}
    assert read("org/out:dropped") == read("org/out:dropped/test") == {"test": [0, 1, 2]}
    with pytest.raises(InputError, match="org/out has no configuration 'test'; it has"):
        opened("org/out:test")


def test_what_is_read_is_the_commit_that_was_found_whatever_comes_later(hub: Hub) -> None:
    old = hub.add("org/sums", FILES)
    hub.add("org/sums", {"fr.parquet": parquet(ROWS[:2])}, revision="short")
    [source] = opened("org/sums@main:fr")
    new = hub.add("org/sums", {"fr.parquet": parquet(ROWS[:3])})
    assert Corpus.scan([source]).n_rows == 20
    assert source.dataset == {"id": "org/sums", "revision": old, "config": "fr", "split": "train"}
    assert source.spec == f"hf://datasets/org/sums@{old}:fr/train"
    assert source.reader.name == f"hf://datasets/org/sums@{old}/fr.parquet"
    assert source.card == ("org/sums", CARD.decode())
    assert {name: len(read(f"org/sums@{name}:fr")["train"]) for name in (old, new, "short")} == {
        old: 20,
        new: 3,
        "short": 2,
    }
    assert Corpus.scan(opened(source.spec)).inputs == Corpus.scan([source]).inputs


def test_streaming_keeps_no_file_and_a_kept_file_is_fetched_once(hub: Hub, tmp_path: Path) -> None:
    hub.add("org/sums", FILES)
    for _ in range(2):
        corpus = Corpus.scan(opened("org/sums:fr"))
        list(corpus.chunks())
    assert len(hub.seen("GET", r"resolve/.*/fr\.parquet")) == 1
    stored = {path.name for path in (tmp_path / "huggingface").rglob("*.jsonl")}
    list(Corpus.scan(opened("org/sums:en", streaming=True)).chunks())
    assert {path.name for path in (tmp_path / "huggingface").rglob("*.jsonl")} == stored == set()


def test_features_come_through_as_load_dataset_gives_them(hub: Hub) -> None:
    features = datasets.Features(
        {
            "n": datasets.Value("int32"),
            "label": datasets.ClassLabel(names=["good", "bad"]),
            "turns": datasets.List({"role": datasets.Value("string"), "content": datasets.Value("large_string")}),
            "at": datasets.Value("timestamp[us]"),
            "picture": datasets.Image(),
        }
    )
    row = {"n": 1, "label": 1, "turns": [{"role": "user", "content": "hi"}], "at": None, "picture": None}
    datasets.Dataset.from_list([row] * 3, features=features).push_to_hub("org/rich")
    corpus = Corpus.scan(opened("org/rich"))
    assert datasets.Features.from_arrow_schema(corpus.schema) == features
    expected = datasets.load_dataset("org/rich", split="train")
    assert next(corpus.chunks()).table.to_pylist() == expected.with_format("arrow")[:].to_pylist()


def test_a_private_dataset_is_read_with_a_token(hub: Hub) -> None:
    hub.add("org/secret", {"a.jsonl": lines(ROWS)}, private=True)
    assert read("org/secret") == {"train": list(range(20))}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("org/none", "There is no file or folder 'org/none' here, and no such dataset on the Hub"),
        ("org/sums@v9:en", "org/sums has no revision 'v9'"),
        ("org/sums", r"org/sums has the configurations en, fr; name one of them: org/sums:en\."),
        ("org/sums:de", "org/sums has no configuration 'de'; it has en, fr"),
        ("org/sums:en/dev", "org/sums has no split 'dev'; it has train, test"),
        ("org/gated", "org/gated is gated: accept its terms"),
        ("org/empty", "org/empty.* holds no data files that can be read"),
        ("hf://datasets/org/sums/*.csv", r"No file matches hf://datasets/org/sums/\*\.csv"),
        ("hf://datasets/org", "names no dataset"),
    ],
)
def test_what_the_hub_does_not_give_is_one_sentence(
    given: str, said: str, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("org/sums", FILES)
    hub.add("org/gated", {"a.jsonl": lines(ROWS)}, gated=True)
    hub.add("org/empty", {})
    monkeypatch.setenv("HF_TOKEN", "hf_stranger")
    monkeypatch.setattr("huggingface_hub.utils._auth._get_token_from_environment", lambda: "hf_stranger")
    with pytest.raises(InputError, match=said) as raised:
        Corpus.scan(opened(given))
    assert "\n" not in str(raised.value)


def test_a_hub_that_asks_for_time_or_drops_connections_gets_another_try(hub: Hub) -> None:
    hub.add("org/sums", FILES)
    hub.fail("GET", "api/datasets/org/sums/revision/main|api/datasets/org/sums$", status=429, times=2)
    hub.cut("GET", r"resolve/.*/fr\.parquet", sent=100)
    hub.cut("HEAD", r"resolve/.*/fr\.parquet", sent=0)
    assert read("org/sums:fr") == {"train": list(range(20))}
    assert [r.status for r in hub.seen("GET", "api/datasets/org/sums$")][:3] == [429, 429, 200]


def test_a_hub_that_never_recovers_is_one_sentence(hub: Hub) -> None:
    hub.add("org/sums", FILES)
    hub.fail("GET", "api/datasets/org/sums", status=429, headers={"Retry-After": "0"}, times=math.inf)
    with pytest.raises(InputError, match="still refuses org/sums because of too many requests"):
        opened("org/sums:fr")
    hub.stop()
    with pytest.raises(InputError, match=r"org/sums can't be read \(.*check the network"):
        opened("org/sums:fr")
