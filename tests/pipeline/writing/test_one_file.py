"""DEST that is one file: the kept rows in it, all else beside it, and otherwise the rules of a folder."""

from __future__ import annotations

import functools
import gzip
import json
import shutil
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from sqsd_filter import Cut, PushTo, SQSDScorer, Writing, filter_dataset, select_dataset
from sqsd_filter.corpus.sources import Corpus
from sqsd_filter.errors import DestinationExists, InputError, UsageError
from sqsd_filter.pipeline.page.page import remake_page
from sqsd_filter.pipeline.publishing.bucket import Bucket
from sqsd_filter.pipeline.report import CONFIGS, FinishedReport, load_calls
from sqsd_filter.pipeline.writing.one_file import FileForm, file_form
from sqsd_filter.pipeline.writing.writers import OF_LINES
from tests.commands import entries
from tests.corpora import make_rows, write_jsonl

datasets.disable_progress_bars()
NAMES = ("o.jsonl", "o.ndjson", "o.json", "o.jsonl.gz", "o.jsonl.zst", "o.json.gz", "o.parquet", "o.arrow")
OWN = ("README.md", "notes.json", "report.html", "report.json", "risk.png", "run.json")
# spaces, line ends and escapes that another writer would not write so
LINE = b'{"id" : %d,"sqsd_risk":%d.50, "sqsd_status":"scored","t":"\\u00e9"}'
LINES = [LINE % (k, k) + b"\r" * k for k in (0, 1, 2)]
LINES += [b"broken", b'{"id":3,"sqsd_risk":null,"sqsd_status":"no_answer"}']


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, with scored rows in in.jsonl, of which two make a chunk. Row 2 is the riskiest."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Corpus, "chunks", functools.partialmethod(Corpus.chunks, rows=2))
    write_jsonl(tmp_path / "in.jsonl", LINES)
    return tmp_path


def cut(dest: str | Path, n: int = 1, **writing: Any) -> FinishedReport:
    return select_dataset("in.jsonl", dest, Cut.of(drop_count=n), Writing(**writing))


def content(dest: str) -> dict[str, bytes]:
    """Every file that a run left, by its path; of the report only what is the same each time."""
    files = {str(p): p.read_bytes() for p in Path().rglob("*") if p.is_file() and str(p).startswith(dest)}
    report = json.loads(files.pop(f"{dest}.sqsd/report.json"))
    del report["timing"]
    return {**files, "report": json.dumps(report).encode()}


def plain(path: Path) -> bytes:
    if path.suffix == ".zst":
        with path.open("rb") as opened:
            return zstandard.ZstdDecompressor().stream_reader(opened).read()
    return gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("out.jsonl", FileForm("jsonl")),
        ("a.b/out.v2.ndjson.zst", FileForm("jsonl", ".zst")),
        ("OUT.JSON.GZ", FileForm("json", ".gz")),
        ("s3://bucket/out.parquet?region=x", FileForm("parquet")),
        ("out.arrow", FileForm("arrow")),
        ("out", None),
        ("out.v2", None),
        ("out.jsonl/", None),
        (".jsonl", None),
        ("out.gz", None),
        ("hf://datasets/org/name.json", None),
        ("s3://bucket/x?file=out.json", None),
    ],
)
def test_the_name_says_whether_it_is_a_file_and_of_what_form(name: str, form: FileForm | None) -> None:
    assert file_form(name) == form


@pytest.mark.parametrize("name", ["o.csv", "o.tsv.gz", "o.parquet.gz", "o.arrow.zst", "o.jsonl.bz2", "o.json.zip"])
def test_a_file_that_can_t_be_written_is_refused(name: str, folder: Path) -> None:
    with pytest.raises(UsageError, match=rf"{name} is named like a \S+ file, which can't be written: name a \.jsonl"):
        cut(name)
    assert entries(folder) == ["in.jsonl"]


@pytest.mark.parametrize("name", NAMES)
def test_the_file_has_the_kept_rows_and_the_folder_beside_it_all_else(name: str, folder: Path) -> None:
    report = cut(name)
    assert entries(folder) == sorted(["in.jsonl", name, f"{name}.sqsd"])
    home = Path(f"{name}.sqsd")
    saved = ("dataset_dict.json", "train/dataset_info.json", "train/state.json") if name.endswith("arrow") else ()
    suffix = f".{report['to']}"
    reasons = ["reasons.jsonl"] if report["to"] in OF_LINES else []
    parts = [f"{part}/{n}" for part in ("dropped", "errors") for n in (*saved, f"train-00000-of-00001{suffix}")]
    found = {str(p.relative_to(home)) for p in home.rglob("*") if p.is_file()}
    assert found == {*OWN, *parts, *reasons}
    assert [f["path"] for f in report["files"]] == [".", *(part for part in parts if part.endswith(suffix))]
    assert {*report["extra_files"], "run.json", "report.json", "report.html", "notes.json"} <= found
    if report["to"] == "jsonl":
        assert plain(Path(name)) == LINES[0] + b"\n" + LINES[1] + b"\n"
    if report["to"] == "json":
        assert plain(Path(name)) == b"[\n" + LINES[0] + b",\n" + LINES[1] + b"\n]\n"


