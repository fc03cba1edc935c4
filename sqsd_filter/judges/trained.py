"""A small judge that recipes/judge trains: one classifier tells refusals, another unsafe answers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from sqsd_filter.errors import JudgeError, first_line
from sqsd_filter.judges.classifier import TextClassifier
from sqsd_filter.judges.loading import SETTINGS
from sqsd_filter.judges.outcomes import HARMLESS, REFUSED, UNSAFE
from sqsd_filter.judges.phrases import without_compliance
from sqsd_filter.storage.folder import write_bytes

WEIGHTS = "judge.safetensors"
_FORMAT = 1
_CLASSIFIERS = ("refusal", "unsafe")


@dataclass(frozen=True)
class TrainedJudge:
    """Refusals by their phrase, then degenerate texts, then what the classifiers say, that of refusals first.

    The classifiers read answers only. That of unsafe ones knows little but the matters that it was trained on: see
    recipes/judge/results.json.
    """

    name: str
    refusal: TextClassifier
    unsafe: TextClassifier

    @property
    def fingerprint(self) -> str:
        settings, numbers = self._content()
        return hashlib.sha256(settings + numbers).hexdigest()[:16]

    def judge(self, prompts: Sequence[str], answers: Sequence[str]) -> list[str]:
        outcomes = [without_compliance(answer) for _, answer in zip(prompts, answers, strict=True)]
        left = [answer for answer, outcome in zip(answers, outcomes, strict=True) if outcome is None]
        found = zip(self.refusal.positive(left), self.unsafe.positive(left), strict=True)
        judged = iter([REFUSED if refused else UNSAFE if unsafe else HARMLESS for refused, unsafe in found])
        return [next(judged) if outcome is None else outcome for outcome in outcomes]

    def save(self, folder: Path) -> None:
        """Two files, the settings with the terms as JSON and the numbers as safetensors. Raises `OSError`."""
        folder.mkdir(parents=True, exist_ok=True)
        settings, numbers = self._content()
        write_bytes(folder / WEIGHTS, numbers)
        write_bytes(folder / SETTINGS, settings)

    def _content(self) -> tuple[bytes, bytes]:
        """Those of the files with the settings and the numbers."""
        parts = {name: getattr(self, name) for name in _CLASSIFIERS}
        numbers = save({f"{name}.{key}": a for name, part in parts.items() for key, a in part.arrays().items()})
        settings = {
            **{"format": _FORMAT, "sha256": hashlib.sha256(numbers).hexdigest()},
            **{name: part.settings() for name, part in parts.items()},
        }
        return json.dumps(settings, ensure_ascii=False).encode(), numbers

    @classmethod
    def load(cls, folder: Path) -> TrainedJudge:
        """Raises `JudgeError` where the folder doesn't hold a whole judge of this format."""
        try:
            settings = json.loads((folder / SETTINGS).read_bytes())
            if settings["format"] != _FORMAT:
                raise ValueError(f"its format is {settings['format']}, not {_FORMAT}")
            numbers = (folder / WEIGHTS).read_bytes()
            if hashlib.sha256(numbers).hexdigest() != settings["sha256"]:
                raise ValueError(f"{WEIGHTS} is not the file that {SETTINGS} was written with")
            arrays = load(numbers)
            parts = {name: TextClassifier.restored(settings[name], _under(arrays, name)) for name in _CLASSIFIERS}
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as problem:
            cause = f"{type(problem).__name__}: {first_line(problem)}"
            raise JudgeError(
                f"{folder} holds no whole judge ({cause}): copy it again, or train one with recipes/judge/train.py."
            ) from problem
        return cls(folder.resolve().name, **parts)


def _under(arrays: dict[str, np.ndarray], name: str) -> dict[str, np.ndarray]:
    return {key.removeprefix(f"{name}."): array for key, array in arrays.items() if key.startswith(f"{name}.")}
