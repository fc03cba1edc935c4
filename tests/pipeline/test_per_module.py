"""`per_module`: each probe's cosine at each module as a column of lists, kept and shared as scores are."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import List, Value, load_dataset

from sqsd_filter import Cut, Scoring, SQSDScorer, score_dataset, select_dataset
from sqsd_filter.cli.main import main
from sqsd_filter.errors import PackError
from sqsd_filter.pipeline.report import FinishedReport
from sqsd_filter.pipeline.scores.upkeep import compact_all, describe
from sqsd_filter.pipeline.stage import shards
from sqsd_filter.pipeline.stage.replica import _to_table, from_bytes
from sqsd_filter.scoring.chat_encoder import Encoded
from sqsd_filter.scoring.pack import load_pack
from sqsd_filter.scoring.reference import ReferenceScorer, cosine
from tests.corpora import make_rows, write_jsonl
from tests.tiny import CONVERSATIONS, make_adapter, make_pack


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory, tiny_pack: Path) -> Path:
    """A pack whose danger covers fewer modules than its state."""
    folder = make_pack(tmp_path_factory.mktemp("pack"), tiny_pack / "base")
    make_adapter(tiny_pack / "base", folder / "danger", target_modules=["k_proj", "up_proj"], seed=9)
    return folder


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    rows = [{"id": k, "messages": turns} for k, turns in enumerate(CONVERSATIONS)]
    write_jsonl(tmp_path / "in.jsonl", [*rows, {"id": -1, "messages": []}, {**rows[1], "id": -2}])
    return tmp_path


def test_the_lists_are_the_dense_cosines_in_the_order_that_is_named(folder: Path, pack: Path) -> None:
    report = score_dataset("in.jsonl", "all.parquet", Scoring(scorer=SQSDScorer(pack, per_module=True)))
    table = pq.read_table("all.parquet")
    assert [name for name in table.column_names if name.startswith("sqsd_")][:6] == [
        *("sqsd_risk", "sqsd_danger", "sqsd_safety"),
        *("sqsd_danger_modules", "sqsd_safety_modules", "sqsd_status"),
    ]
    names = json.loads(table.schema.metadata[b"sqsd_modules"])
    assert names == report["modules"]
    assert names["danger"] == [f"model.layers.{k}.{m}" for k in (0, 1) for m in ("mlp.up_proj", "self_attn.k_proj")]
    assert len(names["safety"]) == 14
    dense = ReferenceScorer(pack)
    dense.load()
    for row, turns in zip(table.to_pylist(), CONVERSATIONS, strict=False):
        (encoded,) = dense.encoder.encode([turns])
        assert isinstance(encoded, Encoded)
        for probe in dense.pack.probes:
            update, V = dense.update(encoded, *probe.at), dense.directions[probe.direction]
            expected = [cosine(update[name], V[name]) for name in names[probe.name]]
            assert row[f"sqsd_{probe.name}_modules"] == pytest.approx(expected, abs=1e-5)
            assert sum(expected) == pytest.approx(row[f"sqsd_{probe.name}"], abs=1e-4)
    unscored, twice = table.to_pylist()[-2:]
    assert unscored["sqsd_danger_modules"] is None
    assert unscored["sqsd_status"] == "no_answer"
    assert twice["sqsd_safety_modules"] == table["sqsd_safety_modules"][1].as_py()


def test_other_columns_are_what_they_are_without(folder: Path, pack: Path) -> None:
    score_dataset("in.jsonl", "with.parquet", Scoring(scorer=SQSDScorer(pack, per_module=True)))
    score_dataset("in.jsonl", "without.parquet", Scoring(scorer=SQSDScorer(pack)))
    rich, plain = pq.read_table("with.parquet"), pq.read_table("without.parquet")
    lists = ["sqsd_danger_modules", "sqsd_safety_modules"]
    assert rich.drop_columns(lists).equals(plain)
    assert b"sqsd_modules" not in (plain.schema.metadata or {})
    loaded = load_dataset("parquet", data_files="with.parquet", split="train", cache_dir=str(folder / "cache"))
    assert loaded.features["sqsd_danger_modules"] == List(Value("float32"), length=4)


def test_scoring_anew_without_lists_leaves_none_behind(folder: Path, pack: Path) -> None:
    score_dataset("in.jsonl", "with.parquet", Scoring(scorer=SQSDScorer(pack, per_module=True)))
    score_dataset("with.parquet", "again.parquet", Scoring(scorer=SQSDScorer(pack)))
    again = pq.read_schema("again.parquet")
    assert not [name for name in again.names if name.endswith("_modules")]
    assert b"sqsd_modules" not in (again.metadata or {})


def test_a_killed_run_goes_on_and_ends_in_the_same_bytes(
    folder: Path, pack: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "shard_size", lambda rows: 4)
    write_jsonl(folder / "in.jsonl", make_rows(10))

    def run(dest: str) -> FinishedReport:
        return score_dataset("in.jsonl", dest, Scoring(scorer=SQSDScorer(pack, per_module=True), score_store="store"))

    whole = run("all.parquet")
    (home,) = Path().glob("*.sqsd")
    assert len(list((home / "scores").iterdir())) == 3
    max((home / "scores").iterdir()).unlink()
    for name in ("all.parquet", "all.parquet.sqsd/report.json"):
        (folder / name).rename(folder / f"{Path(name).name}.old")
    for file in Path("store").iterdir():
        file.unlink()
    again = run("all.parquet")
    assert (whole["rows"]["scored"], again["rows"]["scored"]) == (10, 10)
    assert Path("all.parquet").read_bytes() == Path("all.parquet.old").read_bytes()
    assert run("other.parquet")["rows"]["scored"] == 0
    assert pq.read_table("other.parquet").equals(pq.read_table("all.parquet"))


def test_stores_keep_them_apart_from_plain_scores_and_compact_them(folder: Path, pack: Path) -> None:
    score_dataset("in.jsonl", "plain.parquet", Scoring(scorer=SQSDScorer(pack), score_store="store"))
    rich = score_dataset(
        "in.jsonl", "rich.parquet", Scoring(scorer=SQSDScorer(pack, per_module=True), score_store="store")
    )
    assert rich["rows"]["scored"] == len(CONVERSATIONS)
    write_jsonl(folder / "more.jsonl", [{"messages": CONVERSATIONS[0]}, {"messages": CONVERSATIONS[1][:2]}])
    score_dataset("in.jsonl", "two.parquet", Scoring(scorer=SQSDScorer(pack, per_module=True), score_store="store"))
    assert [s["settings"].get("per_module", False) for s in describe("store")["stores"]].count(True) == 1
    compact_all("store")
    again = score_dataset(
        "in.jsonl", "again.parquet", Scoring(scorer=SQSDScorer(pack, per_module=True), score_store="store")
    )
    assert again["rows"]["scored"] == 0
    assert pq.read_table("again.parquet").equals(pq.read_table("rich.parquet"))


def test_they_come_back_from_a_replica_as_they_went(pack: Path) -> None:
    scorer = SQSDScorer(pack, per_module=True)
    scores = scorer.score(CONVERSATIONS)
    keys, back = from_bytes(_to_table(0, [b"k"] * len(CONVERSATIONS), scores, None)["scores"][0].as_py())
    assert list(back.probes) == list(scores.probes) == scorer.values
    assert len(keys) == len(CONVERSATIONS)
    assert all(np.array_equal(back.probes[name], scores.probes[name]) for name in scorer.values)


def test_a_loaded_scorer_needs_the_packs_files_no_more(tmp_path: Path, pack: Path) -> None:
    scorer = SQSDScorer(pack, per_module=True)
    for name in ("danger", "initial", "safety", "pack.json"):
        copy = shutil.copytree if (pack / name).is_dir() else shutil.copy
        copy(pack / name, tmp_path / name)
    elsewhere = pickle.loads(pickle.dumps(scorer)).with_pack(load_pack(tmp_path))  # as on another node
    elsewhere.model  # noqa: B018  (loads the model)
    shutil.rmtree(tmp_path)
    for name, values in elsewhere.score(CONVERSATIONS).probes.items():
        assert np.array_equal(values, scorer.score(CONVERSATIONS).probes[name])
    assert elsewhere.modules == scorer.modules


def test_a_cut_of_such_a_file_keeps_the_lists(folder: Path, pack: Path) -> None:
    with pytest.raises(SystemExit) as left:
        main(["score", "in.jsonl", "all.parquet", "--per-module", "--pack", str(pack), "-q"])
    assert not left.value.code
    select_dataset("all.parquet", "out", Cut.of(drop_count=1))
    kept = pq.read_table("out/data")
    assert kept.schema.field("sqsd_danger_modules").type == pa.list_(pa.float32(), 4)


def test_no_probe_may_be_called_as_such_a_column_is(tmp_path: Path, tiny_pack: Path) -> None:
    probe = {"name": "danger_modules", "weight": 1.0, "direction": "danger", "state": "initial"}
    folder = make_pack(tmp_path, tiny_pack / "base", probes=[probe])
    with pytest.raises(PackError, match="danger_modules"):
        SQSDScorer(folder)


@pytest.mark.slow
def test_replicas_on_ray_give_the_same_bytes(folder: Path, pack: Path) -> None:
    from sqsd_filter.pipeline.stage.ray_engine import RayEngine

    engine = RayEngine(replicas=1)
    try:
        score_dataset(
            "in.jsonl", "ray.parquet", Scoring(scorer=SQSDScorer(pack, per_module=True), engine=engine, explain=2)
        )
    finally:
        engine.close()
    score_dataset("in.jsonl", "here.parquet", Scoring(scorer=SQSDScorer(pack, per_module=True), explain=2))
    assert Path("ray.parquet").read_bytes() == Path("here.parquet").read_bytes()
    explained = [Path(f"{name}.parquet.sqsd/explained.json").read_bytes() for name in ("ray", "here")]
    assert explained[0] == explained[1]
