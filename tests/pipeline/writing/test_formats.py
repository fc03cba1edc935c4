"""Whole runs in each format, cut from scores that are there: what is left, what loads it, what counts as done."""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sqsd_filter import Cut, Scoring, SQSDScorer, Writing, filter_dataset, score_dataset, select_dataset
from sqsd_filter.corpus.sources import Corpus
from sqsd_filter.errors import DestinationExists, InputError
from sqsd_filter.pipeline.report import Config, FinishedReport, RunContent, load_calls
from sqsd_filter.pipeline.writing.writers import OF_LINES
from tests.corpora import FOLDERS, content, make_rows, read_report, unnamed, write_jsonl

datasets.disable_progress_bars()
FORMATS = ("parquet", "arrow", "jsonl", "json")
ROWS: list[dict[str, Any]] = [
    {"id": k, "text": "é" * k, "sqsd_risk": (k * 7 % 20) / 3, "sqsd_status": "scored"} for k in range(20)
]
LINES: list[dict[str, Any] | bytes] = [
    *ROWS[:9],
    b"broken",
    {"id": 9, "sqsd_risk": None, "sqsd_status": "no_answer"},
    *ROWS[9:],
]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, with scored rows in in.jsonl, of which three make a chunk."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Corpus, "chunks", functools.partialmethod(Corpus.chunks, rows=3))
    write_jsonl(tmp_path / "in.jsonl", LINES)
    return tmp_path


def cut(dest: str, to: str, **writing: Any) -> FinishedReport:
    return select_dataset("in.jsonl", dest, Cut.of(drop_count=6), Writing(to=to, **{"shard_size": 1, **writing}))


def loaded(dest: Path, report: RunContent, config: Config) -> list[dict[str, Any]]:
    """What the call gives that is shown to people."""
    load_dataset = functools.partial(datasets.load_dataset, split="train", cache_dir=str(dest / "cache"))
    return list(eval(load_calls(report, repr(str(dest)))[config], {"load_dataset": load_dataset}))


@pytest.mark.parametrize("to", FORMATS)
def test_what_a_run_writes_is_listed_and_loads_as_the_card_says(to: str, folder: Path) -> None:
    report = cut("out", to)
    assert [f["config"] for f in report["files"]] == ["kept"] * 8 + ["dropped"] * 6 + ["errors"]
    listed = [*(f["path"] for f in report["files"]), *report["extra_files"]]
    listed += [f"_sqsd/{name}" for name in ("report.json", "run.json", "report.html", "notes.json")]
    assert sorted(listed) == sorted(str(p.relative_to("out")) for p in Path("out").rglob("*") if p.is_file())
    assert (report["to"], report["shard_size"], report["with_scores"]) == (to, 1, False)
    card = Path("out/README.md").read_text()
    for config, code in load_calls(report, "path").items():
        assert f"`{code}`" in card
        uneven = to == "json" and int(datasets.__version__.split(".")[0]) < 5  # its rows have different keys
        if config == "errors" and (to == "jsonl" or uneven):
            with pytest.raises((datasets.exceptions.DatasetGenerationError, ValueError)):  # the latter before 5.0
                loaded(Path("out"), report, config)  # a line of it is no JSON, as the card says
            continue
        rows = loaded(Path("out"), report, config)
        assert len(rows) == report["rows"][config]
        assert all(row["text"] == "é" * row["id"] for row in rows if row.get("text") is not None)


@pytest.mark.parametrize("to", FORMATS)
def test_a_finished_run_is_done_until_something_of_it_is_missing_or_cut_short(to: str, folder: Path) -> None:
    report = cut("out", to)
    done = content(Path("out"))
    before = {p: p.stat().st_mtime_ns for p in Path("out").rglob("*") if p.is_file()}
    assert cut("out", to)["already_done"]
    assert {p: p.stat().st_mtime_ns for p in Path("out").rglob("*") if p.is_file()} == before
    for name in [*report["extra_files"], *(f["path"] for f in report["files"])]:
        Path("out", name).unlink()
        assert not cut("out", to).get("already_done")
        assert content(Path("out")) == done
    for file in report["files"]:
        if file["rows"]:
            path = Path("out", file["path"])
            path.write_bytes(path.read_bytes()[:-1])
            assert not cut("out", to).get("already_done")
            assert content(Path("out")) == done
    for name in [*report["extra_files"], report["files"][0]["path"]]:
        path = Path("out", name)
        for lost in (b"", bytes(path.stat().st_size)):  # a disk that lost what was not yet on it, when the power went
            path.write_bytes(lost)
            assert not cut("out", to).get("already_done")
            assert content(Path("out")) == done


