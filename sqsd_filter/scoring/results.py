"""What a scorer gives back, how it is gathered, and who is told of it meanwhile."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sqsd_filter.corpus.conversation import NONFINITE, SCORED, RowError
from sqsd_filter.scoring.chat_encoder import Encoded


class ScoringCallbacks:
    """Told of the work while it goes on, by row numbers of the call. The default looks away."""

    apart: frozenset[int] = frozenset()  # rows to score one by one after the others
    given_up: frozenset[int] = frozenset()  # rows not to try again: they took their process with them

    def starting(self, rows: Sequence[int]) -> None:
        """These rows are about to be run together."""

    def finished(self, rows: Sequence[int]) -> None:
        """That came to an end, whatever it was."""

    def done(self, rows: int, tokens: int) -> None:
        """So many more rows, with so many tokens, have their score or their reason."""


@dataclass(frozen=True)
class Scores:
    """What became of n conversations, in their order.

    `probes` maps each of the scorer's `values` to (n,) float64, NaN where a row could not be scored; `risk` is the
    weighted sum of those that are probes;
    `status` is "scored" or the reason; `detail` says more about a reason; `tokens` counts each row's tokens.
    """

    probes: Mapping[str, np.ndarray]
    risk: np.ndarray
    status: list[str]
    detail: list[str]
    tokens: np.ndarray

    def columns(self) -> dict[str, Any]:
        """The score columns by their names in a dataset."""
        return {
            "sqsd_risk": self.risk,
            **{f"sqsd_{name}": values for name, values in self.probes.items()},
            "sqsd_status": self.status,
        }


class Results:
    """Where the scores of one call are gathered, from any thread."""

    def __init__(self, encoded: Sequence[Encoded | RowError], values: Sequence[str], watch: ScoringCallbacks) -> None:
        n = len(encoded)
        self.watch = watch
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
            self.watch.done(len(rows), int(self.tokens[list(rows)].sum()))

    def failed(self, row: int, status: str, detail: str) -> None:
        with self._lock:
            self.status[row], self.detail[row] = status, detail
            self.watch.done(1, 0)
