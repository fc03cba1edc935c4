"""A small judge that recipes/judge trains: one classifier finds refusals, another one unsafe answers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from sqsd_filter.errors import JudgeError, first_line
from sqsd_filter.judges.outcomes import HARMLESS, REFUSED, UNSAFE
from sqsd_filter.judges.phrases import without_compliance
from sqsd_filter.storage.folder import write_bytes

if TYPE_CHECKING:
    from sqsd_filter.judges.classifier import TextClassifier  # needs scikit-learn, which is an extra

SETTINGS_FILE, ARRAYS_FILE = "judge.json", "judge.safetensors"
_FORMAT = 1
_CLASSIFIERS = ("refusal", "unsafe")


@dataclass(frozen=True)
class TrainedJudge:
    """Finds refusals by their phrases, then degenerate texts, then asks the classifiers, that of refusals first.

    The classifiers read answers only. The one of unsafe answers knows little beyond the topics it was trained on: see
    recipes/judge/results.json.
    """

    name: str
    refusal: TextClassifier
    unsafe: TextClassifier

    @property
    def fingerprint(self) -> str:
        settings, arrays = self._content()
        return hashlib.sha256(settings + arrays).hexdigest()[:16]

    def judge(self, prompts: Sequence[str], answers: Sequence[str]) -> list[str]:
        outcomes = [without_compliance(answer) for _, answer in zip(prompts, answers, strict=True)]
        unsettled = [answer for answer, outcome in zip(answers, outcomes, strict=True) if outcome is None]
        classified = zip(self.refusal.positive(unsettled), self.unsafe.positive(unsettled), strict=True)
        judged = iter([REFUSED if refused else UNSAFE if unsafe else HARMLESS for refused, unsafe in classified])
        return [next(judged) if outcome is None else outcome for outcome in outcomes]

    def save(self, folder: Path) -> None:
        """Write two files: the settings and terms as JSON, the arrays as safetensors. Raises `OSError`."""
        folder.mkdir(parents=True, exist_ok=True)
        settings, arrays = self._content()
        write_bytes(folder / ARRAYS_FILE, arrays)
        write_bytes(folder / SETTINGS_FILE, settings)

    def _content(self) -> tuple[bytes, bytes]:
        """The content of the settings file and of the arrays file."""
        parts = {name: getattr(self, name) for name in _CLASSIFIERS}
        arrays = save({f"{name}.{key}": a for name, part in parts.items() for key, a in part.arrays().items()})
        settings = {
            **{"format": _FORMAT, "sha256": hashlib.sha256(arrays).hexdigest()},
            **{name: part.settings() for name, part in parts.items()},
        }
        return json.dumps(settings, ensure_ascii=False).encode(), arrays

    @classmethod
    def load(cls, folder: Path) -> TrainedJudge:
        """Raises `JudgeError` if the folder doesn't hold a whole judge of this format, or scikit-learn is missing."""
        try:
            from sqsd_filter.judges.classifier import TextClassifier
        except ImportError as problem:
            raise JudgeError("A trained judge needs scikit-learn: pip install 'sqsd-filter[judge]'.") from problem
        try:
            settings = json.loads((folder / SETTINGS_FILE).read_bytes())
            if settings["format"] != _FORMAT:
                raise ValueError(f"its format is {settings['format']}, not {_FORMAT}")
            content = (folder / ARRAYS_FILE).read_bytes()
            if hashlib.sha256(content).hexdigest() != settings["sha256"]:
                raise ValueError(f"{ARRAYS_FILE} is not the file that {SETTINGS_FILE} was written with")
            arrays = load(content)
            parts = {name: TextClassifier.restored(settings[name], _under(arrays, name)) for name in _CLASSIFIERS}
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as problem:
            cause = f"{type(problem).__name__}: {first_line(problem)}"
            raise JudgeError(
                f"{folder} does not hold a whole judge ({cause}): copy it again, or train one with "
                "recipes/judge/train.py."
            ) from problem
        return cls(folder.resolve().name, **parts)


def _under(arrays: dict[str, np.ndarray], name: str) -> dict[str, np.ndarray]:
    return {key.removeprefix(f"{name}."): array for key, array in arrays.items() if key.startswith(f"{name}.")}
