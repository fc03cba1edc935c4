"""The runs people start: filter a corpus, score it, cut it again. Each is scan, score, select, export, report."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from sqsd_filter.errors import InputError, RowErrorBudgetExceeded, SQSDError, UsageError
from sqsd_filter.pipeline.destination import REPORT_FILE, RUN_FILE, Destination, _read_json, input_paths, read_run
from sqsd_filter.pipeline.engines import Engine, LocalEngine
from sqsd_filter.pipeline.export import SPLITS, data_file, export_scored, export_splits
from sqsd_filter.pipeline.keys import KEYS
from sqsd_filter.pipeline.report import summarise, versions, write_card, write_report
from sqsd_filter.pipeline.scored import ColumnIndex, Scored, from_store
from sqsd_filter.pipeline.selection import ERROR, KEPT, Cut, Selection, cut_rows, parse_share
from sqsd_filter.pipeline.shards import Index, plan
from sqsd_filter.pipeline.sources import Corpus, matches, peek
from sqsd_filter.pipeline.store import ScoreStore
from sqsd_filter.progress import Progress, Silent
from sqsd_filter.scoring.conversation import BAD_JSON, RowFormat, choose_format
from sqsd_filter.scoring.scorer import TRANSIENT, SQSDScorer

CARD_FILE = "README.md"
ON_ERROR = ("quarantine", "keep", "fail")


@dataclass(frozen=True)
class Columns:
    """What the user fixed about the row format; None leaves it to detection."""

    format: str | None = None
    messages: str | None = None
    prompt: str | None = None
    context: str | None = None
    answer: str | None = None

    def choose(self, paths: Sequence[str]) -> RowFormat:
        return choose_format(
            peek(paths),
            self.format,
            messages=self.messages,
            prompt=self.prompt,
            context=self.context,
            answer=self.answer,
        )


@dataclass
class Run:
    """Everything a run has in common, whatever it exports.

    `identity` is what makes two runs the same; `settings` and `command` are only recorded.
    """

    destination: Destination
    identity: dict[str, Any]
    progress: Progress
    settings: Mapping[str, Any]
    started: float
    facts: dict[str, Any] = field(default_factory=dict)
    engine: Engine | None = None

    def carry_out(
        self, work: Callable[[], dict[str, Any]], publish: Callable[[dict[str, Any]], None]
    ) -> dict[str, Any]:
        """Claim the destination, do the work, leave a report whatever happens. Returns the report.

        Raises `SQSDError` where the disk refuses.
        """
        try:
            if self.destination.claim(self.identity):
                report = {**_read_json(self.destination.home / REPORT_FILE), "already_done": True}
            else:
                report = self._carry_out(work, publish)
            self.destination.publish()
            return report
        except OSError as problem:
            raise SQSDError(
                f"The run can't go on ({problem}): mend that and run the same command again; no score is lost."
            ) from problem
        finally:
            self.progress.finish()
            self.destination.release()

    def _carry_out(
        self, work: Callable[[], dict[str, Any]], publish: Callable[[dict[str, Any]], None]
    ) -> dict[str, Any]:
        base = {"settings": dict(self.settings), "versions": versions(), **self.facts}
        found: dict[str, Any] = {}
        try:
            found = work()
            publish({**base, **found})
        except BaseException as problem:
            status = "interrupted" if isinstance(problem, KeyboardInterrupt) else "failed"
            with suppress(OSError):  # the disk may be what failed
                self._report({"status": status, **base, **found, "error": str(problem) or status})
            raise
        return self._report({"status": "ok", **base, **found})

    def _report(self, report: dict[str, Any]) -> dict[str, Any]:
        timing = {"seconds": round(time.time() - self.started, 3), "started": round(self.started, 3)}
        timing |= self.engine.facts() if self.engine else {}
        report = {**report, "timing": timing}
        write_report(self.destination.home / REPORT_FILE, report)
        return report


def filter_dataset(
    sources: str | Path | Sequence[str | Path],
    dest: str | Path,
    *,
    drop_top: str | float | None = None,
    drop_count: int | None = None,
    max_risk: float | None = None,
    keep_lowest: int | None = None,
    pack: str | Path = "smollm2-135m",
    scorer: SQSDScorer | None = None,
    engine: Engine | None = None,
    columns: Columns | None = None,
    limit: int | None = None,
    on_error: str = "quarantine",
    max_error_rate: str | float = 0.5,
    overwrite: bool = False,
    progress: Progress | None = None,
    settings: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Score every row of the sources and write them to the folder `dest` without the riskiest ones.

    Exactly one cut is given. `scorer` takes the place of `SQSDScorer(pack)`. Returns the report (also
    `dest/sqsd/report.json`). The same call finishes an interrupted run. Raises `SQSDError`s: `UsageError`,
    `InputError`, `RowErrorBudgetExceeded`, `DestinationExists`, `PackError`, `ModelError`.
    """
    started = time.time()
    cut = Cut.of(drop_top, drop_count, max_risk, keep_lowest)
    policy = Policy.of(on_error, max_error_rate)
    paths, scorer, engine = as_paths(sources), scorer or SQSDScorer(pack), engine or LocalEngine()
    place = _folder(Path(dest), overwrite)
    progress = progress or Silent()
    scan = Scan(place.others(matches(paths)), columns or Columns(), limit, progress)
    scorer = engine.place(scorer)
    run = Run(
        place,
        {**scan.identity(), "scoring": scorer.settings(), "cut": str(cut), "on_error": on_error},
        progress,
        settings or {},
        started,
        _about(scorer),
        engine,
    )

    def work() -> dict[str, Any]:
        scored = scan.score(place, scorer, engine, policy)
        return _split(scored, cut, policy, place, progress)

    return run.carry_out(work, lambda report: write_card(place.root / CARD_FILE, report))


