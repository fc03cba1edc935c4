"""The runs that users start: filter a corpus, score it, cut it again. Each is scan, score, select, export, report."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from sqsd_filter.corpus.addresses import HubDataset, Opener, Source, expand
from sqsd_filter.corpus.row_formats import Columns
from sqsd_filter.errors import UsageError, option
from sqsd_filter.pipeline.explained import check_explain, write_explained
from sqsd_filter.pipeline.exports import AllRows, CutRows, Export
from sqsd_filter.pipeline.job import Job, Outlet
from sqsd_filter.pipeline.meaning import Meaning, place_of, risk_for_reference
from sqsd_filter.pipeline.options import Scoring, Writing
from sqsd_filter.pipeline.page.notes import Notes
from sqsd_filter.pipeline.publishing.hub import PushTo
from sqsd_filter.pipeline.report import FinishedReport, PackFacts, RiskFacts, RunContent, ScoreFacts
from sqsd_filter.pipeline.selecting.consensus import agree, check_rule
from sqsd_filter.pipeline.selecting.earlier import read_earlier
from sqsd_filter.pipeline.selecting.policy import Policy
from sqsd_filter.pipeline.selecting.selection import ABOVE_REFERENCE, Cut
from sqsd_filter.pipeline.stage.engines import Engine, LocalEngine
from sqsd_filter.pipeline.stage.scan import Scan, as_list
from sqsd_filter.pipeline.writing.destination import EXPLAINED_FILE, Destination
from sqsd_filter.pipeline.writing.one_file import file_form
from sqsd_filter.pipeline.writing.writers import JSON_AS, SHARD_SIZE
from sqsd_filter.progress import Meter, Progress, Silent
from sqsd_filter.scoring.pack import OWN_RISK
from sqsd_filter.scoring.scorer import SQSD, BatchedScorer, SQSDScorer
from sqsd_filter.storage.folder import Folder
from sqsd_filter.storage.layout import home_beside

if TYPE_CHECKING:
    from sqsd_filter.pipeline.options import Sources

T = TypeVar("T")
COMBINED = Meaning(None, "Several packs' scores are combined to ranks, for which no pack has a reference: cut by rank.")


def filter_dataset(
    sources: Sources,
    dest: str | Path,
    *,
    drop_top: str | float | None = None,
    drop_count: int | None = None,
    max_risk: float | None = None,
    keep_lowest: int | None = None,
    above_reference: str | float | None = None,
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
    to: str | None = None,
    shard_size: str | int = SHARD_SIZE,
    with_scores: bool = False,
    rows_column: bool = False,
    json_as: str = JSON_AS[0],
    percentile: bool = False,
    push: PushTo | None = None,
    explain: int | None = None,
    overwrite: bool = False,
    score_store: str | Path | None = None,
    progress: Progress | None = None,
    record: Mapping[str, object] | None = None,
) -> FinishedReport:
    """Score every row of the sources and write them to the folder, file or URL `dest` without the riskiest ones.

    A `dest` that ends in .jsonl, .json (also .gz or .zst), .parquet or .arrow is one file with the kept rows; all else
    of the run is in the folder `dest`.sqsd.

    `sources` is a path, URL or Hub id, a `datasets` dataset of any kind, or a sequence of these. Give exactly one of
    the five ways to cut that `Cut` explains, with its `per_group`, `per_split` and `weights`. The other options are
    explained by `Scoring` and `Writing`. `record` is copied into the report.

    Returns the report, which is also in `dest/_sqsd/report.json` or `dest.sqsd/report.json`. The same call resumes an
    interrupted run. Raises `SQSDError`s: `UsageError`, `InputError`, `RowErrorBudgetExceeded`, `DestinationExists`,
    `PackError`, `ModelError`.

    >>> report = filter_dataset("in.jsonl", "out", drop_top="5%")  # doctest: +SKIP
    >>> report["rows"]["dropped"]  # doctest: +SKIP
    3
    """
    return filter_rows(
        sources,
        dest,
        Cut.of(
            drop_top,
            drop_count,
            max_risk,
            keep_lowest,
            above_reference,
            per_group=per_group,
            per_split=per_split,
            weights=weights,
        ),
        Scoring(
            pack=pack,
            scorer=scorer,
            engine=engine,
            columns=columns,
            limit=limit,
            streaming=streaming,
            score_store=score_store,
            max_error_rate=max_error_rate,
            explain=explain,
        ),
        Writing(
            to=to,
            shard_size=shard_size,
            with_scores=with_scores,
            rows_column=rows_column,
            json_as=json_as,
            percentile=percentile,
            on_error=on_error,
            push=push,
            overwrite=overwrite,
        ),
        progress=progress,
        record=record,
    )


def filter_rows(
    sources: Sources,
    dest: str | Path,
    cut: Cut,
    scoring: Scoring,
    writing: Writing,
    *,
    progress: Progress | None = None,
    record: Mapping[str, object] | None = None,
) -> FinishedReport:
    """`filter_dataset` with its options in three parts."""
    policy = Policy.of(writing.on_error, scoring.max_error_rate)
    asked = scoring.chosen_scorer.pack
    scoring = scoring.of_cut(cut)
    if (pack := scoring.chosen_scorer.pack).risk != asked.risk and progress is not None:
        progress.note(
            f"a cut by reference rows takes the risk {pack.risk} of the pack {pack.name}; its own risk, {OWN_RISK}, is "
            "not computed"
        )
    check_explain(scoring.explain, dest, scoring.scorer)
    form = file_form(dest)
    output = writing.output(form)
    meaning = Meaning.of_scorer(scoring.chosen_scorer)
    wanted = meaning.wanted(writing.percentile)
    export = CutRows(meaning.place(cut), policy, output, meaning, wanted, in_file=form is not None)
    outlet = Outlet.of(dest, form, writing.overwrite, writing.push)
    return _score(sources, outlet, export, scoring, progress or Silent(), record or {})


def score_dataset(
    sources: Sources,
    dest: str | Path,
    scoring: Scoring | None = None,
    *,
    percentile: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
    record: Mapping[str, object] | None = None,
) -> FinishedReport:
    """Write one parquet file with all rows in order and their score columns; `dest`.sqsd keeps report and scores.

    `dest` is a file on this disk. With `percentile` there is a column sqsd_percentile, as in `Writing`. All else, and
    the errors, are those of `filter_dataset`. A scorer with `per_module` adds a column of lists for each probe, with
    the cosine at each module; the file's metadata (`sqsd_modules`) and the report name the modules. That takes 12 bytes
    of memory per row, probe and module.
    """
    scoring = _checked(scoring or Scoring(), Scoring, "Scoring(pack=...)")
    check_explain(scoring.explain, "", scoring.scorer)
    policy = Policy.of("quarantine", scoring.max_error_rate)
    if "://" in str(dest):
        raise UsageError(f"Scores are written to a file on this disk, not to {dest}: name a .parquet file.")
    dest = Path(dest)
    if dest.suffix != ".parquet":
        raise UsageError(f"Scores are written as parquet: name the file {dest.with_suffix('.parquet')}.")
    meaning = Meaning.of_scorer(scoring.chosen_scorer)
    export = AllRows(policy, meaning, meaning.wanted(percentile))
    destination = Destination(dest, home_beside, overwrite=overwrite)
    outlet = Outlet(destination, has_card=False)
    return _score(sources, outlet, export, scoring, progress or Silent(), record or {})


def _score(
    sources: Sources,
    outlet: Outlet,
    export: Export,
    scoring: Scoring,
    progress: Progress,
    record: Mapping[str, object],
) -> FinishedReport:
    """Scan, check that the rows can be written, score, and export them."""
    started, meter, engine = time.time(), Meter(progress), scoring.engine or LocalEngine()
    destination, explain = outlet.destination, scoring.explain
    shared = Folder(scoring.score_store) if scoring.score_store else None
    if shared is not None and shared.local is not None:
        destination.keep_out(shared.local)
    asked = scoring.chosen_scorer
    with closing(outlet), closing(Opener(streaming=scoring.streaming)) as opener:
        opened = opener.open(destination.others(expand(as_list(sources))))
        outlet.spare(opened)
        scan = Scan(opened, scoring.columns or asked.columns, scoring.limit, meter, export.per_group)
        export.check(scan.corpus)
        scorer = engine.prepare(asked)
        identity = {**scan.identity(), "scoring": scorer.settings(), **export.identity()}
        explainer = asked.beside(scorer)
        if explain is not None:
            identity["explain"] = explain
            explainer.check_device()
        facts: ScoreFacts = {**_facts_of(scorer), "datasets": _datasets(opened)}
        if scan.unread.found:
            facts["unread"] = scan.unread.found
        job = Job(outlet, identity, meter, record, started, facts, engine, _originals(opened))

        def work() -> tuple[RunContent, Notes]:
            scored = scan.score(destination.home, scorer, engine, old_home=destination.old_home, shared=shared)
            content, notes = export.write(scored, destination.layout, meter)
            if explain is not None:
                assert isinstance(explainer, SQSDScorer)
                path = destination.home / EXPLAINED_FILE
                content["explained"] = write_explained(path, scored, explainer, explain, meter)
            return content, notes

        return job.carry_out(work)


def select_dataset(
    sources: Sources,
    dest: str | Path,
    cut: Cut,
    writing: Writing | None = None,
    *,
    scores: Sequence[Sources] = (),
    consensus: str | None = None,
    risk: str | None = None,
    pack: str | Path | None = None,
    streaming: bool = False,
    progress: Progress | None = None,
    record: Mapping[str, object] | None = None,
) -> FinishedReport:
    """Cut scored rows again: those of scored files, or of an earlier run's folder or file. No model is loaded.

    `risk` is another risk of the pack whose values the scores have, or "sqsd" for the pack's own. A cut by the pack's
    reference takes the risk that such a cut of unscored rows takes.

    `scores` are the scores that other packs gave the same rows, each as files or a folder. With `consensus`, they and
    the sources' own become one risk in (0, 1]. Each pack ranks the n rows that all packs could score (the lowest risk
    is 1/n, the highest 1, equal risks share the mean of their ranks); "mean-rank" takes the mean of a row's ranks,
    "max" the largest. A row that a pack could not score has no risk.

    The reference rows to compare risks with are those of the pack that gave the scores, as far as it is known; `pack`
    names it where it is not, or where it has been moved.

    Other arguments are those of `filter_dataset`. Raises `InputError` where rows have no scores yet, or those of
    different packs are not of the same rows.
    """
    started = time.time()
    check_rule(scores, consensus)
    cut = _checked(cut, Cut, 'Cut.of(drop_top="5%")')
    writing = _checked(writing or Writing(), Writing, 'Writing(to="jsonl")')
    policy = Policy.of(writing.on_error, "100%")
    if risk is not None and consensus is not None:
        raise UsageError(f"{option('consensus')} combines the risks that the scores have: leave out {option('risk')}.")
    given, *others = (expand(as_list(each)) for each in (sources, *scores))
    meter = Meter(progress or Silent())
    file = file_form(dest)
    output = writing.output(file)
    outlet = Outlet.of(dest, file, writing.overwrite, writing.push)
    with closing(outlet), closing(Opener(streaming=streaming)) as opener:
        outlet.destination.spare(chain(given, *others))
        named = _pack_facts(SQSDScorer(pack)) if pack is not None else None
        keyed = consensus is not None
        earlier = read_earlier(given, opener, cut.per_group, meter, keyed=keyed, given_pack=named)
        where = [earlier.where]
        if consensus is not None:
            form = earlier.form
            more = (read_earlier(other, opener, None, meter, keyed=True, likely=form) for other in others)
            packs = [earlier, *more]
            outlet.spare(chain.from_iterable(pack.sources for pack in packs))
            earlier, where = agree(packs, consensus), [pack.where for pack in packs]
        else:
            if risk is None and cut.kind == ABOVE_REFERENCE:
                risk = risk_for_reference(earlier.pack, pack)
            earlier = earlier.by_risk(risk) if risk is not None else earlier
        outlet.spare(earlier.sources)
        meaning = Meaning.of_scores(earlier.pack, earlier.scoring, pack) if consensus is None else COMBINED
        wanted = meaning.wanted(writing.percentile)
        export = CutRows(meaning.place(cut), policy, output, meaning, wanted, in_file=file is not None)
        export.check(earlier.scored.corpus)
        facts: ScoreFacts = {
            **earlier.facts,
            "datasets": _datasets(earlier.sources),
            "scores_from": " and ".join(where),
        }
        identity = {**earlier.identity, **export.identity()}
        job = Job(outlet, identity, meter, record or {}, started, facts, None, _originals(earlier.sources))
        return job.carry_out(lambda: export.write(earlier.scored, outlet.destination.layout, meter))


def _checked(given: object, kind: type[T], example: str) -> T:
    """The options that were given. Raises `UsageError` for anything else."""
    if not isinstance(given, kind):
        raise UsageError(f"{given!r} is not {kind.__name__}: give the options as {example}.")
    return given


def _datasets(sources: Sequence[Source]) -> list[HubDataset]:
    """The Hub's datasets among the sources, each once."""
    datasets = [source.dataset for source in sources if source.dataset is not None]
    return [dataset for k, dataset in enumerate(datasets) if dataset not in datasets[:k]]


