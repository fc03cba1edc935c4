"""Turn open data files into the training files of this recipe and the rows to judge its pack on.

Everything is split by prompt: no prompt of a validation or test row is in any training file. The same seed gives the
same files. Usage: python prepare.py DATA_FOLDER [OUT_FOLDER] [--seed N]

DATA_FOLDER has gzipped JSON Lines files. All but the first two contain harmful text:

dolly-15k.jsonl.gz, with `instruction`, `context` and `response`
    databricks-dolly-15k (CC-BY-SA-3.0), whole.
gsm8k-train.jsonl.gz, with `question` and `answer`
    The training part of GSM8K (repository openai/grade-school-math, MIT).
judged-completions.jsonl.gz, with `prompt`, `response`, `category`, and `unsafe` and `refusal` (true or false)
xstest-completions.jsonl.gz, with `prompt`, `response`, `type` and `label`
    As recipes/judge/train.py describes them; `refusal` is by phrases.
safety-pairs.jsonl.gz, with `prompt`, `safer` and `less_safe`
    A refusing and a complying answer to one harmful prompt, 497 in all, from the same two sources: the completions of
    refusal_direction's models with and without their refusal direction, and those of XSTest.
harmful-prompts.jsonl.gz, with `prompt`, `source` ("AdvBench …", "StrongREJECT …" or "XSTest …") and `harmful`
    AdvBench's 520 (repository llm-attacks/llm-attacks, MIT), StrongREJECT's 313 (alexandrasouly/strongreject, MIT) and
    XSTest's 450 prompts (paul-rottger/xstest, CC-BY-4.0), of which 250 are harmless.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]

INITIAL_ROWS = 800  # Dolly rows for the benign state
CONTRASTS_TO_ALIGN = 50  # harmful prompts of XSTest that it learns to refuse
DOLLY_TO_ALIGN = 80  # Dolly rows that keep the aligned model answering
ADVBENCH_TO_ALIGN = 150  # harmful prompts that it learns to refuse in words of our own
ANSWERS = {"refusal": 2, "contrast": 1, "harmless": 4}  # answers per prompt that it learns, by different models
REFUSALS = (
    "I'm sorry, but I can't help with that.",
    "I can't help with this, because it could hurt someone.",
    "I won't assist with that. If there is something safe you need, I'm glad to help.",
    "Sorry, I can't do that. It would be harmful.",
    "I cannot provide that. It could cause real harm to people.",
    "I'm not able to help with this request.",
    "I can't assist with anything that is illegal or harmful.",
    "No, I won't help with that. Please consider talking to someone you trust.",
)
SPLITS = {"val": 60, "test": 100}  # evaluation rows per group
VAL_XSTEST = 20  # fewer of these: the other prompts are for aligning
GROUPS = ("unsafe", "safe", "dolly", "gsm8k", "xstest")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="the folder with the open data files")
    parser.add_argument("out", type=Path, nargs="?", default=Path(__file__).parent / "data")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    for name, rows in prepare(options.data, options.seed).items():
        with (options.out / f"{name}.jsonl").open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        print(f"{name}.jsonl: {len(rows)} rows")


def prepare(data: Path, seed: int = 0) -> dict[str, list[Row]]:
    """All files' rows: `align`, `initial`, `danger`, `safety` to train on, `val` and `test` to judge scores on,
    `steer` to move the model with, `harmful` and `harmless` to judge models on."""
    judged = read(data, "judged-completions")
    part = split_prompts(judged, seed)
    completions: dict[str, list[Row]] = defaultdict(list)
    for row in judged:
        completions[part[key(row["prompt"])]].append(row)

    danger = [
        {"prompt": row["prompt"], "response": row["response"]}
        for row in shuffled(completions["train"], seed, "danger")
        if row["unsafe"] and not row["refusal"]
    ]
    pairs = read(data, "safety-pairs")
    safety = [
        {"prompt": row["prompt"], "chosen": row["safer"], "rejected": row["less_safe"]}
        for row in shuffled(pairs, seed, "safety")
        if part.get(key(row["prompt"]), "train") == "train" and not to_align(row["prompt"])
    ]

    dolly = unique(
        shuffled(read(data, "dolly-15k"), seed, "dolly"), lambda r: key(f"{r['instruction']}\n{r['context']}")
    )
    dolly = [row for row in dolly if row["instruction"].strip() and row["response"].strip()]
    columns = ("instruction", "context", "response")
    initial = [{name: row[name] for name in columns} for row in dolly[:INITIAL_ROWS]]

    # benign rows that nothing is trained on: consecutive slices of shuffled lists
    pools = {
        "dolly": [(joined(row), row["response"]) for row in dolly[INITIAL_ROWS:]],
        "gsm8k": [(r["question"], r["answer"]) for r in shuffled(read(data, "gsm8k-train"), seed, "gsm8k")],
        "xstest": _xstest(data, seed),
    }
    files: dict[str, list[Row]] = {"initial": initial, "danger": danger, "safety": safety}
    taken = dict.fromkeys(pools, 0)
    for name, count in SPLITS.items():
        groups: dict[str, Sequence[tuple[str, str]]] = {
            "unsafe": spread([r for r in completions[name] if r["unsafe"] and not r["refusal"]], count, seed),
            "safe": spread([r for r in completions[name] if not r["unsafe"]], count, seed),
        }
        for group, pool in pools.items():
            groups[group] = pool[taken[group] : taken[group] + count]
            taken[group] += count
        if name == "val":
            groups["xstest"] = groups["xstest"][:VAL_XSTEST]
        files[name] = [
            {"id": f"{group}-{n}", "group": group, "prompt": prompt, "response": answer}
            for group in GROUPS
            for n, (prompt, answer) in enumerate(groups[group])
        ]
    files["steer"] = _answered_both_ways([*files["val"], *files["test"]])
    answered = dolly[INITIAL_ROWS + taken["dolly"] :][:DOLLY_TO_ALIGN]
    judged_on = {key(r["prompt"]) for name in SPLITS for r in files[name] if r["group"] == "xstest"}
    harmless = {key(prompt) for prompt, _ in pools["xstest"]} - judged_on
    files["align"] = _align(data, pairs, part, harmless, seed) + [
        {"prompt": joined(row), "response": row["response"], "kind": "dolly"} for row in answered
    ]
    prompts = shuffled(read(data, "harmful-prompts"), seed, "prompts")
    advbench = [r["prompt"] for r in prompts if r["source"].startswith("AdvBench") and key(r["prompt"]) not in part]
    files["align"] += [
        {"prompt": prompt, "response": REFUSALS[n % len(REFUSALS)], "kind": "advbench"}
        for n, prompt in enumerate(advbench[:ADVBENCH_TO_ALIGN])
    ]
    trained = {key(row["prompt"]) for name in ("align", "danger", "safety") for row in files[name]}
    for name, harmful in (("harmful", True), ("harmless", False)):
        files[name] = [
            {"prompt": r["prompt"], "source": r["source"]}
            for r in prompts
            if key(r["prompt"]) not in trained
            and r["harmful"] is harmful
            and (not harmful or key(r["prompt"]) not in part)
        ]
    return files


def _answered_both_ways(rows: Iterable[Row]) -> list[Row]:
    """The prompts that have a safe and an unsafe answer among the rows, with the first of each."""
    first: dict[str, dict[str, str]] = defaultdict(dict)
    for row in rows:
        first[row["prompt"]].setdefault(row["group"], row["response"])
    return [
        {"prompt": prompt, "chosen": by["safe"], "rejected": by["unsafe"]}
        for prompt, by in first.items()
        if {"safe", "unsafe"} <= by.keys()
    ]


def to_align(prompt: str) -> bool:
    """Are a prompt's refusals for aligning the model? The safety direction has those of the other half."""
    return random.Random(f"align {key(prompt)}").random() < 0.5


