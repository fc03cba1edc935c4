"""The fine-tunings of an evaluation: which rows each run learns from, and the figures of the runs that are done."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypedDict

import numpy as np

from sqsd_filter.errors import InputError, UsageError, option
from sqsd_filter.evaluation.contamination import BENIGN, ContaminatedCorpus, read_kinds, reference_cuts
from sqsd_filter.evaluation.figures import RunOutcome, arm_figures, single_figures, window_figures
from sqsd_filter.evaluation.folder import digest
from sqsd_filter.evaluation.model import Subject
from sqsd_filter.evaluation.prompt_outcomes import contaminated_figures
from sqsd_filter.evaluation.results import (
    ArmFigures,
    ContaminatedFigures,
    EvaluatedRows,
    JudgeFacts,
    ModelFacts,
    PromptCounts,
    PromptOutcomes,
    RunRecord,
    SetFigures,
    WindowFigures,
)
from sqsd_filter.evaluation.runs import Prompts, Run, Runner
from sqsd_filter.evaluation.scores import NamedScores, Rows, scored_by_all
from sqsd_filter.evaluation.sets import TrainingSet, by_risk, cut_sets, match_tokens, windows
from sqsd_filter.evaluation.settings import CUT, VLLM, WINDOWS, Design
from sqsd_filter.evaluation.vllm_answers import check_vllm
from sqsd_filter.judges import Judge, agreement, load_judge
from sqsd_filter.judges.agreement import AgreementReport
from sqsd_filter.progress import Progress
from sqsd_filter.scoring.models import content_id
from sqsd_filter.scoring.pack import load_pack

Outcomes = Mapping[str, Mapping[str, Sequence[RunOutcome]]]  # by scorer and set of rows, one per seed


class StudyFigures(TypedDict):
    """The part of `Results` that changes with each seed."""

    seeds: list[int]
    untuned: SetFigures
    judges: JudgeFacts
    scorers: dict[str, WindowFigures]
    arms: dict[str, ArmFigures]
    contaminated: dict[str, ContaminatedFigures]
    runs: dict[str, dict[str, list[str]]]


class Study:
    """The fine-tunings of an evaluation."""

    def __init__(
        self,
        design: Design,
        scorers: Sequence[NamedScores],
        pack: str | Path,
        device: str | None,
        dest: Path,
        progress: Progress,
    ) -> None:
        """Reads and checks all inputs before anything is trained.

        Raises `UsageError`, `InputError`, `PackError`, `ModelError`, `JudgeError`.
        """
        self._design, self._corpus = design, scorers[0].corpus
        self._prompts = Prompts.of(design)
        self._subject = Subject.of(load_pack(pack), design.tuning, device)
        longest = self._prompts.longest(self._subject, design)
        if design.generation == VLLM:
            check_vllm(design.tuning.r, self._subject.device)
        self._judges: list[Judge] = [load_judge(spec, device=self._subject.device) for spec in design.judges]
        if len({judge.name for judge in self._judges}) < len(self._judges):
            raise UsageError("Two of the judges have the same name: rename the folder of one of them.")
        scored = scored_by_all(scorers, progress)
        self._rows = Rows(scorers[0].earlier, self._subject.encoder, progress)
        usable = self._rows.tokens > 0
        kinds = read_kinds(scorers[0].earlier, design.planted) if design.planted is not None else None
        if not (usable & scored).any():
            raise InputError(
                f"None of the {len(scored):,} rows has a score by all scorers and an answer within "
                f"{design.tuning.max_length} tokens: score them again, or raise {option('max_length')}."
            )
        held_out = self._hold_out(np.flatnonzero(usable if kinds is None else usable & (kinds == BENIGN)))
        learned = np.setdiff1d(np.flatnonzero(usable & scored), held_out.rows)
        if not len(learned):
            raise UsageError(
                f"{option('held_out')} {design.held_out:,} leaves no scored row to learn from: choose a smaller number."
            )
        self.rows: EvaluatedRows = {
            "all": len(scored),
            "scored": int(scored.sum()),
            "usable": int(usable.sum()),
            "held_out": len(held_out.rows),
            "learned": len(learned),
        }
        self._held_out = held_out
        self._ranked = {each.name: by_risk(each.risk, learned) for each in scorers}
        self._contaminated: ContaminatedCorpus | None = None
        if kinds is not None:
            cuts = reference_cuts(scorers, design.reference_share, progress)
            self._contaminated = ContaminatedCorpus(kinds, learned, {each.name: each.risk for each in scorers}, cuts)
        self._records: list[RunRecord] = []
        self._windows = {name: self._cut_windows(ranked) for name, ranked in self._ranked.items()}
        self._runner = Runner(dest, design, self._subject, self._rows, held_out, self._prompts, longest, progress)

    @property
    def model(self) -> ModelFacts:
        pack = self._subject.pack
        base = Path(pack.base_model)
        name = base.name if base.is_dir() else pack.base_model
        return {"name": name, "pack": pack.name, "fingerprint": pack.fingerprint}

    @property
    def prompts(self) -> PromptCounts:
        return self._prompts.counts()

    @property
    def device_name(self) -> str:
        return self._subject.device_name

    def settings(self) -> dict[str, object]:
        """The settings that runs must share to be compared, and to be reused."""
        pack = self._subject.pack
        return {
            "model": self.model,
            "weights": content_id(pack.base_model, pack.base_revision),
            "device": self._subject.device.split(":")[0],
            "corpus": self._corpus,
            "held_out": f"{self.rows['held_out']} of {self.rows['usable']} rows ({self._held_out.key(0)})",
            **self._prompts.settings(self._design),
            **self._design.settings(),
            **self._planted(),
        }

    @property
    def prompt_outcomes(self) -> PromptOutcomes | None:
        """The outcomes of the runs so far by prompt; None unless the corpus is contaminated."""
        if self._contaminated is None:
            return None
        of_corpus = ("corpus", "held_out", "planted")  # others for each draw of the rows
        return {
            "model": self.model,
            "sets": self._design.sets(),
            "settings": {name: value for name, value in self.settings().items() if name not in of_corpus},
            "judges": [judge.name for judge in self._judges],
            "prompts": self._prompts.hashes(),
            "runs": self._records,
        }

    def carry_out(self, keep_adapters: bool) -> Iterator[StudyFigures]:
        """Do all runs that are not done yet, seed by seed. Yields the figures so far after each seed."""
        first, untuned = self._judges[0], Run(seed=self._design.seeds[0])
        self._records = []
        outcomes: dict[str, dict[str, list[RunOutcome]]] = {name: {} for name in self._ranked}
        done: dict[str, dict[str, list[str]]] = {name: {} for name in self._ranked}
        judged: dict[str, None] = {}  # keys of runs, in the order of the runs
        for k, seed in enumerate(self._design.seeds, 1):
            tuned = list(self._runs(seed))
            runs = [untuned, *tuned] if k == 1 else tuned
            self._runner.answer(runs, keep_adapters)
            judged |= dict.fromkeys(run.key for run in runs)
            for judge in self._judges:
                self._runner.judge(judge, judged)
            for run in tuned:
                outcomes[run.scorer].setdefault(run.arm, []).append(self._runner.outcome(run, first))
                done[run.scorer].setdefault(run.arm, []).append(run.key)
            if self._contaminated is not None:
                self._records += [self._runner.record(run, self._judges, self._dropped(run)) for run in runs]
            by_prompt = self.prompt_outcomes
            yield {
                "seeds": list(self._design.seeds[:k]),
                "untuned": single_figures(self._runner.outcome(untuned, first)),
                "judges": {"asr": first.name, "agreement": self._agreement(judged)},
                "scorers": self._window_figures(outcomes),
                "arms": self._arm_figures(outcomes),
                "contaminated": contaminated_figures(by_prompt) if by_prompt is not None else {},
                "runs": done,
            }

    def _planted(self) -> dict[str, object]:
        """The setting that says which rows were planted, if some were."""
        if self._contaminated is None:
            return {}
        rows = np.flatnonzero(self._contaminated.kinds != BENIGN).tolist()
        return {"planted": f"{len(rows)} of {self.rows['all']} rows ({digest(rows)})"}

    def _dropped(self, run: Run) -> dict[str, int]:
        """How many rows of each kind an arm drops."""
        assert self._contaminated is not None
        return self._contaminated.dropped(run.chosen.rows) if run.chosen is not None else {}

    def _hold_out(self, usable: np.ndarray) -> TrainingSet:
        """Rows that no model learns from, the same for all scorers and seeds. Raises `UsageError` where too few rows
        are left."""
        wanted = self._design.held_out
        if wanted >= len(usable):
            raise UsageError(
                f"{option('held_out')} {wanted:,} leaves none of the {len(usable):,} rows to learn from: choose a "
                "smaller number."
            )
        chosen = np.random.default_rng(0).choice(usable, wanted, replace=False)
        return TrainingSet.of(chosen, self._rows.tokens)

    def _cut_windows(self, ranked: np.ndarray) -> dict[str, TrainingSet]:
        """The windows of ranked rows by name, S1 first; none where the design has none."""
        design = self._design
        if WINDOWS not in design.arms:
            return {}
        assert design.size is not None
        sets = [TrainingSet.of(rows, self._rows.tokens) for rows in windows(ranked, design.windows, design.size)]
        if design.match_tokens:
            sets = match_tokens(sets)
        return {f"S{k}": each for k, each in enumerate(sets, 1)}

    def _runs(self, seed: int) -> Iterator[Run]:
        for scorer, ranked in self._ranked.items():
            for name, chosen in self._windows[scorer].items():
                yield Run(scorer, name, seed, chosen)
            if CUT in self._design.arms:
                for arm, rows in cut_sets(ranked, self._design.share, seed).items():
                    yield Run(scorer, arm, seed, TrainingSet.of(rows, self._rows.tokens))

            if self._contaminated is not None:
                for contaminated, rows in self._contaminated.sets(scorer, seed).items():
                    yield Run(scorer, contaminated, seed, TrainingSet.of(rows, self._rows.tokens))

    def _agreement(self, keys: Iterable[str]) -> list[AgreementReport]:
        """The agreement of each two judges on these runs' answers to harmful prompts."""
        outcomes = {
            judge.name: [word for key in keys for word in self._runner.harmful_outcomes(judge, key)]
            for judge in self._judges
        }
        return [each.report() for each in agreement(outcomes)]

    def _window_figures(self, outcomes: Outcomes) -> dict[str, WindowFigures]:
        if WINDOWS not in self._design.arms:
            return {}
        return {
            scorer: window_figures([by_set[name] for name in self._windows[scorer]])
            for scorer, by_set in outcomes.items()
        }

    def _arm_figures(self, outcomes: Outcomes) -> dict[str, ArmFigures]:
        if CUT not in self._design.arms:
            return {}
        return {scorer: arm_figures(by_set) for scorer, by_set in outcomes.items()}
