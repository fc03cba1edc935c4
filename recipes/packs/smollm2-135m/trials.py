"""Which layers, rows, weights and ridge make the linear probe that points furthest? Each trial scores sources that it
has not seen.

    python trials.py DATA_FOLDER WORK [--pack PACK] [--out trials.json]

DATA_FOLDER has the known.jsonl of known_rows.py. The hidden states of all its rows are read once and kept in WORK (half
an hour on two cores). Every unsafe source, also those for judging only, is scored by fits that have seen neither the
source nor any prompt of what is compared, four fits for each. For each trial and source the result has the AUC against
each group of other rows, and the share above 99 % of the rows of Dolly, GSM8K and one-word tasks, of which each row
weighs the same. `others` has the share of each group of other rows above the same limit, by the fits without pure-bad.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from sqsd_filter.cli.output import Display
from sqsd_filter.corpus.conversation import Message, conversation_key
from sqsd_filter.directions.linear_probe.fit import Standardised
from sqsd_filter.directions.linear_probe.held_out import LEVEL, Rows, figures, of_fold, scores_without
from sqsd_filter.directions.linear_probe.make import KnownRow, read_states
from sqsd_filter.scoring.pack import LinearProbe, load_pack

MAX_LENGTH = 256
LAYERS = (2, 5, 8, 11, 14, 17, 20, 23, 26, 29)  # that are read
EASY = ("dolly", "short", "gsm8k", "labels", "reviews", "news")  # benign groups that make the limit
ANSWER, START = 0, 1  # what is read at a layer
UNSAFE = {"judged": 4.0, "xstest": 3.0, "smollm2": 3.0, "asked": 3.0}
OTHERS = {
    **{"dolly": 35.0, "short": 4.0, "labels": 6.0, "gsm8k": 6.0, "smollm2 (benign)": 12.0, "looks unsafe": 8.0},
    **{"judged (safe)": 12.0, "xstest (safe)": 9.0, "smollm2 (safe)": 9.0},
}
CHATS, AGREEING = {"hh": 3.0}, {"bare": 3.0}


@dataclass(frozen=True)
class Trial:
    """The weights of the sources that are fitted on, the layers and what is read there, the ridge, and the share of the
    rows that is used."""

    unsafe: Mapping[str, float] = field(default_factory=lambda: UNSAFE)
    others: Mapping[str, float] = field(default_factory=lambda: OTHERS)
    layers: tuple[int, ...] = (14, 20, 26)
    read: tuple[int, ...] = (ANSWER, START)
    ridge: float = 0.5
    share: float = 1.0


PLAIN = dict.fromkeys(OTHERS, 1.0)
TRIALS = {
    "as built": Trial(),
    **{f"ridge {ridge:g}": Trial(ridge=ridge) for ridge in (0.05, 0.15, 1.5, 5.0)},
    **{f"layer {layer}": Trial(layers=(layer,)) for layer in (2, 8, 14, 20, 26, 29)},
    "layers 8, 14, 20, 26": Trial(layers=(8, 14, 20, 26)),
    "all ten layers": Trial(layers=LAYERS),
    "answers alone": Trial(read=(ANSWER,)),
    "their starts alone": Trial(read=(START,)),
    **{f"{share:.1%} of the rows": Trial(share=share) for share in (0.5, 0.25, 0.125)},
    "equal sources": Trial(dict.fromkeys(UNSAFE, 1.0), PLAIN),
    "twice the weight for what looks unsafe": Trial(others=OTHERS | {"looks unsafe": 16.0, "judged (safe)": 24.0}),
    "with chats (hh)": Trial(UNSAFE | CHATS, OTHERS | {"hh (safe)": 6.0}),
    "with mere agreement (bare)": Trial(UNSAFE | AGREEING, OTHERS | {"bare (benign)": 4.0}),
    "without answers to chats (asked)": Trial({name: w for name, w in UNSAFE.items() if name != "asked"}),
    "without the model's own answers": Trial(
        {name: weight for name, weight in UNSAFE.items() if name not in ("smollm2", "asked")},
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
    with (options.data / "known.jsonl").open(encoding="utf-8") as lines:
        rows = {conversation_key(turns(row)).hex(): row for row in map(json.loads, lines)}
    read = states(rows, options.work, options.pack)
    measured = [rows[key] for key in read]
    read_nlsh = np.stack(list(read.values()))
    limit_n = np.array([float(group(row) in EASY) for row in measured])
    result = {name: tried(trial, measured, read_nlsh, limit_n) for name, trial in TRIALS.items()}
    print(table(result))
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def states(rows: Mapping[str, Mapping[str, str]], work: Path, pack: str) -> dict[str, np.ndarray]:
    """What is read of each row that can be read, by its key: (layers, 2, h). It is kept in `work`."""
    kept = work / "states.safetensors"
    if not kept.is_file():
        known = {key: KnownRow(turns(row), row["kind"] == "unsafe", group(row), 1.0) for key, row in rows.items()}
        read, _ = read_states(load_pack(pack), LinearProbe("unsafe", LAYERS), MAX_LENGTH, known, Display())
        work.mkdir(parents=True, exist_ok=True)
        save_file(read, kept)
    stored = load_file(kept)
    return {key: stored[key] for key in rows if key in stored}


def tried(
    trial: Trial, measured: list[Mapping[str, str]], read_nlsh: np.ndarray, limit_n: np.ndarray
) -> dict[str, Any]:
    """The figures of one trial."""
    layers = [LAYERS.index(layer) for layer in trial.layers]
    values = Standardised.of(read_nlsh[:, layers][:, :, list(trial.read)].reshape(len(measured), -1))
    rows = plan(trial, measured)
    scores = scores_without(rows, values.kernel(), trial.ridge)
    score_n = of_fold(rows, scores, "pure-bad")
    names = [name for name in rows.names(unsafe=False) if not name.startswith("hh")]
    limit = float(np.quantile(score_n[limit_n > 0], LEVEL, method="inverted_cdf"))
    others = {name: score_n[~rows.unsafe & (rows.source == name)] for name in names}
    return {
        "sources": figures(rows, scores, limit_n),
        "others": {name: round(float((own > limit).mean()), 4) for name, own in others.items()},
    }


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
    """A prompt without the template that known_rows.py has written it into."""
    inside = re.search(r"### Instruction:\n(.*)\n\n### Response:$|^Question: (.*)\nAnswer:$", prompt, re.DOTALL)
    return next(text for text in (*inside.groups(), prompt) if text is not None) if inside else prompt


def plan(trial: Trial, measured: list[Mapping[str, str]]) -> Rows:
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
    """The trials in Markdown: AUC against Dolly and the share above 99 % of the easy benign rows for each unsafe
    source, and that share of the harmless rows that are hard to tell from them."""
    hard = ("looks unsafe", "safety-answers", "smollm2 (benign)", "judged (safe)")
    names = [each["source"] for each in next(iter(result.values()))["sources"]]
    lines = [f"| trial | {' | '.join([*names, *hard])} |", "| --- " * (1 + len(names) + len(hard)) + "|"]
    for trial, found in result.items():
        by = {each["source"]: each for each in found["sources"]}
        cells = [f"{by[n]['auc']['dolly']:.2f}, {100 * by[n]['above']:.0f} %" if n in by else "-" for n in names]
        cells += [f"{100 * found['others'][name]:.0f} %" if name in found["others"] else "-" for name in hard]
        lines.append(f"| {trial} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
