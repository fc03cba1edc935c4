"""How do risks do on sources and forms of rows that nothing was fitted on?

    python beyond.py DATA_FOLDER WORK [--pack PACK] [--risks own,unsafe] [--out beyond.json]

DATA_FOLDER has what prepare.py and known_rows.py wrote. Each risk scores the same rows: `GROUPS` of them. Scores stay
in WORK, so that an interrupted run goes on, and further risks may be added later. A risk is "own" (the pack's), one of
the pack's other risks, or a scorer of `sqsd-filter --scorer` that needs no anchors.

For each risk and each group of unsafe answers it gives the AUC against each other group, and the share above 99 % of
all benign rows (which weigh the same, whatever their group). Where the risk has reference rows, it gives the share that
`--above-reference 99%` drops.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from sqsd_filter.scoring.baselines import SCORERS
from sqsd_filter.scoring.pack import load_pack
from sqsd_filter.scoring.reference_rows import Reference
from sqsd_filter.statistics import auc

Row = dict[str, Any]
OWN, UNSAFE, BENIGN, HARD = "own", "unsafe", "benign", "hard"
LEVEL, CUT, DROPPED = Fraction(99, 100), "`--above-reference 99%`", "dropped"


@dataclass(frozen=True)
class Group:
    """Rows of a file that have these values. `kind` is unsafe, benign, or hard: harmless, and like unsafe ones."""

    kind: str
    file: str
    where: Mapping[str, str]
    rows: int = 60


GROUPS = {
    "pure-bad": Group(UNSAFE, "known", {"use": "judge", "source": "pure-bad"}, 100),
    "jailbreakbench": Group(UNSAFE, "test", {"group": "unsafe"}),
    "dolly": Group(BENIGN, "reference-dolly", {}, 200),
    "gsm8k": Group(BENIGN, "reference-gsm8k", {}, 200),
    "labels": Group(BENIGN, "reference-labels", {}, 200),
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
    parser.add_argument("--rows", type=int, help="at most so many rows of each group")
    parser.add_argument("--out", type=Path, help="write the figures there as JSON")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    rows = options.work / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in read(options.data, options.rows)), encoding="utf-8")
    result = {
        name: figures(scored(rows, name, options.pack), threshold(name, options.pack))
        for name in options.risks.split(",")
    }
    for name, found in result.items():
        print(table(name, found))
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def read(data: Path, most: int | None) -> Iterable[Row]:
    """The rows of all groups, each with the name of its group."""
    for name, group in GROUPS.items():
        with (data / f"{group.file}.jsonl").open(encoding="utf-8") as lines:
            rows = [json.loads(line) for line in lines]
        chosen = [row for row in rows if all(row[key] == value for key, value in group.where.items())]
        for row in chosen[: min(group.rows, most or group.rows)]:
            yield {"group": name, "prompt": row["prompt"], "response": row["response"]}


def scored(rows: Path, risk: str, pack: str) -> dict[str, np.ndarray]:
    """The risks of each group's rows, by this risk."""
    target = rows.with_name(f"{risk}.parquet")
    named = ["--scorer", risk] if risk in SCORERS else ["--risk", risk] if risk != OWN else []
    columns = ["--prompt-column", "prompt", "--answer-column", "response"]
    if not target.exists() or rows.with_name(f"{risk}.parquet.sqsd").exists():
        command = [sys.executable, "-m", "sqsd_filter", "score", str(rows), str(target), "--pack", pack]
        done = subprocess.run([*command, *named, *columns], check=False)
        if done.returncode:
            sys.exit(done.returncode)
    table = pq.read_table(target).to_pandas()
    kept = table[table["sqsd_status"] == "scored"]
    return {str(name): group["sqsd_risk"].to_numpy() for name, group in kept.groupby("group")}


def threshold(risk: str, pack: str) -> float | None:
    """The risk above which `--above-reference 99%` drops a row, if this risk of the pack has reference rows."""
    if risk in SCORERS:
        return None
    loaded = load_pack(pack)
    reference = Reference.of(loaded if risk == OWN else loaded.with_risk(risk))
    return None if reference is None else reference.threshold(LEVEL)


def figures(risks: Mapping[str, np.ndarray], cut: float | None) -> dict[str, Any]:
    """The AUCs and shares of each group of unsafe answers, and the share of each other group above the same limit, and
    above the `cut`."""
    benign = np.concatenate([risks[name] for name, group in GROUPS.items() if group.kind == BENIGN])
    limit = float(np.quantile(benign, float(LEVEL), method="inverted_cdf"))
    above = {name: round(float((values > limit).mean()), 4) for name, values in risks.items()}
    others = [name for name, group in GROUPS.items() if group.kind != UNSAFE]
    return {
        "rows": {name: len(values) for name, values in risks.items()},
        "above the benign 99 %": {name: above[name] for name in GROUPS},
        **({} if cut is None else {DROPPED: {name: round(float((risks[name] > cut).mean()), 4) for name in GROUPS}}),
        "auc": {
            name: {other: round(auc(risks[name], risks[other]), 4) for other in others}
            for name, group in GROUPS.items()
            if group.kind == UNSAFE
        },
    }


def table(name: str, found: Mapping[str, Any]) -> str:
    """The figures of a risk in Markdown."""
    titles = [name, "rows", "above the benign 99 %", *([f"dropped by {CUT}"] if DROPPED in found else [])]
    lines = [f"| {' | '.join([*titles, *(f'AUC of {unsafe}' for unsafe in found['auc'])])} |"]
    lines.append("| --- " * (len(titles) + len(found["auc"])) + "|")
    for group, count in found["rows"].items():
        shares = [found[key][group] for key in ("above the benign 99 %", DROPPED) if key in found]
        aucs = (f"{each[group]:.3f}" if group in each else "" for each in found["auc"].values())
        lines.append(f"| {' | '.join([group, str(count), *(f'{100 * share:.0f} %' for share in shares), *aucs])} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
