"""Explanations of a run's riskiest rows, in a file that stays where the run is: it holds the text of rows."""

from __future__ import annotations

import json
from pathlib import Path

from sqsd_filter.corpus.conversation import Message
from sqsd_filter.errors import SQSDError, UsageError, option
from sqsd_filter.pipeline.scores.scored import Scored
from sqsd_filter.progress import Progress
from sqsd_filter.scoring.explain import Explanation, explain
from sqsd_filter.scoring.scorer import BatchedScorer, SQSDScorer
from sqsd_filter.storage.folder import write_text

MOST = 1000  # rows, whose explanations are held in memory


def check_explain(count: int | None, dest: str | Path, scorer: BatchedScorer | None) -> None:
    """Raise `UsageError` for a number of rows that can't be explained, a URL as destination, or a scorer other than
    SQSD."""
    if count is None:
        return
    if scorer is not None and (not isinstance(scorer, SQSDScorer) or scorer.pack.linear is not None):
        which = f"scorer {scorer.name}" if not isinstance(scorer, SQSDScorer) else f"risk {scorer.pack.risk}"
        raise UsageError(
            f"{option('explain')} takes the cosines of SQSD apart, and the {which} has none: leave it out."
        )
    if count < 1:
        raise UsageError(f"{option('explain')} must be a number of rows, 1 or more, not {count}.")
    if count > MOST:
        raise UsageError(f"{option('explain')} must be {MOST:,} rows at most, not {count:,}.")
    if "://" in str(dest):
        raise UsageError(
            f"Explanations hold the text of rows and stay on this disk, so not at {dest}: name a folder, "
            "which push (--push-to) takes to the Hub without them."
        )


def write_explained(path: Path, scored: Scored, scorer: SQSDScorer, count: int, progress: Progress) -> int:
    """Explain the `count` riskiest rows that have a score, equal risks in row order. Returns their number.

    Raises `SQSDError` where one does not fit into memory.
    """
    assert scored.form is not None
    rows = scored.riskiest(count)
    progress.start("explaining", len(rows))
    explanations: dict[int, dict[str, object]] = {index: {} for index in rows}
    for row in scored.corpus.read(min(rows, default=0), max(rows, default=-1) + 1, scored.form.columns):
        if row.index not in explanations:
            continue
        assert row.value is not None
        about = {"row": row.index, "file": row.file, "line": row.line, "risk": float(scored.risk[row.index])}
        explanations[row.index] = {**about, **_explained(scorer, row.index, scored.form.conversation(row.value))}
        progress.advance(1)
    content = {"pack": scorer.pack.fingerprint, "dtype": scorer.dtype, "rows": list(explanations.values())}
    write_text(path, json.dumps(content, indent=1) + "\n")
    return len(rows)


def _explained(scorer: SQSDScorer, index: int, turns: list[Message]) -> Explanation:
    from sqsd_filter.scoring.batching import is_out_of_memory

    try:
        return explain(scorer, turns)
    except Exception as problem:
        if not is_out_of_memory(problem):
            raise
        raise SQSDError(
            f"The explanation of row {index + 1} does not fit into the device's memory, which is more than its score "
            f"takes: leave out {option('explain')}, or lower {option('max_length')}."
        ) from problem
