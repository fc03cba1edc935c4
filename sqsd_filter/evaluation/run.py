"""The evaluation as a whole: which runs there are, their steps, and what is made of their outcomes."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sqsd_filter.directions.judges import REFUSED, Judge, load_judge
from sqsd_filter.directions.pack import load_pack
from sqsd_filter.directions.refusals import read_prompts
from sqsd_filter.errors import InputError, UsageError, option
from sqsd_filter.evaluation.folder import (
    ANSWERS,
    HELD_OUT,
    OUTCOME,
    PICTURE,
    RESULTS,
    RUNS,
    TRAINING,
    RunFolder,
    claimed,
    write_json,
)
from sqsd_filter.evaluation.model import Subject, held_out_loss
from sqsd_filter.evaluation.plot import CURVES, draw_windows
from sqsd_filter.evaluation.poison import curves, poisoned
from sqsd_filter.evaluation.results import of_arms, of_windows
from sqsd_filter.evaluation.scores import Rows, Scores, corpus_of, poison_scores, read_scores
from sqsd_filter.evaluation.sets import CUT_ARMS, TrainingSet, by_risk, cut_sets, match_tokens, windows
from sqsd_filter.evaluation.settings import CUT, WINDOWS, Design
from sqsd_filter.pictures import picture
from sqsd_filter.pipeline.reading.addresses import Opener
from sqsd_filter.pipeline.writing.report import versions
from sqsd_filter.progress import Progress, Silent

EVALUATION = 1  # to be raised whenever a change gives other figures


def evaluate(
    scores: Sequence[str | Path],
    dest: str | Path,
    design: Design,
    *,
    pack: str | Path = "smollm2-135m",
    poison: Sequence[str | Path] = (),
    keep_adapters: bool = False,
    device: str | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Fine-tune the pack's aligned model on rows of high and of low risk, and see how often it then answers harmful
    prompts; and without any training, see whether the risk finds known unsafe rows among these.

    `scores` are files or folders that scoring the same rows by one or several scorers left. `pack` names the model and
    what is merged into it to align it; the scores may be another pack's. `poison` are scores of known unsafe rows, one
    for each of `scores`.

    Writes to the folder `dest` and returns what is in its results.json. The same call goes on where it was interrupted.
    Raises `DestinationExists` where `dest` holds anything else, `InputError`, `PackError`, `ModelError`, `UsageError`.
    """
    if not design.arms and not poison:
        raise UsageError(f"Nothing is to be done: name {option('arms')} to train, or {option('poison')}.")
    progress = progress or Silent()
    with closing(Opener()) as opener:
        scorers = read_scores(scores, opener, progress)
        unsafe = poison_scores(poison, scorers, scores, opener, progress) if poison else []
        study = _Study(design, scorers, pack, device, Path(dest), progress) if design.arms else None
        settings: dict[str, Any] = {"evaluation": EVALUATION, **design.settings()}
        settings |= {"scores": [[each.name, each.digest] for each in scorers], **(study.settings() if study else {})}
        if poison:
            settings["poison"] = [_digest(one.scored.risk[one.scored.scored].tolist()) for one in unsafe]
        settings = json.loads(json.dumps(settings))
        risks = {
            each.name: (each.risk[each.scored], one.scored.risk[one.scored.scored])
            for each, one in zip(scorers, unsafe, strict=bool(poison))
        }
        drawn = {name: curves(*pair) for name, pair in risks.items()}
        with claimed(Path(dest), settings):
            results: dict[str, Any] = {
                "model": study.model if study else None,
                "corpus": corpus_of(scores[0], scorers[0].earlier),
                "seeds": [] if study else list(design.seeds),
                "scorers": {},
                "arms": {},
                "poisoned": {name: poisoned(*pair, design.seeds[0]) for name, pair in risks.items()},
                "curves": {kind: {name: each[kind] for name, each in drawn.items()} for kind in CURVES},
                "settings": settings,
                "machine": _machine(study.subject.device_name if study else None),
            }
            if study is None or not (Path(dest) / RESULTS).is_file():
                _write(Path(dest), results)
            for figures in study.carry_out(keep_adapters) if study else ():
                results |= figures
                _write(Path(dest), results)
    return results


