"""How do risks do on sources and forms of rows that nothing was fitted on?

    python beyond.py DATA_FOLDER WORK [--pack PACK] [--risks own,unsafe,length] [--out beyond.json]

DATA_FOLDER has what prepare.py and known_rows.py wrote. Each risk scores the same rows: `GROUPS` of them. Scores stay
in WORK, so that an interrupted run goes on, and further risks may be added later. A risk is "own" (the pack's), one of
the pack's other risks, or a scorer of `sqsd-filter --scorer`. Those that compare rows with anchors get the first
`ANCHORS` pairs of safety.jsonl; a judge is written as NAME=judge:FOLDER.

For each risk and each group of unsafe answers it gives the AUC against each other group, and the share above 99 % of
all benign rows (which weigh the same, whatever their group) and, if these are 1,000, above 99.9 %. `precision` is that
of a cut at this limit where unsafe rows of the group are 5 % of a corpus and the others are rows of one benign group.
Where the risk has reference rows, it gives the share that `--above-reference 99%` drops.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from sqsd_filter.scoring.baselines import ANCHORED, SCORERS
from sqsd_filter.scoring.pack import load_pack
from sqsd_filter.scoring.reference_rows import Reference
from sqsd_filter.statistics import auc

Row = dict[str, Any]
OWN, UNSAFE, BENIGN, HARD = "own", "unsafe", "benign", "hard"
LEVEL, CUT, DROPPED = Fraction(99, 100), "`--above-reference 99%`", "dropped"
LEVELS = {"99 %": LEVEL, "99.9 %": Fraction(999, 1000)}
PLANTED = 0.05  # the share of unsafe rows in a corpus
ANCHORS = 100  # of each kind


@dataclass(frozen=True)
class Group:
    """Rows of a file that have these values. `kind` is unsafe, benign, or hard: harmless, and like unsafe ones."""

    kind: str
    file: str
    where: Mapping[str, str]
    rows: int = 60


PLAIN = ("dolly", "gsm8k", "labels")  # benign groups with many rows
GROUPS = {
    "pure-bad": Group(UNSAFE, "known", {"use": "judge", "source": "pure-bad"}, 100),
    "jailbreakbench": Group(UNSAFE, "test", {"group": "unsafe"}),
    "dolly": Group(BENIGN, "reference-dolly", {}, 410),
    "gsm8k": Group(BENIGN, "reference-gsm8k", {}, 300),
    "labels": Group(BENIGN, "reference-labels", {}, 300),
    "reviews": Group(BENIGN, "known", {"use": "judge", "form": "reviews"}),
    "news": Group(BENIGN, "known", {"use": "judge", "form": "news"}),
    "safety-answers": Group(HARD, "known", {"use": "judge", "source": "safety-answers"}),
    "jailbreakbench-safe": Group(HARD, "test", {"group": "safe"}),
    "looks-unsafe": Group(HARD, "test", {"group": "xstest"}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--pack", default="smollm2-135m")
    parser.add_argument("--risks", default=OWN)
    parser.add_argument("--dtype", default="float32", help="number format of the model's weights")
    parser.add_argument("--rows", type=int, help="at most so many rows of each group")
    parser.add_argument("--out", type=Path, help="write the figures there as JSON")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    write(options.work / "rows.jsonl", read(options.data, options.rows))
    pairs = list(lines(options.data / "safety.jsonl"))[:ANCHORS]
    for kind, answer in (("unsafe", "rejected"), ("safe", "chosen")):
        anchors = ({"prompt": pair["prompt"], "response": pair[answer]} for pair in pairs)
        write(options.work / f"anchors-{kind}.jsonl", anchors)
    result = {}
    for given in options.risks.split(","):
        name, _, scorer = given.partition("=")
        risks = scored(options.work, name, scorer, options.pack, options.dtype)
        result[name] = figures(risks, threshold(given, options.pack))
    print(tables(result))
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def write(path: Path, rows: Iterable[Row]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def lines(path: Path) -> Iterable[Row]:
    with path.open(encoding="utf-8") as file:
        yield from map(json.loads, file)


def read(data: Path, most: int | None) -> Iterable[Row]:
    """The rows of all groups, each with the name of its group."""
    for name, group in GROUPS.items():
        rows = lines(data / f"{group.file}.jsonl")
        chosen = [row for row in rows if all(row[key] == value for key, value in group.where.items())]
        for row in chosen[: min(group.rows, most or group.rows)]:
            yield {"group": name, "prompt": row["prompt"], "response": row["response"]}


def scored(work: Path, risk: str, judge: str, pack: str, dtype: str) -> dict[str, np.ndarray]:
    """The risks of each group's rows, by this risk or by this `judge`."""
    target, scorer = work / f"{risk}.parquet", judge or risk
    named = ["--scorer", scorer] if judge or risk in SCORERS else ["--risk", "sqsd" if risk == OWN else risk]
    if risk in ANCHORED:
        named += [
            word for kind in (UNSAFE, "safe") for word in (f"--{kind}-anchors", str(work / f"anchors-{kind}.jsonl"))
        ]
    columns = ["--prompt-column", "prompt", "--answer-column", "response"]
    if not target.exists() or work.joinpath(f"{risk}.parquet.sqsd").exists():
        command = [sys.executable, "-m", "sqsd_filter", "score", str(work / "rows.jsonl"), str(target), "--pack", pack]
        done = subprocess.run([*command, "--dtype", dtype, *named, *columns], check=False)
        if done.returncode:
            sys.exit(done.returncode)
    table = pq.read_table(target).to_pandas()
    kept = table[table["sqsd_status"] == "scored"]
    return {str(name): group["sqsd_risk"].to_numpy() for name, group in kept.groupby("group")}


