"""The scorer and the working folder of tests of whole runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from sqsd_filter import SQSDScorer
from tests.corpora import make_rows, write_jsonl


@pytest.fixture(scope="module")
def scorer(tiny_pack: Path) -> SQSDScorer:
    return SQSDScorer(tiny_pack)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, with 60 plain rows in in.jsonl."""
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "in.jsonl", make_rows(60))
    return tmp_path
