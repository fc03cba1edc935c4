"""The tables of docs/evidence.md, from the results that the study left beside this script: python tables.py"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from sqsd_filter.evaluation.results import of_set
from sqsd_filter.statistics import spearman

HERE = Path(__file__).resolve().parent
ASKED = ("ASR, 95 % interval", "refused", "degenerate", "harmless ones refused", "loss")
SETS = {"all": "all rows", "kept": "without the riskiest", "random": "without random ones", "dropped": "the riskiest"}


def main() -> None:
    for path in sorted(HERE.glob("*/results.json")):
        results = json.loads(path.read_text(encoding="utf-8"))
        print(f"{path.parent.name}\n")
        for kind in (of_windows, of_scorers, of_arms, of_mixes):
            if table := list(kind(results, path.parent.name)):
                print("\n".join(table) + "\n")


def of_windows(results: Mapping[str, Any], _name: str) -> Iterator[str]:
    """All figures of the first scorer's windows, and of the model before, where there are five."""
    found = next(iter(results["scorers"].values()), {"asr": ()})
    if (last := len(found["asr"])) < 5:
        return
    yield from head("", "answer tokens", *ASKED)
    names = {1: "S1, the riskiest", last: f"S{last}, the safest"}
    yield line("before", "", *figures(results["untuned"]))
    for k in range(last):
        one = of_set(found, k)
        yield line(names.get(k + 1, f"S{k + 1}"), f"{one['tokens']:,}", *figures(one))


def of_scorers(results: Mapping[str, Any], _name: str) -> Iterator[str]:
    """The attack success rate by window for each scorer, with 95 % intervals."""
    if len(results["scorers"]) < 2:
        return
    count = max(len(found["asr"]) for found in results["scorers"].values())
    names = [f"S{k + 1}" for k in range(count)]
    yield from head("ASR, %", *names, f"S1 - S{count}", "falls", "answer tokens")
    for name, found in results["scorers"].items():
        rates = [f"{exact(rate)} ({span(ci)})" for rate, ci in zip(found["asr"], found["ci"], strict=True)]
        spread = f"{exact(found['spread'])} ({span(found['spread_ci'])})"
        tokens = ", ".join(f"{each:,}" for each in found["tokens"])
        yield line(name, *rates, spread, "yes" if found["monotone"] else "no", tokens)


def of_arms(results: Mapping[str, Any], _name: str) -> Iterator[str]:
    """What a cut leaves: all rows, the kept ones, as many random ones, the dropped ones."""
    if not results["arms"]:
        return
    yield from head("trained on", "rows", *ASKED)
    for scorer, arms in results["arms"].items():
        for name, words in SETS.items():
            if scorer == next(iter(results["arms"])) or name in ("kept", "dropped"):  # the others are the same
                by = f", by {scorer}" if name in ("kept", "dropped") else ""
                yield line(words + by, f"{arms[name]['rows']:,}", *figures(arms[name]))


def of_mixes(results: Mapping[str, Any], name: str) -> Iterator[str]:
    """How many of the dropped rows are the unsafe ones that were mixed in, and how the scores of the others go with
    SQSD's and with the length of answers."""
    if not results["poisoned"]:
        return
    shares = list(next(iter(results["poisoned"].values())))
    titles = [f"{100 * float(share):.0f} %" for share in shares]
    yield from head("unsafe rows mixed in", *titles, "ROC-AUC at 5 %", "rank correlation with SQSD", "with length")
    kept = pq.read_table(HERE / "scores" / f"{name.partition('-')[0]}.parquet").drop(["row"]).to_pydict()
    risks = {column: np.array(values, np.float64) for column, values in kept.items()}
    known = np.isfinite(list(risks.values())).all(0)
    for scorer, found in results["poisoned"].items():
        own, sqsd, length = (risks[f"sqsd_{each}"][known] for each in (scorer, "sqsd", "length"))
        alike = (f"{spearman(own, other):.2f}" for other in (sqsd, length))
        precision = (estimate(found[share]["precision"]) for share in shares)
        yield line(scorer, *precision, estimate(found["0.05"]["auc"], 1), *alike)


def head(*titles: str) -> Iterator[str]:
    yield line(*titles)
    yield line(*["---"] * len(titles))


def line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |".replace("|  |", "| |")


def figures(found: Mapping[str, Any]) -> Iterable[str]:
    outcomes = found["outcomes"]
    yield f"{percent(found['asr'])} ({span(found['ci'])})"
    yield from map(percent, (outcomes["refused"], outcomes["degenerate"], found["over_refusal"]))
    yield "-" if found["loss"] is None else f"{found['loss']:.2f}"


def estimate(found: Mapping[str, Any], digits: int = 0) -> str:
    return f"{100 * found['mean']:.{digits}f} ({span(found['ci'], digits)})"


def percent(share: float | None) -> str:
    return "-" if share is None else f"{exact(share)} %"


def exact(share: float) -> str:
    """In percent, with the halves that two seeds of 100 prompts make."""
    return f"{round(100 * share, 1):g}"


def span(ci: Sequence[float], digits: int = 0) -> str:
    low, high = (f"{100 * bound:.{digits}f}" for bound in ci)
    return f"{low} to {high}"


if __name__ == "__main__":
    main()
