"""Rows that were scored before: in the folder of an earlier run, or in files with score columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from sqsd_filter.corpus.addresses import Opener, Source, peek
from sqsd_filter.corpus.row_formats import Columns, RowFormat
from sqsd_filter.corpus.sources import Row
from sqsd_filter.errors import InputError, UsageError, option
from sqsd_filter.pipeline.report import PackFacts, RiskFacts, ScoreFacts
from sqsd_filter.pipeline.scores.scored import ColumnIndex, Scored, from_store
from sqsd_filter.pipeline.scores.store import ScoreStore
from sqsd_filter.pipeline.stage.scan import read_once
from sqsd_filter.pipeline.stage.shards import Index
from sqsd_filter.pipeline.writing.destination import input_specs, read_report, read_run
from sqsd_filter.progress import Progress
from sqsd_filter.scoring.pack import OWN_RISK
from sqsd_filter.scoring.scorer import SQSD
from sqsd_filter.storage.layout import holds_run, home_beside, home_in


@dataclass(frozen=True)
class Earlier:
    """Scored rows and their origin.

    `identity` is different for other rows or scores; `facts` are for the report. `keys` (n,) S16 are the keys of the
    conversations, zero where a row has none. `pack` is what is known of the pack, `scoring` the settings of its scorer,
    and `form` the format in which rows were read, or are read for the keys.
    """

    where: str
    sources: list[Source]
    scored: Scored
    identity: dict[str, Any]
    facts: ScoreFacts
    keys: np.ndarray
    pack: PackFacts | None
    form: RowFormat | None
    scoring: Mapping[str, object] | None

    def by_risk(self, name: str) -> Earlier:
        """The rows with another risk of the pack that the scores have. Raises `UsageError` for a risk that they don't
        have, `InputError` where a column of it is missing."""
        pack = self.pack
        if pack is None or self.facts.get("scorer", SQSD) != SQSD:
            raise UsageError(
                f"It is not known which risks the scores of {self.where} have: leave out {option('risk')}, name the "
                f"pack that gave them with {option('pack')}, or score the rows again."
            )
        current, others = pack.get("risk", OWN_RISK), pack.get("beside", {})
        if name == current:
            return self
        if name not in others:
            known = " and ".join([current, *others])
            raise UsageError(
                f"The scores of {self.where} have no risk '{name}' but {known}: choose one of these, or score the rows "
                f"with {option('risk')} {name}."
            )
        values = self.scored.values
        weights = {value: others[name]["weights"].get(value, 0.0) for value in values}
        used = [value for value, weight in weights.items() if weight]
        lost = [value for value in used if self.scored.scored.any() and np.isnan(values[value]).all()]
        if lost or not used:
            raise InputError(
                f"The rows of {self.where} have no column sqsd_{lost[0] if lost else name} with the values of the risk "
                f"'{name}': score them again."
            )
        risk = np.sum([weights[value] * values[value] for value in used], axis=0)
        own = RiskFacts(fingerprint=pack["fingerprint"], weights=pack["weights"], shared_state=pack.get("shared_state"))
        beside = {str(current): own, **{each: facts for each, facts in others.items() if each != name}}
        facts: PackFacts = {**pack, **others[name], "weights": weights, "beside": beside}
        if name == OWN_RISK:
            del facts["risk"]
        else:
            facts["risk"] = name
        scoring = {**self.scoring, "pack": facts["fingerprint"]} if self.scoring is not None else None
        return replace(
            self,
            scored=replace(self.scored, risk=risk, recut=True),
            identity={**self.identity, "risk": name},
            facts={**self.facts, "pack": facts},
            pack=facts,
            scoring=scoring,
        )


def read_earlier(
    given: Sequence[object],
    opener: Opener,
    per_group: str | None,
    progress: Progress,
    *,
    keyed: bool = False,
    likely: RowFormat | None = None,
    given_pack: PackFacts | None = None,
) -> Earlier:
    """The rows of an earlier run's folder or file, or of scored files.

    Rows of files have keys only if `keyed`. The format to read them in is the one that `score` left beside the file,
    else `likely` if the rows have all its columns, else the one that their columns suggest. Raises `InputError` where
    rows have no scores yet.
    """
    path = Path(given[0]) if len(given) == 1 and isinstance(given[0], str | Path) else None
    if path is not None and (home := _home_of_cut(path)) is not None:
        return _run(path, home, opener, per_group, progress)
    sources = opener.open(given)
    beside = home_beside(path) if path is not None else None  # as `score` leaves it
    known = read_run(beside) if beside is not None else None
    form = RowFormat.of(known["row_format"]) if known else None
    if keyed and form is None:
        form = _likely_form(sources, beside, likely)
    index = Index(form) if keyed and form is not None else None
    progress.start("reading", None)
    report = read_report(beside) if beside is not None else None
    pack = report.get("pack") if report else given_pack
    scores = ColumnIndex(list(pack["weights"]) if pack and pack.get("beside") else [])

    def visit(row: Row) -> None:
        scores.visit(row)
        if index is not None:
            index.add(index.form.parse(row.value, row.problem))

    columns = [*scores.columns, *(index.form.columns if index is not None else [])]
    corpus, groups = read_once(sources, visit, columns, per_group, progress)
    return Earlier(
        ", ".join(str(each) if isinstance(each, str | Path) else "the dataset" for each in given),
        sources,
        scores.scored(corpus, groups, form),
        {"inputs": corpus.inputs},
        _scorer(report) if report else {},
        index.keys if index is not None else np.zeros(0, "S16"),
        pack,
        form,
        known["scoring"] if known else None,
    )


def _likely_form(sources: Sequence[Source], beside: Path | None, likely: RowFormat | None) -> RowFormat:
    """The format to read rows in where it is not known. Raises `InputError` where no format fits."""
    rows = peek(sources)
    if likely is not None and {name for row in rows for name in row}.issuperset(likely.columns):
        return likely
    try:
        return Columns().choose(rows)
    except InputError as problem:
        file = beside.name if beside is not None else "FILE.sqsd"
        raise InputError(
            f"The columns that were scored are not known: keep {file} beside the file, as 'sqsd-filter score' left it."
        ) from problem


def _home_of_cut(output: Path) -> Path | None:
    """The home of the run that cut rows into this folder or file; None where none did, as for what `score` wrote."""
    if holds_run(output):
        return home_in(output)
    home = home_beside(output)
    return home if "cut" in (read_run(home) or {}) else None


def _run(output: Path, home: Path, opener: Opener, per_group: str | None, progress: Progress) -> Earlier:
    """The inputs of an earlier run joined with its score store."""
    known = read_run(home)
    assert known is not None
    report = read_report(home)
    if not (home / "scores").is_dir() or not report or "pack" not in report:
        if report and report.get("status") == "ok":
            raise InputError(f"{output} was made by select: select from the scores that it was made from.")
        raise InputError(f"{output} holds an unfinished run: finish it first.")
    form = RowFormat.of(known["row_format"])
    index = Index(form)
    sources = opener.open(input_specs(output, home))
    progress.start("reading", None)
    corpus, groups = read_once(sources, index.visit, form.columns, per_group, progress, limit=known["limit"], form=form)
    if [{**i, "path": ""} for i in corpus.inputs] != [{**i, "path": ""} for i in known["inputs"]]:
        raise InputError(f"The inputs of {output} have changed since it was scored: run sqsd-filter on them again.")
    pack = report["pack"]
    store = ScoreStore(home / "scores", known["scoring"], list(pack["weights"]))
    scored = from_store(corpus, index, store, pack["weights"], groups)
    known_now = scored.counts["scored"] + scored.counts["reused"]  # the first run scored some of them, this one none
    scored = replace(scored, counts={**scored.counts, "scored": 0, "reused": known_now})
    identity = {**known, "inputs": corpus.inputs}
    for name in ("explain", "reference", "percentile"):  # belong to the earlier output
        identity.pop(name, None)
    facts: ScoreFacts = {"pack": pack, **_scorer(report)}
    return Earlier(str(output), sources, scored, identity, facts, index.keys, pack, form, known["scoring"])


def _scorer(report: ScoreFacts) -> ScoreFacts:
    """What the report says about the scorer, for another report."""
    return {"scorer": report["scorer"]} if "scorer" in report else {}
