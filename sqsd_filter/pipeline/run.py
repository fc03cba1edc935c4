"""The runs people start: filter a corpus, score it, cut it again. Each is scan, score, select, export, report."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from sqsd_filter.corpus.addresses import HubDataset, Opener, Source, expand
from sqsd_filter.corpus.row_formats import Columns
from sqsd_filter.corpus.sources import Corpus
from sqsd_filter.errors import UsageError
from sqsd_filter.pipeline.explained import check_explain, write_explained
from sqsd_filter.pipeline.figures import summarise
from sqsd_filter.pipeline.job import Job, Outlet
from sqsd_filter.pipeline.page.notes import Notes, NoteTaker
from sqsd_filter.pipeline.publishing.hub import PushTo
from sqsd_filter.pipeline.report import Explained, FinishedReport, OutputFacts, PackFacts, RunContent, ScoreFacts
from sqsd_filter.pipeline.scores.scored import Scored
from sqsd_filter.pipeline.selecting.consensus import agree, check_rule
from sqsd_filter.pipeline.selecting.earlier import read_earlier
from sqsd_filter.pipeline.selecting.groups import by_split
from sqsd_filter.pipeline.selecting.policy import Policy
from sqsd_filter.pipeline.selecting.selection import Cut, cut_rows
from sqsd_filter.pipeline.stage.engines import Engine, LocalEngine
from sqsd_filter.pipeline.stage.scan import Scan, as_list
from sqsd_filter.pipeline.writing.card import CARD_FILE, PICTURE_FILE
from sqsd_filter.pipeline.writing.destination import EXPLAINED_FILE, Destination
from sqsd_filter.pipeline.writing.export import check_columns, export_scored, export_splits
from sqsd_filter.pipeline.writing.writers import SHARD_SIZE, Output
from sqsd_filter.progress import Meter, Progress, Silent
from sqsd_filter.scoring.scorer import BatchedScorer, SQSDScorer
from sqsd_filter.storage.folder import Folder

PARQUET = Output("parquet", shard_size=1, with_scores=False)
Made = tuple[RunContent, Notes]  # what report and page say of the rows that were written
Sources = Any  # a path, URL or Hub id (see `reading.addresses`), a dataset of `datasets`, or a sequence of these


@dataclass(frozen=True)
class Work:
    """What is to be scored, by whom and how it is told; None leaves a choice to the default."""

    sources: Sources
    scorer: BatchedScorer
    engine: Engine | None
    columns: Columns | None
    limit: int | None
    score_store: str | Path | None
    streaming: bool
    progress: Progress | None
    record: Mapping[str, object] | None
    explain: int | None
    per_group: str | None = None


@dataclass(frozen=True)
class Product:
    """How scored rows are cut, and how they are written."""

    cut: Cut
    policy: Policy
    output: Output

    def identity(self) -> dict[str, object]:
        return {"cut": str(self.cut), "on_error": self.policy.on_error, **vars(self.output)}

    def make(self, scored: Scored, root: Path, progress: Progress) -> Made:
        """Write the rows below `root`."""
        self.policy.check(scored)
        splits = by_split(scored.corpus.parts) if self.cut.per_split else None
        selection = self.policy.apply(scored, cut_rows(scored.risk, scored.scored, self.cut, splits, scored.groups))
        progress.start("writing", scored.corpus.n_rows)
        taker = NoteTaker(scored, selection)
        written = export_splits(scored, selection, root, self.output, progress, taker.see)
        written["extra_files"] += [PICTURE_FILE, CARD_FILE]
        content: RunContent = {
            **summarise(scored, selection, self.cut),
            **OutputFacts(to=self.output.to, shard_size=self.output.shard_size, with_scores=self.output.with_scores),
            **written,
            **Explained(),
        }
        return content, taker.notes(content)


def filter_dataset(
    sources: Sources,
    dest: str | Path,
    *,
    drop_top: str | float | None = None,
    drop_count: int | None = None,
    max_risk: float | None = None,
    keep_lowest: int | None = None,
    per_group: str | None = None,
    per_split: bool = False,
    weights: bool = False,
    pack: str | Path = "smollm2-135m",
    scorer: BatchedScorer | None = None,
    engine: Engine | None = None,
    columns: Columns | None = None,
    limit: int | None = None,
    streaming: bool = False,
    on_error: str = "quarantine",
    max_error_rate: str | float = 0.5,
    to: str = "parquet",
    shard_size: str | int = SHARD_SIZE,
    with_scores: bool = False,
    push: PushTo | None = None,
    explain: int | None = None,
    overwrite: bool = False,
    score_store: str | Path | None = None,
    progress: Progress | None = None,
    record: Mapping[str, object] | None = None,
) -> FinishedReport:
    """Score every row of the sources and write them to the folder or URL `dest` without the riskiest ones.

    `sources` is a path, URL or Hub id, a `datasets` dataset of any kind, or a sequence of these. Exactly one cut is
    given. With `per_group`, groups of equal values in that column share what it drops, and none is emptied; with
    `per_split`, each split is cut on its own; with `weights` nothing is dropped: each row gets a weight `sqsd_weight`
    instead, 1 / (1 + exp((risk - threshold) / scale)), where the threshold is the lowest risk that would be dropped
    (for `max_risk` its value) and the scale a quarter of the risks' interquartile range, both of the rows that are cut
    together.

    `explain` is a number of rows: for so many of the riskiest ones, `dest/sqsd/explained.json` tells which layers,
    module types and answer tokens carry the risk. That file holds text of rows; it is never published.

    `scorer` takes the place of `SQSDScorer(pack)`: another one comes from `make_scorer`. `score_store` is a folder or
    URL with scores that runs share. `to` is parquet, arrow or jsonl, in files of about `shard_size`; `with_scores` puts
    the scores into jsonl, too. `push` is a repository of the Hub that gets the result when it is complete. With
    `streaming`, files of the Hub are not kept here. `record` is copied into the report. Returns the report (also
    `dest/sqsd/report.json`). The same call finishes an interrupted run. Raises `SQSDError`s: `UsageError`,
    `InputError`, `RowErrorBudgetExceeded`, `DestinationExists`, `PackError`, `ModelError`.

    >>> report = filter_dataset("in.jsonl", "out", drop_top="5%")  # doctest: +SKIP
    >>> report["rows"]["dropped"]  # doctest: +SKIP
    3
    """
    cut = Cut.of(drop_top, drop_count, max_risk, keep_lowest, per_group=per_group, per_split=per_split, weights=weights)
    product = Product(cut, Policy.of(on_error, max_error_rate), Output.of(to, shard_size, with_scores))
    check_explain(explain, dest, scorer)
    outlet = _outlet(dest, overwrite, push, product.output)

    def finish(scored: Scored, meter: Meter) -> Made:
        return product.make(scored, outlet.destination.root, meter)

    return _score_and(
        finish,
        outlet,
        product.identity(),
        lambda corpus: check_columns(corpus, product.output),
        Work(
            sources,
            scorer or SQSDScorer(pack),
            engine,
            columns,
            limit,
            score_store,
            streaming,
            progress,
            record,
            explain,
            per_group,
        ),
    )


def score_dataset(
    sources: Sources,
    dest: str | Path,
    *,
    pack: str | Path = "smollm2-135m",
    scorer: BatchedScorer | None = None,
    engine: Engine | None = None,
    columns: Columns | None = None,
    limit: int | None = None,
    streaming: bool = False,
    max_error_rate: str | float = 0.5,
    explain: int | None = None,
    overwrite: bool = False,
    score_store: str | Path | None = None,
    progress: Progress | None = None,
    record: Mapping[str, object] | None = None,
) -> FinishedReport:
    """Write one parquet file with all rows in order and their score columns; `dest`.sqsd keeps report and scores.

    Arguments and errors are those of `filter_dataset`, but for `dest`, a file on this disk. A scorer with `per_module`
    gives each probe a column of lists, too, with the cosine at each module; the file's metadata (`sqsd_modules`) and
    the report name the modules. That takes 12 bytes of memory a row, probe and module.
    """
    check_explain(explain, "", scorer)
    policy = Policy.of("quarantine", max_error_rate)
    if "://" in str(dest):
        raise UsageError(f"Scores are written to a file on this disk, not to {dest}: name a .parquet file.")
    dest = Path(dest)
    if dest.suffix != ".parquet":
        raise UsageError(f"Scores are written as parquet: name the file {dest.with_suffix('.parquet')}.")
    destination = Destination(dest, lambda root: root.with_name(root.name + ".sqsd"), overwrite=overwrite)

    def finish(scored: Scored, meter: Meter) -> Made:
        policy.check(scored)
        meter.start("writing", scored.corpus.n_rows)
        taker = NoteTaker(scored, None)
        written = export_scored(scored, destination.root, meter, taker.see)
        content: RunContent = {
            **summarise(scored, None, None),
            **OutputFacts(to="parquet"),
            **written,
            **Explained(),
        }
        return content, taker.notes(content)

    return _score_and(
        finish,
        Outlet(destination, has_card=False),
        {},
        lambda corpus: check_columns(corpus, PARQUET),
        Work(
            sources,
            scorer or SQSDScorer(pack),
            engine,
            columns,
            limit,
            score_store,
            streaming,
            progress,
            record,
            explain,
        ),
    )


def _score_and(
    finish: Callable[[Scored, Meter], Made],
    outlet: Outlet,
    identity: Mapping[str, object],
    look_at: Callable[[Corpus], None],
    work: Work,
) -> FinishedReport:
    """Scan and `look_at` what is to be written, score, then `finish`. Returns the report."""
    started, meter, engine = time.time(), Meter(work.progress or Silent()), work.engine or LocalEngine()
    destination = outlet.destination
    shared = Folder(work.score_store) if work.score_store else None
    if shared is not None and shared.local is not None:
        destination.keep_out(shared.local)
    with closing(outlet), closing(Opener(streaming=work.streaming)) as opener:
        sources = opener.open(destination.others(expand(as_list(work.sources))))
        outlet.spare(sources)
        scan = Scan(sources, work.columns or work.scorer.columns, work.limit, meter, work.per_group)
        look_at(scan.corpus)
        scorer = engine.on_its_device(work.scorer)
        identity = {**scan.identity(), "scoring": scorer.settings(), **identity}
        identity |= {} if work.explain is None else {"explain": work.explain}
        explainer = work.scorer.beside(scorer)
        if work.explain is not None:
            explainer.check_device()
        facts: ScoreFacts = {**_about(scorer), "datasets": _datasets(sources)}
        job = Job(outlet, identity, meter, work.record or {}, started, facts, engine, _originals(sources))

        def carry_out() -> Made:
            scored = scan.score(destination.home, scorer, engine, old_home=destination.old_home, shared=shared)
            content, notes = finish(scored, meter)
            if work.explain is not None:
                assert isinstance(explainer, SQSDScorer)
                path = destination.home / EXPLAINED_FILE
                content["explained"] = write_explained(path, scored, explainer, work.explain, meter)
            return content, notes

        return job.carry_out(carry_out)


def select_dataset(
    sources: Sources,
    dest: str | Path,
    *,
    drop_top: str | float | None = None,
    drop_count: int | None = None,
    max_risk: float | None = None,
    keep_lowest: int | None = None,
    per_group: str | None = None,
    per_split: bool = False,
    weights: bool = False,
    scores: Sequence[Sources] = (),
    consensus: str | None = None,
    streaming: bool = False,
    on_error: str = "quarantine",
    to: str = "parquet",
    shard_size: str | int = SHARD_SIZE,
    with_scores: bool = False,
    push: PushTo | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    record: Mapping[str, object] | None = None,
) -> FinishedReport:
    """Cut at another place, with the scores that are there: of scored files, or of an earlier run's folder.

    `scores` are those that other packs gave the same rows, each as files or a folder, too; by `consensus` they and the
    sources' own become one risk in (0, 1]: "mean-rank" is the mean over the packs of the row's rank among the rows
    that all could score (the lowest risk is 1/n, the highest 1, equal risks share the mean of their ranks), and "max"
    the largest of these ranks. A row that a pack could not score has no risk.

    Other arguments are those of `filter_dataset`. No model is loaded. Raises `InputError` where rows have no scores
    yet, or those of different packs are not of the same rows.
    """
    started = time.time()
    check_rule(scores, consensus)
    cut = Cut.of(drop_top, drop_count, max_risk, keep_lowest, per_group=per_group, per_split=per_split, weights=weights)
    product = Product(cut, Policy.of(on_error, "100%"), Output.of(to, shard_size, with_scores))
    given, *others = (expand(as_list(each)) for each in (sources, *scores))
    meter = Meter(progress or Silent())
    outlet = _outlet(dest, overwrite, push, product.output)
    with closing(outlet), closing(Opener(streaming=streaming)) as opener:
        outlet.destination.spare(chain(given, *others))
        earlier = read_earlier(given, opener, per_group, meter, keyed=consensus is not None)
        if consensus is not None:
            how: dict[str, Any] = {"keyed": True, "likely": earlier.form}
            packs = [earlier, *(read_earlier(other, opener, None, meter, **how) for other in others)]
            outlet.spare(chain.from_iterable(pack.sources for pack in packs))
            earlier = agree(packs, consensus)
        outlet.spare(earlier.sources)
        check_columns(earlier.scored.corpus, product.output)
        facts: ScoreFacts = {**earlier.facts, "datasets": _datasets(earlier.sources)}
        identity = {**earlier.identity, **product.identity()}
        job = Job(outlet, identity, meter, record or {}, started, facts, None, _originals(earlier.sources))
        return job.carry_out(lambda: product.make(earlier.scored, outlet.destination.root, meter))


def _outlet(dest: str | Path, overwrite: bool, push: PushTo | None, output: Output) -> Outlet:
    outlet = Outlet.of(dest, overwrite, push)
    if output.to == "arrow" and isinstance(outlet.target, PushTo):
        raise UsageError("load_dataset reads no Arrow folders from the Hub: push --to parquet or jsonl.")
    return outlet


def _datasets(sources: Sequence[Source]) -> list[HubDataset]:
    """The Hub's datasets among the sources, each once."""
    datasets = [source.dataset for source in sources if source.dataset is not None]
    return [dataset for k, dataset in enumerate(datasets) if dataset not in datasets[:k]]


def _originals(sources: Sequence[Source]) -> list[tuple[str, str]]:
    """Name and text of the cards of the datasets among the sources; an empty one for what has none beside them."""
    cards = list(dict.fromkeys(source.card for source in sources if source.card is not None))
    bare = any(source.card is None and source.dataset is None for source in sources)
    return [*cards, ("the other files", "")] if cards and bare else cards


def _about(scorer: BatchedScorer) -> ScoreFacts:
    pack = scorer.pack
    return {
        "pack": PackFacts(
            name=pack.name,
            fingerprint=pack.fingerprint,
            base_model=scorer.base_model,
            weights=scorer.weights,
            shared_state=pack.shared_state,
        ),
        "scorer": scorer.name,
        "device": scorer.device.split(":")[0],
        "dtype": scorer.dtype,
        "max_length": scorer.max_length,
    }
