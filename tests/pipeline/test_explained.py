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

from sqsd_filter import Cut, PushTo, Scoring, SQSDScorer, filter_dataset, score_dataset, select_dataset
from sqsd_filter.corpus.sources import Corpus
from sqsd_filter.errors import DestinationExists, InputError, SQSDError, UsageError
from sqsd_filter.pipeline.explained import ModelChoice, explain_run
from sqsd_filter.pipeline.report import FinishedReport
from sqsd_filter.progress import Silent
from sqsd_filter.scoring.baselines import make_scorer
from sqsd_filter.storage.locks import take_lock
from tests.corpora import make_rows, rows_of, write_jsonl
from tests.hub import Hub
from tests.scoring.test_linear_probe import with_probe

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
    filter_dataset("in.jsonl", "out", drop_count=3, scorer=scorer, explain=1)
    select_dataset("out", "cut", Cut.of(drop_count=2))
    shutil.rmtree("out")
    filter_dataset("in.jsonl", "out", drop_count=3, scorer=scorer)
    assert select_dataset("out", "cut", Cut.of(drop_count=2))["already_done"]


# ---------------------------------------------------------------------------------------------- of a finished run


def explain(out: str, *rows: int, count: int = 3, pack: Path | None = None) -> list[Any]:
    return explain_run(Path(out), count, rows, ModelChoice(pack), Silent())


@pytest.fixture
def projected(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of rows of each micro-batch that is scored from now on, without those that try a model out."""
    from sqsd_filter.scoring.scoring_model import SQSDModel

    real, sizes = SQSDModel.project, list[int]()

    def project(self: SQSDModel, rows: Any) -> Any:
        if len(rows[0]) != 8:
            sizes.append(len(rows))
        return real(self, rows)

    monkeypatch.setattr(SQSDModel, "project", project)
    return sizes


def test_a_finished_run_is_explained_as_if_it_had_been_from_the_start(
    folder: Path, scorer: SQSDScorer, projected: list[int]
) -> None:
    filter_dataset("in.jsonl", "at-once", drop_count=3, scorer=scorer, explain=3)
    filter_dataset("in.jsonl", "out", drop_count=3, scorer=scorer)
    score_dataset("in.jsonl", "all.parquet", Scoring(scorer=scorer))
    projected.clear()
    for out, home in (("out", "out/_sqsd"), ("all.parquet", "all.parquet.sqsd")):
        asked = explain(out)
        expected = explained(Path("at-once/_sqsd"))
        kept = explained(Path(home))
        assert asked == kept
        for row in (*kept, *expected):
            del row["file"], row["line"]
        assert kept == expected
    assert projected == []


def test_what_select_wrote_is_explained_from_the_scores_that_it_cut(folder: Path, scorer: SQSDScorer) -> None:
    filter_dataset("in.jsonl", "out", drop_count=3, scorer=scorer)
    score_dataset("in.jsonl", "all.parquet", Scoring(scorer=scorer))
    select_dataset("out", "of-run", Cut.of(drop_count=5))
    select_dataset("all.parquet", "of-file", Cut.of(drop_count=5))
    assert [row["row"] for row in explain("of-run")] == [row["row"] for row in explain("of-file")]
    shutil.rmtree("out")
    with pytest.raises(InputError, match=r"of-run was made by select from out, which is not there any more"):
        explain("of-run")


def test_named_rows_are_explained_and_earlier_explanations_stay(folder: Path, scorer: SQSDScorer) -> None:
    filter_dataset("in.jsonl", "out", drop_count=3, scorer=scorer, explain=2)
    first = explained(Path("out/_sqsd"))
    lowest = min(
        (json.loads(line)["id"], k) for k, line in enumerate(Path("in.jsonl").read_text().splitlines()) if k not in (3,)
    )[1]
    asked = explain("out", lowest + 1, lowest + 1)
    assert [row["row"] for row in asked] == [lowest]
    rows = explained(Path("out/_sqsd"))
    assert len(rows) == len({row["row"] for row in [*first, *asked]})
    assert [row for row in rows if row in first] == first
    assert [row["risk"] for row in rows] == sorted((row["risk"] for row in rows), reverse=True)


@pytest.mark.parametrize(
    ("row", "said"), [(0, "no row 0: the run has the rows 1 to 21"), (22, "no row 22"), (4, r"Row 4 has no risk \(no_")]
)
def test_rows_that_can_not_be_explained_are_named(folder: Path, scorer: SQSDScorer, row: int, said: str) -> None:
    filter_dataset("in.jsonl", "out", drop_count=3, scorer=scorer)
    with pytest.raises(UsageError, match=said):
        explain("out", row)
    assert not Path("out/_sqsd/explained.json").exists()


def test_a_linear_probe_is_explained_at_once_and_later(folder: Path, tiny_pack: Path) -> None:
    from sqsd_filter.scoring.pack import load_pack

    scorer = SQSDScorer(load_pack(with_probe(tiny_pack, folder / "pack")).with_risk("unsafe"))
    filter_dataset("in.jsonl", "at-once", drop_count=3, scorer=scorer, explain=3)
    filter_dataset("in.jsonl", "out", drop_count=3, scorer=scorer)
    assert explain("out") == explained(Path("at-once/_sqsd"))
    for row in explain("out"):
        parts = sum(part["risk"] for part in row["tokens"]) + row["prompt"]["risk"] + row["bias"]
        assert parts == pytest.approx(row["risk"], abs=1e-4)


def test_one_of_the_probes_alone_is_explained_too(folder: Path, tiny_pack: Path) -> None:
    filter_dataset("in.jsonl", "out", drop_count=3, scorer=make_scorer("danger", tiny_pack))
    assert set(explain("out")[0]["total"]["probes"]) == {"danger"}


def test_scores_of_another_origin_are_refused(folder: Path, scorer: SQSDScorer, tiny_pack: Path) -> None:
    score_dataset("in.jsonl", "length.parquet", Scoring(scorer=make_scorer("length", tiny_pack)))
    with pytest.raises(UsageError, match="by the scorer length, which has no parts"):
        explain("length.parquet")
    filter_dataset("in.jsonl", "out", drop_count=3, scorer=scorer)
    other = shutil.copytree(tiny_pack, folder / "other")
    page = json.loads((other / "pack.json").read_text())
    page["probes"][0]["weight"] += 1
    (other / "pack.json").write_text(json.dumps(page))
    with pytest.raises(UsageError, match=r"made by something else \(pack: .*--pack"):
        explain("out", pack=other)
    with pytest.raises(InputError, match="nothing holds no finished run"):
        explain("nothing")


def test_a_run_at_work_is_waited_for(folder: Path, scorer: SQSDScorer) -> None:
    filter_dataset("in.jsonl", "out", drop_count=3, scorer=scorer)
    with take_lock(Path("out/_sqsd/lock")), pytest.raises(DestinationExists, match="writing to out right now"):
        explain("out")


def test_an_explained_run_is_still_done_and_one_that_is_to_be_is_pointed_to_the_command(
    folder: Path, scorer: SQSDScorer
) -> None:
    filter_dataset("in.jsonl", "out", drop_count=3, scorer=scorer)
    explain("out")
    assert filter_dataset("in.jsonl", "out", drop_count=3, scorer=scorer)["already_done"]
    with pytest.raises(DestinationExists, match="explain rows of it with 'sqsd-filter explain out', which reuses"):
        filter_dataset("in.jsonl", "out", drop_count=3, scorer=scorer, explain=3)
