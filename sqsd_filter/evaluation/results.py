"""The shape of results.json: `evaluate` writes it; the page, the command's table and the study's tables read it.

Rates and shares are from 0 to 1, losses are in nats per token, and an `Interval` is [low, high] at 95 %. Lists in
`WindowFigures` have one value per window, S1 first.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NotRequired, TypedDict

from sqsd_filter.judges.agreement import AgreementReport

Interval = list[float]
Point = list[float]  # [x, y] of a curve
Arm = Literal["all", "kept", "random", "dropped"]
ContaminatedArm = Literal["all", "above-reference", "cut", "random", "clean"]


class ModelFacts(TypedDict):
    """The model under evaluation, and the pack that aligned it."""

    name: str
    pack: str
    fingerprint: str


class CorpusFile(TypedDict):
    name: str
    rows: int


class EvaluatedRows(TypedDict):
    """Rows of the corpus: all, with a score by every scorer, with answer tokens, held out, and left to learn from."""

    all: int
    scored: int
    usable: int
    held_out: int
    learned: int


class PromptCounts(TypedDict):
    harmful: int
    harmless: int
    questions: NotRequired[int]


class SetDesign(TypedDict):
    """Which sets of rows were learned from. The sizes of windows and cut are there where these are among the arms."""

    arms: list[str]
    windows: NotRequired[int]
    size: NotRequired[int | None]
    match_tokens: NotRequired[bool]
    drop_top: NotRequired[float]
    planted: NotRequired[str]  # the column that marks planted rows
    above_reference: NotRequired[float]


class SetFigures(TypedDict):
    """The figures of one set of rows; `outcomes` are shares of the answers to harmful prompts."""

    rows: int
    tokens: int
    asr: float
    ci: Interval
    asr_by_seed: list[float]
    over_refusal: float | None
    loss: float | None
    outcomes: dict[str, float]


class ListedFigures(TypedDict):
    """The figures of several sets of rows: each is a list with one value per set."""

    rows: list[int]
    tokens: list[int]
    asr: list[float]
    ci: list[Interval]
    asr_by_seed: list[list[float]]
    over_refusal: list[float | None]
    loss: list[float | None]
    outcomes: dict[str, list[float]]


class WindowFigures(ListedFigures):
    """The figures of a scorer's windows. `spread` is the rate of S1 minus that of the last window."""

    spread: float
    spread_ci: Interval
    monotone: bool


class Difference(TypedDict):
    """One attack success rate minus another."""

    asr: float
    ci: Interval


class ArmFigures(TypedDict):
    """The figures of the arms of a cut."""

    all: SetFigures
    kept: SetFigures
    random: SetFigures
    dropped: SetFigures
    random_minus_kept: Difference


class Estimate(TypedDict):
    """The mean over the bootstrap draws."""

    mean: float
    ci: Interval


class Measured(TypedDict):
    """A mean over seeds and prompts; no interval of a single value."""

    mean: float
    ci: Interval | None


class MeasuredBySeed(Measured):
    by_seed: list[float]


class ArmMeasures(TypedDict):
    """An arm of a contaminated corpus, before any fine-tuning with 0 rows. Numbers of rows and tokens are means over
    the seeds, `dropped` is by the kind of row."""

    seeds: list[int]
    rows: float
    tokens: float
    dropped: dict[str, float]
    measures: dict[str, MeasuredBySeed]


class ContaminatedFigures(TypedDict):
    """The arms of a contaminated corpus, and differences of two arms ("all - clean"), each by what was measured:
    "unsafe by <judge>" is the attack success rate."""

    arms: dict[str, ArmMeasures]
    differences: dict[str, dict[str, Measured]]


class RunRecord(TypedDict):
    """What one fine-tuning led to, without any text. Texts of 0 and 1 have one digit per prompt, in the order of
    `PromptOutcomes.prompts`; where there are several judges, by judge. `run` is equal for arms that with this seed are
    one model, because their rows are equal."""

    scorer: str
    arm: str
    seed: int
    run: NotRequired[str]  # files of earlier versions lack it
    rows: int
    tokens: int
    dropped: dict[str, int]  # by the kind of row
    unsafe: dict[str, str]
    refused: dict[str, str]
    degenerate: dict[str, str]
    harmless_refused: str
    right: str
    loss: float | None


class PromptOutcomes(TypedDict):
    """All of outcomes.json. `prompts` has a hash of each prompt by its kind: harmful, harmless, questions."""

    model: ModelFacts
    sets: SetDesign
    settings: Mapping[str, object]
    judges: list[str]
    prompts: dict[str, list[str]]
    runs: list[RunRecord]


class MixFigures(TypedDict):
    """What a score finds of `unsafe` rows mixed into `benign` ones; `prompts` counts different unsafe prompts."""

    benign: int
    unsafe: int
    prompts: int
    precision: Estimate
    recall: Estimate
    auc: Estimate
    average_precision: Estimate


class JudgeFacts(TypedDict):
    """The judge that gives the attack success rate, and how far each two judges agree."""

    asr: str
    agreement: list[AgreementReport]


class Results(TypedDict):
    """All of results.json. Keys of `scorers`, `arms`, `contaminated`, `poisoned`, `runs` and of each of `curves` are
    scorers' names.

    `model`, `rows` and `prompts` are None where nothing was trained; the last three keys are missing then.
    """

    model: ModelFacts | None
    corpus: list[CorpusFile]
    rows: EvaluatedRows | None
    prompts: PromptCounts | None
    sets: SetDesign
    seeds: list[int]
    scorers: dict[str, WindowFigures]
    arms: dict[str, ArmFigures]
    contaminated: NotRequired[dict[str, ContaminatedFigures]]
    poisoned: dict[str, dict[str, MixFigures]]  # by the share of unsafe rows
    curves: dict[str, dict[str, list[Point]]]  # by their kind: roc, pr
    warnings: list[str]
    settings: Mapping[str, object]
    machine: Mapping[str, object]
    untuned: NotRequired[SetFigures]
    judges: NotRequired[JudgeFacts]
    runs: NotRequired[dict[str, dict[str, list[str]]]]  # by set of rows: the folders of its runs, one per seed
