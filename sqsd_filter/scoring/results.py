"""What a scorer returns, how it is collected from threads, and the callbacks that report progress."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from sqsd_filter.corpus.conversation import NONFINITE, SCORED, RowError
from sqsd_filter.scoring.chat_encoder import Encoded


class ScoringCallbacks:
    """Called while rows are scored, with row numbers of the call to `score`. By default nothing happens."""

    apart: frozenset[int] = frozenset()  # rows to score one by one after the others
    given_up: frozenset[int] = frozenset()  # rows not to try again: their process died each time

    def starting(self, rows: Sequence[int]) -> None:
        """A micro-batch of these rows is about to run."""

    def finished(self, rows: Sequence[int]) -> None:
        """The micro-batch of these rows has ended, with scores or an error."""

    def done(self, rows: int, tokens: int) -> None:
        """`rows` more rows, with `tokens` tokens in all, have a score or a reason for none."""


@dataclass(frozen=True)
class Scores:
    """The scores of n conversations, in their order.

    `probes` maps each of the scorer's `values` to (n,) float64, NaN where a row could not be scored. `risk` is the sum
    of the probes' values times their weights. `status` is "scored" or the reason for no score, `detail` explains the
    reason, and `tokens` counts each row's tokens.
    """

    probes: Mapping[str, np.ndarray]
    risk: np.ndarray
    status: list[str]
    detail: list[str]
    tokens: np.ndarray

    def columns(self) -> dict[str, np.ndarray | list[str]]:
        """The score columns by their names in a dataset."""
        return {
            "sqsd_risk": self.risk,
            **{f"sqsd_{name}": values for name, values in self.probes.items()},
            "sqsd_status": self.status,
        }


class ScoreCollector:
    """Collects the scores of one call to `score`, from any thread."""

    def __init__(
        self, encoded: Sequence[Encoded | RowError], values: Sequence[str], callbacks: ScoringCallbacks
    ) -> None:
        n = len(encoded)
        self.callbacks = callbacks
        self.probes = {name: np.full(n, np.nan) for name in values}
        self.status, self.detail = [SCORED] * n, [""] * n
        self.tokens = np.zeros(n, dtype=np.int64)
        self.rows: dict[int, Encoded] = {}
        self._lock = threading.Lock()
        for k, e in enumerate(encoded):
            if isinstance(e, RowError):
                self.failed(k, e.status, e.detail)
            else:
                self.rows[k] = e
                self.tokens[k] = len(e)

    def done(self, rows: Sequence[int], values_bv: np.ndarray) -> None:
        with self._lock:
            for k, values in zip(rows, values_bv, strict=True):
                if not np.isfinite(values).all():
                    self.status[k], self.detail[k] = NONFINITE, "its gradient is not finite"
                    continue
                for column, value in zip(self.probes.values(), values, strict=True):
                    column[k] = value
            self.callbacks.done(len(rows), int(self.tokens[list(rows)].sum()))

    def failed(self, row: int, status: str, detail: str) -> None:
        with self._lock:
            self.status[row], self.detail[row] = status, detail
            self.callbacks.done(1, 0)
