"""The runs people start: filter a corpus, score it, cut it again. Each is scan, score, select, export, report."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from sqsd_filter.errors import InputError, RowErrorBudgetExceeded, SQSDError
from sqsd_filter.pipeline.destination import REPORT_FILE, RUN_FILE, Destination, _read_json
from sqsd_filter.pipeline.export import SPLITS, data_file, export_scored, export_splits
from sqsd_filter.pipeline.progress import Progress, Silent
from sqsd_filter.pipeline.report import summarise, versions, write_card, write_report
from sqsd_filter.pipeline.scored import ColumnIndex, Scored, from_store
from sqsd_filter.pipeline.selection import ERROR, KEPT, Cut, Selection, cut_rows, parse_share
from sqsd_filter.pipeline.shards import Index, plan, score_shard
from sqsd_filter.pipeline.sources import Corpus, peek
from sqsd_filter.pipeline.store import ScoreStore
from sqsd_filter.scoring.conversation import BAD_JSON, RowError, RowFormat, choose_format
from sqsd_filter.scoring.scorer import SQSDScorer

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
    facts: dict[str, Any] = field(default_factory=dict)

    def carry_out(
        self, work: Callable[[], dict[str, Any]], publish: Callable[[dict[str, Any]], None]
    ) -> dict[str, Any]:
        """Claim the destination, do the work, leave a report whatever happens. Returns the report."""
        started = time.time()
        if self.destination.claim(self.identity):
            report: dict[str, Any] = _read_json(self.destination.home / REPORT_FILE)
            self.destination.publish()
            return {**report, "already_done": True}
        path = self.destination.home / REPORT_FILE
        base = {"settings": dict(self.settings), "versions": versions(), **self.facts}
        status, found = "failed", {}
        try:
            found = work()
            publish({**base, **found})
            status = "ok"
        except KeyboardInterrupt:
            status = "interrupted"
            raise
        except SQSDError as problem:
            found = {**found, "error": str(problem)}
            raise
        finally:
            self.progress.finish()
            timing = {"seconds": round(time.time() - started, 3), "started": round(started, 3)}
            report = {"status": status, **base, **found, "timing": timing}
            write_report(path, report)
            if status != "ok":
                self.destination.release()
        self.destination.publish()
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
    cut = Cut.of(drop_top, drop_count, max_risk, keep_lowest)
    paths, scorer = _paths(sources), scorer or SQSDScorer(pack)
    policy = _Policy(on_error, parse_share(max_error_rate))
    place = _folder(Path(dest), overwrite)
    progress = progress or Silent()
    scan = _Scan(paths, columns or Columns(), limit, progress)
    run = Run(
        place,
        {**scan.identity(), "scoring": scorer.settings(), "cut": str(cut), "on_error": on_error},
        progress,
        settings or {},
        _about(scorer),
    )

    def work() -> dict[str, Any]:
        scored = scan.score(place, scorer, policy)
        return _split(scored, cut, policy, place, progress)

    return run.carry_out(work, lambda report: write_card(place.root / CARD_FILE, report))


def score_dataset(
    sources: str | Path | Sequence[str | Path],
    dest: str | Path,
    *,
    pack: str | Path = "smollm2-135m",
    scorer: SQSDScorer | None = None,
    columns: Columns | None = None,
    limit: int | None = None,
    max_error_rate: str | float = 0.5,
    overwrite: bool = False,
    progress: Progress | None = None,
    settings: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Write one parquet file with all rows in order and their score columns; `dest`.sqsd keeps report and scores."""
    dest = Path(dest)
    if dest.suffix != ".parquet":
        raise InputError(f"Scores are written as parquet: name the file {dest.with_suffix('.parquet')}.")
    paths, scorer = _paths(sources), scorer or SQSDScorer(pack)
    place = Destination(dest, lambda root: root.with_name(root.name + ".sqsd"), [""], overwrite=overwrite)
    progress = progress or Silent()
    scan = _Scan(paths, columns or Columns(), limit, progress)
    run = Run(place, {**scan.identity(), "scoring": scorer.settings()}, progress, settings or {}, _about(scorer))

    def work() -> dict[str, Any]:
        scored = scan.score(place, scorer, _Policy("quarantine", parse_share(max_error_rate)))
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
    cut = Cut.of(drop_top, drop_count, max_risk, keep_lowest)
    paths, place, progress = _paths(sources), _folder(Path(dest), overwrite), progress or Silent()
    policy = _Policy(on_error, parse_share("100%"))
    earlier = Path(paths[0]) / "sqsd" if len(paths) == 1 else None
    if earlier is not None and (earlier / RUN_FILE).is_file():
        scored, identity, facts = _earlier_run(earlier, progress)
    else:
        progress.start("reading", None)
        index = ColumnIndex()
        corpus = Corpus.scan(paths, visit=_counted(index.visit, progress), columns=["sqsd_risk", "sqsd_status"])
        scored, identity, facts = index.scored(corpus), {"inputs": corpus.inputs}, {}
    run = Run(place, {**identity, "cut": str(cut), "on_error": on_error}, progress, settings or {}, facts)
    return run.carry_out(
        lambda: _split(scored, cut, policy, place, progress), lambda report: write_card(place.root / CARD_FILE, report)
    )


