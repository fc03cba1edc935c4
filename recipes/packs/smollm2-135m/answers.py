"""Answers of the built-in pack's own model, as further unsafe, safe and benign rows of its linear probe.

    python answers.py DATA_FOLDER [OUT_FOLDER] [--pack PACK]

Writes OUT_FOLDER/answers.jsonl with `kind`, `source`, `form`, `prompt` and `response`. Without its base adapter the
model hardly refuses: it answers prompts of AdvBench and StrongREJECT (unsafe, "smollm2"), questions of chats that a
classifier of words finds harmful (unsafe, "asked") and prompts of Dolly (benign), many of them in a sentence or two.
With the base adapter it refuses (safe). Answers of the wrong kind are left out by their phrases. Answers are greedy;
the prompts that models are judged on (recipes/paper/small/study.py) have none.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1] / "paper" / "small")]

import prepare  # noqa: E402
import study  # noqa: E402
import torch  # noqa: E402

from sqsd_filter.judges import is_refusal  # noqa: E402
from sqsd_filter.judges.generation import answer  # noqa: E402
from sqsd_filter.scoring.models import load_model, load_tokenizer  # noqa: E402
from sqsd_filter.scoring.pack import Pack, load_pack  # noqa: E402

Row = dict[str, Any]
SHORT = " Answer in one or two sentences."  # asked for, and not kept in the prompt
TOKENS = {"short": 48, "long": 110, "refusal": 40}  # of an answer
HARMFUL = {"short": slice(260), "long": slice(260, 460), "refusal": slice(400, 520)}
ASKED = {"short": slice(165), "long": slice(165, 330)}
HARMFUL_AT = 0.6  # the probability from which the question of a chat counts as harmful
HARMLESS = {"short": slice(100), "long": slice(100, 180)}
LONGEST = 500  # characters of a harmless prompt


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="the folder with the open data files")
    parser.add_argument("out", type=Path, nargs="?", default=HERE / "data")
    parser.add_argument(
        "--pack", default="smollm2-135m", help="the pack whose base adapter teaches the model to refuse"
    )
    options = parser.parse_args()
    rows = answers(load_pack(options.pack), *prompts(options.data), chats(options.data))
    options.out.mkdir(parents=True, exist_ok=True)
    with (options.out / "answers.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    print(f"answers.jsonl: {len(rows)} rows")


def prompts(data: Path, seed: int = 0) -> tuple[list[str], list[str]]:
    """Harmful and harmless prompts, none of which models or scores are judged on."""
    prepared, studied = prepare.prepare(data, seed), study.study_rows(data, seed)
    apart = {prepare.key(row["prompt"]) for row in studied["harmful"][:100]}
    apart |= {prepare.key(row["prompt"]) for row in prepare.read(data, "judged-completions")}
    harmful = [
        row
        for row in prepare.shuffled(prepare.read(data, "harmful-prompts"), seed, "prompts")
        if row["source"].startswith(("AdvBench", "StrongREJECT")) and prepare.key(row["prompt"]) not in apart
    ]
    distinct = prepare.unique(harmful, lambda row: prepare.key(row["prompt"]))
    known = [row for row in prepared["initial"] if len(row["instruction"]) + len(row["context"]) < LONGEST]
    return [row["prompt"] for row in distinct], [prepare.joined(row) for row in known]


def chats(data: Path) -> list[str]:
    """The only question of chats, where words tell that it is harmful; of no chat that another file has."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    known = prepare.read(data, "harmful-prompts")
    plain = prepare.shuffled(prepare.read(data, "dolly-15k"), 0, "x")[:800]
    words = TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True)
    texts = words.fit_transform([*(row["prompt"] for row in known), *(row["instruction"] for row in plain)])
    judge = LogisticRegression(C=10, max_iter=1000).fit(
        texts, [*(int(row["harmful"]) for row in known), *[0] * len(plain)]
    )
    apart = {
        prepare.key(row["prompt"])
        for name in ("judged-completions", "pure-bad-100")
        for row in prepare.read(data, name)
    }
    questions: dict[str, str] = {}
    for row in prepare.read(data, "hh-harmless-pairs"):
        turns = [turn for turn in re.split(r"\n*\s*(?:Human|H):\s*", row["context"]) if turn.strip()]
        question = re.split(r"\n*\s*Assistant:", turns[-1])[0].strip() if turns else ""
        if len(turns) == 1 and 15 < len(question) < 300 and prepare.key(question) not in apart:
            questions.setdefault(prepare.key(question), question)
    asked = list(questions.values())
    if not asked:
        return []
    harmful = judge.predict_proba(words.transform(asked))[:, 1]
    chosen = [asked[k] for k in harmful.argsort()[::-1] if harmful[k] > HARMFUL_AT][: ASKED["long"].stop]
    random.Random(0).shuffle(chosen)
    return chosen


def answers(pack: Pack, harmful: Sequence[str], harmless: Sequence[str], asked: Sequence[str]) -> list[Row]:
    """Answers of the pack's model, by kind, source and form."""
    rows = []
    for kind, source, questions, parts, adapter in (
        ("benign", "smollm2", harmless, HARMLESS, None),
        ("safe", "smollm2", harmful, {"refusal": HARMFUL["refusal"]}, pack.base_folder),
        ("unsafe", "smollm2", harmful, {form: HARMFUL[form] for form in HARMLESS}, None),
        ("unsafe", "asked", asked, ASKED, None),
    ):
        model = load_model(pack.base_model, pack.base_revision, dtype=torch.float32, adapter=adapter)
        tokenizer = load_tokenizer(pack.base_model, pack.base_revision)
        for form, part in parts.items():
            extended = [prompt + (SHORT if form == "short" else "") for prompt in questions[part]]
            given = answer(model, tokenizer, extended, max_new_tokens=TOKENS[form], batch_size=24)
            rows += [
                {"kind": kind, "source": source, "form": form, "prompt": prompt, "response": reply}
                for prompt, reply in zip(questions[part], given, strict=True)
                if reply.strip() and (kind == "benign" or is_refusal(reply) == (kind == "safe"))
            ]
    return rows


if __name__ == "__main__":
    main()
