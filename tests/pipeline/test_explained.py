"""`explain`: the riskiest rows are explained in a file that stays here, whatever made their scores."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from sqsd_filter import Cut, PushTo, Scoring, SQSDScorer, filter_dataset, score_dataset
from sqsd_filter.corpus.sources import Corpus
from sqsd_filter.errors import DestinationExists, SQSDError, UsageError
from sqsd_filter.pipeline.report import FinishedReport
from tests.corpora import make_rows, rows_of, write_jsonl
from tests.hub import Hub

SECRET = "mangowurzel"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, with 20 rows in in.jsonl, and one more without an answer between them."""
    monkeypatch.chdir(tmp_path)
    rows = make_rows(20)
    write_jsonl(tmp_path / "in.jsonl", [*rows[:3], {"id": 99, "instruction": "?", "output": ""}, *rows[3:]])
    return tmp_path


def explained(home: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((home / "explained.json").read_text())["rows"]
    return found


def test_the_riskiest_rows_are_explained_the_riskiest_first(folder: Path, scorer: SQSDScorer) -> None:
    report = filter_dataset("in.jsonl", "out", drop_count=3, scorer=scorer, explain=3)
    rows = explained(Path("out/_sqsd"))
    dropped = sorted(rows_of(Path("out"), "dropped"), key=lambda row: -row["sqsd_risk"])
    assert report["explained"] == 3
    assert [row["risk"] for row in rows] == [row["sqsd_risk"] for row in dropped]
    lines = Path("in.jsonl").read_text().splitlines()
    for row, there in zip(rows, dropped, strict=True):
        own = json.loads(lines[row["row"]])
        assert (row["file"], row["line"], own["id"]) == ("in.jsonl", row["row"] + 1, there["id"])
        assert "".join(token["text"] for token in row["tokens"]) == own["output"] + "<|im_end|>"
        assert sum(part["risk"] for part in row["layers"]) == pytest.approx(row["risk"], abs=1e-5)


def test_more_than_there_are_and_equal_risks_come_in_row_order(folder: Path, scorer: SQSDScorer) -> None:
    write_jsonl(folder / "twice.jsonl", [*make_rows(3), *make_rows(3)])
    assert score_dataset("twice.jsonl", "all.parquet", Scoring(scorer=scorer, explain=50))["explained"] == 6
    rows = [(row["risk"], row["row"]) for row in explained(Path("all.parquet.sqsd"))]
    assert rows == sorted(rows, key=lambda row: (-row[0], row[1]))
    assert len({risk for risk, _ in rows}) == 3
    score_dataset("twice.jsonl", "first.parquet", Scoring(scorer=scorer, explain=1))
    assert [(row["risk"], row["row"]) for row in explained(Path("first.parquet.sqsd"))] == rows[:1]


def test_scores_from_a_store_are_explained_in_the_same_bytes(folder: Path, scorer: SQSDScorer) -> None:
    filter_dataset("in.jsonl", "out", drop_count=3, scorer=scorer, explain=2, score_store="store")
    again = filter_dataset("in.jsonl", "again", drop_count=3, scorer=scorer, explain=2, score_store="store")
    assert again["rows"]["scored"] == 0
    assert Path("again/_sqsd/explained.json").read_bytes() == Path("out/_sqsd/explained.json").read_bytes()


def test_a_run_without_its_explanations_is_not_done(folder: Path, scorer: SQSDScorer) -> None:
    def run(count: int | None = 2) -> FinishedReport:
        return filter_dataset("in.jsonl", "out", drop_count=3, scorer=scorer, explain=count)

    run()
    content = Path("out/_sqsd/explained.json").read_bytes()
    assert run()["already_done"]
    Path("out/_sqsd/explained.json").unlink()
    (Path("out/_sqsd") / "report.json").unlink()  # and killed before its report
    assert "already_done" not in run()
    Path("out/_sqsd/explained.json").unlink()
    assert "already_done" not in run()
    assert Path("out/_sqsd/explained.json").read_bytes() == content
    with pytest.raises(DestinationExists, match="explain"):
        run(3)


def test_the_total_of_the_parts_stands_beside_the_stored_risk(folder: Path, tiny_pack: Path) -> None:
    filter_dataset("in.jsonl", "out", drop_count=3, scorer=SQSDScorer(tiny_pack, dtype="bfloat16"), explain=20)
    for row in explained(Path("out/_sqsd")):
        for parts in (row["layers"], row["module_types"]):
            assert sum(part["risk"] for part in parts) == pytest.approx(row["total"]["risk"], abs=1e-6)
        assert row["total"]["risk"] == pytest.approx(row["risk"], abs=1e-2)


@pytest.mark.parametrize("private", [True, False])
def test_explanations_are_never_pushed(folder: Path, scorer: SQSDScorer, hub: Hub, private: bool) -> None:
    write_jsonl(folder / "secret.jsonl", [{"instruction": "?", "output": SECRET}, *make_rows(9)])
    push = PushTo("org/out", private=private, rows=["kept"])
    filter_dataset("secret.jsonl", "out", drop_count=9, scorer=scorer, explain=10, push=push)
    assert SECRET in "".join(token["text"] for row in explained(Path("out/_sqsd")) for token in row["tokens"])
    files = hub.files("org/out")
    assert "_sqsd/report.json" in files
    assert not [name for name in files if "explained" in name]
    assert not [name for name, content in files.items() if b'"tokens": [' in content]


def test_explanations_make_no_other_run_of_what_was_pushed(folder: Path, scorer: SQSDScorer, hub: Hub) -> None:
    push = PushTo("org/out")
    filter_dataset("in.jsonl", "out", drop_count=3, scorer=scorer, push=push)
    pushed = hub.files("org/out")
    assert filter_dataset("in.jsonl", "more", drop_count=3, scorer=scorer, explain=2, push=push)["explained"] == 2
    assert hub.files("org/out") == pushed
    assert len(explained(Path("more/_sqsd"))) == 2
    with pytest.raises(DestinationExists, match="another run"):
        filter_dataset("in.jsonl", "fewer", drop_count=2, scorer=scorer, explain=2, push=push)


@pytest.mark.parametrize("dest", ["hf://datasets/org/out", "s3://bucket/out"])
def test_explanations_are_not_kept_at_a_url(folder: Path, scorer: SQSDScorer, dest: str) -> None:
    with pytest.raises(UsageError, match="text of rows"):
        filter_dataset("in.jsonl", dest, drop_count=3, scorer=scorer, explain=1)


def test_rows_are_read_once_however_many_are_explained(
    folder: Path, scorer: SQSDScorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[tuple[int, int]] = []
    real = Corpus.read

    def read(self: Corpus, start: int, stop: int, columns: Any = None) -> Any:
        reads.append((start, stop))
        return real(self, start, stop, columns)

    def passes(count: int | None, dest: str) -> int:
        reads.clear()
        score_dataset("in.jsonl", dest, Scoring(scorer=scorer, explain=count))
        return len(reads)

    monkeypatch.setattr(Corpus, "read", read)
    assert passes(1, "one.parquet") == passes(9, "nine.parquet") == passes(None, "none.parquet") + 1


def test_an_explanation_that_does_not_fit_into_memory_is_one_sentence(folder: Path, tiny_pack: Path) -> None:
    def forward(module: Any, query: torch.Tensor, *arguments: Any, **named: Any) -> tuple[torch.Tensor, None]:
        if len(query) == 1 and query.shape[2] > 8:  # a row alone, other than the one that is tried first
            raise torch.OutOfMemoryError("out of memory")
        return sdpa_attention_forward(module, query, *arguments, **named)

    AttentionInterface.register("lonely", forward)
    scorer = SQSDScorer(tiny_pack, attention="lonely")
    with pytest.raises(SQSDError, match=r"explanation of row \d+ does not fit .*--explain.*--max-length"):
        filter_dataset("in.jsonl", "out", drop_count=3, scorer=scorer, explain=1)


@pytest.mark.parametrize("count", [0, 1001])
def test_no_rows_and_too_many_can_not_be_asked_for(folder: Path, scorer: SQSDScorer, count: int) -> None:
    with pytest.raises(UsageError, match="--explain"):
        score_dataset("in.jsonl", "all.parquet", Scoring(scorer=scorer, explain=count))
    assert not Path("all.parquet.sqsd").exists()


def test_a_cut_of_an_explained_run_is_that_of_any_other(folder: Path, scorer: SQSDScorer) -> None:
    from sqsd_filter import select_dataset

    filter_dataset("in.jsonl", "out", drop_count=3, scorer=scorer, explain=1)
    select_dataset("out", "cut", Cut.of(drop_count=2))
    shutil.rmtree("out")
    filter_dataset("in.jsonl", "out", drop_count=3, scorer=scorer)
    assert select_dataset("out", "cut", Cut.of(drop_count=2))["already_done"]
