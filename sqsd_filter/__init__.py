"""sqsd-filter: a safety-risk column on every row of an instruction corpus, and the corpus without its riskiest rows."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sqsd_filter.corpus.row_formats import Columns
    from sqsd_filter.directions.callback import DriftCallback
    from sqsd_filter.errors import SQSDError
    from sqsd_filter.evaluation.run import evaluate
    from sqsd_filter.evaluation.settings import Design, FineTuning
    from sqsd_filter.pipeline.options import Scoring, Writing
    from sqsd_filter.pipeline.publishing.hub import PushTo
    from sqsd_filter.pipeline.run import filter_dataset, score_dataset, select_dataset
    from sqsd_filter.pipeline.selecting.select import select
    from sqsd_filter.pipeline.selecting.selection import Cut
    from sqsd_filter.scoring.baselines import make_scorer
    from sqsd_filter.scoring.pack import Pack, load_pack
    from sqsd_filter.scoring.scorer import SQSDScorer

    __version__: str

_HOMES = {
    "SQSDScorer": "scoring.scorer",
    "Columns": "corpus.row_formats",
    "make_scorer": "scoring.baselines",
    "DriftCallback": "directions.callback",
    "Design": "evaluation.settings",
    "FineTuning": "evaluation.settings",
    "evaluate": "evaluation.run",
    "Pack": "scoring.pack",
    "load_pack": "scoring.pack",
    "PushTo": "pipeline.publishing.hub",
    "Cut": "pipeline.selecting.selection",
    "Scoring": "pipeline.options",
    "Writing": "pipeline.options",
    "select": "pipeline.selecting.select",
    "filter_dataset": "pipeline.run",
    "score_dataset": "pipeline.run",
    "select_dataset": "pipeline.run",
    "SQSDError": "errors",
}

__all__ = [
    "Columns",
    "Cut",
    "Design",
    "DriftCallback",
    "FineTuning",
    "Pack",
    "PushTo",
    "SQSDError",
    "SQSDScorer",
    "Scoring",
    "Writing",
    "evaluate",
    "filter_dataset",
    "load_pack",
    "make_scorer",
    "score_dataset",
    "select",
    "select_dataset",
]


def __getattr__(name: str) -> object:
    """Import on first use, so that `--help` and usage errors are quick."""
    if name == "__version__":
        return _version()
    if name not in _HOMES:
        raise AttributeError(f"module 'sqsd_filter' has no attribute '{name}'")
    return getattr(import_module(f"sqsd_filter.{_HOMES[name]}"), name)


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("sqsd-filter")
    except PackageNotFoundError:  # a checkout that was not installed
        return "unknown"