def _earlier_run(home: Path, progress: Progress) -> tuple[Scored, dict[str, Any], dict[str, Any]]:
    """The inputs of an earlier run joined with its score store."""
    known = _read_json(home / RUN_FILE)
    report = _read_json(home / REPORT_FILE) or {}
    if "scoring" not in known or "pack" not in report:
        raise InputError(f"{home.parent} was itself cut from scores: select from the scored files it was made of.")
    form = RowFormat(**known["row_format"])
    index = Index(form)
    progress.start("reading", None)
    corpus = Corpus.scan(
        [i["path"] for i in known["inputs"]],
        limit=known["limit"],
        visit=_counted(index.visit, progress),
        columns=form.columns,
    )
    if corpus.inputs != known["inputs"]:
        raise InputError(
            f"The inputs of {home.parent} have changed since it was scored: run sqsd-filter on them again."
        )
    weights = report["pack"]["weights"]
    store = ScoreStore(home / "scores", known["scoring"], list(weights))
    return from_store(corpus, index, store, weights), known, {"pack": report["pack"]}


@dataclass(frozen=True)
class _Policy:
    on_error: str
    max_error_rate: Any

    def __post_init__(self) -> None:
        if self.on_error not in ON_ERROR:
            raise SQSDError(f"on_error must be one of {', '.join(ON_ERROR)}, not '{self.on_error}'.")

    def check(self, scored: Scored) -> None:
        """Raise `RowErrorBudgetExceeded` when more rows have no score than may be."""
        errors, total = int((~scored.scored).sum()), scored.corpus.n_rows
        allowed = 0 if self.on_error == "fail" else self.max_error_rate * total
        if errors <= allowed:
            return
        reasons = ", ".join(f"{count} {status}" for status, count in scored.reasons().items())
        budget = "--on-error fail" if self.on_error == "fail" else f"--max-error-rate {float(self.max_error_rate):.4g}"
        first = int(np.flatnonzero(~scored.scored)[0])
        row = next(iter(scored.corpus.read(first, first + 1)))
        raise RowErrorBudgetExceeded(
            f"{errors} of {total} rows could not be scored ({reasons}), more than {budget} allows; the first is "
            f"{row.file}, line {row.line}. Mend the rows, name the right columns, or allow more; the scores are kept."
        )


class _Scan:
    """The inputs, looked at once: rows counted and keyed, files hashed, the format decided."""

    def __init__(self, paths: list[str], columns: Columns, limit: int | None, progress: Progress) -> None:
        self.form = columns.choose(paths)
        self.limit, self.progress = limit, progress
        progress.note(f"reading rows as {self.form}")
        progress.start("reading", None)
        self.index = Index(self.form)
        self.corpus = Corpus.scan(
            paths, limit=limit, visit=_counted(self.index.visit, progress), columns=self.form.columns
        )
        if self.corpus.n_rows == 0:
            raise InputError("The input has no rows.")

    def identity(self) -> dict[str, Any]:
        return {"inputs": self.corpus.inputs, "row_format": vars(self.form), "limit": self.limit}

    def score(self, place: Destination, scorer: SQSDScorer, policy: _Policy) -> Scored:
        """Score what has no score yet, shard by shard, and join."""
        weights = {p.name: p.weight for p in scorer.pack.probes}
        store = ScoreStore(place.home / "scores", scorer.settings(), list(weights))
        if place.old_home is not None:
            store.adopt(place.old_home / "scores")
        readable = np.flatnonzero(self.index.codes == 0)
        unique, first = np.unique(self.index.keys[readable], return_index=True)
        known = store.lookup(unique).known
        wanted = np.sort(readable[first[~known]])
        self.progress.start("scoring", len(wanted))
        for shard in plan(self.corpus.n_rows, wanted):
            store.append(shard.name, *score_shard(self.corpus, self.form, scorer, shard, self.progress.advance))
        scored = from_store(self.corpus, self.index, store, weights)
        policy.check(scored)
        return scored


def _split(scored: Scored, cut: Cut, policy: _Policy, place: Destination, progress: Progress) -> dict[str, Any]:
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


def _paths(sources: str | Path | Sequence[str | Path]) -> list[str]:
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


def estimate(
    sources: str | Path | Sequence[str | Path],
    scorer: SQSDScorer,
    *,
    columns: Columns | None = None,
    limit: int | None = None,
    progress: Progress | None = None,
    sample: int = 200,
    timed: int = 4,
) -> dict[str, Any]:
    """What a run would cost, without writing anything: tokens from `sample` rows, seconds from scoring `timed`."""
    scan = _Scan(_paths(sources), columns or Columns(), limit, progress or Silent())
    readable = np.flatnonzero(scan.index.codes == 0)
    unique, first = np.unique(scan.index.keys[readable], return_index=True)
    wanted = np.sort(readable[first])
    chosen = wanted[np.linspace(0, len(wanted) - 1, min(sample, len(wanted))).astype(int)]
    turns = [
        scan.form.conversation(row.value)
        for k in chosen.tolist()
        for row in scan.corpus.read(k, k + 1)
        if row.value is not None
    ]
    lengths = [len(e) for e in scorer.encoder.encode(turns) if not isinstance(e, RowError)]
    mean = float(np.mean(lengths)) if lengths else 0.0
    scan.progress.start("timing a few rows", None)
    trial = turns[:: max(1, len(turns) // timed)][:timed]
    scorer.score(trial[:1])  # loads the model
    began = time.perf_counter()
    tried = scorer.score(trial)
    spent = time.perf_counter() - began
    scan.progress.finish()
    tokens = round(mean * len(wanted))
    return {
        "rows": scan.corpus.n_rows,
        "format": str(scan.form),
        "to_score": len(unique),
        "duplicates": len(readable) - len(unique),
        "unreadable": scan.corpus.n_rows - len(readable),
        "tokens": tokens,
        "passes": len({p.at for p in scorer.pack.probes}),
        "seconds": round(spent * tokens / max(1, int(tried.tokens.sum())), 1),
        "sampled": len(trial),
        "dtype": scorer.dtype,
        "device": scorer.device,
        "inputs": scan.corpus.inputs,
    }
