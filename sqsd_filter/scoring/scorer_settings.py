"""The settings of scorers: keyword arguments that each class passes on to the one it is built on."""

from __future__ import annotations

from typing import TypedDict

from sqsd_filter.corpus.row_formats import Columns

SYSTEM = ("fold", "error")  # what becomes of a system prompt that the chat template refuses
DTYPES = ("float32", "bfloat16", "float64")


class ScorerSettings(TypedDict, total=False):
    """Keyword arguments of `Scorer`, beside the pack and the model."""

    device: str | None
    dtype: str | None
    max_length: int | None
    columns: Columns | None
    trust_remote_code: bool
    system: str


class BatchedSettings(ScorerSettings, total=False):
    """Keyword arguments of `BatchedScorer`, beside the pack and the model."""

    token_budget: int | None
    attention: str | None


class SQSDSettings(BatchedSettings, total=False):
    """Keyword arguments of `SQSDScorer`, beside the pack and the model."""

    per_module: bool