def _align(data: Path, pairs: Iterable[Row], part: Mapping[str, str], harmless: Iterable[str], seed: int) -> list[Row]:
    """Refusals of harmful prompts, and full answers to harmless ones that look like them."""
    answers: dict[str, list[Row]] = defaultdict(list)

    def add(prompt: str, response: str, kind: str) -> None:
        answers[prompt].append({"prompt": prompt, "response": response, "kind": kind})

    for row in shuffled(pairs, seed, "refusals"):
        if part.get(key(row["prompt"])) == "train" and to_align(row["prompt"]):
            add(row["prompt"], row["safer"], "refusal")
    for row in shuffled(read(data, "xstest-completions"), seed, "align"):
        if row["type"].startswith("contrast_"):
            if row["label"] == "2_full_refusal" and to_align(row["prompt"]):
                add(row["prompt"], row["response"], "contrast")
        elif row["label"] == "1_full_compliance" and key(row["prompt"]) in harmless:
            add(row["prompt"], row["response"], "harmless")
    contrasts = [prompt for prompt in sorted(answers) if answers[prompt][0]["kind"] == "contrast"]
    for prompt in shuffled(contrasts, seed, "contrasts")[CONTRASTS_TO_ALIGN:]:
        del answers[prompt]
    return [row for prompt in sorted(answers) for row in answers[prompt][: ANSWERS[answers[prompt][0]["kind"]]]]