def test_a_changed_byte_in_a_data_file_is_repaired_and_no_reasons_are_no_damage(folder: Path) -> None:
    write_jsonl(folder / "in.jsonl", ROWS)
    report = cut("out", "jsonl")
    assert Path("out/_sqsd/reasons.jsonl").read_bytes() == b""
    assert cut("out", "jsonl")["already_done"]
    path = Path("out", report["files"][0]["path"])
    whole = path.read_bytes()
    path.write_bytes(whole[:-3] + b"X" + whole[-2:])
    assert not cut("out", "jsonl").get("already_done")
    assert path.read_bytes() == whole


def test_an_array_holds_the_lines_of_the_input_and_unreadable_ones_as_text(folder: Path) -> None:
    rows = [b'{"id" : 0, "sqsd_risk":0.1,"sqsd_status":"scored"}\r', b'{"id":1,"sqsd_risk":0.2,"sqsd_status":"scored"}']
    write_jsonl(folder / "in.jsonl", [rows[0], b'\xff"', rows[1], b"{"])
    cut("out", "json", shard_size="1MB")
    kept, errors = (Path("out", FOLDERS[config], "train-00000-of-00001.json") for config in ("kept", "errors"))
    assert [path.name for path in kept.parent.iterdir()] == [kept.name]
    assert kept.read_bytes() == b"[\n]\n"
    assert json.loads(errors.read_text()) == [
        {"sqsd_raw": '\udcff"', "sqsd_row": "in.jsonl:2"},
        {"sqsd_raw": "{", "sqsd_row": "in.jsonl:4"},
    ]
    select_dataset("in.jsonl", "all", Cut.of(drop_count=0), Writing(to="json"))
    assert Path("all/data", kept.name).read_bytes() == b"[\n" + rows[0] + b",\n" + rows[1] + b"\n]\n"


def test_only_a_byte_order_mark_is_missing_from_lines_as_they_were(folder: Path) -> None:
    written = b"".join(b'{"id" : %d,  "sqsd_risk":0.1,"sqsd_status":"scored"}\r\n' % k for k in range(3))
    Path("in.jsonl").write_bytes(b"\xef\xbb\xbf" + written)
    report = select_dataset("in.jsonl", "out", Cut.of(drop_count=0), Writing(to="jsonl", with_scores=True))
    assert Path("out", report["files"][0]["path"]).read_bytes() == written


@pytest.mark.parametrize("to", FORMATS)
def test_files_of_a_killed_attempt_that_made_more_of_them_go(to: str, folder: Path) -> None:
    few, many = cut("few", to, shard_size=10**6), cut("out", to)
    assert len(many["files"]) > len(few["files"]) == 3
    shutil.copy("few/_sqsd/run.json", "out/_sqsd/run.json")  # as if it had been this very run
    Path("out/_sqsd/report.json").unlink()
    Path("out", few["files"][0]["path"]).with_name(".train-00009.tmp").touch()
    cut("out", to, shard_size=10**6)
    assert content(Path("out")) == content(Path("few"))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"to": "arrow"}, "to: jsonl there, arrow here"),
        ({"shard_size": "1KB"}, "shard_size: 1 there, 1000 here"),
        ({"with_scores": True}, "with_scores: False there, True here"),
    ],
    ids=["to", "shard_size", "with_scores"],
)
def test_the_form_of_the_rows_is_part_of_the_run(options: dict[str, Any], match: str, folder: Path) -> None:
    cut("out", "jsonl")
    options = {"to": "jsonl", **options}
    with pytest.raises(DestinationExists, match=match):
        cut("out", **options)
    cut("out", **options, overwrite=True)
    cut("straight", **options)
    assert content(Path("out")) == content(Path("straight"))


@pytest.mark.parametrize("to", FORMATS)
def test_what_was_written_can_be_cut_again(to: str, folder: Path) -> None:
    report = cut("out", to, with_scores=to in OF_LINES)
    sources = [f"out/{file['path']}" for file in report["files"] if file["config"] == "kept"]
    again = select_dataset(sources, "again", Cut.of(keep_lowest=3), Writing(to="jsonl", with_scores=True))
    lowest = sorted(ROWS, key=lambda row: row["sqsd_risk"])[:3]
    lines = [json.loads(line) for line in Path("again/data/train-00000-of-00001.jsonl").read_text().splitlines()]
    assert sorted(lines, key=lambda row: row["sqsd_risk"]) == lowest
    assert again["rows"]["kept"] == 3


