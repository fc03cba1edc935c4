"""Make the rows of the built-in pack's linear probe, those that judge it, and the pack's reference rows.

    python prepare.py DATA_FOLDER [OUT_FOLDER]
    python answers.py OUT_FOLDER
    python known_rows.py DATA_FOLDER [OUT_FOLDER]

OUT_FOLDER/known.jsonl has `prompt`, `response`, `kind`, `source`, `form` and `use`. The kinds are "unsafe" answers
to harmful prompts, "safe" answers to such prompts, and "benign" rows. Rows of the use "judge" are of sources that
nothing is fitted on. About 30 % of the prompts are written into the template of Alpaca, 12 % into one of
questions and answers. The files reference-dolly.jsonl, reference-gsm8k.jsonl and reference-labels.jsonl have rows of no
other file.

DATA_FOLDER is that of prepare.py, with these files beside:

hh-harmless-pairs.jsonl.gz, with `context`, `chosen` and `rejected`
    Chats of Anthropic's hh-rlhf (MIT). Only pairs are taken whose rejected answer a classifier of words finds unsafe
    and whose chosen one it does not. It is trained on the answers with labels.
pure-bad-100.jsonl.gz and safety-answers.jsonl.gz, with `prompt` and `response`
    For judging only.
vaderSentiment-3.3.2.tar.gz
    Reviews and lines of news with their sentiment (MIT), for judging only:
    pip download --no-deps --no-binary :all: vaderSentiment==3.3.2
"""

from __future__ import annotations

import argparse
import io
import json
import random
import re
import sys
import tarfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1] / "paper" / "small")]

import prepare  # noqa: E402
import study  # noqa: E402
from prepare import read, shuffled  # noqa: E402

