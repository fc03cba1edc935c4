"""The folder of an evaluation, whose runs are done one step after the other and once.

results.json, asr.png                       what came out, of the seeds that are done so far
settings.json                               what the evaluation is
runs/<scorer>/<arm>/seed-<n>/
    training.json, adapter/                 how the model was fine-tuned, and the LoRA that came out of it
    held_out.json                           the loss on held-out rows
    answers.jsonl                           every answer; their outcomes, when they have been judged
    outcome.json                            what results are made of; where it is, the run is done
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqsd_filter.errors import DestinationExists, InputError
from sqsd_filter.pipeline.folder import sweep, write_whole
from sqsd_filter.pipeline.writing.destination import difference, read_json, take_lock

RESULTS, PICTURE, SETTINGS, RUNS, LOCK = "results.json", "asr.png", "settings.json", "runs", "lock"
TRAINING, HELD_OUT, ANSWERS, OUTCOME = "training.json", "held_out.json", "answers.jsonl", "outcome.json"
ADAPTER, CHECKPOINTS = "adapter", ".checkpoints"


@contextmanager
def claimed(dest: Path, settings: Mapping[str, Any]) -> Iterator[None]:
    """The folder is this evaluation's, and no other process's until the end.

    Raises `DestinationExists` where it holds anything else, naming the settings that differ.
    """
    if dest.exists() and not dest.is_dir():
        raise DestinationExists(f"{dest} is a file: choose a folder.")
    if not dest.absolute().parent.is_dir():
        raise InputError(f"The folder {dest.absolute().parent} does not exist: create it first.")
    known = read_json(dest / SETTINGS)
    if known is None and dest.is_dir() and {path.name for path in dest.iterdir()} - {LOCK}:
        raise DestinationExists(f"{dest} holds other files: choose another folder.")
    if known is not None and known != settings:
        raise DestinationExists(
            f"{dest} holds another evaluation ({difference(known, settings)}): choose another folder or remove it."
        )
    dest.mkdir(exist_ok=True)
    with take_lock(dest / LOCK, dest):
        sweep(dest)
        if known is None:
            write_json(dest / SETTINGS, settings)
        yield


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

    def answers(self) -> list[dict[str, Any]]:
        with (self.path / ANSWERS).open(encoding="utf-8") as lines:
            return [json.loads(line) for line in lines]

    def write_answers(self, answers: Sequence[Mapping[str, Any]]) -> None:
        text = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in answers)
        # A model may stop in the middle of a character, and what stands for half of one is not UTF-8.
        write_whole(self.path / ANSWERS, lambda sink: sink.write(text.encode(errors="replace")))

    def copy_from(self, twin: RunFolder) -> None:
        """Take over what another run left, its outcome last."""
        for name in (TRAINING, HELD_OUT, ANSWERS, OUTCOME):
            if twin.has(name):
                content = (twin.path / name).read_bytes()
                write_whole(self.path / name, lambda sink, content=content: sink.write(content))  # type: ignore[misc]

    def clear(self, *, keep_adapter: bool) -> None:
        """Remove what a run that is done needs no more."""
        shutil.rmtree(self.checkpoints, ignore_errors=True)
        if not keep_adapter:
            shutil.rmtree(self.adapter, ignore_errors=True)


def write_json(path: Path, value: Any) -> None:
    text = json.dumps(value, indent=1, ensure_ascii=False) + "\n"
    write_whole(path, lambda sink: sink.write(text.encode()))
