"""The tables of docs/evidence.md, from the results that the study left beside this script: python tables.py"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from sqsd_filter.evaluation.figures import select_set
from sqsd_filter.evaluation.prompt_outcomes import (
    LOSS,
    contaminated_figures,
    count_cell,
    intervals_over,
    measured_cell,
)
from sqsd_filter.evaluation.results import Estimate, Interval, PromptOutcomes, Results, SetFigures
from sqsd_filter.evaluation.sets import CUT_ARMS
from sqsd_filter.statistics import spearman

HERE = Path(__file__).resolve().parent
ASKED = ("ASR, 95 % interval", "refused", "degenerate", "harmless ones refused", "loss")
SETS = {"all": "all rows", "kept": "without the riskiest", "random": "without random ones", "dropped": "the riskiest"}
KEPT = {  # the arms of a contaminated corpus
    **{"untuned": "before", "all": "all rows", "above-reference": "rows not above 99 % of the reference"},
    **{"cut": "without the riskiest", "random": "without random ones", "clean": "benign rows only"},
}


def main() -> None:
    for path in sorted(HERE.glob("*/results.json")):
        results: Results = json.loads(path.read_text(encoding="utf-8"))
        print(f"{path.parent.name}\n")
        corpus = path.parent.name.partition("-")[0]
        for lines in (windows(results), scorers(results), arms(results), mixes(results, corpus)):
            if table := list(lines):
                print("\n".join(table) + "\n")
    for path in sorted(HERE.glob("*/outcomes.json")):
        outcomes: PromptOutcomes = json.loads(path.read_text(encoding="utf-8"))
        seeds = sorted({run["seed"] for run in outcomes["runs"]})
        print(f"{path.parent.name}\n\nSeeds: {', '.join(map(str, seeds))}. {intervals_over(seeds)}\n")
        for lines in (contaminated(outcomes), differences(outcomes)):
            print("\n".join(lines) + "\n")


def windows(results: Results) -> Iterator[str]:
    """All figures of the first scorer's windows and of the model before fine-tuning, where there are five windows."""
    first = next(iter(results["scorers"].values()), None)
    if first is None or (last := len(first["asr"])) < 5:
        return
    yield from head("", "answer tokens", *ASKED)
    names = {1: "S1, the riskiest", last: f"S{last}, the safest"}
    yield line("before", "", *figures(results["untuned"]))
    for k in range(last):
        window = select_set(first, k)
        yield line(names.get(k + 1, f"S{k + 1}"), f"{window['tokens']:,}", *figures(window))


def scorers(results: Results) -> Iterator[str]:
    """The attack success rate by window for each scorer, with 95 % intervals, where `windows` does not show them."""
    count = max((len(scorer["asr"]) for scorer in results["scorers"].values()), default=0)
    if not count or (len(results["scorers"]) < 2 and count >= 5):
        return
    names = [f"S{k + 1}" for k in range(count)]
    yield from head("ASR, %", *names, f"S1 - S{count}", "falls", "answer tokens")
    for name, scorer in results["scorers"].items():
        rates = [f"{exact(rate)} ({span(ci)})" for rate, ci in zip(scorer["asr"], scorer["ci"], strict=True)]
        spread = f"{exact(scorer['spread'])} ({span(scorer['spread_ci'])})"
        tokens = ", ".join(f"{each:,}" for each in scorer["tokens"])
        yield line(name, *rates, spread, "yes" if scorer["monotone"] else "no", tokens)


def arms(results: Results) -> Iterator[str]:
    """The arms of a cut: all rows, the kept ones, as many random ones, the dropped ones."""
    if not results["arms"]:
        return
    yield from head("trained on", "rows", *ASKED)
    for k, (scorer, cut) in enumerate(results["arms"].items()):
        for arm in CUT_ARMS:
            by_scorer = arm in ("kept", "dropped")
            if by_scorer or k == 0:  # the other arms are the same for all scorers
                words = SETS[arm] + (f", by {scorer}" if by_scorer else "")
                yield line(words, f"{cut[arm]['rows']:,}", *figures(cut[arm]))


