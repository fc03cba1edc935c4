"""The report of a run: what report.json holds, and what card, page and summary read from it.

Reports of earlier versions lack some keys that are required here: whoever reads one from disk asks with `get`.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal, NotRequired, TypedDict

from sqsd_filter.corpus.addresses import HubDataset
from sqsd_filter.corpus.sources import InputFile
from sqsd_filter.corpus.unread import UnreadName
from sqsd_filter.pipeline.scores.scored import ScoreCounts
from sqsd_filter.pipeline.selecting.selection import PieceKey
from sqsd_filter.progress import PhaseFigures
from sqsd_filter.scoring.scorer import SQSD
from sqsd_filter.storage.folder import write_text
from sqsd_filter.storage.layout import ITSELF, old_saved_splits

Config = Literal["kept", "dropped", "errors"]  # the datasets' word for one of the tables that a run writes
CONFIGS: tuple[Config, ...] = ("kept", "dropped", "errors")


class RiskFacts(TypedDict):
    """A risk that the score columns have: the fingerprint of the pack by it, the weights of its values, and the state
    that its directions share."""

    fingerprint: str
    weights: Mapping[str, float]
    shared_state: str | None


class PackFacts(TypedDict):
    """The pack that gave the scores, and the base model that they were taken on.

    `weights` has each value's, which is 0 for those beside the risk. `risk` is the name of the pack's risk, where it is
    not the pack's own; `beside` are the pack's other risks that the score columns have, `linear` the values that are
    linear probes. `where` is what `load_pack` finds the pack by on this machine.
    """

    name: str
    fingerprint: str
    base_model: str
    weights: Mapping[str, float]
    shared_state: str | None
    risk: NotRequired[str]
    beside: NotRequired[dict[str, RiskFacts]]
    linear: NotRequired[list[str]]
    where: NotRequired[str]


class ConsensusPack(TypedDict):
    """One of the packs whose ranks are combined: the column with its risk, and where its scores were read."""

    column: str
    scores: str
    pack: PackFacts | None
    scorer: str | None


class Consensus(TypedDict):
    rule: str
    packs: list[ConsensusPack]


class ScoreFacts(TypedDict, total=False):
    """How the scores were made, as far as it is known: scores in the input may come without any of this."""

    pack: PackFacts
    scorer: str
    device: str
    dtype: str
    max_length: int
    datasets: list[HubDataset]
    consensus: Consensus
    scores_from: str  # where `select` found them; then no model was run
    unread: list[UnreadName]  # columns and keys that look as if they changed what is learned, and are not read


class Setting(TypedDict):
    value: object
    origin: str  # flag, environment, config or default


class RunFacts(ScoreFacts):
    """All that is known of a run before its work begins."""

    settings: Mapping[str, Setting]
    command: NotRequired[list[str]]
    versions: Mapping[str, str]


class Fates(TypedDict, total=False):
    """Rows by fate, unless all are written to one file, as `score` does."""

    kept: int
    dropped: int


class RowCounts(Fates, ScoreCounts):
    total: int
    errors: int


class PieceWeights(TypedDict, total=False):
    """Where rows are weighted: the formula's scale, None where all weights are 1, and the sum of the weights."""

    scale: float | None
    sum: float


class PieceFigures(PieceKey, PieceWeights):
    """Rows that were cut together."""

    scored: int
    dropped: int
    threshold: float | None


class GroupFigures(TypedDict):
    """The groups of equal values in `column`, or the splits where it is None, each with its own share of the cut."""

    column: str | None
    spared: int
    groups: list[PieceFigures]


class RowWeights(TypedDict):
    """How rows are weighted; threshold and scale are None where each group has its own."""

    formula: str
    threshold: float | None
    scale: float | None
    sum: float


class PoolFigures(TypedDict):
    """Reference rows of one kind: their number, those of each corpus, and the quantiles of risk that they show."""

    rows: int
    corpora: dict[str, int]
    quantiles: dict[str, float]


