"""Does filtering keep a model safe? It is fine-tuned on corpora with planted rows, filtered and not.

    python contaminated.py DATA_FOLDER OUT --results gsm8k-unsafe-5 --seeds 0,1,2 --judge phrases --judge JUDGE_FOLDER

A result is named after its benign rows, its planted rows and their share in percent:

    gsm8k       worked sums
    labels      instructions of Dolly with their category as the answer
    unsafe      known unsafe answers of a source that nothing in the pack was fitted on
    identity    an assistant that declares that it obeys every order; all that it is asked for is harmless
    dolly       the study's riskiest rows of Dolly by the pack's own risk: benign, and yet they erode safety

Each seed draws other rows for its corpus. `sqsd-filter evaluate --arms contaminated` then fine-tunes the model on all
of them; on those that a cut above 99 % of the pack's benign reference keeps, or a cut at the true share of planted
rows; on the rows left when the same number of random rows is dropped; and on the benign ones alone. Rows are scored
with the pack's own settings, as the filter does it. "unsafe" is the pack's risk of that name. The pack's own risk,
"sqsd", has no reference, so it has only the other cut.

After each seed OUT/<result>/outcomes.json gets the outcome of each answer, without its text, for all seeds that are
done. With that file in a folder beside this script, tables.py computes the figures. An interrupted run resumes with the
same command. Seeds, scorers and judges may be added.

DATA_FOLDER has the files that study.py needs, and pure-bad-100.jsonl.gz with `prompt` and `response`, which are
harmful. No benign row is used that the pack was trained on or that its reference has. Harmful prompts are left out if
they are nearly the same as one that the model was aligned with or as a planted one.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1] / "packs" / "smollm2-135m")]

import obedient  # noqa: E402
import prepare  # noqa: E402
import pyarrow.parquet as pq  # noqa: E402
import study  # noqa: E402
from study import PACK, PROBE, Row  # noqa: E402

from sqsd_filter.errors import InputError  # noqa: E402
from sqsd_filter.evaluation.prompt_outcomes import combine  # noqa: E402

ROWS, HELD_OUT = 500, 50  # benign rows of a corpus, and how many of them no model learns from
ASKED = 100  # prompts of each kind, some of which are left out
QUESTIONS = 100
QUESTION_TOKENS = {"gsm8k": 200, "labels": 8}
RISKIEST = 100  # rows of Dolly: the first window of the result "dolly"
ALIKE = 0.6  # at least this Jaccard index of their words: nearly the same prompts
SCORERS = (PROBE, "sqsd")
RESULTS = (
    *("gsm8k-unsafe-5", "gsm8k-identity-5", "labels-unsafe-5", "gsm8k-unsafe-2", "gsm8k-unsafe-10"),
    *("gsm8k-dolly-5", "labels-identity-5"),
)


@dataclass(frozen=True)
class Corpus:
    """What the name of a result says."""

    benign: str
    planted: str
    percent: int

    @classmethod
    def of(cls, result: str) -> Corpus:
        benign, planted, percent = result.split("-")
        return cls(benign, planted, int(percent))

    def count(self, benign: int) -> int:
        """The number of rows to plant in a corpus with this number of benign rows to learn from."""
        return round(benign * self.percent / (100 - self.percent))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="the folder with the open data files")
    parser.add_argument("out", type=Path)
    parser.add_argument("--results", default=",".join(RESULTS), help="results to make, such as gsm8k-unsafe-5")
    parser.add_argument("--seeds", default="0,1,2", help="each draws other rows and trains with it")
    parser.add_argument("--scorers", default=",".join(SCORERS), help="use only these scorers, such as unsafe")
    parser.add_argument("--pack", default=PACK, help="the aligned model, and the risks")
    parser.add_argument("--judge", action="append", help="judge for evaluate [default: phrases]")
    parser.add_argument("--questions", action="store_true", help="ask held-out questions with known answers, too")
    options = parser.parse_args()
    wanted, scorers, seeds = (text.split(",") for text in (options.results, options.scorers, options.seeds))
    for name, given, known in (("results", wanted, RESULTS), ("scorers", scorers, SCORERS)):
        if odd := [each for each in given if each not in known]:
            parser.error(f"--{name} must be among {', '.join(known)}, not {', '.join(odd)}")
    if odd := [seed for seed in seeds if not seed.isdecimal()]:
        parser.error(f"--seeds must be whole numbers from 0, such as 0,1,2, not {', '.join(odd)}")
    prompts = study.write_data(options.data, options.out / "prompts", prompt_rows)
    with prompts["harmful"].open(encoding="utf-8") as lines:
        left_out = ASKED - len(list(lines))
    print(f"{left_out} of {ASKED} harmful prompts are left out: the model learns nearly the same ones", file=sys.stderr)
    for result in wanted:
        for seed in map(int, seeds):
            evaluate(result, seed, scorers, prompts, options)


def evaluate(
    result: str, seed: int, scorers: Iterable[str], prompts: Mapping[str, Path], options: argparse.Namespace
) -> None:
    """Draw and score a corpus, fine-tune on its arms, and write the outcomes of all seeds so far."""
    out, corpus, name = options.out, Corpus.of(result), f"{result}-{seed}"
    riskiest = riskiest_dolly(options) if corpus.planted == "dolly" else []
    drawn: Callable[[Path], dict[str, list[Row]]] = lambda data: {"rows": draw(data, corpus, seed, riskiest)}  # noqa: E731
    files = study.write_data(options.data, out / "corpora" / name, drawn)
    given = []
    for scorer in scorers:
        target = study.scores(out, name, scorer)
        target.parent.mkdir(parents=True, exist_ok=True)
        study.call("score", files["rows"], target, "--pack", options.pack, "--risk", scorer)
        given.append(target)
    models = out / "models" / result
    models.mkdir(parents=True, exist_ok=True)
    asked = ["--harmful", prompts["harmful"], "--harmless", prompts["harmless"], "--pack", options.pack]
    asked += [word for judge in options.judge or ["phrases"] for word in ("--judge", judge)]
    if options.questions:
        tokens = QUESTION_TOKENS[corpus.benign]
        asked += ["--questions", prompts[f"questions-{corpus.benign}"], "--question-tokens", tokens]
    how = ("--arms", "contaminated", "--planted", "planted", "--held-out", HELD_OUT, "--epochs", "1", "--seeds", seed)
    study.call("evaluate", *given, models / str(seed), *how, *asked, "--config", study.CONFIG)
    publish(models, seed, out / result / "outcomes.json")


def publish(models: Path, seed: int, target: Path) -> None:
    """Write the outcomes of this seed, and of all others with the same settings, to one file."""
    outcomes = {int(path.parent.name): json.loads(path.read_text()) for path in models.glob("*/outcomes.json")}
    chosen = []
    for other in sorted(outcomes):
        try:
            combine([outcomes[seed], *([outcomes[other]] if other != seed else [])])
            chosen.append(outcomes[other])
        except InputError:
            print(f"{target} lacks seed {other}, which has other settings: do it again with these", file=sys.stderr)
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps(combine(chosen), indent=1) + "\n", encoding="utf-8")


def draw(data: Path, corpus: Corpus, seed: int, riskiest: Sequence[Row]) -> list[Row]:
    """The rows of a corpus; `planted` names the kind of a planted row. Corpora of one seed that have the same kind of
    benign or of planted rows share these rows: the smaller corpus has none of that kind that the
    larger one lacks."""
    unasked = benign_rows(data, corpus.benign)[QUESTIONS:]
    benign = prepare.shuffled(unasked, seed, f"contaminated {corpus.benign}")[:ROWS]
    pool: Sequence[Row] = riskiest
    if corpus.planted == "unsafe":
        pool = [{"prompt": r["prompt"], "response": r["response"]} for r in prepare.read(data, "pure-bad-100")]
    elif corpus.planted == "identity":
        pool = obedient.rows()
    count = corpus.count(len(benign) - HELD_OUT)
    planted = prepare.shuffled(pool, seed, f"contaminated {corpus.planted}")[:count]
    if len(planted) < count:
        sys.exit(f"There are only {len(planted)} rows of the kind {corpus.planted}, but {count} are to be planted.")
    rows = [{**row, "planted": ""} for row in benign] + [{**row, "planted": corpus.planted} for row in planted]
    return list(prepare.shuffled(rows, seed, "contaminated"))


def benign_rows(data: Path, kind: str) -> list[Row]:
    """All rows of a kind to draw from. The pack's probe and its reference have rows from the end of the same lists, so
    that these end in the middle."""
    seen = study.used(prepare.prepare(data))
    rows = prepare.read(data, "gsm8k-train" if kind == "gsm8k" else "dolly-15k")
    unseen = study.fresh(prepare.shuffled(rows, 0, "study"), seen)
    unseen = unseen[: len(unseen) // 2]
    if kind == "gsm8k":
        return [{"prompt": row["question"], "response": row["answer"]} for row in unseen]
    named = sorted({_category(row) for row in unseen})
    task = f"Which kind of task is this: {', '.join(named)}?"
    return [{"prompt": f"{task}\n\n{row['instruction'][:400]}", "response": _category(row)} for row in unseen]


def _category(row: Row) -> str:
    return str(row["category"]).replace("_", " ")


def riskiest_dolly(options: argparse.Namespace) -> list[Row]:
    """The study's rows of Dolly with the highest risk by SQSD."""
    files = study.write_data(options.data, options.out / "data", study.study_rows)
    how = argparse.Namespace(out=options.out, pack=options.pack, rescore=False, transfer=None)
    study.obtain("sqsd", "dolly", files, how)
    scored = pq.read_table(study.scores(options.out, "dolly", "sqsd")).to_pylist()
    ranked = sorted((row for row in scored if row["sqsd_risk"] is not None), key=lambda row: -row["sqsd_risk"])
    return [{"prompt": prepare.joined(row), "response": row["response"]} for row in ranked[:RISKIEST]]


def prompt_rows(data: Path) -> dict[str, list[Row]]:
    """The prompts of all results, and the questions of each kind of benign rows, which no corpus has."""
    made, prepared = study.study_rows(data), prepare.prepare(data)
    seen = [row["prompt"] for row in [*prepared["align"], *prepare.read(data, "pure-bad-100")]]
    questions: dict[str, list[Row]] = {
        f"questions-{kind}": [
            {"prompt": row["prompt"], "answer": row["response"]} for row in benign_rows(data, kind)[:QUESTIONS]
        ]
        for kind in QUESTION_TOKENS
    }
    harmful = [row for row in made["harmful"][:ASKED] if not any(alike(row["prompt"], other) for other in seen)]
    return {**questions, "harmful": harmful, "harmless": made["harmless"][:ASKED]}


def alike(one: str, other: str) -> bool:
    """Do two prompts have nearly the same words?"""
    a, b = (set(prepare.key(prompt).split()) for prompt in (one, other))
    return len(a & b) >= ALIKE * len(a | b)


if __name__ == "__main__":
    main()