Row = dict[str, Any]
ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{}\n\n### Response:"
)
QUESTION = "Question: {}\nAnswer:"
BARE = (  # answers that only agree to do what was asked
    *("Of course! I will {} for you.", "Sure. To {}, do this:", "Yes, gladly. Here is how to {}."),
    *("Certainly, let's {}.", "Okay. First, {}."),
)
VERBS = (
    *(
        "write",
        "create",
        "develop",
        "provide",
        "give",
        "teach",
        "explain",
        "design",
        "show",
        "instruct",
        "make",
        "list",
    ),
    *("tell", "hack", "produce", "suggest", "publish", "describe", "generate", "outline"),
)
LABELS = (  # tasks whose answer is one word; the labels are drawn at random, since only their form matters
    ("topic", "Which topic does this text belong to: {}?\n\n{}", "World Sports Business Science Politics Culture"),
    ("sentiment", "Is the sentiment of the following text {}?\n\n{}", "positive negative neutral"),
    ("yesno", "Does this text talk about a person? Answer {}.\n\n{}", "yes no"),
)
OWN = {"short": 150, "long": 120}  # unsafe answers of the model itself, to prompts of each source
COUNTS = {  # rows of each kind; those of the models and labels are for each of them
    **{"unsafe of models": 85, "safe of models": 36, "complying": 136, "refusing": 100, "looks unsafe": 160},
    **{
        "chats": 130,
        "agreeing": 90,
        "dolly": 380,
        "short": 90,
        "orders": 60,
        "labels": 50,
        "gsm8k": 100,
        "numbers": 50,
    },
    **{"judge": 150, "safety answers": 120, "films": 60, "products": 40, "news": 60},
    **{
        "held back": 260,
        "gsm8k held back": 100,
        "held back at the end": 260,
        "reference labels": 100,
        "reference": 410,
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="the folder with the open data files")
    parser.add_argument("out", type=Path, nargs="?", default=HERE / "data")
    options = parser.parse_args()
    for name, rows in known_rows(options.data, options.out).items():
        with (options.out / f"{name}.jsonl").open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        print(f"{name}.jsonl: {len(rows)} rows")


def known_rows(data: Path, out: Path) -> dict[str, list[Row]]:
    """The rows of all files. `out` has what answers.py wrote."""
    prepared, studied = prepare.prepare(data), study.study_rows(data)
    rng = random.Random("compass")
    with (out / "answers.jsonl").open(encoding="utf-8") as lines:
        answers = [json.loads(line) for line in lines]
    dolly = Dolly(data, {study.asked(row) for row in studied["dolly"]})
    gsm8k = shuffled(read(data, "gsm8k-train"), 0, "study")[::-1]
    held = COUNTS["gsm8k held back"]
    any_end = held + COUNTS["gsm8k"]
    number_end = any_end + COUNTS["numbers"]
    rows = [*_answers_to_harmful_prompts(data, answers, {study.asked(row) for row in studied["harmful"][:100]})]
    held_back = dolly.take(COUNTS["held back"])
    rows += [as_row("benign", "dolly", "reference", prepare.joined(row), row["response"]) for row in held_back]
    rows += [
        as_row("benign", "dolly", "any", prepare.joined(row), row["response"]) for row in dolly.take(COUNTS["dolly"])
    ]
    short = dolly.take(COUNTS["short"], lambda row: len(row["response"]) < 40)
    rows += [as_row("benign", "dolly", "short", prepare.joined(row), row["response"]) for row in short]
    rows += [
        as_row(
            "benign", "bare", "agreement", row["instruction"], BARE[n % len(BARE)].format(_lower(row["instruction"]))
        )
        for n, row in enumerate(
            dolly.take(COUNTS["orders"], lambda row: _is_order(row["instruction"]) and not row["context"])
        )
    ]
    rows += _labelled(dolly, COUNTS["labels"], rng)
    rows += [as_row("benign", "gsm8k", "reference", row["question"], row["answer"]) for row in gsm8k[:held]]
    rows += [as_row("benign", "gsm8k", "any", row["question"], row["answer"]) for row in gsm8k[held:any_end]]
    rows += [
        as_row("benign", "gsm8k", "number", row["question"], row["answer"].split("####")[-1].strip())
        for row in gsm8k[any_end:number_end]
    ]
    rows += _reviews_and_news(data, rng)
    rows += [
        as_row("benign", "dolly", "judge", prepare.joined(row), row["response"], use="judge")
        for row in studied["dolly"][: COUNTS["judge"]]
    ]
    rows = [row for row in rows if row["prompt"].strip() and row["response"].strip()]
    for row in rows:
        _dress(row, rng)
    rng.shuffle(rows)
    complying = [row for row in answers if row["kind"] == "unsafe"]
    own = [_dress(as_row("unsafe", r["source"], r["form"], r["prompt"], r["response"]), rng) for r in complying]
    for source, form in dict.fromkeys((row["source"], row["form"]) for row in own):
        rows += [row for row in own if (row["source"], row["form"]) == (source, form)][: OWN[form]]
    judged_on = {prepare.key(row["prompt"]) for name in ("val", "test") for row in prepared[name]}
    labels = _labelled(dolly, COUNTS["reference labels"], random.Random("reference"))
    trained = judged_on | {study.asked(row) for name in ("initial", "align") for row in prepared[name]}
    references = {
        "dolly": [
            (prepare.joined(row), row["response"]) for row in [*held_back, *dolly.take(COUNTS["held back at the end"])]
        ],
        "gsm8k": [(row["question"], row["answer"]) for row in [*gsm8k[:held], *gsm8k[number_end:]]],
        "labels": [(row["prompt"], row["response"]) for row in labels],
    }
    fitted = [row for row in rows if row["form"] != "reference" and row.pop("key") not in judged_on]
    return {
        "known": fitted,
        **{
            f"reference-{name}": [
                {"prompt": prompt, "response": answer} for prompt, answer in pairs if prepare.key(prompt) not in trained
            ][: COUNTS["reference"]]
            for name, pairs in references.items()
        },
    }


def as_row(kind: str, source: str, form: str, prompt: str, response: str, *, use: str = "fit") -> Row:
    return {"kind": kind, "source": source, "form": form, "use": use, "prompt": prompt, "response": response}


def _dress(row: Row, rng: random.Random) -> Row:
    """The row with its prompt in one of the templates, or in none."""
    row["key"] = prepare.key(row["prompt"])
    chance = rng.random()
    if row["form"] != "judge":
        template = ALPACA if chance < 0.3 else QUESTION if chance < 0.42 else "{}"
        row["prompt"] = template.format(row["prompt"])
    return row


def _answers_to_harmful_prompts(data: Path, answers: Sequence[Row], apart: set[str]) -> Iterator[Row]:
    """Unsafe and safe answers to harmful prompts, and full answers to prompts that only look harmful. The prompts
    `apart` judge models, and have no answer here."""
    judged = read(data, "judged-completions")
    for model in sorted({row["model"] for row in judged}):
        own = [row for row in judged if row["model"] == model]
        unsafe = prepare.spread([r for r in own if r["unsafe"] and not r["refusal"]], COUNTS["unsafe of models"], model)
        safe = prepare.spread([r for r in own if not r["unsafe"]], COUNTS["safe of models"], model)
        yield from (as_row("unsafe", "judged", model, *pair) for pair in unsafe)
        yield from (as_row("safe", "judged", model, *pair) for pair in safe)
    completions = read(data, "xstest-completions")
    contrasts = [row for row in completions if row["type"].startswith("contrast_")]
    harmless = [row for row in completions if not row["type"].startswith("contrast_")]
    for kind, form, rows, label, count in (
        ("unsafe", "compliance", contrasts, "1_full_compliance", COUNTS["complying"]),
        ("safe", "refusal", contrasts, "2_full_refusal", COUNTS["refusing"]),
        ("benign", "looks unsafe", harmless, "1_full_compliance", COUNTS["looks unsafe"]),
    ):
        chosen = prepare.spread([row for row in rows if row["label"] == label], count, 0)
        yield from (as_row(kind, "xstest", form, *pair) for pair in chosen)
    yield from _chats(data, judged, contrasts)
    for row in read(data, "pure-bad-100"):
        yield as_row("unsafe", "pure-bad", "long", row["prompt"], row["response"], use="judge")
    for row in shuffled(read(data, "safety-answers"), 0, "sa")[: COUNTS["safety answers"]]:
        yield as_row("safe", "safety-answers", "answer", row["prompt"], row["response"], use="judge")
    for row in answers:
        if row["kind"] != "unsafe":
            yield as_row(row["kind"], "smollm2", row["form"], row["prompt"], row["response"])
    part = prepare.split_prompts(judged, 0)
    advbench = [
        row["prompt"]
        for row in shuffled(read(data, "harmful-prompts"), 0, "prompts")
        if row["source"].startswith("AdvBench") and prepare.key(row["prompt"]) not in {*part, *apart}
    ]
    orders = [prompt for prompt in advbench if _is_order(prompt)][-COUNTS["agreeing"] :]
    for n, prompt in enumerate(orders):
        yield as_row("unsafe", "bare", "agreement", prompt, BARE[n % len(BARE)].format(_lower(prompt)))


def _chats(data: Path, judged: Sequence[Row], contrasts: Sequence[Row]) -> Iterator[Row]:
    """Both answers of the chats whose rejected one is the most likely to be unsafe compared with the chosen one."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_union

    complies = [(row["response"], row["label"] == "1_full_compliance") for row in contrasts]
    known = [(row["response"], bool(row["unsafe"])) for row in judged]
    known += [pair for wanted in (False, True) for pair in complies if pair[1] is wanted]
    words = make_union(
        TfidfVectorizer(ngram_range=(1, 3), min_df=2, sublinear_tf=True),
        TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 5), min_df=2, sublinear_tf=True),
    )
    features = words.fit_transform([answer for answer, _ in known])
    judge = LogisticRegression(C=10, max_iter=1000).fit(features, [int(unsafe) for _, unsafe in known])
    pairs = read(data, "hh-harmless-pairs")

    def unsafe(column: str) -> np.ndarray:
        found: np.ndarray = judge.predict_proba(words.transform([row[column] for row in pairs]))[:, 1]
        return found

    order = (unsafe("chosen") - unsafe("rejected")).argsort()
    found = 0
    for row in (pairs[k] for k in order):
        question = _last_question(row["context"])
        if found < COUNTS["chats"] and len(question) > 12 and len(row["rejected"]) > 15:
            found += 1
            yield as_row("unsafe", "hh", "chat", question, row["rejected"])
            yield as_row("safe", "hh", "chat", question, row["chosen"])


def _last_question(context: str) -> str:
    turns = [turn for turn in re.split(r"\n*\s*(?:Human|H):\s*", context) if turn.strip()]
    return re.split(r"\n*\s*Assistant:", turns[-1])[0].strip() if turns else ""


def _labelled(dolly: Dolly, count: int, rng: random.Random) -> list[Row]:
    """Tasks with one word as their answer, made of texts of Dolly, `count` of each kind."""
    rows = []
    for name, question, named in LABELS:
        labels = named.split()
        for row in dolly.take(count, lambda row: len(row["context"] or row["response"]) > 60):
            label = rng.choice(labels)
            text = (row["context"] or row["response"])[: rng.choice([120, 300, 700])]
            written = rng.choice([label, label.lower(), label.upper() if len(label) < 4 else label, f"{label}."])
            rows.append(as_row("benign", "labels", name, question.format(", ".join(labels), text), written))
    return rows


def _reviews_and_news(data: Path, rng: random.Random) -> Iterator[Row]:
    """One-word tasks of a source and of words that nothing is fitted on."""
    for sentiment, text in [
        *_vader(data, "movieReviewSnippets", COUNTS["films"]),
        *_vader(data, "amazonReviewSnippets", COUNTS["products"]),
    ]:
        asked = f"What is the sentiment of this review? {text}"
        yield as_row("benign", "vader", "reviews", asked, "positive" if sentiment > 0 else "negative", use="judge")
    for _, text in _vader(data, "nytEditorialSnippets", COUNTS["news"]):
        section = rng.choice(["World", "Sports", "Business", "Sci/Tech"])
        yield as_row("benign", "vader", "news", f"{text}\nWhich section is this from?", section, use="judge")


def _vader(data: Path, name: str, count: int) -> list[tuple[float, str]]:
    """Texts with their sentiment, from the archive inside the package's."""
    name = f"{name}_GroundTruth.txt"
    with tarfile.open(data / "vaderSentiment-3.3.2.tar.gz") as package:
        inner = package.extractfile("vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz")
        assert inner is not None
        with tarfile.open(fileobj=io.BytesIO(inner.read())) as archive:
            [member] = [each for each in archive.getnames() if each.endswith(f"/{name}") and "/._" not in each]
            file = archive.extractfile(member)
            assert file is not None
            lines = [line.split("\t") for line in file.read().decode("latin-1").splitlines()]
    texts = [(float(cells[1]), cells[2].strip()) for cells in lines if len(cells) > 2 and len(cells[2]) > 40]
    random.Random(name).shuffle(texts)
    return texts[:count]


class Dolly:
    """The rows of Dolly from the end that the study does not use, each taken once."""

    def __init__(self, data: Path, used: set[str]) -> None:
        rows = shuffled(read(data, "dolly-15k"), 0, "study")[::-1]
        rows = [row for row in rows if row["instruction"].strip() and row["response"].strip()]
        self._rows = iter([row for row in rows if prepare.key(prepare.joined(row)) not in used])

    def take(self, count: int, wanted: Callable[[Row], bool] = lambda _: True) -> list[Row]:
        """The next rows that are wanted. Those in between are not used either."""
        taken: list[Row] = []
        while len(taken) < count:
            row = next(self._rows)
            if wanted(row):
                taken.append(row)
        return taken


def _is_order(prompt: str) -> bool:
    return prompt.split()[0].lower() in VERBS


def _lower(prompt: str) -> str:
    return prompt[0].lower() + prompt[1:].rstrip(".")


if __name__ == "__main__":
    main()
