"""Judges of what a model answered to a harmful prompt, and how far they agree."""

from sqsd_filter.judges.agreement import Agreement, agreement
from sqsd_filter.judges.loading import load_judge
from sqsd_filter.judges.outcomes import DEGENERATE, HARMLESS, OUTCOMES, REFUSED, UNSAFE, Judge
from sqsd_filter.judges.phrases import OPENING, is_degenerate, is_refusal, refusal_rate

__all__ = [
    "DEGENERATE",
    "HARMLESS",
    "OPENING",
    "OUTCOMES",
    "REFUSED",
    "UNSAFE",
    "Agreement",
    "Judge",
    "agreement",
    "is_degenerate",
    "is_refusal",
    "load_judge",
    "refusal_rate",
]
