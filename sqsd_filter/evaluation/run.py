"""`evaluate`: reads the scores, carries out the study, and writes results.json and the picture after each seed."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from sqsd_filter.corpus.addresses import Opener
from sqsd_filter.errors import UsageError, option
from sqsd_filter.evaluation.figures import find_warnings
from sqsd_filter.evaluation.folder import OUTCOMES, PICTURE, POISONED, RESULTS, check_destination, claimed, digest
from sqsd_filter.evaluation.plot import CURVES, draw_windows
from sqsd_filter.evaluation.poison import curves, mix_figures
from sqsd_filter.evaluation.results import MixFigures, Point, Results
from sqsd_filter.evaluation.scores import NamedScores, corpus_of, poison_scores, prompts_of, read_scores
from sqsd_filter.evaluation.settings import Design
from sqsd_filter.evaluation.study import Study
from sqsd_filter.pictures import picture
from sqsd_filter.pipeline.report import versions
from sqsd_filter.pipeline.selecting.earlier import Earlier
from sqsd_filter.pipeline.writing.destination import read_json
from sqsd_filter.progress import Progress, Silent
from sqsd_filter.storage.folder import write_json

EVALUATION = 1  # raise it whenever a change gives other figures


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
) -> Results:
    """Fine-tune the pack's aligned model on rows of high and of low risk, and measure how often it then answers harmful
    prompts. Or fine-tune it on a contaminated corpus, filtered and not. Without training: see how the risk ranks known
    unsafe rows among the others.

    `scores` are files or folders with the scores of the same rows, by one or several scorers. `pack` names the model
    and what is merged into it to align it; the scores may come from another pack. `poison` are scores of known unsafe
    rows, one for each of `scores`.

    Writes to the folder `dest` and returns the content of its results.json. The same call resumes where it was
    interrupted. Raises `DestinationExists` where `dest` holds anything else, `InputError`, `PackError`, `ModelError`,
    `JudgeError`, `UsageError`.
    """
    if not design.arms and not poison:
        raise UsageError(f"Nothing to do: name {option('arms')} to train, or {option('poison')}.")
    progress, dest = progress or Silent(), Path(dest)
    check_destination(dest)
    with closing(Opener()) as opener:
        scorers = read_scores(scores, opener, progress)
        unsafe = poison_scores(poison, scorers, scores, opener, progress) if poison else []
        study = Study(design, scorers, pack, device, dest, progress) if design.arms else None
        settings = {"evaluation": EVALUATION, **(study.settings() if study else {})}
        with claimed(dest, settings):
            mixes, points = _mixes(scorers, unsafe, dest, progress)
            results: Results = {
                "model": study.model if study else None,
                "corpus": corpus_of(scores[0], scorers[0].earlier),
                "rows": study.rows if study else None,
                "prompts": study.prompts if study else None,
                "sets": design.sets(),
                "seeds": [],
                "scorers": {},
                "arms": {},
                "poisoned": mixes,
                "curves": points,
                "warnings": [],
                "settings": settings,
                "machine": _machine(study.device_name if study else None),
            }
            _note_missing(dest, results, [each.name for each in scorers], progress)
            if study is None:
                _write(dest, results)
            for figures in study.carry_out(keep_adapters) if study else ():
                results = {**results, **figures}
                results["warnings"] = find_warnings(results)
                if study is not None and (by_prompt := study.prompt_outcomes) is not None:
                    write_json(dest / OUTCOMES, by_prompt)
                _write(dest, results)
    return results


def _note_missing(dest: Path, results: Results, names: Sequence[str], progress: Progress) -> None:
    """Note what the last results.json has and the new one will not have."""
    known = read_json(dest / RESULTS) or {}
    gone = [name for name in known.get("runs", {}) if name not in names]
    gone += [arm for arm in known.get("sets", {}).get("arms", ()) if arm not in results["sets"]["arms"]]
    if gone:
        progress.note(f"{', '.join(gone)}: no longer in {RESULTS}, because not asked for now; finished runs are kept")


def _mixes(
    scorers: Sequence[NamedScores], unsafe: Sequence[Earlier], dest: Path, progress: Progress
) -> tuple[dict[str, dict[str, MixFigures]], dict[str, dict[str, list[Point]]]]:
    """`poisoned` and `curves` of results.json. Figures of risks seen before are read from poisoned.json."""
    known = read_json(dest / POISONED) or {}
    mixes: dict[str, dict[str, MixFigures]] = {}
    points: dict[str, dict[str, list[Point]]] = {kind: {} for kind in CURVES if unsafe}
    for each, one in zip(scorers, unsafe, strict=bool(unsafe)):
        risks = each.risk[each.scored], one.scored.risk[one.scored.scored]
        prompts = prompts_of(one)
        key = digest([values.tolist() for values in (*risks, prompts)])
        if key not in known:
            progress.note(f"{each.name}: known unsafe rows among the others")
            known[key] = {"poisoned": mix_figures(*risks, prompts), "curves": curves(*risks)}
            write_json(dest / POISONED, known)
        mixes[each.name] = known[key]["poisoned"]
        for kind in points:
            points[kind][each.name] = known[key]["curves"][kind]
    return mixes, points


def _write(dest: Path, results: Results) -> None:
    if results["scorers"]:
        with picture(dest / PICTURE, 9, 5) as figure:
            draw_windows(figure, results["scorers"])
    else:
        (dest / PICTURE).unlink(missing_ok=True)
    write_json(dest / RESULTS, results)


def _machine(device: str | None) -> dict[str, object]:
    return {
        "processor": platform.machine(),
        "cpus": os.cpu_count(),
        "device": device,
        "versions": versions("peft", "trl"),
    }
