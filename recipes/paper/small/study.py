"""The paper's experiment at the size of a laptop: each scorer scores rows of Dolly and GSM8K, and models are fine-tuned
on the rows it calls risky and safe.

    nohup python study.py DATA_FOLDER OUT > study.log 2>&1 &

OUT/<name>/ gets results.json and asr.png for each of these names:

    dolly-mixes     known unsafe rows mixed into Dolly, by every scorer, without training
    gsm8k-mixes     the same for GSM8K, by three scorers
    dolly           five windows of Dolly by three scorers, with two seeds
    dolly-all       three windows of Dolly by every scorer, with one seed
    dolly-ends      the riskiest and the safest rows by four scorers, with two seeds
    dolly-matched   the riskiest and the safest rows by SQSD and by length, all with the same number of answer tokens
    gsm8k           three windows of GSM8K by three scorers, with one seed
    dolly-cut       all rows of Dolly, those that a cut at 20 % keeps, as many random ones, and the dropped ones
    dolly-cut-5     the same for a cut at 5 %
    dolly-unsafe    the riskiest and the safest rows by the pack's risk "unsafe", with two seeds

Scores in the folder scores/ beside this script are reused unless `--rescore` or another `--pack` is given. All scores
are written to OUT/scores/<corpus>.parquet in the same form: risks by a hash of the row, without its text. `--windows 2`
learns from the riskiest and the safest rows only. These are the first and the last window of any number of windows, and
the second of three windows is the third of five. "transfer" is SQSD's risk by another pack, of another model; the model
that is fine-tuned stays the same. "half-safety" is SQSD's risk with half the weight on the safety direction.

DATA_FOLDER has the open data files that recipes/packs/smollm2-135m/prepare.py describes. No row or prompt is
used that the pack was trained or chosen on, except for the anchors that some scorers need. An interrupted study resumes
with the same command. contaminated.py fine-tunes on corpora with planted rows.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
CONFIG = HERE / "evaluate.toml"
sys.path.insert(0, str(HERE.parents[1] / "packs" / "smollm2-135m"))

import prepare  # noqa: E402
import pyarrow as pa  # noqa: E402
import pyarrow.compute as pc  # noqa: E402
import pyarrow.parquet as pq  # noqa: E402

from sqsd_filter.scoring.baselines import ANCHORED, SCORERS  # noqa: E402

RISK, UNSAFE, TRANSFER, PACK = "sqsd_", "unsafe", "transfer", "smollm2-135m"
PROBE = "unsafe"  # a risk of the pack, not the known unsafe rows
CORPORA = {"dolly": 1100, "gsm8k": 700}  # rows of each
HALF = "half-safety"
PARTS = {  # risks computed from the other columns of SQSD's scores: their weights
    "danger": {"danger": 1.0},
    "safety": {"safety": -1.0},
    HALF: {"danger": 1.0, "safety": -0.5},
}
ANCHORS = 100  # of each kind: answers to the same prompts, from the pairs of the pack's safety direction


Row = Mapping[str, Any]  # of the open data


@dataclass(frozen=True)
class Result:
    """Scorers compared on a corpus. The models stay in the folder OUT/models/<kept>."""

    corpus: str
    kept: str
    scorers: tuple[str, ...]
    settings: tuple[str, ...]  # options of `evaluate`

    @property
    def mixes(self) -> bool:
        return "none" in self.settings


ALL, FEW = (*SCORERS, HALF, TRANSFER, PROBE), ("sqsd", "random", "length")
ENDS = ("sqsd", "danger", "bi-anchor", HALF)
MIXES = ("--arms", "none")
MATCHED = ("--windows", "2", "--match-tokens", "--seeds", "0")
ONCE = ("--arms", "cut", "--epochs", "1", "--seeds", "0")  # more updates than a window has
RESULTS = {
    "dolly-mixes": Result("dolly", "dolly-mixes", ALL, MIXES),
    "gsm8k-mixes": Result("gsm8k", "gsm8k-mixes", FEW, MIXES),
    "dolly": Result("dolly", "dolly", FEW, ("--windows", "5", "--seeds", "0,1")),
    "dolly-all": Result("dolly", "dolly", ALL, ("--windows", "3", "--seeds", "0")),
    "dolly-ends": Result("dolly", "dolly", ENDS, ("--windows", "2", "--seeds", "0,1")),
    "dolly-unsafe": Result("dolly", "dolly", (PROBE,), ("--windows", "2", "--seeds", "0,1")),
    "dolly-matched": Result("dolly", "dolly", ("sqsd", "length"), MATCHED),
    "gsm8k": Result("gsm8k", "gsm8k", FEW, ("--windows", "3", "--seeds", "0")),
    "dolly-cut": Result("dolly", "dolly-cut", ("sqsd",), (*ONCE, "--drop-top", "20%")),
    "dolly-cut-5": Result("dolly", "dolly-cut", ("sqsd",), (*ONCE, "--drop-top", "5%")),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="the folder with the open data files")
    parser.add_argument("out", type=Path)
    parser.add_argument("--results", default=",".join(RESULTS), help="results to make, such as dolly,dolly-cut")
    parser.add_argument("--pack", default=PACK, help="the aligned model, and the directions of the scores")
    parser.add_argument("--transfer", help="the other pack, needed where its scores are not kept")
    parser.add_argument("--judge", action="append", help="judge for evaluate [default: phrases]")
    parser.add_argument("--scorers", default=",".join(ALL), help="use only these scorers, such as sqsd,random")
    parser.add_argument("--windows", help="number of windows, instead of that of each result")
    parser.add_argument("--rescore", action="store_true", help="reuse no scores from the folder beside this script")
    options = parser.parse_args()
    wanted = options.results.split(",")
    only = options.scorers.split(",")
    for name, given, known in (("results", wanted, RESULTS), ("scorers", only, ALL)):
        if odd := [each for each in given if each not in known]:
            parser.error(f"--{name} must be among {', '.join(known)}, not {', '.join(odd)}")
    files = write_data(options.data, options.out / "data", study_rows)
    asked = ["--harmful", files["harmful"], "--harmless", files["harmless"], "--pack", options.pack]
    asked += [word for judge in options.judge or ["phrases"] for word in ("--judge", judge)]
    asked += ["--config", CONFIG]
    for name in wanted:
        result = RESULTS[name]
        chosen = [scorer for scorer in result.scorers if scorer in only]
        for rows in (UNSAFE, result.corpus) if result.mixes else (result.corpus,):
            for scorer in chosen:
                obtain(scorer, rows, files, options)
            keep(files[rows], options.out / "scores" / rows)
        models = options.out / "models" / result.kept
        models.parent.mkdir(exist_ok=True)
        given = [scores(options.out, result.corpus, scorer) for scorer in chosen]
        unsafe = [word for scorer in chosen for word in ("--poison", scores(options.out, UNSAFE, scorer))]
        other = ("--windows", options.windows) if options.windows else ()
        call("evaluate", *given, models, *asked, *result.settings, *other, *(unsafe if result.mixes else ()))
        publish(models, options.out / name)


def obtain(scorer: str, rows: str, files: Mapping[str, Path], options: argparse.Namespace) -> None:
    """Put the scorer's scores of the rows into OUT: from beside this script if they are by this pack, else computed
    from SQSD's scores, else by the command."""
    target = scores(options.out, rows, scorer)
    target.parent.mkdir(parents=True, exist_ok=True)
    known = options.pack == PACK and not options.rescore
    if known and restore(files[rows], HERE / "scores" / f"{rows}.parquet", scorer, target):
        return
    if scorer in PARTS:
        obtain("sqsd", rows, files, options)
    if scorer not in PARTS or not part(scores(options.out, rows, "sqsd"), scorer, target):
        score(files, rows, target, scorer, options.transfer if scorer == TRANSFER else options.pack)