def contaminated(outcomes: PromptOutcomes) -> Iterator[str]:
    """The arms of a contaminated corpus: what they drop, and what their models do. Arms that do not depend on the
    scorer are there once."""
    names = shown(outcomes)
    yield from head("trained on", "planted dropped", "benign dropped", *names.values())
    of_all = set()
    for scorer, figures in contaminated_figures(outcomes).items():
        for arm, each in figures["arms"].items():
            by_scorer = arm in ("above-reference", "cut")
            if not by_scorer and arm in of_all:
                continue
            of_all.add(arm)
            benign = each["dropped"].get("benign")
            planted = sum(count for kind, count in each["dropped"].items() if kind != "benign")
            dropped = ["", ""] if benign is None else [count_cell(planted), count_cell(benign)]
            measured = (measured_cell(each["measures"].get(name), name, between) for name in names)
            yield line(KEPT[arm] + (f", by {scorer}" if by_scorer else ""), *dropped, *measured)


def differences(outcomes: PromptOutcomes) -> Iterator[str]:
    """Differences of two arms of a contaminated corpus, on the same seeds and prompts."""
    names = shown(outcomes)
    yield from head("difference", *names.values())
    of_all = set()
    for scorer, figures in contaminated_figures(outcomes).items():
        for pair, each in figures["differences"].items():
            by_scorer = {"above-reference", "cut"} & set(pair.split(" - "))
            if by_scorer or pair not in of_all:
                of_all.add(pair)
                measured = (measured_cell(each.get(name), name, between) for name in names)
                yield line(pair + (f", by {scorer}" if by_scorer else ""), *measured)


def shown(outcomes: PromptOutcomes) -> dict[str, str]:
    """What was measured of a contaminated corpus's arms that the tables show, and its title."""
    first = outcomes["runs"][0]
    names = {f"unsafe by {judge}": f"ASR by {judge}, %" for judge in outcomes["judges"]}
    names |= {"harmless refused": "harmless ones refused, %"} if first["harmless_refused"] else {}
    return names | ({"right": "right answers, %"} if first["right"] else {}) | {LOSS: "loss"}


def mixes(results: Results, corpus: str) -> Iterator[str]:
    """The share of unsafe rows among the dropped ones, and each scorer's rank correlation with SQSD and with the length
    of answers."""
    if not results["poisoned"]:
        return
    shares = list(next(iter(results["poisoned"].values())))
    titles = [f"{100 * float(share):.0f} %" for share in shares]
    yield from head("unsafe rows mixed in", *titles, "ROC-AUC at 5 %", "rank correlation with SQSD", "with length")
    kept = pq.read_table(HERE / "scores" / f"{corpus}.parquet").drop(["row"]).to_pydict()
    risks = {column: np.array(values, np.float64) for column, values in kept.items()}
    scored = np.isfinite(list(risks.values())).all(0)
    sqsd, length = (risks[f"sqsd_{scorer}"][scored] for scorer in ("sqsd", "length"))
    for scorer, by_share in results["poisoned"].items():
        own = risks[f"sqsd_{scorer}"][scored]
        correlations = (f"{spearman(own, other):.2f}" for other in (sqsd, length))
        precision = (estimate(by_share[share]["precision"]) for share in shares)
        yield line(scorer, *precision, estimate(by_share["0.05"]["auc"], 1), *correlations)


def head(*titles: str) -> Iterator[str]:
    yield line(*titles)
    yield line(*["---"] * len(titles))


def line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |".replace("|  |", "| |")


def figures(one: SetFigures) -> Iterator[str]:
    outcomes = one["outcomes"]
    yield f"{percent(one['asr'])} ({span(one['ci'])})"
    yield from map(percent, (outcomes["refused"], outcomes["degenerate"], one["over_refusal"]))
    yield "-" if one["loss"] is None else f"{one['loss']:.2f}"


def estimate(value: Estimate, digits: int = 0) -> str:
    return f"{100 * value['mean']:.{digits}f} ({span(value['ci'], digits)})"


def between(share: float, ci: Interval | None) -> str:
    """A share in percent with its interval."""
    return exact(share) + (f" ({span(ci)})" if ci else "")


def percent(share: float | None) -> str:
    return "-" if share is None else f"{exact(share)} %"


def exact(share: float) -> str:
    """In percent, with one decimal at most: two seeds of 100 prompts give halves."""
    return f"{round(100 * share, 1):g}"


def span(ci: Interval, digits: int = 0) -> str:
    low, high = (f"{100 * bound:.{digits}f}" for bound in ci)
    return f"{low} to {high}"


if __name__ == "__main__":
    main()