@pytest.mark.parametrize("name", NAMES)
def test_every_part_loads_as_the_summary_and_the_card_say(name: str, folder: Path) -> None:
    report = cut(name)
    card = Path(f"{name}.sqsd/README.md").read_text()
    load = functools.partial(datasets.load_dataset, split="train", cache_dir=str(folder / "cache"))
    for config, call in load_calls(report, "path").items():
        assert f"`{call}`" in card
        if not (config == "errors" and report["to"] == "jsonl"):  # where a line is no JSON
            assert len(eval(call, {"path": str(folder / name), "load_dataset": load})) == report["rows"][config]


@pytest.mark.parametrize("name", NAMES)
def test_the_same_run_is_done_until_a_byte_is_missing_and_gives_the_same_bytes(name: str, folder: Path) -> None:
    report = cut(name)
    before = content(name)
    assert cut(name)["already_done"]
    for path in [Path(name), *(Path(f"{name}.sqsd", f["path"]) for f in report["files"] if f["path"] != ".")]:
        path.write_bytes(path.read_bytes()[:-1])
        assert not cut(name).get("already_done")
        assert content(name) == before


def test_another_cut_is_refused_and_overwrite_swaps_file_and_folder(folder: Path) -> None:
    cut("o.jsonl")
    before = content("o.jsonl")
    with pytest.raises(DestinationExists, match=r"o\.jsonl holds another run \(cut: drop-count 1 there, drop-count 2"):
        cut("o.jsonl", 2)
    assert content("o.jsonl") == before
    cut("o.jsonl", 2, overwrite=True)
    assert Path("o.jsonl").read_bytes() == LINES[0] + b"\n"
    assert entries(folder) == ["in.jsonl", "o.jsonl", "o.jsonl.sqsd"]


@pytest.mark.parametrize("inside", ["o.jsonl", "o.jsonl.sqsd/dropped/train-00000-of-00001.jsonl"])
def test_overwrite_spares_an_input_in_what_it_would_replace(inside: str, folder: Path) -> None:
    cut("o.jsonl", with_scores=True)
    before = content("o.jsonl")
    with pytest.raises(DestinationExists, match="which --overwrite would delete"):
        select_dataset([inside, "in.jsonl"], "o.jsonl", Cut.of(drop_count=0), Writing(overwrite=True))
    assert content("o.jsonl") == before


def test_foreign_files_and_folders_stay(folder: Path) -> None:
    Path("o.jsonl").write_text("theirs")
    with pytest.raises(DestinationExists, match="was not written by this command"):
        cut("o.jsonl")
    Path("o.json").mkdir()
    for overwrite in (False, True):
        with pytest.raises(DestinationExists, match=r"o\.json is a folder, but the output is a file"):
            cut("o.json", overwrite=overwrite)
    cut("o.json/")
    assert Path("o.json/data/train-00000-of-00001.parquet").is_file()
    assert Path("o.jsonl").read_text() == "theirs"


def test_temporary_files_of_others_beside_the_file_stay(folder: Path) -> None:
    Path(".other.tmp").touch()
    Path(".o.jsonl-00000.tmp").write_text("of a killed attempt")
    cut("o.jsonl")
    assert entries(folder) == [".other.tmp", "in.jsonl", "o.jsonl", "o.jsonl.sqsd"]


def test_a_run_that_replaces_a_killed_one_removes_what_it_wrote_of_the_file(folder: Path) -> None:
    cut("o.jsonl")
    Path(".o.jsonl-00000.tmp").write_text("of an attempt killed by the system")
    Path(".o.jsonl-00001.tmp").write_text("theirs")
    cut("o.jsonl", 2, overwrite=True)
    theirs = [".o.jsonl-00001.tmp", "in.jsonl", "o.jsonl", "o.jsonl.sqsd"]
    assert entries(folder) == theirs
    Path(".o.jsonl-00000.tmp").write_text("of another")
    assert cut("o.jsonl", 2)["already_done"]
    assert entries(folder) == theirs


def test_a_link_stays_and_its_run_is_found_through_it(folder: Path, tiny_pack: Path) -> None:
    Path("disk").mkdir()
    Path("o.jsonl").symlink_to("disk/real.jsonl")
    write_jsonl(Path("rows.jsonl"), make_rows(9))
    filter_dataset("rows.jsonl", "o.jsonl", drop_count=2, pack=tiny_pack)
    assert Path("o.jsonl").is_symlink()
    assert entries(Path("disk")) == ["real.jsonl", "real.jsonl.sqsd"]
    report = select_dataset("o.jsonl", "again.json", Cut.of(drop_count=3))
    assert (report["rows"]["total"], report["rows"]["kept"], report["scores_from"]) == (9, 6, "o.jsonl")
    assert remake_page(Path("o.jsonl"))[0].parent.name == "real.jsonl.sqsd"
    with pytest.raises(InputError, match=r"again\.json was made by select"):
        select_dataset("again.json", "more.json", Cut.of(drop_count=3))


