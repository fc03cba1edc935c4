"""Explanations of a run's rows, in a file that stays where the run is: it holds the text of rows."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from sqsd_filter.corpus.addresses import Opener
from sqsd_filter.corpus.conversation import Message
from sqsd_filter.errors import InputError, SQSDError, UsageError, option
from sqsd_filter.pipeline.meaning import find_pack
from sqsd_filter.pipeline.report import PackFacts
from sqsd_filter.pipeline.scores.scored import Scored
from sqsd_filter.pipeline.selecting.earlier import Earlier, read_earlier
from sqsd_filter.pipeline.writing.destination import (
    EXPLAINED_FILE,
    LOCK_FILE,
    difference,
    lock_run,
    path_from_here,
    read_json,
    read_report,
)
from sqsd_filter.progress import Progress
from sqsd_filter.scoring.baselines import make_scorer
from sqsd_filter.scoring.explain import Explanation, explain
from sqsd_filter.scoring.pack import load_pack
from sqsd_filter.scoring.scorer import SQSD, BatchedScorer, SQSDScorer
from sqsd_filter.storage.folder import write_text
from sqsd_filter.storage.layout import home_beside, home_in

EXPLAINED = (SQSD, "danger", "safety")  # scorers whose risks have parts
MOST = 1000  # rows, whose explanations are held in memory


class ExplainedRow(Explanation):
    """The explanation of the row with this index, and the risk that it has in the run."""

    row: int
    file: str
    line: int
    risk: float


def check_explain(count: int | None, dest: str | Path, scorer: BatchedScorer | None) -> None:
    """Raise `UsageError` for a number of rows that can't be explained, a URL as destination, or a scorer other than
    SQSD."""
    if count is None:
        return
    if scorer is not None and not isinstance(scorer, SQSDScorer):
        raise UsageError(
            f"{option('explain')} takes the risks of a pack apart, and the scorer {scorer.name} has none: leave it out."
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
    fix = f"leave out {option('explain')}, or lower {option('max_length')}"
    explained = _explain_rows(scored, scorer, scored.riskiest(count), progress, fix)
    _write(path, scorer, explained)
    return len(explained)


@dataclass(frozen=True)
class ModelChoice:
    """What loads the model beside what the run names: see `SQSDScorer`. `pack` is where the pack is, if that has
    changed."""

    pack: str | Path | None = None
    device: str | None = None
    trust_remote_code: bool = False


def explain_run(
    out: Path, count: int, rows: Sequence[int], model: ModelChoice, progress: Progress
) -> list[ExplainedRow]:
    """Explain rows of the finished run in `out` (a folder, or a file of scores): those with these numbers, from 1, or
    without any the `count` riskiest. Its scores are reused; explanations that are already there are kept.

    Returns the explanations that were asked for. Raises `InputError` where there is no finished run or where its rows
    or scores can't be found, `UsageError` for rows without a risk and for risks that have no parts, `DestinationExists`
    where a run is at work there, and `SQSDError` where the model does not fit into memory.
    """
    home = home_in(out) if out.is_dir() else home_beside(out)
    report = read_report(home)
    if not report or report.get("status") != "ok":
        raise InputError(f"{out} holds no finished run: name the destination of one.")
    if report.get("consensus"):
        raise UsageError(f"{out} combines the ranks by several packs, which have no parts: explain the run of one.")
    with lock_run(home / LOCK_FILE, out), closing(Opener(streaming=False)) as opener:
        earlier = read_earlier([_scores_of(out, home, report.get("scores_from"))], opener, None, progress)
        scorer = _scorer_of(earlier, report.get("pack"), report.get("dtype"), model)
        scored = earlier.scored
        chosen = _numbered(scored, rows) if rows else scored.riskiest(count)
        known = _known(home / EXPLAINED_FILE, scorer)
        fix = f"explain other rows ({option('row')}), or use {option('device')} cpu"
        new = _explain_rows(scored, scorer, [row for row in chosen if row not in known], progress, fix)
        explained = known | {row["row"]: row for row in new}
        order = sorted(explained, key=lambda row: (-explained[row]["risk"], row))
        _write(home / EXPLAINED_FILE, scorer, [explained[row] for row in order])
    return [explained[row] for row in chosen]


def _scores_of(out: Path, home: Path, scores_from: str | None) -> str | Path:
    """Where the scores of a run are: with itself, or where `select` took them from."""
    if scores_from is None:
        return out
    path = path_from_here(scores_from, home)
    if not Path(path).exists():
        raise InputError(f"{out} was made by select from {scores_from}, which is not there any more: put it back.")
    return path


def _scorer_of(earlier: Earlier, pack: PackFacts | None, dtype: str | None, model: ModelChoice) -> SQSDScorer:
    """The scorer that gave these scores. Raises `UsageError` where it can't be had, or has no parts to show."""
    pack, known = pack or earlier.pack, earlier.scoring
    if pack is None or known is None or earlier.scored.form is None:
        raise InputError(
            f"Nothing says how the scores in {earlier.where} were made: keep the folder _sqsd in it, or FILE.sqsd "
            "beside it, as the run left it."
        )
    if (name := str(known.get("scorer", SQSD))) not in EXPLAINED:
        raise UsageError(f"The scores in {earlier.where} are by the scorer {name}, which has no parts to explain.")
    found = load_pack(model.pack) if model.pack is not None else find_pack(pack)
    if found is None:
        raise UsageError(f"The pack {pack['name']}, which gave these scores, is not here: name it with --pack.")
    found = found if pack.get("risk") is None else found.with_risk(pack["risk"])
    found = found if pack.get("shared_state") is None else found.at_one_state(str(pack["shared_state"]))
    named = cast("dict[str, Any]", {name: known[name] for name in ("attention", "system") if name in known})
    base = None if known["base_model"] == found.base_model else str(known["base_model"])
    scorer = make_scorer(
        name,
        found,
        base,
        device=model.device,
        dtype=dtype or str(known["dtype"]),
        max_length=cast("int", known["max_length"]),
        trust_remote_code=model.trust_remote_code,
        per_module="per_module" in known,
        **named,
    )
    assert isinstance(scorer, SQSDScorer)
    if (own := json.loads(json.dumps(scorer.settings()))) != known:
        raise UsageError(
            f"The scores in {earlier.where} were made by something else ({difference(known, own)}): name their pack "
            "with --pack."
        )
    return scorer


