"""`map` reads every row as the command does, in any number of processes and batches of any size."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict, load_dataset
from datasets.fingerprint import Hasher

from sqsd_filter import Columns, Scoring, SQSDScorer, score_dataset
from sqsd_filter.errors import InputError, UsageError
from tests.corpora import write_jsonl
from tests.tiny import chat

TOOLS = json.dumps([{"name": "f", "description": "d", "parameters": {"type": "object", "properties": {}}}])
HISTORIES: list[Any] = [None, '[["o", "p"]]', "", "null", "broken", json.dumps(chat("o", "p"))]
TOOL_TEXTS: list[Any] = [TOOLS, " ", TOOLS, "null", None, "[]", "hammer"]


def mixed(n: int) -> list[dict[str, Any]]:
    """Rows of which some lack a value that others have, and some have one that fits no row."""
    return [
        {
            "prompt": f"What is {k % 50}?",
            "response": "" if k % 31 == 5 else f"It is {k % 7}.",
            "system": ["Be brief.", None, " ", ""][k % 4],
            "tools": TOOL_TEXTS[k % 7],
            "history": HISTORIES[k % 6],
            "label": [True, False, None][k % 3] if k % 5 == 0 else True,
        }
        for k in range(n)
    ]


@pytest.fixture(scope="module")
def scored(tiny_pack: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[Any]]]:
    """A file of rows, and the scores that the command gives them."""
    folder = tmp_path_factory.mktemp("mixed")
    path = write_jsonl(folder / "in.jsonl", mixed(200))
    score_dataset(path, folder / "out.parquet", Scoring(pack=tiny_pack, max_error_rate="100%"))
    return path, pq.read_table(folder / "out.parquet").select(["sqsd_risk", "sqsd_status"]).to_pydict()


@pytest.mark.parametrize(
    ("batch_size", "num_proc"), [(1, None), (7, None), (1000, None), (7, 2), (1000, 2), (7, 3), (1000, 3)]
)
def test_scores_are_those_of_the_command(
    tiny_pack: Path, scored: tuple[Path, dict[str, list[Any]]], tmp_path: Path, batch_size: int, num_proc: int | None
) -> None:
    path, theirs = scored
    rows = load_dataset("json", data_files=str(path), split="train", cache_dir=str(tmp_path))
    assert isinstance(rows, Dataset)
    ours = rows.map(SQSDScorer(tiny_pack), batched=True, batch_size=batch_size, num_proc=num_proc)
    assert ours["sqsd_status"][:] == theirs["sqsd_status"]
    assert {"scored", "no_answer", "bad_row", "unwanted"} == set(theirs["sqsd_status"])
    risks = (np.array(found["sqsd_risk"][:], dtype=np.float64) for found in (ours, theirs))
    assert np.nanmax(np.abs(np.subtract(*risks))) <= 2e-6


def test_a_format_that_is_decided_over_the_dataset_holds_for_every_batch(tiny_pack: Path) -> None:
    """`tools` here is no column of tools, which names alone can't tell."""
    rows = Dataset.from_list([{"messages": chat(str(k), "a"), "tools": "hammer"} for k in range(4)])
    scorer = SQSDScorer(tiny_pack)
    by_name = rows.map(scorer, batched=True)
    assert by_name["sqsd_status"][:] == ["bad_row"] * 4
    expected = scorer.score([chat(str(k), "a") for k in range(4)]).risk
    for dataset in (rows, rows.to_iterable_dataset(), DatasetDict(train=rows)):
        ours = rows.map(scorer.reading(dataset), batched=True, batch_size=1, num_proc=2)
        assert np.abs(expected - ours["sqsd_risk"][:]).max() <= 2e-6
    assert len({Hasher.hash(scorer), Hasher.hash(scorer.reading(rows))}) == 2
    with pytest.raises(UsageError, match="not over list"):
        scorer.reading([1])


def test_what_a_batch_has_unread_is_said_once(tiny_pack: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = Dataset.from_list([{"messages": chat("q", "a"), "weight": 2}] * 4)
    with caplog.at_level(logging.WARNING):
        rows.map(SQSDScorer(tiny_pack), batched=True, batch_size=2)
    said = [record.message for record in caplog.records if "not read" in record.message]
    assert len(said) == 1
    assert "column 'weight' (a batch, line 1)" in said[0]
    with pytest.raises(InputError, match="--strict"):
        rows.map(SQSDScorer(tiny_pack, columns=Columns(strict=True)), batched=True)


@pytest.mark.parametrize("form", [None, "arrow", "numpy", "pandas", "torch"])
def test_arguments_of_several_types_are_read_in_every_format(tiny_pack: Path, tmp_path: Path, form: str | None) -> None:
    def calling(**arguments: Any) -> dict[str, Any]:
        call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
        turns = [*chat("q"), {"role": "assistant", "content": "", "tool_calls": [call]}]
        return {"messages": [*turns, {"role": "tool", "content": "1"}, {"role": "assistant", "content": "x"}]}

    path = write_jsonl(tmp_path / "in.jsonl", [calling(a="s", b=[1]), calling(a=1)] * 2)
    rows = load_dataset("json", data_files=str(path), split="train", cache_dir=str(tmp_path))
    assert isinstance(rows, Dataset)
    ours = rows.with_format(form).map(SQSDScorer(tiny_pack), batched=True).with_format(None)
    assert ours["sqsd_status"][:] == ["scored"] * 4
    assert ours["messages"][:] == rows["messages"][:]


def test_objects_that_ray_keeps_as_python_are_read(tiny_pack: Path) -> None:
    import pyarrow as pa

    ray = pytest.importorskip("ray.data.extensions.object_extension")
    turns = [chat("q", "a"), chat("r", "b")]
    batch = pa.table({"messages": ray.ArrowPythonObjectArray.from_objects(turns)})
    scored = SQSDScorer(tiny_pack)(batch)
    assert isinstance(scored, pa.Table)
    assert scored["sqsd_status"].to_pylist() == ["scored", "scored"]
