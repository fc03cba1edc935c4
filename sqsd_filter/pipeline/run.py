"""The runs people start: filter a corpus, score it, cut it again. Each is scan, score, select, export, report."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sqsd_filter.errors import InputError, SQSDError, UsageError
from sqsd_filter.pipeline.engines import Engine, LocalEngine
from sqsd_filter.pipeline.folder import Folder
from sqsd_filter.pipeline.policy import Policy
from sqsd_filter.pipeline.reading.sources import Corpus, matches
from sqsd_filter.pipeline.scan import Scan, as_paths, counted, not_empty
from sqsd_filter.pipeline.scores.scored import ColumnIndex, Scored, from_store
from sqsd_filter.pipeline.scores.store import ScoreStore
from sqsd_filter.pipeline.selection import Cut, cut_rows
from sqsd_filter.pipeline.shards import Index
from sqsd_filter.pipeline.writing.card import CARD_FILE, PICTURE_FILE, write_card
from sqsd_filter.pipeline.writing.destination import (
    REPORT_FILE,
    RUN_FILE,
    Destination,
    _read_json,
    input_paths,
    read_run,
)
from sqsd_filter.pipeline.writing.export import SPLITS, data_file, export_scored, export_splits
from sqsd_filter.pipeline.writing.histogram import write_histogram
from sqsd_filter.pipeline.writing.report import summarise, versions, write_report
from sqsd_filter.progress import Meter, Progress, Silent
from sqsd_filter.scoring.conversation import Columns, RowFormat
from sqsd_filter.scoring.scorer import SQSDScorer


@dataclass
class Run:
    """Everything a run has in common, whatever it exports.

    `identity` is what makes two runs the same; `settings` and `command` are only recorded.
    """

    destination: Destination
    identity: dict[str, Any]
    meter: Meter
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
            self.meter.finish()
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
        timing: dict[str, Any] = {"seconds": round(time.time() - self.started, 3), "started": round(self.started, 3)}
        timing |= self.engine.facts() if self.engine else {}
        timing |= {"phases": self.meter.figures()}
        report = {**report, "timing": timing}
        write_report(self.destination.home / REPORT_FILE, report)
        return report


@dataclass(frozen=True)
class Work:
    """What is to be scored, by whom and how it is told; None leaves a choice to the default."""

    sources: str | Path | Sequence[str | Path]
    scorer: SQSDScorer
    engine: Engine | None
    columns: Columns | None
    limit: int | None
    score_store: str | Path | None
    progress: Progress | None
    settings: Mapping[str, Any] | None


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
    score_store: str | Path | None = None,
    progress: Progress | None = None,
    settings: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Score every row of the sources and write them to the folder `dest` without the riskiest ones.

    Exactly one cut is given. `scorer` takes the place of `SQSDScorer(pack)`. `score_store` is a folder or URL with
    scores that runs share. Returns the report (also `dest/sqsd/report.json`). The same call finishes an interrupted
    run. Raises `SQSDError`s: `UsageError`, `InputError`, `RowErrorBudgetExceeded`, `DestinationExists`, `PackError`,
    `ModelError`.
    """
    cut = Cut.of(drop_top, drop_count, max_risk, keep_lowest)
    policy = Policy.of(on_error, max_error_rate)
    place = _folder(Path(dest), overwrite)

    def finish(scored: Scored, meter: Meter) -> dict[str, Any]:
        return _split(scored, cut, policy, place, meter)

    return _score_and(
        finish,
        lambda report: write_card(place.root, report),
        place,
        {"cut": str(cut), "on_error": on_error},
        Work(sources, scorer or SQSDScorer(pack), engine, columns, limit, score_store, progress, settings),
    )


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
    score_store: str | Path | None = None,
    progress: Progress | None = None,
    settings: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Write one parquet file with all rows in order and their score columns; `dest`.sqsd keeps report and scores.

    Arguments and errors are those of `filter_dataset`.
    """
    dest = Path(dest)
    policy = Policy.of("quarantine", max_error_rate)
    if dest.suffix != ".parquet":
        raise UsageError(f"Scores are written as parquet: name the file {dest.with_suffix('.parquet')}.")
    place = Destination(dest, lambda root: root.with_name(root.name + ".sqsd"), [""], overwrite=overwrite)

    def finish(scored: Scored, meter: Meter) -> dict[str, Any]:
        policy.check(scored)
        meter.start("writing", scored.corpus.n_rows)
        export_scored(scored, place.root, meter)
        return summarise(scored, None, None)

    return _score_and(
        finish,
        lambda report: None,
        place,
        {},
        Work(sources, scorer or SQSDScorer(pack), engine, columns, limit, score_store, progress, settings),
    )


def _score_and(
    finish: Callable[[Scored, Meter], dict[str, Any]],
    publish: Callable[[dict[str, Any]], None],
    place: Destination,
    identity: Mapping[str, Any],
    work: Work,
) -> dict[str, Any]:
    """Scan, score, then `finish` and `publish`. Returns the report."""
    started, meter, engine = time.time(), Meter(work.progress or Silent()), work.engine or LocalEngine()
    shared = Folder(work.score_store) if work.score_store else None
    if shared is not None and shared.local is not None:
        place.keep_out(shared.local)
    paths = place.others(matches(as_paths(work.sources)))
    scan = Scan(paths, work.columns or Columns(), work.limit, meter)
    scorer = engine.place(work.scorer)
    identity = {**scan.identity(), "scoring": scorer.settings(), **identity}
    run = Run(place, identity, meter, work.settings or {}, started, _about(scorer), engine)

    def carry_out() -> dict[str, Any]:
        return finish(scan.score(place.home, scorer, engine, old_home=place.old_home, shared=shared), meter)

    return run.carry_out(carry_out, publish)


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
    paths, place, meter = as_paths(sources), _folder(Path(dest), overwrite), Meter(progress or Silent())
    place.spare(paths)
    earlier = Path(paths[0]) / "sqsd" if len(paths) == 1 else None
    if earlier is not None and (earlier / RUN_FILE).is_file():
        scored, identity, facts = _earlier_run(earlier, meter)
    else:
        meter.start("reading", None)
        index = ColumnIndex()
        corpus = Corpus.scan(paths, visit=counted(index.visit, meter), columns=["sqsd_risk", "sqsd_status"])
        scored, identity, facts = index.scored(not_empty(corpus)), {"inputs": corpus.inputs}, {}
    identity = {**identity, "cut": str(cut), "on_error": on_error}
    run = Run(place, identity, meter, settings or {}, started, facts)
    return run.carry_out(
        lambda: _split(scored, cut, policy, place, meter), lambda report: write_card(place.root, report)
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
        visit=counted(index.visit, progress),
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


def _split(scored: Scored, cut: Cut, policy: Policy, place: Destination, progress: Progress) -> dict[str, Any]:
    policy.check(scored)
    selection = policy.apply(scored, cut_rows(scored.risk, scored.scored, cut))
    progress.start("writing", scored.corpus.n_rows)
    written = export_splits(scored, selection, place.root / "data", progress)
    files = [_written(place.root, config, rows) for config, rows in written.items()]
    report = {**summarise(scored, selection, cut), "to": "parquet", "files": files}
    write_histogram(place.root / PICTURE_FILE, scored.risk, scored.scored, selection.place, report)
    return report


def _written(root: Path, config: str, rows: int) -> dict[str, Any]:
    path = f"data/{data_file(config)}"
    with (root / path).open("rb") as file:
        content = hashlib.file_digest(file, "sha256").hexdigest()
    return {"path": path, "config": config, "split": "train", "rows": rows, "sha256": content}


def _folder(dest: Path, overwrite: bool) -> Destination:
    products = [CARD_FILE, PICTURE_FILE, *(f"data/{data_file(split)}" for split in SPLITS)]
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