def test_the_kept_rows_of_a_file_are_the_input_of_another_run(folder: Path, tiny_pack: Path) -> None:
    write_jsonl(Path("rows.jsonl"), make_rows(9))
    filter_dataset("rows.jsonl", "a.jsonl.gz", drop_count=2, pack=tiny_pack)
    assert filter_dataset("a.jsonl.gz", "b.jsonl", drop_count=2, pack=tiny_pack)["rows"]["kept"] == 5
    Path("all").mkdir()
    for name in ("b.jsonl", "b.jsonl.sqsd"):
        shutil.move(name, f"all/{name}")
    with pytest.raises(InputError, match=r"all holds b\.jsonl\.sqsd, the output of an earlier run"):
        filter_dataset("all", "c.jsonl", drop_count=2, pack=tiny_pack)


class Unused(SQSDScorer):
    """Fails the test when anything is scored."""

    def score(self, *_: Any) -> Any:
        raise AssertionError("scored before the destination was looked at")


def test_what_one_file_can_t_hold_is_refused_before_scoring(folder: Path, tiny_pack: Path) -> None:
    rows = datasets.Dataset.from_list(make_rows(3))
    both = datasets.DatasetDict({"train": rows, "test": rows})
    scorer = Unused(tiny_pack)
    with pytest.raises(UsageError, match="have the splits train, test, which one file can't keep apart: name a folder"):
        filter_dataset(both, "o.jsonl", drop_count=1, scorer=scorer)
    with pytest.raises(UsageError, match=r"o\.json is one file, and org/name gets a whole output: name a folder"):
        filter_dataset(rows, "o.json", drop_count=1, scorer=scorer, push=PushTo("org/name"))
    with pytest.raises(UsageError, match=r"name of the destination says json, and to \(--to\) says parquet"):
        filter_dataset(rows, "o.json", drop_count=1, scorer=scorer, to="parquet")
    with pytest.raises(UsageError, match="parquet files always hold scores"):
        filter_dataset(rows, "o.parquet", drop_count=1, scorer=scorer, with_scores=True)
    pq.write_table(pa.Table.from_pylist([{**row, "image": b"\x89PNG"} for row in make_rows(3)]), "a.parquet")
    with pytest.raises(InputError, match="Column 'image' holds binary, which can't be written to jsonl"):
        filter_dataset("a.parquet", "o.jsonl", drop_count=1, scorer=scorer)
    assert entries(folder) == ["a.parquet", "in.jsonl"]


@pytest.fixture
def bucket(folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    (folder / "bucket").mkdir()
    return f"file://{folder}/bucket/o.jsonl.gz"


def test_a_file_behind_a_url_is_published_like_a_folder(bucket: str, folder: Path) -> None:
    there = folder / "bucket"
    cut(bucket)
    cut("here.jsonl.gz")
    assert entries(there) == ["o.jsonl.gz", "o.jsonl.gz.sqsd"]
    assert (there / "o.jsonl.gz").read_bytes() == Path("here.jsonl.gz").read_bytes()
    names = {str(p.relative_to("here.jsonl.gz.sqsd")) for p in Path("here.jsonl.gz.sqsd").rglob("*") if p.is_file()}
    published = there / "o.jsonl.gz.sqsd"
    assert {str(p.relative_to(published)) for p in published.rglob("*") if p.is_file()} == {*names, "published.json"}
    assert cut(bucket)["already_done"]
    with pytest.raises(DestinationExists, match="holds another run"):
        cut(bucket, 2)
    cut(bucket, 2, overwrite=True)
    assert plain(there / "o.jsonl.gz") == LINES[0] + b"\n"
    with pytest.raises(DestinationExists, match=r"holds the input .*, which --overwrite would delete"):
        select_dataset(bucket, bucket, Cut.of(drop_count=1), Writing(overwrite=True))


def test_a_foreign_file_behind_a_url_stays_and_half_a_run_is_finished(
    bucket: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = folder / "bucket" / "o.jsonl.gz"
    file.write_bytes(b"theirs")
    with pytest.raises(DestinationExists, match="is a file, which this command did not write"):
        cut(bucket)
    assert file.read_bytes() == b"theirs"
    file.unlink()
    write = Bucket.write

    def failing(self: Bucket, name: str, data: Any) -> None:
        if name == "report.json":
            raise KeyboardInterrupt
        write(self, name, data)

    monkeypatch.setattr(Bucket, "write", failing)
    with pytest.raises(KeyboardInterrupt):
        cut(bucket)
    monkeypatch.setattr(Bucket, "write", write)
    assert not cut(bucket).get("already_done")
    assert cut(bucket)["already_done"]
    assert plain(file) == LINES[0] + b"\n" + LINES[1] + b"\n"


def test_all_fates_are_counted(folder: Path) -> None:
    rows = cut("o.json")["rows"]
    assert [rows[config] for config in CONFIGS] == [2, 1, 2]
