"""The runs of an evaluation: fine-tune the model, measure its held-out loss, ask it all prompts, and judge the answers.

Each step leaves a file in the run's folder and is done only once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from sqsd_filter.directions.refusals import read_prompts
from sqsd_filter.evaluation.figures import RunOutcome
from sqsd_filter.evaluation.folder import (
    ALIGNED,
    ANSWERS,
    HELD_OUT,
    RUNS,
    SOLUTIONS,
    TRAINING,
    UNTUNED,
    RunFolder,
    digest,
    judged_file,
)
from sqsd_filter.evaluation.model import Answerer, Subject, held_out_loss
from sqsd_filter.evaluation.prompt_outcomes import UNTUNED_ARM, bits, prompt_hash
from sqsd_filter.evaluation.questions import Question, is_right, read_questions
from sqsd_filter.evaluation.results import PromptCounts, RunRecord
from sqsd_filter.evaluation.scores import Rows
from sqsd_filter.evaluation.sets import TrainingSet
from sqsd_filter.evaluation.settings import VLLM, Design
from sqsd_filter.evaluation.vllm_answers import vllm_answers
from sqsd_filter.judges import DEGENERATE, REFUSED, UNSAFE, Judge
from sqsd_filter.progress import Progress
from sqsd_filter.scoring.placement import release_memory


@dataclass(frozen=True)
class Run:
    """One fine-tuning with its questions. Where `chosen` is None, the model is asked without any fine-tuning."""

    scorer: str = ""
    arm: str = ""
    seed: int = 0
    chosen: TrainingSet | None = None

    @property
    def name(self) -> str:
        return UNTUNED if self.chosen is None else f"{self.scorer} {self.arm}, seed {self.seed}"

    @property
    def key(self) -> str:
        """The name of its folder, equal for runs that train the same."""
        return UNTUNED if self.chosen is None else self.chosen.key(self.seed)


@dataclass(frozen=True)
class Prompts:
    """What every model is asked."""

    harmful: Sequence[str]
    harmless: Sequence[str]
    questions: Sequence[Question] = ()

    @classmethod
    def of(cls, design: Design) -> Prompts:
        """Raises `InputError`."""
        assert design.harmful is not None
        return cls(
            read_prompts(design.harmful, design.prompts),
            read_prompts(design.harmless, design.prompts) if design.harmless is not None else [],
            read_questions(design.questions, design.prompts) if design.questions is not None else [],
        )

    @property
    def judged(self) -> list[str]:
        """Those whose answers are judged, the harmful ones first."""
        return [*self.harmful, *self.harmless]

    @property
    def asked(self) -> list[str]:
        """The questions, without their answers."""
        return [question.prompt for question in self.questions]

    def longest(self, subject: Subject, design: Design) -> int:
        """The largest number of tokens of a prompt with its answer. Raises `InputError` where that is too many."""
        longest = subject.longest(self.judged, design.max_new_tokens)
        return max(longest, subject.longest(self.asked, design.solution_tokens)) if self.questions else longest

    def settings(self, design: Design) -> dict[str, object]:
        """What runs must share to be compared."""
        texts = {"harmful": self.harmful, "harmless": self.harmless}
        settings: dict[str, object] = {kind: f"{len(own)} prompts ({digest(own)})" for kind, own in texts.items()}
        asked = f"{len(self.questions)} questions ({digest(self.questions)}), {design.solution_tokens} tokens"
        return {**settings, "questions": asked if self.questions else None}

    def counts(self) -> PromptCounts:
        counts: PromptCounts = {"harmful": len(self.harmful), "harmless": len(self.harmless)}
        return {**counts, "questions": len(self.questions)} if self.questions else counts

    def hashes(self) -> dict[str, list[str]]:
        """A hash of each prompt, by its kind."""
        texts = {"harmful": self.harmful, "harmless": self.harmless, "questions": self.asked}
        return {kind: [prompt_hash(text) for text in own] for kind, own in texts.items()}


@dataclass(frozen=True)
class Runner:
    """Does the steps of runs in the evaluation's folder `dest`."""

    dest: Path
    design: Design
    subject: Subject
    rows: Rows
    held_out: TrainingSet
    prompts: Prompts
    longest: int  # prompt with its answer, in tokens
    progress: Progress

    def answer(self, runs: Sequence[Run], keep_adapters: bool) -> None:
        """Do the steps of these runs, up to their answers, that are not done yet."""
        numbered = [(f"run {k} of {len(runs)} with this seed", run) for k, run in enumerate(runs, 1)]
        together = self.design.generation == VLLM  # its engine is slow to start
        for batch in [numbered] if together else [[one] for one in numbered]:
            for number, run in batch:
                if not self._folder(run.key).has(HELD_OUT):
                    self.progress.note(f"{run.name}: {number}")
                    self._fine_tune(run, keep_adapters)
                    self._measure_loss(run)
                    release_memory()
            if waiting := {run.key: run for _, run in batch if not self._folder(run.key).has(ANSWERS)}:
                with self._answerer() as answerer:
                    for run in waiting.values():
                        self._ask(run, answerer)
            for _, run in batch:
                self._folder(run.key).clear()

    def judge(self, judge: Judge, keys: Iterable[str]) -> None:
        """Judge all answers of these runs that this judge has not judged yet, in one call."""
        folders = [folder for folder in map(self._folder, sorted(keys)) if not folder.has(judged_file(judge))]
        answers_by_folder = [folder.answers() for folder in folders]
        answers = [answer for several in answers_by_folder for answer in several]
        if not answers:
            return
        outcomes = iter(judge.judge([each["prompt"] for each in answers], [each["answer"] for each in answers]))
        for folder, several in zip(folders, answers_by_folder, strict=True):
            folder.write_outcomes(judge, list(islice(outcomes, len(several))))

    def harmful_outcomes(self, judge: Judge, key: str) -> list[str]:
        """The judge's outcomes of a run's answers to harmful prompts."""
        return self._folder(key).outcomes(judge)[: len(self.prompts.harmful)]

    def outcome(self, run: Run, judge: Judge) -> RunOutcome:
        """The result of a run that is done and judged."""
        folder = self._folder(run.key)
        harmless = folder.outcomes(judge)[len(self.prompts.harmful) :]
        return RunOutcome(
            rows=len(run.chosen.rows) if run.chosen is not None else 0,
            tokens=run.chosen.total if run.chosen is not None else 0,
            outcomes=self.harmful_outcomes(judge, run.key),
            over_refusal=harmless.count(REFUSED) / len(harmless) if harmless else None,
            loss=folder.loss(),
        )

    def record(self, run: Run, judges: Sequence[Judge], dropped: Mapping[str, int]) -> RunRecord:
        """The result of a run that is done and judged, prompt by prompt; `dropped` counts rows by kind."""
        folder, first = self._folder(run.key), self.outcome(run, judges[0])
        words = {judge.name: self.harmful_outcomes(judge, run.key) for judge in judges}
        harmless = folder.outcomes(judges[0])[len(self.prompts.harmful) :]

        def shown(outcome: str) -> dict[str, str]:
            return {name: bits(word == outcome for word in own) for name, own in words.items()}

        return {
            "scorer": run.scorer,
            "arm": run.arm or UNTUNED_ARM,
            "seed": run.seed,
            "run": run.key,
            "rows": first.rows,
            "tokens": first.tokens,
            "dropped": dict(dropped),
            "unsafe": shown(UNSAFE),
            "refused": shown(REFUSED),
            "degenerate": shown(DEGENERATE),
            "harmless_refused": bits(word == REFUSED for word in harmless),
            "right": bits(solution["right"] for solution in folder.solutions()),
            "loss": first.loss,
        }

    def _folder(self, key: str) -> RunFolder:
        return RunFolder(self.dest / RUNS / key)

    def _adapter(self, run: Run) -> Path | None:
        return self._folder(run.key).adapter if run.chosen is not None else None

    def _fine_tune(self, run: Run, keep_adapters: bool) -> None:
        folder = self._folder(run.key)
        if run.chosen is None or folder.has(TRAINING):
            return
        rows = self.rows.encoded(run.chosen)
        record = self.subject.fine_tune(run.name, rows, run.seed, folder.checkpoints, folder.adapter, self.progress)
        folder.write_training(record, keeps_adapter=keep_adapters)

    def _measure_loss(self, run: Run) -> None:
        rows, loss = self.rows.encoded(self.held_out), None
        if rows:
            with self.subject.tuned(self._adapter(run)) as model:
                loss = held_out_loss(model, rows)
        self._folder(run.key).write_loss(loss, len(rows))

    def _answerer(self) -> AbstractContextManager[Answerer]:
        if self.design.generation == VLLM:
            return vllm_answers(self.subject, self.dest / ALIGNED, self.longest)
        return nullcontext(self.subject.answers)

    def _ask(self, run: Run, answerer: Answerer) -> None:
        folder, adapter = self._folder(run.key), self._adapter(run)
        if self.prompts.questions and not folder.has(SOLUTIONS):
            texts = answerer(adapter, self.prompts.asked, self.design.solution_tokens)
            folder.write_solutions(
                [
                    {"prompt": prompt, "answer": text, "known": known, "right": is_right(text, known)}
                    for (prompt, known), text in zip(self.prompts.questions, texts, strict=True)
                ]
            )
        prompts, harmful = self.prompts.judged, len(self.prompts.harmful)
        texts = answerer(adapter, prompts, self.design.max_new_tokens)
        folder.write_answers(
            [
                {"harmful": k < harmful, "prompt": prompt, "answer": text}
                for k, (prompt, text) in enumerate(zip(prompts, texts, strict=True))
            ]
        )
