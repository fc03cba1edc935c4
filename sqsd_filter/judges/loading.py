"""Which judge a user means: the phrases, a trained judge's folder, or a chat guard."""

from __future__ import annotations

from pathlib import Path

from sqsd_filter.errors import JudgeError
from sqsd_filter.judges.outcomes import Judge
from sqsd_filter.judges.phrases import PhrasesJudge
from sqsd_filter.judges.trained import SETTINGS_FILE, TrainedJudge


def load_judge(spec: str, *, device: str | None = None) -> Judge:
    """The judge that `spec` names: `phrases`, the folder of a judge that recipes/judge trained, or a chat guard by its
    folder or its name on the Hub. A guard runs on `device` (default: a GPU if there is one).

    Raises `JudgeError` or `ModelError` if there is no such judge, `UsageError` for a device that can't be used.
    """
    if spec == PhrasesJudge.name:
        return PhrasesJudge()
    path = Path(spec)
    if not path.exists() and "/" not in spec:
        raise JudgeError(
            f"There is no judge '{spec}': take '{PhrasesJudge.name}', a judge's folder or a chat guard's ORG/NAME."
        )
    if (path / SETTINGS_FILE).is_file():
        return TrainedJudge.load(path)
    if path.exists() and not (path / "config.json").is_file():
        raise JudgeError(
            f"{spec} is not a judge: it has neither the {SETTINGS_FILE} that recipes/judge/train.py writes nor the "
            f"config.json of a model. Name the folder of a judge or a chat guard, or take '{PhrasesJudge.name}'."
        )
    from sqsd_filter.judges.guard import GuardJudge  # loads torch

    return GuardJudge(spec, device=device)
