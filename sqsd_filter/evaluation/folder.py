"""The folder of an evaluation. Its runs are done one step after the other, and each step once.

results.json, asr.png                       the figures of the seeds that are done so far
outcomes.json                               for a contaminated corpus: the outcome of each answer, without texts
poisoned.json                               how known unsafe rows rank among the others, by a hash of the risks
settings.json                               what the evaluation is
runs/untuned/                               the model before any fine-tuning
runs/<digits>/                              the model after a fine-tuning; results.json says after which
    training.json, adapter/                 how the model was fine-tuned, and the LoRA
    held_out.json                           the loss on held-out rows
    solutions.jsonl                         every answer to a question with a known answer, and whether it is right
    answers.jsonl                           every other answer
    judged-<judge>.json                     the outcome of each answer, in their order, by each judge asked
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypedDict

from sqsd_filter.errors import DestinationExists, InputError, option
from sqsd_filter.judges import Judge
from sqsd_filter.pipeline.writing.destination import difference, lock_run, read_json
from sqsd_filter.storage.folder import sweep, write_json, write_text

RESULTS, PICTURE, SETTINGS, RUNS, LOCK = "results.json", "asr.png", "settings.json", "runs", "lock"
POISONED, UNTUNED = "poisoned.json", "untuned"
TRAINING, HELD_OUT, ANSWERS = "training.json", "held_out.json", "answers.jsonl"
OUTCOMES, SOLUTIONS = "outcomes.json", "solutions.jsonl"
ANSWER_SETTINGS = ("harmful", "harmless", "questions", "max_new_tokens", "generation")  # they change answers only
ADAPTER, CHECKPOINTS, ALIGNED = "adapter", ".checkpoints", ".aligned"


class Answer(TypedDict):
    """A line of answers.jsonl."""

    harmful: bool
    prompt: str
    answer: str


class Solution(TypedDict):
    """A line of solutions.jsonl."""

    prompt: str
    answer: str
    known: str
    right: bool


def check_destination(dest: Path) -> None:
    """Raise `DestinationExists` or `InputError` where the folder can't be made."""
    if dest.exists() and not dest.is_dir():
        raise DestinationExists(f"{dest} is a file: name a folder as DEST, which comes last.")
    if not dest.absolute().parent.is_dir():
        raise InputError(f"The folder {dest.absolute().parent} does not exist: create it first.")


@contextmanager
def claimed(dest: Path, settings: Mapping[str, object]) -> Iterator[None]:
    """Hold the folder for this evaluation; no other process gets it until the end.

    Raises `DestinationExists` where the folder holds anything else, and names the settings that differ. Until a model
    is trained all settings may change. Until a model has answered, those of the answers may.
    """
    known = read_json(dest / SETTINGS) or {}
    if not known and dest.is_dir() and {path.name for path in dest.iterdir()} - {LOCK}:
        raise DestinationExists(f"{dest} holds other files: choose another folder.")
    fixed = _fixed(dest, known)
    if fixed.keys() - settings.keys():
        raise DestinationExists(
            f"{dest} has fine-tunings, which would be missing in its {RESULTS}: name their {option('arms')}, or choose "
            "another folder."
        )
    asked = {name: settings.get(name) for name in fixed}
    if asked != fixed:
        raise DestinationExists(
            f"{dest} holds another evaluation ({difference(fixed, asked)}): choose another folder or remove it."
        )
    dest.mkdir(exist_ok=True)
    with lock_run(dest / LOCK, dest):
        sweep(dest)
        shutil.rmtree(dest / ALIGNED, ignore_errors=True)  # left by a killed process
        if not fixed:
            shutil.rmtree(dest / RUNS, ignore_errors=True)
            (dest / POISONED).unlink(missing_ok=True)
        write_json(dest / SETTINGS, settings)
        yield


def _fixed(dest: Path, known: Mapping[str, object]) -> Mapping[str, object]:
    """The known settings that may no longer change, because files in the folder depend on them."""
    ended = (dest / RESULTS).is_file()
    if not ended and not any((dest / RUNS).glob(f"*/{TRAINING}")):
        return {}
    answered = ended or any(any((dest / RUNS).glob(f"*/{name}")) for name in (SOLUTIONS, ANSWERS))
    if "harmful" in known:
        known = {"questions": None, **known}  # as it was before there were any
    return known if answered else {name: value for name, value in known.items() if name not in ANSWER_SETTINGS}


class RunFolder:
    """The files of one run."""

    def __init__(self, path: Path) -> None:
        self._path = path
        path.mkdir(parents=True, exist_ok=True)
        sweep(path)

    @property
    def adapter(self) -> Path:
        return self._path / ADAPTER

    @property
    def checkpoints(self) -> Path:
        return self._path / CHECKPOINTS

    def has(self, name: str) -> bool:
        return (self._path / name).is_file()

    def write_training(self, record: Mapping[str, object], *, keeps_adapter: bool) -> None:
        """Record that the adapter is complete, and remove its checkpoints."""
        write_json(self._path / TRAINING, {**record, "keeps_adapter": keeps_adapter})
        shutil.rmtree(self.checkpoints, ignore_errors=True)

    def write_loss(self, loss: float | None, rows: int) -> None:
        """Keep the mean loss, and the number of held-out `rows`."""
        write_json(self._path / HELD_OUT, {"rows": rows, "loss": loss})

    def loss(self) -> float | None:
        loss: float | None = self._read(HELD_OUT)["loss"]
        return loss

    def write_answers(self, answers: Sequence[Answer]) -> None:
        self._write_lines(ANSWERS, answers)

    def answers(self) -> list[Answer]:
        return self._read_lines(ANSWERS)

    def write_solutions(self, solutions: Sequence[Solution]) -> None:
        self._write_lines(SOLUTIONS, solutions)

    def solutions(self) -> list[Solution]:
        """Empty where no question was asked."""
        return self._read_lines(SOLUTIONS) if self.has(SOLUTIONS) else []

    def write_outcomes(self, judge: Judge, outcomes: Sequence[str]) -> None:
        write_json(self._path / judged_file(judge), {"judge": judge.name, "outcomes": outcomes})

    def outcomes(self, judge: Judge) -> list[str]:
        """The outcome of each answer, in their order."""
        outcomes: list[str] = self._read(judged_file(judge))["outcomes"]
        return outcomes

    def clear(self) -> None:
        """Remove what a run with all its answers no longer needs: its checkpoints, and the adapter unless it was
        trained to be kept."""
        shutil.rmtree(self.checkpoints, ignore_errors=True)
        if not (self.has(TRAINING) and self._read(TRAINING)["keeps_adapter"]):
            shutil.rmtree(self.adapter, ignore_errors=True)

    def _write_lines(self, name: str, lines: Sequence[Answer] | Sequence[Solution]) -> None:
        write_text(self._path / name, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))

    def _read_lines(self, name: str) -> list[Any]:
        with (self._path / name).open(encoding="utf-8") as lines:
            return [json.loads(line) for line in lines]

    def _read(self, name: str) -> dict[str, Any]:
        content: dict[str, Any] = json.loads((self._path / name).read_text(encoding="utf-8"))
        return content


def digest(values: Sequence[object]) -> str:
    """16 hex digits, a hash of JSON values."""
    return hashlib.blake2b(json.dumps(values).encode(), digest_size=8).hexdigest()


def judged_file(judge: Judge) -> str:
    """The file with a judge's outcomes."""
    return f"judged-{judge.fingerprint}.json"