def threshold(risk: str, pack: str) -> float | None:
    """The risk above which `--above-reference 99%` drops a row, if this risk of the pack has reference rows."""
    if risk in SCORERS or "=" in risk:
        return None
    loaded = load_pack(pack)
    reference = Reference.of(loaded if risk == OWN else loaded.with_risk(risk))
    return None if reference is None else reference.threshold(LEVEL)


def figures(risks: Mapping[str, np.ndarray], cut: float | None) -> dict[str, Any]:
    """The AUCs of each group of unsafe answers, and the shares of all groups above limits and above the `cut`."""
    benign = np.concatenate([risks[name] for name, group in GROUPS.items() if group.kind == BENIGN])
    shown = {level: share for level, share in LEVELS.items() if share == LEVEL or len(benign) * (1 - share) >= 1}
    limits = {level: np.quantile(benign, float(share), method="inverted_cdf") for level, share in shown.items()}
    above = {level: {name: float((risks[name] > limit).mean()) for name in GROUPS} for level, limit in limits.items()}
    unsafe = [name for name, group in GROUPS.items() if group.kind == UNSAFE]
    return {
        "rows": {name: len(risks[name]) for name in GROUPS},
        "above": {level: rounded(shares) for level, shares in above.items()},
        **({} if cut is None else {DROPPED: rounded({name: (risks[name] > cut).mean() for name in GROUPS})}),
        "auc": {
            name: rounded({other: auc(risks[name], risks[other]) for other in GROUPS if other not in unsafe})
            for name in unsafe
        },
        "precision": {
            name: {
                level: rounded({other: precision(shares[name], shares[other]) for other in PLAIN})
                for level, shares in above.items()
            }
            for name in unsafe
        },
    }


def precision(unsafe: float, benign: float) -> float:
    """The share of unsafe rows among those above a limit, by the shares of unsafe and of benign rows that are above;
    0 where no row is."""
    found, false = PLANTED * unsafe, (1 - PLANTED) * benign
    return found / (found + false) if found else 0.0


def rounded(values: Mapping[str, float]) -> dict[str, float]:
    return {name: round(float(value), 4) for name, value in values.items()}


def tables(result: Mapping[str, Mapping[str, Any]]) -> str:
    """The figures of all risks in Markdown: a table for each group of unsafe answers, one for all groups."""
    parts, levels = [], list(next(iter(result.values()))["above"])
    for unsafe in (name for name, group in GROUPS.items() if group.kind == UNSAFE):
        compared = [name for name, group in GROUPS.items() if group.kind == BENIGN]
        titles = [
            unsafe,
            *(f"AUC: {name}" for name in compared),
            *(f"above {level}" for level in levels),
            *(f"precision: {name}" for name in PLAIN),
        ]
        rows = (
            [
                name,
                *(f"{found['auc'][unsafe][other]:.3f}" for other in compared),
                *(percent(found["above"][level][unsafe]) for level in levels),
                *(percent(found["precision"][unsafe]["99 %"][other]) for other in PLAIN),
            ]
            for name, found in result.items()
        )
        parts.append(markdown(titles, rows))
    counts = next(iter(result.values()))["rows"]
    titles = ["above the benign 99 %", *(f"{name} ({counts[name]})" for name in GROUPS)]
    rows = ([name, *(percent(found["above"]["99 %"][group]) for group in GROUPS)] for name, found in result.items())
    cuts = (
        [f"{name}, {CUT}", *(percent(found[DROPPED][group]) for group in GROUPS)]
        for name, found in result.items()
        if DROPPED in found
    )
    parts.append(markdown(titles, [*rows, *cuts]))
    return "\n\n".join(parts)


def markdown(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (titles, ["---"] * len(titles), *rows))


def percent(share: float) -> str:
    return f"{100 * share:.0f} %"


if __name__ == "__main__":
    main()
