"""The score store: what it gives back is what was put in for these very settings, or nothing."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sqsd_filter.errors import RowErrorBudgetExceeded, SQSDError
from sqsd_filter.pipeline.run import filter_dataset
from sqsd_filter.pipeline.scores.keys import KEYS
from sqsd_filter.pipeline.scores.store import ScoreStore
from sqsd_filter.scoring.results import Scores
from sqsd_filter.scoring.scorer import SQSDScorer
from sqsd_filter.storage.folder import write_whole
from tests.corpora import make_rows, write_jsonl

SETTINGS = {"pack": "p", "dtype": "float32"}
KEY = [bytes([k]) * 15 + b"\0" for k in range(1, 6)]  # a key may end in NUL


def scores(*danger: float) -> Scores:
    values = np.array(danger)
    n = len(danger)
    return Scores({"danger": values}, values, ["scored"] * n, [""] * n, np.arange(n))


def store_in(folder: Path, **settings: Any) -> ScoreStore:
    return ScoreStore(folder / "scores", {**SETTINGS, **settings}, ["danger"])


def file_in(store: ScoreStore, name: str) -> Path:
    assert store.folder.local is not None
    return store.folder.local / name


def known(store: ScoreStore) -> dict[bytes, float]:
    stored = store.lookup(np.array(KEY, dtype=KEYS))
    return {key: value for key, value, k in zip(KEY, stored.probes["danger"], stored.known, strict=True) if k}


def test_what_is_appended_is_found_again_in_any_order(tmp_path: Path) -> None:
    store = store_in(tmp_path)
    store.append("shard-000001", KEY[2:4], scores(0.1, float("nan")))
    store.append("shard-000000", KEY[:1], scores(1 / 3))
    stored = store_in(tmp_path).lookup(np.array([KEY[3], KEY[4], KEY[0], KEY[2]], dtype=KEYS))
    assert stored.known.tolist() == stored.own.tolist() == [True, False, True, True]
    assert np.array_equal(stored.probes["danger"], [np.nan, np.nan, 1 / 3, 0.1], equal_nan=True)
    assert [stored.statuses[c] for c in stored.codes] == ["scored", "", "scored", "scored"]
    assert stored.tokens.tolist() == [1, 0, 0, 0]


def test_an_empty_or_missing_store_knows_nothing(tmp_path: Path) -> None:
    assert known(store_in(tmp_path)) == {}
    assert not store_in(tmp_path).lookup(np.zeros(0, dtype=KEYS)).known.size


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def replace_by_text(path: Path) -> None:
    path.write_text("not parquet")


def replace_by_another_table(path: Path) -> None:
    pq.write_table(pa.table({"key": KEY, "danger": [0.0] * 5}), path)


def replace_by_scores_of_other_settings(path: Path) -> None:
    other = store_in(path.parent / "elsewhere", dtype="bfloat16")
    path.write_bytes(file_in(other, other.append("x", KEY, scores(*[9.0] * 5))).read_bytes())


def flip_a_bit_of_the_scores(path: Path) -> None:
    """Such that the file opens, and would give other scores."""
    content = bytearray(path.read_bytes())
    column = pq.read_metadata(path).row_group(0).column(1)
    content[column.data_page_offset + column.total_compressed_size - 1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "spoil",
    [
        truncate,
        replace_by_text,
        replace_by_another_table,
        replace_by_scores_of_other_settings,
        flip_a_bit_of_the_scores,
    ],
)
def test_a_segment_that_is_not_what_its_name_says_is_skipped_with_a_warning(
    spoil: Callable[[Path], None], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = store_in(tmp_path)
    store.append("shard-000000", KEY[:2], scores(0.1, 0.2))
    spoiled = file_in(store, store.append("shard-000001", KEY[2:4], scores(0.3, 0.4)))
    spoil(spoiled)
    with caplog.at_level(logging.WARNING):
        assert known(store) == {KEY[0]: 0.1, KEY[1]: 0.2}
    assert str(spoiled) in caplog.text


def test_scores_of_other_settings_live_in_the_same_folder_unseen(tmp_path: Path) -> None:
    store_in(tmp_path, dtype="bfloat16").append("shard-000000", KEY[:1], scores(9.0))
    store_in(tmp_path).append("shard-000000", KEY[1:2], scores(0.2))
    assert known(store_in(tmp_path)) == {KEY[1]: 0.2}


def test_adopted_scores_are_known_but_not_its_own(tmp_path: Path) -> None:
    old, new = store_in(tmp_path / "old"), store_in(tmp_path / "new")
    old.append("shard-000000", KEY[:2], scores(0.1, 0.2))
    store_in(tmp_path / "old", dtype="bfloat16").append("shard-000000", KEY[2:3], scores(9.0))
    for _ in range(2):
        new.adopt(np.array(KEY, dtype=KEYS), old)
    assert len(new.segments()) == 1
    assert known(new) == {KEY[0]: 0.1, KEY[1]: 0.2}
    assert not new.lookup(np.array(KEY, dtype=KEYS)).own.any()


def test_a_folder_that_takes_no_files_gives_one_clear_sentence(tmp_path: Path) -> None:
    (tmp_path / "scores").symlink_to("/proc")
    with pytest.raises(
        SQSDError,
        match=r"can't be written to .*scores .*: check the free space and your rights there and run the same command",
    ):
        store_in(tmp_path).append("shard-000000", KEY[:1], scores(0.1))


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    write_whole(path, lambda sink: sink.write(b"old"))

    def refuse(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(OSError, match="No space"):
        write_whole(path, lambda sink: sink.write(b"new"))
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_reason_that_may_pass_gives_way_to_a_score_and_never_the_other_way_round(tmp_path: Path) -> None:
    store, lost = store_in(tmp_path), scores(float("nan"), 0.25)
    lost.status[0] = "out_of_memory"
    store.append("shard-000000", KEY[:2], lost)
    store.append("shard-000000", KEY[:1], scores(0.5))  # tried again: the shard's other scores stay
    assert known(store) == {KEY[0]: 0.5, KEY[1]: 0.25}
    store.append("shard-000000", KEY[:2], lost)
    assert known(store) == {KEY[0]: 0.5, KEY[1]: 0.25}


def test_rows_that_did_not_fit_are_tried_again_by_the_next_run(
    tmp_path: Path, tiny_pack: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, scorer = write_jsonl(tmp_path / "in.jsonl", make_rows(8)), SQSDScorer(tiny_pack)
    project = scorer.model.project

    def short_of_memory(rows: Any) -> Any:
        raise MemoryError

    monkeypatch.setattr(scorer.model, "project", short_of_memory)
    with pytest.raises(RowErrorBudgetExceeded, match=r"8 out_of_memory.*line 1 \(\d+ tokens don't fit"):
        filter_dataset(source, tmp_path / "out", drop_count=1, scorer=scorer)
    monkeypatch.setattr(scorer.model, "project", project)
    report = filter_dataset(source, tmp_path / "out", drop_count=1, scorer=scorer)
    assert (report["rows"]["kept"], report["rows"]["dropped"], report["rows"]["scored"]) == (7, 1, 8)