def _originals(sources: Sequence[Source]) -> list[tuple[str, str]]:
    """Name and text of the cards of the datasets among the sources; an empty text for files without a card."""
    cards = list(dict.fromkeys(source.card for source in sources if source.card is not None))
    bare = any(source.card is None and source.dataset is None for source in sources)
    return [*cards, ("the other files", "")] if cards and bare else cards


def _facts_of(scorer: BatchedScorer) -> ScoreFacts:
    return {
        "pack": _pack_facts(scorer),
        "scorer": scorer.name,
        "device": scorer.device.split(":")[0],
        "dtype": scorer.dtype,
        "max_length": scorer.max_length,
    }


def _pack_facts(scorer: BatchedScorer) -> PackFacts:
    pack = scorer.pack
    facts = PackFacts(
        name=pack.name,
        fingerprint=pack.fingerprint,
        base_model=scorer.base_model,
        weights=scorer.weights,
        shared_state=pack.shared_state,
        where=place_of(pack),
    )
    if pack.risk is not None:
        facts["risk"] = pack.risk
    if scorer.name == SQSD and (linear := [p.linear.name for p in (pack, *pack.beside) if p.linear is not None]):
        facts["linear"] = linear
    if pack.beside and scorer.name == SQSD:
        facts["beside"] = {
            each.risk or OWN_RISK: RiskFacts(fingerprint=each.fingerprint, weights=each.weights, shared_state=None)
            for each in pack.beside
        }
    return facts