def _numbered(scored: Scored, rows: Sequence[int]) -> list[int]:
    """The indices of the rows with these numbers. Raises `UsageError` for one that has no risk."""
    for number in rows:
        if not 1 <= number <= scored.corpus.n_rows:
            raise UsageError(f"There is no row {number:,}: the run has the rows 1 to {scored.corpus.n_rows:,}.")
        if not scored.scored[number - 1]:
            raise UsageError(f"Row {number:,} has no risk ({scored.statuses[scored.codes[number - 1]]}): leave it out.")
    return [number - 1 for number in dict.fromkeys(rows)]


def _known(path: Path, scorer: SQSDScorer) -> dict[int, ExplainedRow]:
    """The explanations that are there, if they are of the same pack and number format, by their rows."""
    content = read_json(path) or {}
    if (content.get("pack"), content.get("dtype")) != (scorer.pack.fingerprint, scorer.dtype):
        return {}
    return {row["row"]: row for row in content.get("rows", [])}


def _write(path: Path, scorer: SQSDScorer, rows: Iterable[ExplainedRow]) -> None:
    content = {"pack": scorer.pack.fingerprint, "dtype": scorer.dtype, "rows": list(rows)}
    write_text(path, json.dumps(content, indent=1) + "\n")


def _explain_rows(
    scored: Scored, scorer: SQSDScorer, rows: Sequence[int], progress: Progress, fix: str
) -> list[ExplainedRow]:
    """The explanations of the rows with these indices, in their order. `fix` is what helps where memory runs out."""
    assert scored.form is not None
    progress.start("explaining", len(rows))
    explained: dict[int, ExplainedRow] = {}
    for row in scored.corpus.read(min(rows, default=0), max(rows, default=-1) + 1, scored.form.columns):
        if row.index not in rows:
            continue
        assert row.value is not None
        parts = _explained(scorer, row.index, scored.form.conversation(row.value), fix)
        risk = float(scored.risk[row.index])
        explained[row.index] = {"row": row.index, "file": row.file, "line": row.line, "risk": risk, **parts}
        progress.advance(1)
    progress.finish()
    return [explained[row] for row in rows]


def _explained(scorer: SQSDScorer, index: int, turns: list[Message], fix: str) -> Explanation:
    from sqsd_filter.scoring.batching import is_out_of_memory

    try:
        return explain(scorer, turns)
    except Exception as problem:
        if not is_out_of_memory(problem):
            raise
        raise SQSDError(
            f"The explanation of row {index + 1} does not fit into the device's memory, which is more than its score "
            f"takes: {fix}."
        ) from problem


def explained_of(home: Path) -> dict[int, ExplainedRow]:
    """The explained rows of the run with this home by their index; none if no row was explained."""
    return {row["row"]: row for row in (read_json(home / EXPLAINED_FILE) or {}).get("rows", [])}
