"""Small chunks, for tests of what is written chunk by chunk."""

from __future__ import annotations

import functools

import pytest

from sqsd_filter.corpus.sources import Corpus


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a few rows are several batches."""
    monkeypatch.setattr(Corpus, "chunks", functools.partialmethod(Corpus.chunks, rows=3))