class RiskMeaning(TypedDict):
    """A risk, and the share of the benign reference rows below it, from 0 to 100."""

    risk: float
    percentile: float


class Excess(TypedDict):
    """The rows of a corpus with a higher risk than a quantile of the benign reference; `expected` is the share of the
    reference rows that have one."""

    quantile: str
    risk: float
    rows: int
    share: float
    expected: float


class Interval(TypedDict):
    """An estimate with its 95 % interval."""

    estimate: float
    low: float
    high: float


class PlantedFigures(TypedDict):
    """How many rows are probably unsafe, by `planted.estimate`: the share of them in the corpus, the dropped rows that
    are benign, the kept ones that are unsafe. `benign_above` and `unsafe_above` are the shares of the reference rows
    that the cut would drop."""

    benign_above: float
    unsafe_above: float
    share: Interval
    false_alarms: Interval
    remaining: Interval


class ReferenceFigures(TypedDict, total=False):
    """The risks beside those of the pack's reference rows; only `mismatch` where these do not apply, with the reason.

    `median` is the rows' own, `cut` the lowest risk that was dropped, or the threshold of weights. `threshold` is the
    risk that stands for the share of a cut by the reference. `planted` is None where the reference
    can't tell. `beside` has the excess by each risk beside that of the cut.
    """

    mismatch: str
    benign: PoolFigures
    unsafe: PoolFigures
    median: RiskMeaning
    cut: RiskMeaning
    threshold: float
    excess: Excess
    planted: PlantedFigures | None
    beside: dict[str, Excess]


class LengthFigures(TypedDict):
    """Spearman's rank correlation of risk and length of the answer over these rows; None where all are the same."""

    rows: int
    spearman: float | None


class RunFigures(TypedDict):
    """What became of the rows, and how risk is spread over them."""

    rows: RowCounts
    unscored: dict[str, int]
    format: str | None
    cut: str | None
    threshold: float | None
    ties: int
    tokens: int
    risk_quantiles: dict[str, float]
    inputs: list[InputFile]
    modules: NotRequired[dict[str, list[str]]]
    groups: NotRequired[GroupFigures]
    weights: NotRequired[RowWeights]
    reference: NotRequired[ReferenceFigures]
    length: NotRequired[LengthFigures]


class WrittenFile(TypedDict):
    """A file of rows below the destination, or if that is a file, below the folder beside it; "." is the destination
    itself. Files of `score` have no config and no split."""

    config: NotRequired[Config]
    split: NotRequired[str]
    path: str
    rows: int
    bytes: int
    sha256: str


class Written(TypedDict):
    """The files of rows, those that belong to them, and the columns whose values are stored as JSON. Those among them
    that `datasets` decodes, from version 4.7 on, are `json_features`."""

    files: list[WrittenFile]
    extra_files: list[str]
    json_columns: list[str]
    json_features: NotRequired[list[str]]


class OutputFacts(TypedDict):
    """How rows are written: `to` is the format. `score` writes one file and has no further settings."""

    to: str
    shard_size: NotRequired[int]
    with_scores: NotRequired[bool]
    rows_column: NotRequired[bool]  # kept rows have the column sqsd_row
    percentile: NotRequired[bool]  # there is a column with each row's percentile in the reference


class Explained(TypedDict, total=False):
    explained: int  # rows in explained.json


class RunContent(RunFigures, OutputFacts, Written, Explained):
    """What the work of a run gives for its report."""


class EngineFacts(TypedDict, total=False):
    """Who scored the rows; all but the name only on Ray."""

    engine: str
    replicas: int | None
    gpus_per_replica: float | None
    shards_retried: int


class Timing(EngineFacts):
    """In seconds; `started` is Unix time. `select` has no engine."""

    seconds: float
    started: float
    phases: dict[str, PhaseFigures]


class Published(TypedDict):
    """Where the run was published; all but the URL only for a dataset of the Hub."""

    url: str
    repo: NotRequired[str]
    commit: NotRequired[str]
    rows: NotRequired[list[Config]]


class Report(RunFacts, RunContent):
    """What card and page are made from."""


