"""The rows as a file, and what this process makes of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sqsd_filter.pipeline.run import filter_dataset
from tests.corpora import content, write_jsonl
from tests.pipeline.stage.sharded_rows import LINES


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "in.jsonl", LINES)
    return Path("in.jsonl")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, tiny_pack: Path) -> dict[str, Any]:
    """What this process makes of the rows."""
    folder = tmp_path_factory.mktemp("undisturbed")
    write_jsonl(folder / "in.jsonl", LINES)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        filter_dataset("in.jsonl", "out", drop_top="5%", pack=tiny_pack)
        return content(Path("out"))
