"""A pack to evaluate, scored rows with prompts, and a finished evaluation."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from sqsd_filter import evaluate
from tests.corpora import write_jsonl
from tests.evaluation.studies import CONSENT, REFUSAL, ROWS, quick, scored
from tests.tiny import make_pack


@pytest.fixture(scope="session")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pack(tmp_path_factory.mktemp("aligned") / "pack", aligned=True)


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prompts, and rows whose answers consent in the first half and refuse in the other, with the scores of a scorer
    that knows, of one that ranks them the wrong way round, and of one much like the first."""
    folder = tmp_path_factory.mktemp("files")
    rows = [{"prompt": f"Explain {k}.", "response": f"{CONSENT if k < ROWS // 2 else REFUSAL}"} for k in range(ROWS)]
    knows = np.linspace(1, -1, ROWS)
    scored(folder / "knows.parquet", rows, knows)
    scored(folder / "wrong.parquet", rows, -knows)
    scored(folder / "alike.parquet", rows, np.where(np.arange(ROWS) < 8, 9.0 - np.arange(ROWS)[::-1], knows))
    write_jsonl(folder / "harmful.jsonl", [{"prompt": f"Explain {k}."} for k in (60, 61, 62)])
    write_jsonl(folder / "harmless.jsonl", [{"prompt": f"Explain {k}."} for k in (70, 71)])
    return folder


@pytest.fixture(scope="session")
def done(pack: Path, files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished evaluation, which no test may change."""
    out = tmp_path_factory.mktemp("done")
    evaluate([files / "knows.parquet"], out, quick(files), pack=pack)
    return out


@pytest.fixture
def mine(done: Path, tmp_path: Path) -> Path:
    """A copy of the finished evaluation."""
    return Path(shutil.copytree(done, tmp_path / "out"))
