"""Runs of earlier versions: read where they are, and finished into the layout of today with their scores."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import fsspec
import pytest

from sqsd_filter import Cut, PushTo, SQSDScorer, Writing, filter_dataset, select_dataset
from sqsd_filter.errors import DestinationExists, InputError
from sqsd_filter.pipeline.forecast import estimate
from sqsd_filter.pipeline.options import Scoring
from sqsd_filter.pipeline.page.page import remake_page
from sqsd_filter.pipeline.report import load_calls
from sqsd_filter.storage.layout import modernise
from tests.corpora import content, make_rows, segments, write_jsonl
from tests.hub import Hub
from tests.old_layout import age, old_names

datasets.disable_progress_bars()
FORMATS = ("parquet", "arrow", "jsonl")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, with 20 rows and a line that is none in in.jsonl."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SQSD_FILTER_CACHE", str(tmp_path / "cache"))
    write_jsonl(tmp_path / "in.jsonl", [*make_rows(20), b"broken"])
    return tmp_path


def run(scorer: SQSDScorer, dest: str = "out", **options: Any) -> Any:
    return filter_dataset("in.jsonl", dest, drop_count=3, scorer=scorer, **options)


@pytest.mark.parametrize("to", FORMATS)
def test_an_unfinished_run_is_finished_into_the_layout_of_today_with_its_scores(
    to: str, folder: Path, scorer: SQSDScorer
) -> None:
    run(scorer, to=to)
    straight, scores = content(Path("out")), segments(Path("out/_sqsd"))
    age(Path("out"), finished=False)
    mine = next(Path("out").rglob("*-00001.*")).with_name("notes-of-mine.txt")
    mine.touch()
    assert run(scorer, to=to)["status"] == "ok"
    assert segments(Path("out/_sqsd")) == scores
    assert content(Path("out")) == {**straight, str(mine.relative_to("out")): b""}


def test_the_move_may_be_killed_at_any_point(folder: Path, scorer: SQSDScorer, monkeypatch: pytest.MonkeyPatch) -> None:
    run(scorer)
    kept, scores = Path("out/data/train-00000-of-00001.parquet").read_bytes(), segments(Path("out/_sqsd"))
    age(Path("out"), finished=False)
    left = 2

    def unlink(path: Path, unlink: Any = Path.unlink) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        unlink(path)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", unlink)
        with pytest.raises(KeyboardInterrupt):
            modernise(Path("out"), Path("out/sqsd"))
    run(scorer)
    assert segments(Path("out/_sqsd")) == scores
    assert [path.name for path in Path("out/data").iterdir()] == ["train-00000-of-00001.parquet"]
    assert Path("out/data/train-00000-of-00001.parquet").read_bytes() == kept


@pytest.mark.parametrize("to", FORMATS)
def test_a_finished_run_is_left_as_it_is_and_can_be_read(to: str, folder: Path, scorer: SQSDScorer) -> None:
    run(scorer, to=to)
    age(Path("out"))
    before = {path: path.stat().st_mtime_ns for path in Path("out").rglob("*") if path.is_file()}
    report = run(scorer, to=to)
    assert report["already_done"]
    assert {path: path.stat().st_mtime_ns for path in Path("out").rglob("*") if path.is_file()} == before
    part, loads = ("default", 'load_dataset("out", "dropped")')
    if to == "arrow":
        part, loads = ("kept", 'load_from_disk("out")["dropped"]')
    assert load_calls(report, '"out"')["dropped"] == loads
    with pytest.raises(InputError, match=f"name what to read, as 'out:{part}' for the kept rows"):
        select_dataset(["out", "out"], "other", Cut.of(drop_count=1))
    if to != "jsonl":
        assert select_dataset(f"out:{part}", "kept", Cut.of(drop_count=1))["rows"]["total"] == 17


def test_every_command_reads_an_old_run(folder: Path, scorer: SQSDScorer) -> None:
    first = run(scorer)
    age(Path("out"))
    rows = select_dataset("out", "other", Cut.of(drop_count=5))["rows"]
    assert (rows["kept"], rows["dropped"], rows["errors"]) == (15, 5, 1)
    assert Path("other/data").is_dir()
    assert remake_page(Path("out"))[0] == Path("out/sqsd/report.html")
    assert estimate("in.jsonl", "out", Scoring(scorer=scorer))["reused"] == 20
    with pytest.raises(DestinationExists, match="out holds another run"):
        filter_dataset("in.jsonl", "out", drop_count=4, scorer=scorer)
    again = filter_dataset("in.jsonl", "out", drop_count=4, scorer=scorer, overwrite=True)
    assert (again["rows"]["scored"], again["rows"]["reused"]) == (0, first["rows"]["scored"])
    assert sorted(path.name for path in Path("out").iterdir()) == ["README.md", "_sqsd", "data"]
    assert sorted(path.name for path in folder.iterdir() if path.name != "cache") == ["in.jsonl", "other", "out"]


@pytest.fixture
def bucket() -> Iterator[str]:
    yield "memory://old/out"
    fsspec.filesystem("memory").rm("/old", recursive=True)


def test_an_old_run_in_a_bucket_is_known_and_replaced_as_a_whole(bucket: str, folder: Path, scorer: SQSDScorer) -> None:
    run(scorer, bucket)
    there = fsspec.filesystem("memory")
    _age_published({name: there.cat(name) for name in there.find("/old")}, "/old/out/", there.pipe, there.rm)
    assert run(scorer, bucket)["already_done"]
    filter_dataset("in.jsonl", bucket, drop_count=4, scorer=scorer, overwrite=True)
    assert not [name for name in there.find("/old") if "/out/sqsd/" in name or "kept-" in name]


def test_an_old_run_on_the_hub_is_known_and_replaced_as_a_whole(hub: Hub, folder: Path, scorer: SQSDScorer) -> None:
    run(scorer, push=PushTo("org/out"))
    changed: dict[str, bytes] = {}
    gone: list[str] = []
    _age_published(hub.files("org/out"), "", changed.__setitem__, gone.append)
    hub.repos.clear()
    hub.add("org/out", changed, private=True)
    commits = len(hub.seen("POST", "/commit/"))
    run(scorer, push=PushTo("org/out"))
    assert len(hub.seen("POST", "/commit/")) == commits
    select_dataset("out", "other", Cut.of(drop_count=4), Writing(push=PushTo("org/out", overwrite=True)))
    assert not [name for name in hub.files("org/out") if name.startswith("sqsd/") or "kept-" in name]
    assert len(datasets.load_dataset("org/out", split="train")) == 16


def test_an_old_output_is_published_in_the_layout_of_today(hub: Hub, folder: Path, scorer: SQSDScorer) -> None:
    run(scorer)
    straight = content(Path("out"))
    age(Path("out"))
    run(scorer, push=PushTo("org/out"))
    assert content(Path("out")) == straight
    assert not [name for name in hub.files("org/out") if name.startswith("sqsd/") or "kept-" in name]


def _age_published(files: dict[str, bytes], top: str, write: Any, remove: Any) -> None:
    """Publish these files of today under the names of earlier versions."""
    for name, data in files.items():
        old = top + old_names(name.removeprefix(top))
        write(old, old_names(data.decode()).encode() if name.endswith((".json", ".md")) else data)
        if old != name:
            remove(name)
