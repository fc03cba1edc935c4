"""The evaluation as a whole: which runs there are, their steps, and what is made of their outcomes."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from sqsd_filter.corpus.addresses import Opener
from sqsd_filter.directions.refusals import read_prompts
from sqsd_filter.errors import InputError, UsageError, option
from sqsd_filter.evaluation.folder import (
    ALIGNED,
    ANSWERS,
    HELD_OUT,
    PICTURE,
    POISONED,
    RESULTS,
    RUNS,
    TRAINING,
    UNTUNED,
    RunFolder,
    check_place,
    claimed,
)
from sqsd_filter.evaluation.model import Answering, Subject, free_memory, held_out_loss
from sqsd_filter.evaluation.plot import CURVES, draw_windows
from sqsd_filter.evaluation.poison import curves, poisoned
from sqsd_filter.evaluation.results import doubts, of_arms, of_one, of_windows
from sqsd_filter.evaluation.scores import (
    Rows,
    Scores,
    corpus_of,
    poison_scores,
    prompts_of,
    read_scores,
    scored_by_all,
)
from sqsd_filter.evaluation.sets import CUT_ARMS, TrainingSet, by_risk, cut_sets, match_tokens, windows
from sqsd_filter.evaluation.settings import CUT, VLLM, WINDOWS, Design
from sqsd_filter.evaluation.vllm_answers import check_vllm, vllm_answers
from sqsd_filter.judges import REFUSED, Judge, agreement, load_judge
from sqsd_filter.pictures import picture
from sqsd_filter.pipeline.report import versions
from sqsd_filter.pipeline.selecting.earlier import Earlier
from sqsd_filter.pipeline.writing.destination import read_json
from sqsd_filter.progress import Progress, Silent
from sqsd_filter.scoring.models import content_id
from sqsd_filter.scoring.pack import load_pack
from sqsd_filter.storage.folder import write_json

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
    check_place(Path(dest))
    with closing(Opener()) as opener:
        scorers = read_scores(scores, opener, progress)
        unsafe = poison_scores(poison, scorers, scores, opener, progress) if poison else []
        study = _Study(design, scorers, pack, device, Path(dest), progress) if design.arms else None
        settings = {"evaluation": EVALUATION, **(study.settings() if study else {})}
        with claimed(Path(dest), settings):
            results: dict[str, Any] = {
                "model": study.model if study else None,
                "corpus": corpus_of(scores[0], scorers[0].earlier),
                "rows": study.counts if study else None,
                "prompts": {"harmful": len(study.harmful), "harmless": len(study.harmless)} if study else None,
                "sets": design.sets(),
                "seeds": [],
                "scorers": {},
                "arms": {},
                **_mixes(scorers, unsafe, Path(dest), progress),
                "warnings": [],
                "settings": settings,
                "machine": _machine(study.subject.device_name if study else None),
            }
            _note_missing(Path(dest), results, [each.name for each in scorers], progress)
            if study is None:
                _write(Path(dest), results)
            for figures in study.carry_out(keep_adapters) if study else ():
                results |= figures
                results["warnings"] = doubts(results)
                _write(Path(dest), results)
    return results


def _note_missing(dest: Path, results: Mapping[str, Any], names: Sequence[str], progress: Progress) -> None:
    """Say what results.json has and will not have any more."""
    known = read_json(dest / RESULTS) or {}
    gone = [name for name in known.get("runs", {}) if name not in names]
    gone += [arm for arm in known.get("sets", {}).get("arms", ()) if arm not in results["sets"]["arms"]]
    if gone:
        progress.note(
            f"{', '.join(gone)}: no more in {RESULTS}, which has what is asked for now; what was done is kept"
        )


def _mixes(scorers: Sequence[Scores], unsafe: Sequence[Earlier], dest: Path, progress: Progress) -> dict[str, Any]:
    """What is found of known unsafe rows; what was looked at before is kept."""
    known = read_json(dest / POISONED) or {}
    found: dict[str, Any] = {"poisoned": {}, "curves": {kind: {} for kind in CURVES if unsafe}}
    for each, one in zip(scorers, unsafe, strict=bool(unsafe)):
        risks = each.risk[each.scored], one.scored.risk[one.scored.scored]
        prompts = prompts_of(one)
        key = _digest([values.tolist() for values in (*risks, prompts)])
        if key not in known:
            progress.note(f"{each.name}: known unsafe rows among the others")
            known[key] = {"poisoned": poisoned(*risks, prompts), "curves": curves(*risks)}
            write_json(dest / POISONED, known)
        found["poisoned"][each.name] = known[key]["poisoned"]
        for kind, points in known[key]["curves"].items():
            found["curves"][kind][each.name] = points
    return found


def _write(dest: Path, results: Mapping[str, Any]) -> None:
    if results["scorers"]:
        with picture(dest / PICTURE, 9, 5) as figure:
            draw_windows(figure, results["scorers"])
    else:
        (dest / PICTURE).unlink(missing_ok=True)
    write_json(dest / RESULTS, results)


@dataclass(frozen=True)
class _Run:
    """One fine-tuning and what is asked after it; without a set of rows the model is asked as it is."""

    scorer: str
    arm: str
    seed: int
    chosen: TrainingSet | None

    @property
    def name(self) -> str:
        return UNTUNED if self.chosen is None else f"{self.scorer} {self.arm}, seed {self.seed}"

    @property
    def key(self) -> str:
        """That of its folder."""
        return UNTUNED if self.chosen is None else self.chosen.key(self.seed)


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
        self.longest = self.subject.longest([*self.harmful, *self.harmless], design.max_new_tokens)
        if design.generation == VLLM:
            check_vllm(design.tuning.r, self.subject.device)
        self.judges: list[Judge] = [load_judge(spec, device=self.subject.device) for spec in design.judges]
        if len({judge.name for judge in self.judges}) < len(self.judges):
            raise UsageError("Two of the judges have one name: rename the folder of one of them.")
        scored = scored_by_all(scorers, progress)
        self.rows = Rows(scorers[0].earlier, self.subject.encoder, progress)
        usable = self.rows.tokens > 0
        if not (usable & scored).any():
            raise InputError(
                f"None of the {len(scored):,} rows has a score by all scorers and an answer within "
                f"{design.tuning.max_length} tokens: score them again, or raise {option('max_length')}."
            )
        self.held_out = self._hold_out(np.flatnonzero(usable))
        learned = np.setdiff1d(np.flatnonzero(usable & scored), self.held_out.rows)
        if not len(learned):
            raise UsageError(
                f"{option('held_out')} {design.held_out:,} leaves no row with a score to learn from: ask for less."
            )
        self.counts = {"all": len(scored), "scored": int(scored.sum()), "usable": int(usable.sum())}
        self.counts |= {"held_out": len(self.held_out.rows), "learned": len(learned)}
        self.ranked = {each.name: by_risk(each.risk, learned) for each in scorers}
        self.windows = {each.name: self._windows(each.name) for each in scorers} if WINDOWS in design.arms else {}

    @property
    def model(self) -> dict[str, Any]:
        pack = self.subject.pack
        base = Path(pack.base_model)
        name = base.name if base.is_dir() else pack.base_model
        return {"name": name, "pack": pack.name, "fingerprint": pack.fingerprint}

    def settings(self) -> dict[str, Any]:
        """What has to be the same for runs to be compared, and for what is done to be kept."""
        told = {"harmful": self.harmful, "harmless": self.harmless}
        prompts = {kind: f"{len(texts)} prompts ({_digest(texts)})" for kind, texts in told.items()}
        pack, device = self.subject.pack, self.subject.device.split(":")[0]
        found = {"model": self.model, "weights": content_id(pack.base_model, pack.base_revision), "device": device}
        held_out = f"{self.counts['held_out']} of {self.counts['usable']} rows ({self.held_out.key(0)})"
        rows = {"corpus": self.scorers[0].corpus, "held_out": held_out}
        return {**found, **rows, **prompts, **self.design.settings()}

    def _hold_out(self, usable: np.ndarray) -> TrainingSet:
        """Rows that no model learns from, whatever the scorers and seeds. Raises `UsageError` where there aren't
        enough."""
        wanted = self.design.held_out
        if wanted >= len(usable):
            raise UsageError(
                f"{option('held_out')} {wanted:,} leaves none of the {len(usable):,} rows to learn from: ask for less."
            )
        chosen = np.random.default_rng(0).choice(usable, wanted, replace=False)
        return TrainingSet.of(chosen, self.rows.tokens)

    def _windows(self, scorer: str) -> dict[str, TrainingSet]:
        design = self.design
        assert design.size is not None
        found = [
            TrainingSet.of(rows, self.rows.tokens) for rows in windows(self.ranked[scorer], design.windows, design.size)
        ]
        found = match_tokens(found) if design.match_tokens else found
        return {f"S{k}": each for k, each in enumerate(found, 1)}

    def _runs(self, seed: int) -> Iterator[_Run]:
        for scorer, ranked in self.ranked.items():
            for arm, chosen in self.windows.get(scorer, {}).items():
                yield _Run(scorer, arm, seed, chosen)
            if CUT in self.design.arms:
                for arm, rows in cut_sets(ranked, self.design.share, seed).items():
                    yield _Run(scorer, arm, seed, TrainingSet.of(rows, self.rows.tokens))

    def carry_out(self, keep_adapters: bool) -> Iterator[dict[str, Any]]:
        """Do all runs that are not done yet, seed by seed; after each seed the figures so far."""
        untuned = _Run("", "", 0, None)
        outcomes: dict[str, dict[str, list[dict[str, Any]]]] = {name: {} for name in self.ranked}
        done: dict[str, dict[str, list[str]]] = {name: {} for name in self.ranked}
        judged_runs: dict[str, None] = {}  # in their order
        for k, seed in enumerate(self.design.seeds, 1):
            runs = [*([untuned] if k == 1 else []), *self._runs(seed)]
            self._carry_out(runs, keep_adapters)
            judged_runs |= dict.fromkeys(run.key for run in runs)
            for judge in self.judges:
                self._judge(judge, judged_runs)
            for run in runs:
                if run is untuned:
                    continue
                outcomes[run.scorer].setdefault(run.arm, []).append(self._outcome(run))
                done[run.scorer].setdefault(run.arm, []).append(run.key)
            yield {
                "seeds": list(self.design.seeds[:k]),
                "untuned": of_one(self._outcome(untuned)),
                "judges": {"asr": self.judges[0].name, "agreement": self._agreement(judged_runs)},
                **self._figures(outcomes),
                "runs": done,
            }

    def _agreement(self, keys: Iterable[str]) -> list[dict[str, Any]]:
        """Of each two judges, on the answers to harmful prompts of these runs."""
        outcomes = {
            judge.name: [word for key in keys for word in self._words(judge, key)[: len(self.harmful)]]
            for judge in self.judges
        }
        return [each.report() for each in agreement(outcomes)]

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

    def _folder(self, key: str) -> RunFolder:
        return RunFolder(self.dest / RUNS / key)

    def _carry_out(self, runs: Sequence[_Run], keep_adapters: bool) -> None:
        """The steps of these runs that are not done yet, up to their answers."""
        numbered = [(f"run {k} of {len(runs)} with this seed", run) for k, run in enumerate(runs, 1)]
        together = self.design.generation == VLLM  # its engine takes long to start
        for some in [numbered] if together else [[one] for one in numbered]:
            for number, run in some:
                folder = self._folder(run.key)
                if not folder.has(HELD_OUT):
                    self.progress.note(f"{run.name}: {number}")
                    self._fine_tune(run, folder, keep_adapters)
                    self._hold_against(run, folder)
                    free_memory()
            if waiting := {run.key: run for _, run in some if not self._folder(run.key).has(ANSWERS)}:
                with self._answering() as answering:
                    for run in waiting.values():
                        self._ask(run, answering)
            for _, run in some:
                self._folder(run.key).clear()

    def _fine_tune(self, run: _Run, folder: RunFolder, keep_adapters: bool) -> None:
        if run.chosen is None or folder.has(TRAINING):
            return
        rows = self.rows.encoded(run.chosen)
        record = self.subject.fine_tune(run.name, rows, run.seed, folder.checkpoints, folder.adapter, self.progress)
        folder.write_training({**record, "keeps_adapter": keep_adapters})

    def _hold_against(self, run: _Run, folder: RunFolder) -> None:
        """The loss on the held-out rows."""
        held_out = self.rows.encoded(self.held_out)
        with self.subject.tuned(self._adapter(run)) if held_out else nullcontext() as model:
            loss = held_out_loss(model, held_out) if held_out else None
        folder.write(HELD_OUT, {"rows": len(held_out), "loss": loss})

    def _adapter(self, run: _Run) -> Path | None:
        return self._folder(run.key).adapter if run.chosen is not None else None

    def _answering(self) -> AbstractContextManager[Answering]:
        """What gives the answers to all prompts."""
        if self.design.generation == VLLM:
            return vllm_answers(self.subject, self.dest / ALIGNED, self.longest)
        return nullcontext(self.subject.answers)

    def _ask(self, run: _Run, answering: Answering) -> None:
        prompts = [*self.harmful, *self.harmless]
        texts = answering(self._adapter(run), prompts, self.design.max_new_tokens)
        self._folder(run.key).write_answers(
            [
                {"harmful": k < len(self.harmful), "prompt": prompt, "answer": text}
                for k, (prompt, text) in enumerate(zip(prompts, texts, strict=True))
            ]
        )

    def _judge(self, judge: Judge, keys: Iterable[str]) -> None:
        """Have the answers of several runs judged at once."""
        folders = [folder for folder in map(self._folder, sorted(keys)) if not folder.has(judged(judge))]
        asked = [folder.answers() for folder in folders]
        entries = [entry for answers in asked for entry in answers]
        if not entries:
            return
        words = iter(judge.judge([each["prompt"] for each in entries], [each["answer"] for each in entries]))
        for folder, answers in zip(folders, asked, strict=True):
            folder.write(judged(judge), {"judge": judge.name, "outcomes": list(islice(words, len(answers)))})

    def _words(self, judge: Judge, key: str) -> list[str]:
        """The outcomes of a run's answers, those to harmful prompts first."""
        outcomes: list[str] = self._folder(key).read(judged(judge))["outcomes"]
        return outcomes

    def _outcome(self, run: _Run) -> dict[str, Any]:
        words = self._words(self.judges[0], run.key)
        harmful, harmless = words[: len(self.harmful)], words[len(self.harmful) :]
        return {
            "rows": len(run.chosen.rows) if run.chosen is not None else 0,
            "tokens": run.chosen.total if run.chosen is not None else 0,
            "outcomes": harmful,
            "over_refusal": harmless.count(REFUSED) / len(harmless) if harmless else None,
            "loss": self._folder(run.key).read(HELD_OUT)["loss"],
        }


def judged(judge: Judge) -> str:
    """The file with a judge's outcomes."""
    return f"judged-{judge.fingerprint}.json"


def _digest(values: Sequence[Any]) -> str:
    return hashlib.blake2b(json.dumps(values).encode(), digest_size=8).hexdigest()


def _machine(device: str | None) -> dict[str, Any]:
    found = {"processor": platform.machine(), "cpus": os.cpu_count(), "device": device}
    return found | {"versions": versions("peft", "trl")}
