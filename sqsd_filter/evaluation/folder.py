"""The folder of an evaluation, whose runs are done one step after the other and once.

results.json, asr.png                       what came out, of the seeds that are done so far
poisoned.json                               what was found of known unsafe rows, by what was looked at
settings.json                               what the evaluation is
runs/untuned/                               the model as it is
runs/<digits>/                              the model after a fine-tuning: results.json says which
    training.json, adapter/                 how the model was fine-tuned, and the LoRA that came out of it
    held_out.json                           the loss on held-out rows
    answers.jsonl                           every answer
    judged-<judge>.json                     the outcome of each, in their order, by each judge that was asked
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqsd_filter.errors import DestinationExists, InputError, option
from sqsd_filter.pipeline.writing.destination import difference, lock_run, read_json
from sqsd_filter.storage.folder import sweep, write_json, write_text

RESULTS, PICTURE, SETTINGS, RUNS, LOCK = "results.json", "asr.png", "settings.json", "runs", "lock"
POISONED, UNTUNED = "poisoned.json", "untuned"
TRAINING, HELD_OUT, ANSWERS = "training.json", "held_out.json", "answers.jsonl"
ASKED = ("harmful", "harmless", "max_new_tokens", "generation")  # settings that only answers depend on
ADAPTER, CHECKPOINTS, ALIGNED = "adapter", ".checkpoints", ".aligned"


def check_place(dest: Path) -> None:
    """Raise `DestinationExists` or `InputError` where there can't be a folder."""
    if dest.exists() and not dest.is_dir():
        raise DestinationExists(f"{dest} is a file: name a folder as DEST, which comes last.")
    if not dest.absolute().parent.is_dir():
        raise InputError(f"The folder {dest.absolute().parent} does not exist: create it first.")


@contextmanager
def claimed(dest: Path, settings: Mapping[str, Any]) -> Iterator[None]:
    """The folder is this evaluation's, and no other process's until the end.

    Raises `DestinationExists` where it holds anything else, naming the settings that differ. Until a model is trained
    all of them may change, and until one has answered, what it is asked and by what it answers.
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
        shutil.rmtree(dest / ALIGNED, ignore_errors=True)  # what a killed one left
        if not fixed:
            shutil.rmtree(dest / RUNS, ignore_errors=True)
            (dest / POISONED).unlink(missing_ok=True)
        write_json(dest / SETTINGS, settings)
        yield


def _fixed(dest: Path, known: Mapping[str, Any]) -> Mapping[str, Any]:
    """Those of its settings that what is done there depends on."""
    ended = (dest / RESULTS).is_file()
    if not ended and not any((dest / RUNS).glob(f"*/{TRAINING}")):
        return {}
    answered = ended or any((dest / RUNS).glob(f"*/{ANSWERS}"))
    return known if answered else {name: value for name, value in known.items() if name not in ASKED}


class RunFolder:
    """What the steps of one run leave."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir(parents=True, exist_ok=True)
        sweep(path)

    @property
    def adapter(self) -> Path:
        return self.path / ADAPTER

    @property
    def checkpoints(self) -> Path:
        return self.path / CHECKPOINTS

    def has(self, name: str) -> bool:
        return (self.path / name).is_file()

    def read(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.path / name).read_text(encoding="utf-8"))
        return found

    def write(self, name: str, value: Mapping[str, Any]) -> None:
        write_json(self.path / name, value)

    def write_training(self, record: Mapping[str, Any]) -> None:
        """Note that the adapter is there, for which no checkpoint is needed any more."""
        self.write(TRAINING, record)
        shutil.rmtree(self.checkpoints, ignore_errors=True)

    def answers(self) -> list[dict[str, Any]]:
        with (self.path / ANSWERS).open(encoding="utf-8") as lines:
            return [json.loads(line) for line in lines]

    def write_answers(self, answers: Sequence[Mapping[str, Any]]) -> None:
        text = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in answers)
        write_text(self.path / ANSWERS, text)

    def clear(self) -> None:
        """Remove what a run that has its answers needs no more: the adapter, too, unless it was trained to be kept."""
        shutil.rmtree(self.checkpoints, ignore_errors=True)
        if not (self.has(TRAINING) and self.read(TRAINING)["keeps_adapter"]):
            shutil.rmtree(self.adapter, ignore_errors=True)
