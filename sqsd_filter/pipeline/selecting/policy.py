"""What happens to rows that can't be scored, and how many of them a run allows."""

from __future__ import annotations

from dataclasses import dataclass, replace
from fractions import Fraction

import numpy as np

from sqsd_filter.corpus.conversation import BAD_JSON, UNWANTED, RowError
from sqsd_filter.corpus.encodings import cure
from sqsd_filter.corpus.sources import Row
from sqsd_filter.errors import RowErrorBudgetExceeded, UsageError, option
from sqsd_filter.pipeline.scores.scored import Scored
from sqsd_filter.pipeline.selecting.selection import ERROR, KEPT, Selection, parse_share

ON_ERROR = ("quarantine", "keep", "fail")


@dataclass(frozen=True)
class Policy:
    """`on_error` is one of `ON_ERROR`; `max_error_rate` a share of all rows."""

    on_error: str
    max_error_rate: Fraction

    @classmethod
    def of(cls, on_error: str, max_error_rate: str | float) -> Policy:
        """Raises `UsageError`."""
        if on_error not in ON_ERROR:
            raise UsageError(f"{option('on_error')} must be one of {', '.join(ON_ERROR)}, not '{on_error}'.")
        return cls(on_error, parse_share(max_error_rate, "max_error_rate", ""))

    def check(self, scored: Scored) -> None:
        """Raise `RowErrorBudgetExceeded` when more rows have no score than the policy allows."""
        failed = ~scored.scored
        if UNWANTED in scored.statuses:  # not to be scored, which is no failure
            failed &= scored.codes != scored.statuses.index(UNWANTED)
        errors, total = int(failed.sum()), scored.corpus.n_rows
        allowed = 0 if self.on_error == "fail" else self.max_error_rate * total
        if errors <= allowed:
            return
        reasons = ", ".join(f"{n} {status}" for status, n in scored.reasons().items() if status != UNWANTED)
        rate = f"{option('max_error_rate')} {float(self.max_error_rate):.4g}"
        budget = f"{option('on_error')} fail" if self.on_error == "fail" else rate
        first = int(np.flatnonzero(failed)[0])
        columns = scored.form.columns if scored.form else ["sqsd_status"]
        row = next(iter(scored.corpus.read(first, first + 1, columns)))
        reason = scored.details.get(first) or row.problem or _reason(scored, row)
        why = f" ({reason}{cure(reason)})" if reason else ""
        fix = f"choose another {option('on_error')}" if self.on_error == "fail" else f"raise {option('max_error_rate')}"
        raise RowErrorBudgetExceeded(
            f"{errors} of {total} rows could not be scored ({reasons}), more than {budget} allows; the first is "
            f"{row.file}, line {row.line}{why}. Fix the rows, name the right columns, or {fix}. Computed scores are "
            "kept."
        )

    def apply(self, scored: Scored, selection: Selection) -> Selection:
        """The selection in which rows without a score have the fate that the policy says."""
        if self.on_error != "keep":
            return selection
        fate = selection.fate.copy()
        unreadable = np.zeros(len(fate), dtype=bool)  # a line that can't be read can't be kept as a row
        if BAD_JSON in scored.statuses:
            unreadable = scored.codes == scored.statuses.index(BAD_JSON)
        fate[(fate == ERROR) & ~unreadable] = KEPT
        return replace(selection, fate=fate)


def _reason(scored: Scored, row: Row) -> str:
    """Why a readable row has no conversation; "" where it has one, or where its format is not known."""
    parsed = scored.form.parse(row.value) if scored.form is not None and row.value is not None else None
    return parsed.detail if isinstance(parsed, RowError) else ""