def _write(dest: Path, results: Mapping[str, Any]) -> None:
    if results["scorers"]:
        with picture(dest / PICTURE, 9, 5) as figure:
            draw_windows(figure, results["scorers"])
    write_json(dest / RESULTS, results)


@dataclass(frozen=True)
class _Run:
    """One fine-tuning and what is asked after it."""

    scorer: str
    arm: str
    seed: int
    chosen: TrainingSet

    @property
    def name(self) -> str:
        return f"{self.scorer}/{self.arm}/seed-{self.seed}"


class _Study:
    """The fine-tunings of an evaluation."""

    def __init__(
        self,
        design: Design,
        scorers: Sequence[Scores],
        pack: str | Path,
        device: str | None,
        dest: Path,
        progress: Progress,
    ) -> None:
        """Reads and checks all that is needed before anything is trained."""
        assert design.harmful is not None
        self.design, self.scorers, self.dest, self.progress = design, scorers, dest, progress
        self.harmful = read_prompts(design.harmful, design.prompts)
        self.harmless = read_prompts(design.harmless, design.prompts) if design.harmless is not None else []
        self.subject = Subject.of(load_pack(pack), design.tuning, device)
        self.subject.check_prompts([*self.harmful, *self.harmless], design.max_new_tokens)
        self.judge: Judge = load_judge(design.judge, device=self.subject.device)
        scored = np.logical_and.reduce([each.scored for each in scorers])
        self.rows = Rows(scorers[0].earlier, scored, self.subject.encoder, progress)
        usable = np.flatnonzero(self.rows.tokens)
        if not len(usable):
            raise InputError(
                f"None of the {len(scored):,} rows has a score by all scorers and an answer within "
                f"{design.tuning.max_length} tokens: score them again, or raise {option('max_length')}."
            )
        self.ranked = {each.name: by_risk(each.risk, usable) for each in scorers}
        self.windows = {each.name: self._windows(each.name) for each in scorers} if WINDOWS in design.arms else {}
        self.held_out = self._hold_out(usable)

    @property
    def model(self) -> dict[str, Any]:
        pack = self.subject.pack
        base = Path(pack.base_model)
        name = base.name if base.is_dir() else pack.base_model
        return {"name": name, "pack": pack.name, "fingerprint": pack.fingerprint}

    def settings(self) -> dict[str, Any]:
        """What has to be the same for a run to go on, beside the design."""
        told = {"harmful": self.harmful, "harmless": self.harmless}
        prompts = {kind: f"{len(texts)} prompts ({_digest(texts)})" for kind, texts in told.items()}
        device = self.subject.device.split(":")[0]
        return {"model": self.model, "device": device, "judge": self.judge.name, **prompts}

    def _windows(self, scorer: str) -> dict[str, TrainingSet]:
        design = self.design
        assert design.size is not None
        found = [
            TrainingSet.of(rows, self.rows.tokens) for rows in windows(self.ranked[scorer], design.windows, design.size)
        ]
        found = match_tokens(found) if design.match_tokens else found
        return {f"S{k}": each for k, each in enumerate(found, 1)}

    def _hold_out(self, usable: np.ndarray) -> TrainingSet:
        """Rows that no model learns from, the same for all. Raises `UsageError` where there aren't enough."""
        taken = [each.rows for found in self.windows.values() for each in found.values()]
        if CUT in self.design.arms:
            nothing = usable[:0]
            taken += [cut_sets(ranked, self.design.share, nothing, 0)["dropped"] for ranked in self.ranked.values()]
        free = np.setdiff1d(usable, np.concatenate(taken))
        wanted = self.design.held_out
        if wanted > len(free):
            raise UsageError(
                f"Only {len(free):,} rows are in no window and not dropped, which is less than {option('held_out')} "
                f"{wanted:,}: hold out fewer, or make the windows smaller."
            )
        chosen = np.random.default_rng(self.design.seeds[0]).choice(free, wanted, replace=False)
        return TrainingSet.of(chosen, self.rows.tokens)

    def _runs(self, seed: int) -> Iterator[_Run]:
        for scorer, ranked in self.ranked.items():
            for arm, chosen in self.windows.get(scorer, {}).items():
                yield _Run(scorer, arm, seed, chosen)
            if CUT in self.design.arms:
                for arm, rows in cut_sets(ranked, self.design.share, self.held_out.rows, seed).items():
                    yield _Run(scorer, arm, seed, TrainingSet.of(rows, self.rows.tokens))

    def carry_out(self, keep_adapters: bool) -> Iterator[dict[str, Any]]:
        """Do all runs that are not done yet, seed by seed; after each such seed, and in the end, the figures so far."""
        outcomes: dict[str, dict[str, list[dict[str, Any]]]] = {name: {} for name in self.ranked}
        done: dict[str, RunFolder] = {}
        for k, seed in enumerate(self.design.seeds, 1):
            runs, news = list(self._runs(seed)), False
            for number, run in enumerate(runs, 1):
                folder, key = RunFolder(self.dest / RUNS / run.name), run.chosen.key(seed)
                if not folder.has(OUTCOME):
                    news = True
                    if key in done:
                        folder.copy_from(done[key])
                    else:
                        self.progress.note(f"{run.name}: run {number} of {len(runs)} with this seed")
                        self._carry_out(run, folder)
                folder.clear(keep_adapter=keep_adapters)
                done.setdefault(key, folder)
                outcomes[run.scorer].setdefault(run.arm, []).append(folder.read(OUTCOME))
            if news or k == len(self.design.seeds):
                yield {"seeds": list(self.design.seeds[:k]), **self._figures(outcomes)}

    def _figures(self, outcomes: Mapping[str, Mapping[str, Sequence[Any]]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        if WINDOWS in self.design.arms:
            found["scorers"] = {
                scorer: of_windows([arms[name] for name in self.windows[scorer]]) for scorer, arms in outcomes.items()
            }
        if CUT in self.design.arms:
            found["arms"] = {
                scorer: of_arms({name: arms[name] for name in CUT_ARMS}) for scorer, arms in outcomes.items()
            }
        return found

    def _carry_out(self, run: _Run, folder: RunFolder) -> None:
        """The steps of a run that are not done yet."""
        chosen = run.chosen
        trains = len(chosen.rows) > 0
        if trains and not folder.has(TRAINING):
            record = self.subject.fine_tune(
                run.name,
                self.rows.encoded(chosen),
                run.seed,
                folder.checkpoints,
                folder.adapter,
                self.progress,
            )
            folder.write(TRAINING, record)
        if not folder.has(ANSWERS):
            self._ask(folder, folder.adapter if trains else None)
        answers = self._judged(folder)
        harmful = [entry["outcome"] for entry in answers if entry["harmful"]]
        refused = [entry["outcome"] == REFUSED for entry in answers if not entry["harmful"]]
        outcome = {
            "rows": len(chosen.rows),
            "tokens": chosen.total,
            "outcomes": harmful,
            "over_refusal": sum(refused) / len(refused) if refused else None,
            "loss": folder.read(HELD_OUT)["loss"],
        }
        folder.write(OUTCOME, outcome)

    def _ask(self, folder: RunFolder, adapter: Path | None) -> None:
        """The loss on the held-out rows, then the answers to all prompts."""
        with self.subject.tuned(adapter) as model:
            if not folder.has(HELD_OUT):
                held_out = self.rows.encoded(self.held_out)
                loss = held_out_loss(model, held_out) if held_out else None
                folder.write(HELD_OUT, {"rows": len(held_out), "loss": loss})
            prompts = [*self.harmful, *self.harmless]
            texts = self.subject.answers(model, prompts, self.design.max_new_tokens)
        folder.write_answers(
            [
                {"harmful": k < len(self.harmful), "prompt": prompt, "answer": text, "outcome": None}
                for k, (prompt, text) in enumerate(zip(prompts, texts, strict=True))
            ]
        )

    def _judged(self, folder: RunFolder) -> list[dict[str, Any]]:
        answers = folder.answers()
        if all(entry["outcome"] is not None for entry in answers):
            return answers
        words = self.judge.judge([entry["prompt"] for entry in answers], [entry["answer"] for entry in answers])
        answers = [entry | {"outcome": word} for entry, word in zip(answers, words, strict=True)]
        folder.write_answers(answers)
        return answers


def _digest(values: Sequence[Any]) -> str:
    return hashlib.blake2b(json.dumps(values).encode(), digest_size=8).hexdigest()


def _machine(device: str | None) -> dict[str, Any]:
    found = {"processor": platform.machine(), "cpus": os.cpu_count(), "device": device}
    return found | {"versions": versions("peft", "trl")}
