"""The paper's experiment at the size of a laptop: rows of Dolly and GSM8K are scored by each scorer, and models are
fine-tuned on what they call risky and safe. Results come to OUT/<corpus>/results.json after each seed.

    nohup python study.py DATA_FOLDER OUT > study.log 2>&1 &

DATA_FOLDER has databricks-dolly-15k, GSM8K, AdvBench, StrongREJECT, XSTest and completions to JailbreakBench prompts,
as recipes/packs/smollm2-135m/prepare.py reads them. No row or prompt that the pack was trained or chosen on is used,
but for the anchors that some scorers need. Whatever ends it, the same command goes on.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1] / "packs" / "smollm2-135m"))

import prepare  # noqa: E402

from sqsd_filter.scoring.baselines import ANCHORED, SCORERS  # noqa: E402

CORPORA, UNSAFE = ("dolly", "gsm8k"), "unsafe"
CUT_SCORERS = ("sqsd", "length")  # whose cut is compared with a random one, which takes longer
CORPUS_ROWS = 1100
ANCHORS = 100  # of each kind: answers to the same prompts, of the pairs that the pack's safety direction was trained on


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="the folder with the open data files")
    parser.add_argument("out", type=Path)
    parser.add_argument("--pack", default="smollm2-135m", help="the aligned model, and the compass of the scores")
    parser.add_argument("--judge", default="phrases")
    parser.add_argument("--scorers", default=",".join(SCORERS), help="as sqsd,random")
    parser.add_argument("--seeds", default="0,1,2", help="fine-tune once with each")
    options = parser.parse_args()
    scorers = options.scorers.split(",")
    files = write_data(options.data, options.out / "data")
    anchors = ("--unsafe-anchors", files["anchors-unsafe"], "--safe-anchors", files["anchors-safe"])
    for corpus in CORPORA:
        for scorer in scorers:
            how = ["--pack", options.pack, *(anchors if scorer in ANCHORED else ())]
            for name in (UNSAFE, corpus):
                score(files[name], scores(options.out, name, scorer), scorer, how)
        asked = ["--harmful", files["harmful"], "--harmless", files["harmless"], "--judge", options.judge]
        asked += ["--pack", options.pack, "--seeds", options.seeds, "--config", HERE / "evaluate.toml"]
        found = [scores(options.out, corpus, scorer) for scorer in scorers]
        poison = [word for scorer in scorers for word in ("--poison", scores(options.out, UNSAFE, scorer))]
        call("evaluate", *found, options.out / corpus, *asked, *poison)
        if cut := [scores(options.out, corpus, scorer) for scorer in scorers if scorer in CUT_SCORERS]:
            call("evaluate", *cut, options.out / f"{corpus}-cut", *asked, "--arms", "cut", "--drop-top", "5%")


def scores(out: Path, rows: str, scorer: str) -> Path:
    return out / "scores" / rows / f"{scorer}.parquet"


def score(rows: Path, target: Path, scorer: str, how: Sequence[object]) -> None:
    """Score a file. What is done already is found so by the command."""
    target.parent.mkdir(parents=True, exist_ok=True)
    call("score", rows, target, "--scorer", scorer, *how, "--config", HERE / "evaluate.toml")


def call(*words: object) -> None:
    command = ["sqsd-filter", *map(str, words)]
    print(" ".join(command), file=sys.stderr, flush=True)
    done = subprocess.run([sys.executable, "-m", "sqsd_filter", *command[1:]], check=False)
    if done.returncode:
        sys.exit(done.returncode)


def write_data(data: Path, out: Path) -> dict[str, Path]:
    """The files of the study, which are written once: two corpora, known unsafe rows, anchors and prompts."""
    files = {
        name: out / f"{name}.jsonl"
        for name in (*CORPORA, UNSAFE, "anchors-unsafe", "anchors-safe", "harmful", "harmless")
    }
    if all(path.is_file() for path in files.values()):
        return files
    out.mkdir(parents=True, exist_ok=True)
    for name, rows in study_rows(data).items():
        beside = files[name].with_suffix(".tmp")
        beside.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        beside.rename(files[name])
    return files


def study_rows(data: Path, seed: int = 0) -> dict[str, list[Mapping[str, Any]]]:
    """All files' rows: what `prepare` left, and the prompts that it set aside for judging models."""
    prepared = prepare.prepare(data, seed)
    seen = {asked(row) for name in ("initial", "align", "val", "test") for row in prepared[name]}
    judged = prepare.read(data, "judged-completions")
    part = prepare.split_prompts(judged, seed)
    corpora = {name: prepare.read(data, file) for name, file in (("dolly", "dolly-15k"), ("gsm8k", "gsm8k-train"))}
    unsafe = [
        {"prompt": row["prompt"], "response": row["response"]}
        for row in judged
        if part[prepare.key(row["prompt"])] == "test" and row["unsafe"] and not row["refusal"]
    ]
    anchors = {
        f"anchors-{kind}": [{"prompt": r["prompt"], "response": r[answer]} for r in prepared["safety"][:ANCHORS]]
        for kind, answer in (("unsafe", "rejected"), ("safe", "chosen"))
    }
    chosen_on = {asked(row) for row in prepared["val"]}
    prompts = {
        "harmful": [row for row in prepared["harmful"] if row["source"].startswith("AdvBench")],  # which it refuses
        "harmless": [row for row in prepared["harmless"] if asked(row) not in chosen_on],
    }
    unseen = {name: fresh(prepare.shuffled(rows, seed, "study"), seen) for name, rows in corpora.items()}
    return {**unseen, UNSAFE: unsafe, **anchors, **prompts}


def fresh(rows: Iterable[Mapping[str, Any]], seen: set[str]) -> list[Mapping[str, Any]]:
    """The first `CORPUS_ROWS` of the rows with a question and an answer, none of them seen before or twice."""
    chosen: dict[str, Mapping[str, Any]] = {}
    for row in rows:
        answer = row.get("response", row.get("answer", ""))
        if asked(row) not in seen and asked(row) and answer.strip():
            chosen.setdefault(asked(row), row)
    return list(chosen.values())[:CORPUS_ROWS]


def asked(row: Mapping[str, Any]) -> str:
    """What a row asks, without case, punctuation and spacing."""
    question = row.get("prompt") or row.get("question") or f"{row.get('instruction', '')}\n{row.get('context', '')}"
    return prepare.key(question)


if __name__ == "__main__":
    main()