def score_dataset(
    sources: str | Path | Sequence[str | Path],
    dest: str | Path,
    *,
    pack: str | Path = "smollm2-135m",
    scorer: SQSDScorer | None = None,
    engine: Engine | None = None,
    columns: Columns | None = None,
    limit: int | None = None,
    max_error_rate: str | float = 0.5,
    overwrite: bool = False,
    progress: Progress | None = None,
    settings: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Write one parquet file with all rows in order and their score columns; `dest`.sqsd keeps report and scores."""
    started, dest = time.time(), Path(dest)
    policy = Policy.of("quarantine", max_error_rate)
    if dest.suffix != ".parquet":
        raise UsageError(f"Scores are written as parquet: name the file {dest.with_suffix('.parquet')}.")
    paths, scorer, engine = as_paths(sources), scorer or SQSDScorer(pack), engine or LocalEngine()
    place = Destination(dest, lambda root: root.with_name(root.name + ".sqsd"), [""], overwrite=overwrite)
    progress = progress or Silent()
    scan = Scan(place.others(matches(paths)), columns or Columns(), limit, progress)
    scorer = engine.place(scorer)
    identity = {**scan.identity(), "scoring": scorer.settings()}
    run = Run(place, identity, progress, settings or {}, started, _about(scorer), engine)

    def work() -> dict[str, Any]:
        scored = scan.score(place, scorer, engine, policy)
        progress.start("writing", scored.corpus.n_rows)
        export_scored(scored, place.root)
        return summarise(scored, None, None)

    return run.carry_out(work, lambda report: None)


def select_dataset(
    sources: str | Path | Sequence[str | Path],
    dest: str | Path,
    *,
    drop_top: str | float | None = None,
    drop_count: int | None = None,
    max_risk: float | None = None,
    keep_lowest: int | None = None,
    on_error: str = "quarantine",
    overwrite: bool = False,
    progress: Progress | None = None,
    settings: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Cut at another place, with the scores that are there: of scored files, or of an earlier run's folder.

    No model is loaded. Raises `InputError` where rows have no scores yet.
    """
    started = time.time()
    cut = Cut.of(drop_top, drop_count, max_risk, keep_lowest)
    policy = Policy.of(on_error, "100%")
    paths, place, progress = as_paths(sources), _folder(Path(dest), overwrite), progress or Silent()
    place.spare(paths)
    earlier = Path(paths[0]) / "sqsd" if len(paths) == 1 else None
    if earlier is not None and (earlier / RUN_FILE).is_file():
        scored, identity, facts = _earlier_run(earlier, progress)
    else:
        progress.start("reading", None)
        index = ColumnIndex()
        corpus = Corpus.scan(paths, visit=_counted(index.visit, progress), columns=["sqsd_risk", "sqsd_status"])
        scored, identity, facts = index.scored(_not_empty(corpus)), {"inputs": corpus.inputs}, {}
    identity = {**identity, "cut": str(cut), "on_error": on_error}
    run = Run(place, identity, progress, settings or {}, started, facts)
    return run.carry_out(
        lambda: _split(scored, cut, policy, place, progress), lambda report: write_card(place.root / CARD_FILE, report)
    )


def _earlier_run(home: Path, progress: Progress) -> tuple[Scored, dict[str, Any], dict[str, Any]]:
    """The inputs of an earlier run joined with its score store."""
    known = read_run(home)
    assert known is not None
    report = _read_json(home / REPORT_FILE) or {}
    if not (home / "scores").is_dir() or "pack" not in report:
        if report.get("status") == "ok":
            raise InputError(f"{home.parent} was itself cut from scores: select from what it was cut from.")
        raise InputError(f"{home.parent} holds a run that was never finished: finish it first.")
    form = RowFormat(**known["row_format"])
    index = Index(form)
    progress.start("reading", None)
    corpus = Corpus.scan(
        input_paths(home),
        limit=known["limit"],
        visit=_counted(index.visit, progress),
        columns=form.columns,
        form=form,
    )
    if [{**i, "path": ""} for i in corpus.inputs] != [{**i, "path": ""} for i in known["inputs"]]:
        raise InputError(
            f"The inputs of {home.parent} have changed since it was scored: run sqsd-filter on them again."
        )
    weights = report["pack"]["weights"]
    store = ScoreStore(home / "scores", known["scoring"], list(weights))
    identity = {**known, "inputs": corpus.inputs}
    return from_store(corpus, index, store, weights), identity, {"pack": report["pack"]}


@dataclass(frozen=True)
class Policy:
    """What becomes of rows that can't be scored, and how many there may be."""

    on_error: str
    max_error_rate: Fraction

    @classmethod
    def of(cls, on_error: str, max_error_rate: str | float) -> Policy:
        """Raises `UsageError`."""
        if on_error not in ON_ERROR:
            raise UsageError(f"on_error must be one of {', '.join(ON_ERROR)}, not '{on_error}'.")
        return cls(on_error, parse_share(max_error_rate, "--max-error-rate", ""))

    def check(self, scored: Scored) -> None:
        """Raise `RowErrorBudgetExceeded` when more rows have no score than may be."""
        errors, total = int((~scored.scored).sum()), scored.corpus.n_rows
        allowed = 0 if self.on_error == "fail" else self.max_error_rate * total
        if errors <= allowed:
            return
        reasons = ", ".join(f"{count} {status}" for status, count in scored.reasons().items())
        budget = "--on-error fail" if self.on_error == "fail" else f"--max-error-rate {float(self.max_error_rate):.4g}"
        first = int(np.flatnonzero(~scored.scored)[0])
        columns = scored.form.columns if scored.form else ["sqsd_status"]
        row = next(iter(scored.corpus.read(first, first + 1, columns)))
        why = f" ({scored.details[first]})" if scored.details.get(first) else ""
        raise RowErrorBudgetExceeded(
            f"{errors} of {total} rows could not be scored ({reasons}), more than {budget} allows; the first is "
            f"{row.file}, line {row.line}{why}. Mend the rows, name the right columns, or allow more; the scores are "
            "kept."
        )


class Scan:
    """The inputs, looked at once: rows counted and keyed, files hashed, the format decided."""

    def __init__(self, paths: list[str], columns: Columns, limit: int | None, progress: Progress) -> None:
        self.form = columns.choose(paths)
        self.limit, self.progress = limit, progress
        progress.note(f"reading rows as {self.form}")
        progress.start("reading", None)
        self.index = Index(self.form)
        self.corpus = Corpus.scan(
            paths,
            limit=limit,
            visit=_counted(self.index.visit, progress),
            columns=self.form.columns,
            form=self.form,
        )
        _not_empty(self.corpus)

    def identity(self) -> dict[str, Any]:
        return {"inputs": self.corpus.inputs, "row_format": vars(self.form), "limit": self.limit}

    def score(self, place: Destination, scorer: SQSDScorer, engine: Engine, policy: Policy) -> Scored:
        """Score what has no score yet, shard by shard, and join."""
        weights = {p.name: p.weight for p in scorer.pack.probes}
        store = ScoreStore(place.home / "scores", scorer.settings(), list(weights))
        if place.old_home is not None:
            store.adopt(place.old_home / "scores")
        readable = np.flatnonzero(self.index.codes == 0)
        unique, first = np.unique(self.index.keys[readable], return_index=True)
        found = store.lookup(unique)
        known = found.known & ~np.isin(found.status, TRANSIENT)
        wanted = np.sort(readable[first[~known]])
        self.progress.start("scoring", len(wanted))
        shards = list(plan(self.corpus.n_rows, wanted))
        for shard, keys, scores in engine.score(self.corpus, self.form, scorer, shards, self.progress):
            if not np.array_equal(np.array(keys, dtype=KEYS), self.index.keys[shard.wanted]):
                raise SQSDError(f"The rows of {shard.name} came back as others than went out: report this as a bug.")
            store.append(shard.name, keys, scores)
        scored = from_store(self.corpus, self.index, store, weights)
        policy.check(scored)
        return scored


def _not_empty(corpus: Corpus) -> Corpus:
    if corpus.n_rows == 0:
        raise InputError("The input has no rows.")
    return corpus


def _split(scored: Scored, cut: Cut, policy: Policy, place: Destination, progress: Progress) -> dict[str, Any]:
    policy.check(scored)
    selection = cut_rows(scored.risk, scored.scored, cut)
    if policy.on_error == "keep":  # a line that can't be read can't be kept as a row
        unreadable = scored.codes == scored.statuses.index(BAD_JSON) if BAD_JSON in scored.statuses else False
        kept = selection.place.copy()
        kept[(selection.place == ERROR) & ~np.asarray(unreadable)] = KEPT
        selection = Selection(kept, selection.threshold, selection.ties)
    progress.start("writing", scored.corpus.n_rows)
    export_splits(scored, selection, place.root / "data")
    return summarise(scored, selection, cut)


def as_paths(sources: str | Path | Sequence[str | Path]) -> list[str]:
    return [str(sources)] if isinstance(sources, str | Path) else [str(s) for s in sources]


def _folder(dest: Path, overwrite: bool) -> Destination:
    products = [CARD_FILE, *(f"data/{data_file(split)}" for split in SPLITS)]
    return Destination(dest, lambda root: root / "sqsd", products, overwrite=overwrite)


def _about(scorer: SQSDScorer) -> dict[str, Any]:
    pack = scorer.pack
    return {
        "pack": {
            "name": pack.name,
            "fingerprint": pack.fingerprint,
            "base_model": scorer.base_model,
            "weights": {p.name: p.weight for p in pack.probes},
        },
        "device": scorer.device.split(":")[0],
        "dtype": scorer.dtype,
        "max_length": scorer.max_length,
    }


def _counted(visit: Callable[[Any], None], progress: Progress) -> Callable[[Any], None]:
    def both(row: Any) -> None:
        visit(row)
        progress.advance(1)

    return both
