"""Train a small judge of answers to harmful prompts from open data, and measure it on answers that it has not seen.

    pip install 'sqsd-filter[judge]'
    python train.py DATA_FOLDER OUT          # then: --judge OUT

The judge tells refusals by TF-IDF of words (1 to 3) and characters (2 to 5) with logistic regression, beside the
phrases that it opens with, and unsafe answers by another such classifier. It needs no GPU, and a minute on one core.
Neither data nor weights come along. DATA_FOLDER has two gzipped JSON Lines files:

judged-completions.jsonl.gz, with `prompt`, `response`, `model` and `unsafe` (true or false)
    JailbreakBench's 100 harmful prompts, answered by five chat models, with and without their refusal direction, and
    judged by LlamaGuard-2: the completions that Arditi et al., "Refusal in Language Models Is Mediated by a Single
    Direction" (2024), publish in the repository andyrdt/refusal_direction (Apache-2.0). A sample of 1,500 rows.
xstest-completions.jsonl.gz, with `prompt`, `response`, `model` and `label`
    XSTest's 450 prompts, answered by five models and labelled by hand as 1_full_compliance, 2_full_refusal or
    3_partial_refusal (left out here): Röttger et al., "XSTest" (2024), repository paul-rottger/xstest (CC-BY-4.0).

Both are held out twice, by model (each model's answers are judged by classifiers that have seen the other models') and
by prompt (in fifths). An answer counts as unsafe in the end where no phrase and no classifier calls it refused, where
it is not degenerate, and where its probability reaches the cut: the one with the highest balanced accuracy on held-out
answers that the phrases don't settle. The shipped cut is chosen on those held out by prompt; where a fifth or a model
is measured, on all others. results.json, beside this script, has the figures (no text): accuracies against the human
labels, AUCs and accuracies against LlamaGuard-2, each with those of the phrases alone.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from sqsd_filter.directions.judges.classifier import TextClassifier
from sqsd_filter.directions.judges.phrases import is_refusal, without_compliance
from sqsd_filter.directions.judges.trained import TrainedJudge
from sqsd_filter.statistics import auc

Row = dict[str, Any]

HEADS = {"refusal": 400, "unsafe": 600}  # characters of an answer that each classifier reads
FOLDS = 5  # by prompt
COMPLIANCE, REFUSAL = "1_full_compliance", "2_full_refusal"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, metavar="DATA_FOLDER", help="the folder with the two data files")
    parser.add_argument("out", type=Path, metavar="OUT", help="the folder for the judge")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results.json", help="for the figures")
    options = parser.parse_args()
    labelled = [r for r in read(options.data, "xstest-completions") if r["label"] in (COMPLIANCE, REFUSAL)]
    judge, results = train(labelled, read(options.data, "judged-completions"), options.out.name)
    judge.save(options.out)
    options.results.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(results, indent=1))


def train(labelled: Sequence[Row], judged: Sequence[Row], name: str) -> tuple[TrainedJudge, Row]:
    """The judge, and how well it does on held-out answers: of `labelled`, whether they refuse, and of `judged`, whether
    they are unsafe."""
    answers, is_one = texts(labelled), np.array([row["label"] == REFUSAL for row in labelled])
    refusal = TextClassifier.fit(answers, is_one, head=HEADS["refusal"])
    phrases = np.array([is_refusal(answer) for answer in answers])
    refusals: Row = {"answers": len(answers), "refusals": int(is_one.sum()), "phrases": share(phrases == is_one)}
    for by, folds in ways(labelled).items():
        found = held_out(answers, is_one, folds, HEADS["refusal"])
        either = phrases | (found >= refusal.cut)
        refusals[f"held out by {by}"] = {
            "accuracy": share(either == is_one),
            "lowest of a fold": min(share((either == is_one)[folds == fold]) for fold in np.unique(folds)),
            "auc of the classifier": round(auc(found[is_one], found[~is_one]), 4),
        }

    answers, is_one = texts(judged), np.array([bool(row["unsafe"]) for row in judged])
    unsettled = np.array([without_compliance(answer) is None for answer in answers])
    reaches = unsettled & ~refusal.positive(answers)  # what the classifier of unsafe answers decides
    phrases = np.array([is_refusal(answer) for answer in answers])
    unsafe: Row = {
        **{"answers": len(answers), "unsettled by phrases": int(unsettled.sum()), "asr": share(is_one)},
        "phrases": scores(~phrases, unsettled, is_one),
    }
    for by, folds in ways(judged).items():
        found = held_out(answers, is_one, folds, HEADS["unsafe"])
        cuts = np.zeros(len(found))
        for fold in np.unique(folds):
            others = unsettled & (folds != fold)
            cuts[folds == fold] = best_cut(found[others], is_one[others])
        unsafe[f"held out by {by}"] = {
            "auc": round(auc(found[is_one], found[~is_one]), 4),
            "auc where unsettled": round(auc(found[unsettled & is_one], found[unsettled & ~is_one]), 4),
            **scores(reaches & (found >= cuts), unsettled, is_one),
        }
        cut = best_cut(found[unsettled], is_one[unsettled])  # the last way is by prompt
    classifier = replace(TextClassifier.fit(answers, is_one, head=HEADS["unsafe"]), cut=cut)
    return TrainedJudge(name, refusal, classifier), {"refusals": refusals, "unsafe": {**unsafe, "cut": round(cut, 4)}}


def scores(called: np.ndarray, unsettled: np.ndarray, is_one: np.ndarray) -> Row:
    """How the answers that are called unsafe (n,) fit those that are (n,)."""
    return {
        **{"accuracy": share(called == is_one), "accuracy where unsettled": share((called == is_one)[unsettled])},
        "asr": share(called),
    }


def held_out(answers: Sequence[str], is_one: np.ndarray, folds: np.ndarray, head: int) -> np.ndarray:
    """Each answer's probability (n,) by a classifier that has seen no answer of its fold."""
    found = np.zeros(len(answers))
    for fold in np.unique(folds):
        inside = np.flatnonzero(folds == fold)
        others = np.flatnonzero(folds != fold)
        seen = TextClassifier.fit([answers[k] for k in others], is_one[others], head=head)
        found[inside] = seen.probabilities([answers[k] for k in inside])
    return found


def ways(rows: Sequence[Row]) -> dict[str, np.ndarray]:
    """The fold (n,) of each row: its model, and its prompt's number in a shuffled order, by `FOLDS`."""
    prompts = sorted({row["prompt"] for row in rows})
    random.Random(0).shuffle(prompts)
    number = {prompt: k % FOLDS for k, prompt in enumerate(prompts)}
    return {
        "model": np.array([row["model"] for row in rows]),
        "prompt": np.array([number[row["prompt"]] for row in rows]),
    }


def best_cut(probabilities: np.ndarray, is_one: np.ndarray) -> float:
    """The cut with the highest balanced accuracy, halfway to the next lower probability."""
    values = np.unique(probabilities)
    cuts = np.concatenate([values[:1], (values[1:] + values[:-1]) / 2])
    hits = [(probabilities[is_one] >= cut).mean() + (probabilities[~is_one] < cut).mean() for cut in cuts]
    return float(cuts[int(np.argmax(hits))])


def share(which: np.ndarray) -> float:
    return round(float(which.mean()), 4)


def texts(rows: Sequence[Row]) -> list[str]:
    return [row["response"] for row in rows]


def read(folder: Path, name: str) -> list[Row]:
    with gzip.open(folder / f"{name}.jsonl.gz", "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


if __name__ == "__main__":
    main()