def publish(models: Path, target: Path) -> None:
    """Copy the results away from the models, which other results share."""
    target.mkdir(exist_ok=True)
    for name in ("results.json", "asr.png"):
        if (models / name).is_file():
            shutil.copyfile(models / name, target / name)


def score(files: Mapping[str, Path], rows: str, target: Path, scorer: str, pack: str | None) -> None:
    if pack is None:
        sys.exit("There are no scores by another pack: name one with --transfer, or leave transfer out of --scorers.")
    anchors = ("--unsafe-anchors", files["anchors-unsafe"], "--safe-anchors", files["anchors-safe"])
    how = ("--scorer", scorer if scorer in SCORERS else "sqsd", "--pack", pack, "--config", CONFIG)
    risk = ("--risk", scorer if scorer == PROBE else "sqsd")  # with the probe, too, a row takes one more forward pass
    call("score", files[rows], target, *how, *risk, *(anchors if scorer in ANCHORED else ()))


def scores(out: Path, rows: str, scorer: str) -> Path:
    return out / "scores" / rows / f"{scorer}.parquet"


def keep(rows: Path, folder: Path) -> None:
    """Put the rows' risks by all scorers, in row order, into one file beside the folder."""
    columns = {RISK + path.stem: pq.read_table(path)[f"{RISK}risk"] for path in sorted(folder.glob("*.parquet"))}
    write(pa.table({"row": hashes(rows), **columns}), folder.with_suffix(".parquet"))


def write(table: pa.Table, target: Path) -> None:
    beside = target.with_suffix(".tmp")
    pq.write_table(table, beside)
    beside.replace(target)