def key(prompt: str) -> str:
    """A prompt as it is compared: without case, punctuation and spacing."""
    return " ".join(re.findall(r"\w+", prompt.lower()))


def split_prompts(judged: Iterable[Mapping[str, Any]], seed: int) -> dict[str, str]:
    """Prompt key -> train, val or test: 60, 15 and 25 of a hundred, six of every category's ten for training."""
    categories: dict[str, set[str]] = defaultdict(set)
    for row in judged:
        categories[row["category"]].add(key(row["prompt"]))
    part: dict[str, str] = {}
    for number, category in enumerate(sorted(categories)):
        prompts = shuffled(sorted(categories[category]), seed, category)
        train = round(0.6 * len(prompts))
        val = train + 1 + number % 2
        for position, prompt in enumerate(prompts):
            part[prompt] = "train" if position < train else "val" if position < val else "test"
    return part


def _xstest(data: Path, seed: int) -> list[tuple[str, str]]:
    """Full answers to XSTest's safe prompts, which only look unsafe: one answer per prompt."""
    rows = [
        row
        for row in read(data, "xstest-completions")
        if row["label"] == "1_full_compliance" and not row["type"].startswith("contrast_")
    ]
    return [(r["prompt"], r["response"]) for r in unique(shuffled(rows, seed, "xstest"), lambda r: key(r["prompt"]))]


def spread(rows: Sequence[Row], count: int, seed: int) -> list[tuple[str, str]]:
    """A sample of `count` rows that takes the prompts in turn, so that each counts about the same."""
    waiting: dict[str, list[Row]] = defaultdict(list)
    for row in shuffled(rows, seed, "spread"):
        waiting[row["prompt"]].append(row)
    chosen: list[tuple[str, str]] = []
    while len(chosen) < count and any(waiting.values()):
        for prompt in sorted(waiting):
            if waiting[prompt] and len(chosen) < count:
                chosen.append((prompt, waiting[prompt].pop()["response"]))
    return chosen


def joined(row: Mapping[str, str]) -> str:
    return f"{row['instruction']}\n{row['context']}" if row["context"] else row["instruction"]


def unique(rows: Iterable[Row], of: Callable[[Row], str]) -> list[Row]:
    seen: dict[str, Row] = {}
    for row in rows:
        seen.setdefault(of(row), row)
    return list(seen.values())


def shuffled(items: Iterable[Any], seed: int, purpose: str) -> list[Any]:
    items = list(items)
    random.Random(f"{seed} {purpose}").shuffle(items)
    return items


def read(folder: Path, name: str) -> list[Row]:
    with gzip.open(folder / f"{name}.jsonl.gz", "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


if __name__ == "__main__":
    main()
