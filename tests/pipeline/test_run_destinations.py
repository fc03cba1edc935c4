"""Runs whose destination can't be replaced, or whose disk refuses to be read or written."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from sqsd_filter import Scoring, SQSDScorer, filter_dataset, score_dataset
from sqsd_filter.errors import DestinationExists, InputError, SQSDError
from tests.corpora import content, make_rows, write_jsonl
from tests.disks import small_disk

# ---------------------------------------------------------------------------------------------- destinations


class Unused(SQSDScorer):
    """Fails the test when anything is scored."""

    def score(self, *_: Any) -> Any:
        raise AssertionError("scored before the destination was looked at")


@pytest.mark.parametrize("dest", [".", "..", "/proc"])
def test_what_can_not_be_swapped_is_refused_before_scoring(
    dest: str,
    folder: Path,
    tiny_pack: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (folder / "work").mkdir()
    (folder / "work" / "notes.txt").touch()
    outside = write_jsonl(tmp_path_factory.mktemp("elsewhere") / "in.jsonl", make_rows(3))
    monkeypatch.chdir(folder / "work")
    with pytest.raises(DestinationExists, match="can't be replaced, since it"):
        filter_dataset(outside, dest, drop_count=0, overwrite=True, scorer=Unused(tiny_pack))


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_in_the_place_of_a_scored_file_is_refused_before_scoring(
    overwrite: bool, folder: Path, tiny_pack: Path
) -> None:
    (folder / "d.parquet").mkdir()
    with pytest.raises(DestinationExists, match="is a folder, but the output is a file"):
        score_dataset("in.jsonl", "d.parquet", Scoring(scorer=Unused(tiny_pack)), overwrite=overwrite)


def test_a_glob_that_finds_the_destination_finds_the_same_inputs(folder: Path, scorer: SQSDScorer) -> None:
    (folder / "data").mkdir()
    (folder / "in.jsonl").rename("data/in.jsonl")
    for again in (False, True):
        typed = [str(path) for path in sorted(Path("data").iterdir())]
        for sources in (typed, "data/*"):
            report = filter_dataset(sources, "data/out", drop_count=1, scorer=scorer)
        assert [i["path"] for i in report["inputs"]] == ["data/in.jsonl"]
        assert again == ("data/out" in typed)
    for _ in range(2):
        score_dataset("data/in.*", "data/in.parquet", Scoring(scorer=scorer))
    with pytest.raises(InputError, match=r"data/out holds the output of an earlier run"):
        filter_dataset("data/out", "data/out", drop_count=1, scorer=scorer)


def test_a_scored_file_that_is_not_the_reports_is_written_again(folder: Path, scorer: SQSDScorer) -> None:
    score_dataset("in.jsonl", "scored.parquet", Scoring(scorer=scorer))
    done = Path("scored.parquet").read_bytes()
    score_dataset("in.jsonl", "other.parquet", Scoring(limit=7, scorer=scorer))
    shutil.copy("other.parquet", "scored.parquet")
    report = score_dataset("in.jsonl", "scored.parquet", Scoring(scorer=scorer))
    assert not report.get("already_done")
    assert Path("scored.parquet").read_bytes() == done


def test_a_kill_between_two_swaps_leaves_nothing_that_counts_as_done(folder: Path, scorer: SQSDScorer) -> None:
    score_dataset("in.jsonl", "scored.parquet", Scoring(scorer=scorer))
    done = Path("scored.parquet").read_bytes()
    Path("scored.parquet").rename(".scored.parquet.sqsd-old")
    pq.write_table(pq.read_table(".scored.parquet.sqsd-old").select(["id", "sqsd_risk"]), "scored.parquet")
    score_dataset("in.jsonl", "scored.parquet", Scoring(scorer=scorer))
    assert Path("scored.parquet").read_bytes() == done
    assert not Path(".scored.parquet.sqsd-old").exists()


# ---------------------------------------------------------------------------------------------- disks that refuse


@pytest.mark.parametrize("size", [100, 3000, 4500], ids=["start", "scores", "export"])
def test_a_full_disk_gives_one_clear_sentence_and_room_finishes_the_run(
    size: int, folder: Path, scorer: SQSDScorer, capfd: pytest.CaptureFixture[str]
) -> None:
    scorer.score([])  # nothing of the model is written
    sentence = r"^[^\n]* can't (be written|go on) [^\n]*File too large[^\n]*\.$"
    with pytest.raises(SQSDError, match=sentence), small_disk(size):
        filter_dataset("in.jsonl", "out", drop_top="5%", scorer=scorer)
    assert not [p for p in Path("out").rglob("*") if p.name.endswith(".tmp") or p.name == "lock"]
    assert "Traceback" not in capfd.readouterr().err
    assert filter_dataset("in.jsonl", "out", drop_top="5%", scorer=scorer)["status"] == "ok"
    filter_dataset("in.jsonl", "straight", drop_top="5%", scorer=scorer)
    assert content(Path("out")) == content(Path("straight"))


@pytest.fixture
def nobody(scorer: SQSDScorer, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder where this process may read and not write, as for anyone but root."""
    scorer.score([])
    scorer.settings()  # what lies in root's folders has been read
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_jsonl(folder / "in.jsonl", make_rows(3))
        write_jsonl(folder / "secret.jsonl", make_rows(3)).chmod(0)
        (folder / "closed").mkdir(0o700)
        folder.chmod(0o555)
        monkeypatch.chdir(folder)
        root = os.geteuid() == 0
        if root:
            os.seteuid(65534)
        yield folder
        if root:
            os.seteuid(0)
        folder.chmod(0o755)


@pytest.mark.parametrize(
    ("source", "dest"),
    [("in.jsonl", "out"), ("in.jsonl", "closed/out"), ("secret.jsonl", "out"), ("closed/a.jsonl", "out")],
)
def test_what_may_not_be_read_or_written_is_an_input_error(
    source: str, dest: str, scorer: SQSDScorer, nobody: Path
) -> None:
    with pytest.raises(InputError, match=r"^[^\n]*(secret|closed|out)[^\n]*Permission denied[^\n]*\.$"):
        filter_dataset(source, dest, drop_count=1, scorer=scorer)