def test_a_run_writes_the_lines_of_its_input(folder: Path, tiny_pack: Path) -> None:
    lines: list[dict[str, Any] | bytes] = [*make_rows(9), b"broken", b'{"instruction":"q" , "output":"a"}\r', {"id": 1}]
    write_jsonl(folder / "plain.jsonl", lines)
    scorer = SQSDScorer(tiny_pack)
    report = filter_dataset("plain.jsonl", "out", drop_count=3, to="jsonl", scorer=scorer)
    written = {
        config: Path("out", folder, "train-00000-of-00001.jsonl").read_bytes().splitlines(True)
        for config, folder in FOLDERS.items()
    }
    source = (folder / "plain.jsonl").read_bytes().splitlines(True)
    dropped = [int(json.loads(line)["sqsd_row"].removeprefix("plain.jsonl:")) for line in written["dropped"]]
    assert written["kept"] == [line for k, line in enumerate(source, 1) if k not in (*dropped, 10, 12)]
    assert [unnamed(line, "plain.jsonl", k) for line, k in zip(written["dropped"], dropped, strict=True)] == [
        source[k - 1] for k in dropped
    ]
    assert written["errors"] == [b"broken\n", b'{"id": 1, "sqsd_row": "plain.jsonl:12"}\n']
    reasons = [json.loads(line) for line in Path("out/_sqsd/reasons.jsonl").read_text().splitlines()]
    assert reasons == [
        {"file": "plain.jsonl", "line": 10, "status": "bad_json", "reason": "not JSON: Expecting value at column 1"},
        {"file": "plain.jsonl", "line": 12, "status": "no_answer", "reason": "column 'output' is empty or missing"},
    ]
    assert report["json_columns"] == []

    scored = select_dataset("out", "scored", Cut.of(drop_count=3), Writing(to="jsonl", with_scores=True))
    own: dict[Config, list[bytes]] = {"kept": written["kept"], "dropped": [source[k - 1] for k in dropped]}
    for config, before in own.items():
        path = f"{FOLDERS[config]}/train-00000-of-00001.jsonl"
        for line, more in zip(before, Path("scored", path).read_bytes().splitlines(True), strict=True):
            assert more.startswith(line.rstrip()[:-1].rstrip())
            assert line[len(line.rstrip()) - 1 :] in more
            row = json.loads(more)
            assert row["sqsd_risk"] == row["sqsd_danger"] - row["sqsd_safety"]
            assert row["sqsd_status"] == "scored"
    assert scored["threshold"] == report["threshold"]


def test_a_column_without_a_form_is_refused_before_anything_is_scored(folder: Path, tiny_pack: Path) -> None:
    class Unused(SQSDScorer):
        def score(self, *_: Any) -> Any:
            raise AssertionError("scored before the columns were looked at")

    pq.write_table(pa.Table.from_pylist([{**row, "image": b"\x89PNG"} for row in make_rows(3)]), "a.parquet")
    with pytest.raises(InputError, match="Column 'image' holds binary, which can't be written to jsonl: use --to parq"):
        filter_dataset("a.parquet", "out", drop_count=1, to="jsonl", scorer=Unused(tiny_pack))
    assert not Path("out").exists()


def test_the_one_file_of_scores_is_listed_too(folder: Path, tiny_pack: Path) -> None:
    write_jsonl(folder / "plain.jsonl", make_rows(3))
    report = score_dataset("plain.jsonl", "scored.parquet", Scoring(scorer=SQSDScorer(tiny_pack)))
    [file] = report["files"]
    assert (file["path"], file["rows"], file["bytes"]) == (".", 3, Path("scored.parquet").stat().st_size)
    assert report["extra_files"] == []


@pytest.mark.parametrize("to", FORMATS)
def test_each_split_is_loaded_by_its_name(to: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def scan(*arguments: Any, scan: Any = Corpus.scan, **options: Any) -> Corpus:
        corpus: Corpus = scan(*arguments, **options)
        names = ("train", "test.a")
        parts = [dataclasses.replace(part, split=name) for part, name in zip(corpus.parts, names, strict=True)]
        return dataclasses.replace(corpus, parts=parts)

    monkeypatch.setattr(Corpus, "scan", scan)
    write_jsonl(folder / "more.jsonl", [{**row, "id": row["id"] + 100} for row in ROWS])
    report = select_dataset(["in.jsonl", "more.jsonl"], "out", Cut.of(drop_top="50%"), Writing(to=to, shard_size="1KB"))
    assert report["rows"]["kept"] == 20
    assert read_report(Path("out")) == report
    splits = datasets.load_dataset("out", cache_dir=str(folder / "cache"))
    if to == "arrow":
        saved = datasets.load_from_disk("out")
        assert {split: saved[split]["id"][:] for split in saved} == {split: splits[split]["id"][:] for split in splits}
    assert list(splits) == ["train", "test.a"]
    ids = {split: splits[split]["id"][:] for split in splits}
    assert all(k < 100 for k in ids["train"])
    assert all(k >= 100 for k in ids["test.a"])
    assert sum(map(len, ids.values())) == 20