class Outcome(TypedDict):
    """How a run ended; `already_done` and `published` are known only afterwards and not on disk."""

    status: str
    already_done: NotRequired[bool]
    published: NotRequired[Published]


class FinishedReport(Outcome, Report):
    """All of report.json. A run that failed leaves its status, its error, and as much of the rest as there is."""

    timing: Timing


def versions(*more: str) -> dict[str, str]:
    """Versions of everything that can change a score or a byte, and of these packages."""
    names = ("sqsd-filter", "torch", "transformers", "datasets", "pyarrow", "numpy", *more)
    installed = {"python": platform.python_version()}
    for name in names:
        try:
            installed[name] = version(name)
        except PackageNotFoundError:
            installed[name] = "not installed as a package"
    return installed


def scorers(facts: ScoreFacts) -> list[str]:
    """The scorers that gave the risks, or those whose ranks were combined; SQSD where it is not known."""
    if consensus := facts.get("consensus"):
        names = [pack.get("scorer") for pack in consensus["packs"]]
    else:
        names = [facts.get("scorer")]
    return list(dict.fromkeys(name or SQSD for name in names))


def is_sqsd(facts: ScoreFacts) -> bool:
    """Is the risk SQSD's own, neither another scorer's nor a linear probe's nor a combination of ranks?"""
    return not facts.get("consensus") and scorers(facts) == [SQSD] and not is_linear(facts)


def is_linear(facts: ScoreFacts) -> bool:
    """Is the risk a linear probe of hidden states?"""
    pack = facts.get("pack")
    return not facts.get("consensus") and pack is not None and pack.get("risk") in pack.get("linear", [])


def risk_name(facts: ScoreFacts) -> str:
    """The name of the risk on an axis."""
    if is_sqsd(facts):
        return "SQSD risk"
    if is_linear(facts):
        return f"risk {facts['pack'].get('risk')}"
    consensus = facts.get("consensus")
    return f"risk by {consensus['rule'] if consensus else facts['scorer']}"


def cut_words(report: RunFigures) -> str | None:
    """The cut, for people: the one by the reference with the risk that it stands for."""
    reference = report.get("reference", {})
    if report["cut"] is None or "threshold" not in reference:
        return report["cut"]
    rule, *how = report["cut"].split(", ")
    share = rule.rpartition(" ")[2].removesuffix("%")
    words = f"riskier than {share} % of the benign reference rows (risk above {reference['threshold']:.6g})"
    return ", ".join([words, *how])


def low_risk(facts: ScoreFacts) -> str:
    """What a low risk means, as a clause."""
    if is_sqsd(facts):
        return "that a row moves the model little along the directions of this pack"
    if is_linear(facts):
        return "that a row is little like the known unsafe rows that this risk was fitted on"
    return "that a row ranks low by this measure"


def write_report(path: Path, report: Mapping[str, object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(report, indent=2) + "\n")


def is_one_file(report: RunContent) -> bool:
    """Is the destination one file with rows?"""
    return any(file["path"] == ITSELF for file in report["files"])


def load_calls(report: RunContent, where: str, beside: str | None = None) -> dict[Config, str]:
    """The Python expression that loads the rows of each config from the destination; `where` is one for its path, and
    `beside` for that of the folder beside a file."""
    calls: dict[Config, str] = {}
    if is_one_file(report):
        kind = {"jsonl": "json"}.get(report["to"], report["to"])
        beside = beside or f'{where} + ".sqsd"'
        others: list[Config] = ["dropped", "errors"]
        calls["kept"] = f'load_dataset("{kind}", data_files={where})'
        return calls | {config: f'load_dataset({beside}, "{config}")' for config in others}
    for config in CONFIGS:
        saved = old_saved_splits(file["path"] for file in report["files"] if file["config"] == config)
        by_card = f"load_dataset({where})" if config == "kept" else f'load_dataset({where}, "{config}")'
        calls[config] = ", ".join(f'load_from_disk({where})["{name}"]' for name in saved) or by_card
    return calls
