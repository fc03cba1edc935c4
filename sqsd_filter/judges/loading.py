"""A judge by what a user calls it."""

from __future__ import annotations

from pathlib import Path

from sqsd_filter.errors import JudgeError
from sqsd_filter.judges.outcomes import Judge
from sqsd_filter.judges.phrases import PhrasesJudge

SETTINGS = "judge.json"  # the folder of a trained judge has it


def load_judge(spec: str, *, device: str | None = None) -> Judge:
    """The judge `phrases`, one that recipes/judge trained, by its folder, or a chat guard by its name on the Hub or its
    folder, which runs on `device` (a GPU where there is one).

    Raises `JudgeError`, `ModelError` where there is no such judge, `UsageError` for a device that can't be used.
    """
    if spec == PhrasesJudge.name:
        return PhrasesJudge()
    path = Path(spec)
    if not path.exists() and "/" not in spec:
        raise JudgeError(
            f"There is no judge '{spec}': take '{PhrasesJudge.name}', a judge's folder or a chat guard's ORG/NAME."
        )
    if (path / SETTINGS).is_file():
        try:
            from sqsd_filter.judges.trained import TrainedJudge
        except ImportError as problem:
            raise JudgeError("A trained judge needs scikit-learn: pip install 'sqsd-filter[judge]'.") from problem
        return TrainedJudge.load(path)
    if path.exists() and not (path / "config.json").is_file():
        raise JudgeError(
            f"{spec} is no judge, it has neither the {SETTINGS} that recipes/judge/train.py writes nor the config.json "
            f"of a model: name the folder of a judge or a chat guard, or take '{PhrasesJudge.name}'."
        )
    from sqsd_filter.judges.guard import GuardJudge

    return GuardJudge(spec, device=device)
