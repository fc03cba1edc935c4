"""What was scored is what is written: an input that changes while a run is on is never written out."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset

from sqsd_filter import Cut, Scoring, SQSDScorer, filter_dataset, score_dataset, select_dataset
from sqsd_filter.errors import InputError
from sqsd_filter.progress import Silent
from sqsd_filter.storage.folder import connect
from tests.corpora import content, make_rows, write_jsonl

Rows = list[dict[str, Any]]
CHANGED = "has changed since it was scanned: nothing was written, and scores are kept"


def jsonl(path: Path, rows: Rows) -> None:
    write_jsonl(path, rows)


def gz(path: Path, rows: Rows) -> None:
    path.write_bytes(gzip.compress(b"".join(json.dumps(row).encode() + b"\n" for row in rows), mtime=0))


def json_array(path: Path, rows: Rows) -> None:
    path.write_text(json.dumps(rows))


def csv(path: Path, rows: Rows) -> None:
    path.write_text("\n".join(["id,instruction,output", *(",".join(map(str, row.values())) for row in rows)]))


def parquet(path: Path, rows: Rows) -> None:
    pq.write_table(pa.Table.from_pylist(rows), path)


def arrow(path: Path, rows: Rows) -> None:
    table = pa.Table.from_pylist(rows)
    with pa.ipc.new_stream(str(path), table.schema) as writer:
        writer.write_table(table)


def saved(path: Path, rows: Rows) -> None:
    for file in path.glob("*"):
        file.unlink()
    Dataset.from_list(rows).save_to_disk(path)


FORMATS = {
    "in.jsonl": jsonl,
    "in.jsonl.gz": gz,
    "in.json": json_array,
    "in.csv": csv,
    "in.parquet": parquet,
    "in.arrow": arrow,
    "saved": saved,
}
GOOD = make_rows(20)
EVIL = [{**row, "output": row["output"].replace("It is", "It's a")} for row in GOOD]  # of equal size
CHANGES = {"other answers": EVIL, "another order": GOOD[::-1], "more rows": GOOD * 20, "fewer rows": GOOD[:3]}


class At(Silent):
    """Calls `change` when a phase begins, as another job may at any moment."""

    def __init__(self, phase: str, change: Callable[[], None]) -> None:
        self._phase, self._change = phase, change

    def start(self, phase: str, rows: int | None) -> None:
        if phase == self._phase:
            self._change()


@pytest.fixture
def scorer(tiny_pack: Path) -> SQSDScorer:
    return SQSDScorer(tiny_pack)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", FORMATS)
def test_rows_that_were_not_scored_are_never_written(
    name: str, change: str, scorer: SQSDScorer, tmp_path: Path
) -> None:
    path, out = tmp_path / name, tmp_path / "out"
    FORMATS[name](path, GOOD)
    later = At("writing", lambda: FORMATS[name](path, CHANGES[change]))
    with pytest.raises(InputError, match=f"{name} {CHANGED}"):
        filter_dataset(str(path), out, drop_top="20%", scorer=scorer, progress=later)
    assert not list(out.glob("data/*"))
    assert list(out.glob("_sqsd/scores/*.parquet"))


@pytest.mark.parametrize("name", ["in.jsonl", "in.parquet"])
@pytest.mark.parametrize("to", ["jsonl", "arrow"])
def test_neither_are_they_in_another_format(name: str, to: str, scorer: SQSDScorer, tmp_path: Path) -> None:
    path, out = tmp_path / name, tmp_path / "out"
    FORMATS[name](path, GOOD)
    later = At("writing", lambda: FORMATS[name](path, EVIL))
    with pytest.raises(InputError, match=CHANGED):
        filter_dataset(str(path), out, drop_top="20%", scorer=scorer, to=to, progress=later)
    assert not [file for file in out.rglob("*") if file.suffix in (".arrow", ".jsonl")]


def test_a_table_of_other_columns_is_a_changed_input_too(scorer: SQSDScorer, tmp_path: Path) -> None:
    path = tmp_path / "in.parquet"
    parquet(path, GOOD)
    later = At("writing", lambda: parquet(path, [{**row, "id": "x"} for row in GOOD]))
    with pytest.raises(InputError, match=CHANGED):
        filter_dataset(str(path), tmp_path / "out", drop_top="20%", scorer=scorer, progress=later)


@pytest.mark.parametrize("name", FORMATS)
def test_a_change_while_rows_are_scored_is_noticed(name: str, scorer: SQSDScorer, tmp_path: Path) -> None:
    path = tmp_path / name
    FORMATS[name](path, GOOD)
    later = At("scoring", lambda: FORMATS[name](path, EVIL))
    with pytest.raises(InputError, match="has changed since it was scanned"):
        filter_dataset(str(path), tmp_path / "out", drop_top="20%", scorer=scorer, progress=later)


def test_the_old_result_stays_where_it_would_have_been_replaced(scorer: SQSDScorer, tmp_path: Path) -> None:
    path, out = tmp_path / "in.jsonl", tmp_path / "out"
    jsonl(path, GOOD)
    filter_dataset(str(path), out, drop_top="20%", scorer=scorer)
    before = content(out)
    later = At("writing", lambda: jsonl(path, EVIL))
    with pytest.raises(InputError, match=CHANGED):
        filter_dataset(str(path), out, drop_top="50%", scorer=scorer, overwrite=True, progress=later)
    assert content(out) == before


def test_score_and_select_look_as_well(scorer: SQSDScorer, tmp_path: Path) -> None:
    path, scores = tmp_path / "in.jsonl", tmp_path / "scores.parquet"
    jsonl(path, GOOD)
    with pytest.raises(InputError, match=CHANGED):
        score_dataset(str(path), scores, Scoring(scorer=scorer), progress=At("writing", lambda: jsonl(path, EVIL)))
    assert not scores.exists()
    jsonl(path, GOOD)
    score_dataset(str(path), scores, Scoring(scorer=scorer), overwrite=True)
    swapped = pq.read_table(scores).take(list(range(19, -1, -1)))
    with pytest.raises(InputError, match=CHANGED):
        select_dataset(
            str(scores),
            tmp_path / "out",
            Cut.of(drop_top="20%"),
            progress=At("writing", lambda: pq.write_table(swapped, scores)),
        )


def test_a_file_that_was_only_touched_is_the_same(scorer: SQSDScorer, tmp_path: Path) -> None:
    for name, write in FORMATS.items():
        path = tmp_path / name
        write(path, GOOD)

        def touch(path: Path = path) -> None:
            for file in path.iterdir() if path.is_dir() else [path]:
                os.utime(file, (1, 1))

        report = filter_dataset(
            str(path), tmp_path / f"{name}-out", drop_top="20%", scorer=scorer, progress=At("writing", touch)
        )
        assert report["rows"]["kept"] == 16


@pytest.mark.parametrize("name", ["in.jsonl", "in.parquet"])
def test_a_part_of_an_input_is_compared_as_far_as_it_was_read(name: str, scorer: SQSDScorer, tmp_path: Path) -> None:
    path = tmp_path / name
    FORMATS[name](path, GOOD)
    report = filter_dataset(str(path), tmp_path / "out", drop_top="20%", scorer=scorer, limit=10)
    assert report["rows"]["kept"] == 8


@pytest.fixture(params=["s3", "memory"])
def bucket(request: pytest.FixtureRequest, moto: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URL of a folder behind a service, with {} for a file's name."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "anyone")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "anything")
    query = f"?endpoint_override={moto}&scheme=http&allow_bucket_creation=true" if request.param == "s3" else ""
    filesystem, root = connect(f"{request.param}://changing{query}")
    filesystem.create_dir(root)
    return f"{request.param}://changing/{tmp_path.name}-{{}}{query}"


@pytest.mark.parametrize("name", ["in.jsonl", "in.parquet", "in.arrow"])
def test_so_is_a_change_in_a_bucket(name: str, bucket: str, scorer: SQSDScorer, tmp_path: Path) -> None:
    url = bucket.format(name)

    def upload(rows: Rows) -> None:
        FORMATS[name](tmp_path / name, rows)
        filesystem, path = connect(url)
        with filesystem.open_output_stream(path) as sink:
            sink.write((tmp_path / name).read_bytes())

    upload(GOOD)
    with pytest.raises(InputError, match="has changed since it was scanned"):
        filter_dataset(
            url, tmp_path / "out", drop_top="20%", scorer=scorer, progress=At("writing", lambda: upload(EVIL))
        )
    upload(GOOD)
    assert filter_dataset(url, tmp_path / "again", drop_top="20%", scorer=scorer)["rows"]["kept"] == 16