def restore(rows: Path, kept: Path, scorer: str, target: Path) -> bool:
    """Give the rows the kept risks of the scorer. False where there are none, or where they are of other rows.

    A row without a risk had no score.
    """
    if target.is_file():
        return not Path(f"{target}.sqsd").exists()
    if not kept.is_file() or RISK + scorer not in pq.read_schema(kept).names:
        return False
    risks = pq.read_table(kept)
    if risks["row"].to_pylist() != hashes(rows):
        return False
    with rows.open(encoding="utf-8") as lines:
        table = pa.Table.from_pylist([json.loads(line) for line in lines])
    risk = risks[RISK + scorer]
    status = ["error" if value is None else "scored" for value in risk.to_pylist()]
    write(table.append_column(f"{RISK}risk", risk).append_column(f"{RISK}status", [status]), target)
    return True


def part(whole: Path, scorer: str, target: Path) -> bool:
    """Compute the scorer's risks from the columns of SQSD's scores in `whole`. False where these are not there."""
    weights = {RISK + name: weight for name, weight in PARTS.get(scorer, {}).items()}
    if not weights or not whole.is_file() or not weights.keys() <= set(pq.read_schema(whole).names):
        return False
    columns = pq.read_table(whole)
    terms = [pc.multiply(columns[name], weight) for name, weight in weights.items()]
    others = [name for name in columns.column_names if name not in (f"{RISK}risk", f"{RISK}danger", f"{RISK}safety")]
    write(columns.select(others).append_column(f"{RISK}risk", reduce(pc.add, terms)), target)
    return True


def hashes(rows: Path) -> list[str]:
    with rows.open("rb") as lines:
        return [hashlib.blake2b(line, digest_size=8).hexdigest() for line in lines]


def call(*words: object) -> None:
    command = ["sqsd-filter", *map(str, words)]
    print(" ".join(command), file=sys.stderr, flush=True)
    done = subprocess.run([sys.executable, "-m", "sqsd_filter", *command[1:]], check=False)
    if done.returncode:
        sys.exit(done.returncode)


def write_data(data: Path, out: Path, rows_of: Callable[[Path], Mapping[str, list[Row]]]) -> dict[str, Path]:
    """The files of rows, written once into a folder of their own."""
    if not out.is_dir():
        beside = Path(f"{out}.tmp")
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
        for name, rows in rows_of(data).items():
            lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            (beside / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
        beside.rename(out)
    return {path.stem: path for path in out.glob("*.jsonl")}


def study_rows(data: Path, seed: int = 0) -> dict[str, list[Row]]:
    """Two corpora, known unsafe rows, anchors and prompts: rows that `prepare` did not use, and prompts that it set
    aside for judging models."""
    prepared = prepare.prepare(data, seed)
    seen = used(prepared)
    judged = prepare.read(data, "judged-completions")
    part = prepare.split_prompts(judged, seed)
    corpora = {name: prepare.read(data, file) for name, file in (("dolly", "dolly-15k"), ("gsm8k", "gsm8k-train"))}
    unsafe: list[Row] = [
        {"prompt": row["prompt"], "response": row["response"]}
        for row in judged
        if part[prepare.key(row["prompt"])] == "test" and row["unsafe"] and not row["refusal"]
    ]
    anchors: dict[str, list[Row]] = {
        f"anchors-{kind}": [{"prompt": r["prompt"], "response": r[answer]} for r in prepared["safety"][:ANCHORS]]
        for kind, answer in (("unsafe", "rejected"), ("safe", "chosen"))
    }
    chosen_on = {asked(row) for row in prepared["val"]}
    prompts: dict[str, list[Row]] = {
        "harmful": [row for row in prepared["harmful"] if row["source"].startswith("AdvBench")],  # which it refuses
        "harmless": [row for row in prepared["harmless"] if asked(row) not in chosen_on],
    }
    unseen = {
        name: fresh(prepare.shuffled(rows, seed, "study"), seen)[: CORPORA[name]] for name, rows in corpora.items()
    }
    return {**unseen, UNSAFE: unsafe, **anchors, **prompts}


def used(prepared: Mapping[str, Iterable[Row]]) -> set[str]:
    """The questions of the rows that the pack was trained or judged on, as `asked` has them."""
    return {asked(row) for name in ("initial", "align", "val", "test") for row in prepared[name]}


def fresh(rows: Iterable[Row], seen: set[str]) -> list[Row]:
    """The rows with a question and an answer, none of them seen before or twice."""
    chosen: dict[str, Row] = {}
    for row in rows:
        answer = row.get("response", row.get("answer", ""))
        if asked(row) not in seen and asked(row) and answer.strip():
            chosen.setdefault(asked(row), row)
    return list(chosen.values())


def asked(row: Row) -> str:
    """The question of a row, without case, punctuation and spacing."""
    question = row.get("prompt") or row.get("question") or f"{row.get('instruction', '')}\n{row.get('context', '')}"
    return str(prepare.key(question))


if __name__ == "__main__":
    main()
