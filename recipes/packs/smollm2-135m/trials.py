"""Which rows, weights and ridge make the contrast that points furthest? Each trial scores sources that it has not seen.

    python trials.py DATA_FOLDER WORK [--pack PACK] [--out trials.json]

DATA_FOLDER has the contrast.jsonl of contrast.py. The updates of all its rows are measured once and kept in WORK (about
an hour on two cores, 5 MB a row); all trials together then read them twice. Every unsafe source, also those for judging
only, is scored by fits that have seen neither the source nor any prompt of what is compared, four fits for each. For
each trial and source the result has the AUC against each group of other rows, and the share above 99 % of the rows of
Dolly, GSM8K and one-word tasks, of which each row weighs the same.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from sqsd_filter.cli.output import Display
from sqsd_filter.corpus.conversation import Message, conversation_key
from sqsd_filter.directions.contrast.held_out import Rows, figures, fits_without
from sqsd_filter.directions.contrast.make import measure, open_store
from sqsd_filter.directions.contrast.ridge import apply, kernel
from sqsd_filter.directions.contrast.updates import UpdateSpace
from sqsd_filter.scoring.adapters import load_adapter
from sqsd_filter.scoring.pack import Probe, load_pack
from sqsd_filter.scoring.scorer import SQSDScorer

STATE, MAX_LENGTH = "initial", 256
EASY = ("dolly", "short", "gsm8k", "labels", "reviews", "news")  # benign groups that make the limit
UNSAFE = {"judged": 4.0, "xstest": 3.0, "smollm2": 3.0}
OTHERS = {
    **{"dolly": 35.0, "short": 4.0, "labels": 6.0, "gsm8k": 6.0, "smollm2 (benign)": 12.0, "looks unsafe": 8.0},
    **{"judged (safe)": 12.0, "xstest (safe)": 9.0, "smollm2 (safe)": 9.0},
}
CHATS, AGREEING = {"hh": 3.0}, {"bare": 3.0}


@dataclass(frozen=True)
class Trial:
    """The weights of the sources that are fitted on, the ridge, and the share of the rows that is used. Without
    weights, each row of the sources counts the same."""

    unsafe: Mapping[str, float] = field(default_factory=lambda: UNSAFE)
    others: Mapping[str, float] = field(default_factory=lambda: OTHERS)
    ridge: float = 0.3
    share: float = 1.0


PLAIN = dict.fromkeys(OTHERS, 1.0)
TRIALS = {
    "as built": Trial(),
    **{f"ridge {ridge:g}": Trial(ridge=ridge) for ridge in (0.03, 1.0, 3.0, 10.0)},
    **{f"{share:.0%} of the rows": Trial(share=share) for share in (0.5, 0.25, 0.125)},
    "equal sources": Trial(dict.fromkeys(UNSAFE, 1.0), PLAIN),
    "with chats (hh)": Trial(UNSAFE | CHATS, OTHERS | {"hh (safe)": 6.0}),
    "with mere agreement (bare)": Trial(UNSAFE | AGREEING, OTHERS | {"bare (benign)": 4.0}),
    "without the model's own answers": Trial(
        {name: weight for name, weight in UNSAFE.items() if name != "smollm2"},
        {name: weight for name, weight in OTHERS.items() if not name.startswith("smollm2")},
    ),
    "without safe answers": Trial(others={n: weight for n, weight in OTHERS.items() if not n.endswith("(safe)")}),
    "without one-word answers": Trial(others={n: w for n, w in OTHERS.items() if n not in ("labels", "short")}),
    "Dolly alone against unsafe": Trial(others={"dolly": 1.0}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--pack", default="smollm2-135m")
    parser.add_argument("--out", type=Path, help="write the figures there as JSON")
    options = parser.parse_args()
    pack = load_pack(options.pack)
    pack = replace(pack, probes=(Probe("danger", 1.0, STATE, STATE),))
    scorer, space = SQSDScorer(pack, max_length=MAX_LENGTH), UpdateSpace(load_adapter(pack.adapter(STATE)))
    store = open_store(options.work, scorer, space)
    lines = (options.data / "contrast.jsonl").read_text(encoding="utf-8").splitlines()
    rows = {conversation_key(turns(row)).hex(): row for row in map(json.loads, lines)}
    measure(scorer, {key: turns(row) for key, row in rows.items()}, store, Display())
    known = store.places()
    keys = [key for key in rows if key in known]
    measured = [rows[key] for key in keys]
    modules = [module.where for module in space.modules.values()]
    vectors = store.vectors(keys)
    kernel_nn = kernel(vectors, modules)
    plans = {name: plan(trial, measured) for name, trial in TRIALS.items()}
    fits = {name: fits_without(plans[name], kernel_nn, trial.ridge) for name, trial in TRIALS.items()}
    _, scores_nf = apply(vectors, modules, np.concatenate([alpha_nf for _, alpha_nf in fits.values()], axis=1))
    limit_n = np.array([float(group(row) in EASY) for row in measured])
    result: dict[str, Any] = {}
    start = 0
    for name, (of, _) in fits.items():
        result[name] = figures(plans[name], of, scores_nf[:, start : start + len(of)], limit_n)
        start += len(of)
    print(table(result))
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def turns(row: Mapping[str, str]) -> list[Message]:
    return [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["response"]}]


def group(row: Mapping[str, str]) -> str:
    """What a row counts to: its source, and what sets it apart from other rows of the source."""
    if row["kind"] == "unsafe" or row["source"] in ("gsm8k", "labels", "safety-answers"):
        return row["source"]
    if row["source"] in ("dolly", "vader") or row["form"] == "looks unsafe":
        return {"any": "dolly", "judge": "dolly"}.get(row["form"], row["form"])
    return f"{row['source']} ({row['kind']})"


def bare(prompt: str) -> str:
    """A prompt without the template that contrast.py has written it into."""
    inside = re.search(r"### Instruction:\n(.*)\n\n### Response:$|^Question: (.*)\nAnswer:$", prompt, re.DOTALL)
    return next(text for text in (*inside.groups(), prompt) if text is not None) if inside else prompt


def plan(trial: Trial, measured: list[dict[str, str]]) -> Rows:
    """The rows with a trial's weights: 0 for what it does not fit on."""
    groups = np.array([group(row) for row in measured])
    unsafe_n = np.array([row["kind"] == "unsafe" for row in measured])
    asked = [hashlib.blake2b(bare(row["prompt"]).encode(), digest_size=4).digest() for row in measured]
    prompt_n = np.array([int.from_bytes(prompt) for prompt in asked])
    used_n = np.array([row["use"] == "fit" for row in measured]) & (prompt_n // 4 % 1000 < 1000 * trial.share)
    wanted = [trial.unsafe if unsafe else trial.others for unsafe in unsafe_n.tolist()]
    weight_n = np.array([weights.get(name, 0.0) for weights, name in zip(wanted, groups.tolist(), strict=True)])
    return Rows(unsafe_n, groups, np.where(used_n, weight_n, 0.0), prompt_n)


def table(result: Mapping[str, Any]) -> str:
    """The trials in Markdown: AUC against Dolly, and the share above 99 % of the easy benign rows."""
    names = [each["source"] for each in next(iter(result.values()))]
    lines = [f"| trial | {' | '.join(names)} |", "| --- " * (1 + len(names)) + "|"]
    for trial, found in result.items():
        by = {each["source"]: each for each in found}
        cells = (f"{by[n]['auc']['dolly']:.2f}, {100 * by[n]['above']:.0f} %" if n in by else "-" for n in names)
        lines.append(f"| {trial} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
