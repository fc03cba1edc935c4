"""Small corpora for tests of whole runs, and what a run left of them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.parquet as pq

from sqsd_filter.corpus.addresses import Opener, expand
from sqsd_filter.corpus.json_schema import to_rows
from sqsd_filter.corpus.sources import Corpus
from sqsd_filter.pipeline.report import Config
from sqsd_filter.pipeline.scores.scored import ScoreCounts, Scored
from sqsd_filter.pipeline.selecting.selection import ERROR, Selection

BIG = 2**70
# Where the rows of each config are in an output folder.
FOLDERS: dict[Config, str] = {"kept": "data", "dropped": "_sqsd/dropped", "errors": "_sqsd/errors"}
# Rows with values that are easily changed on their way, and the same among lines that get no score, for REASONS.
VALUES: list[dict[str, Any]] = [
    {
        "output": f"Answer {k}.",
        "id": k,
        "zip": "007",
        "when": "2024-01-31T12:00:00Z",
        "big": BIG + k,
        "text": "line\u2028separator, é, 👩, \u0000",
        "nested": {"b": [1, None, {"c": "x"}], "a": None},
        "none": None,
        "mixed": k if k % 2 else str(k),
        "instruction": f"Question {k}?",
    }
    for k in range(6)
]
NASTY: list[dict[str, Any] | bytes] = [
    *VALUES,
    b'{"instruction": "broken", "output": "x"',
    b'{"instruction": "\xff", "output": "x"}',
    b"[1, 2]",
    b"null",
    {"id": 10, "instruction": "no answer", "output": "  "},
    {"id": 11, "instruction": 5, "output": "wrong type"},
    {"id": 12, "instruction": "far too long " * 200, "output": "x"},
    {"id": 13, "instruction": "no such column"},
    {**VALUES[0], "id": 14},
    {**VALUES[1], "id": 15},
]
REASONS = {"bad_json": 4, "no_answer": 2, "bad_row": 1, "prompt_too_long": 1}


def make_rows(n: int) -> list[dict[str, Any]]:
    return [{"id": k, "instruction": f"What is {k} plus {k % 7}?", "output": f"It is {k + k % 7}."} for k in range(n)]


def write_jsonl(path: Path, lines: Iterable[object]) -> Path:
    """Rows as JSON, bytes as they are, one to a line."""
    raw = [line if isinstance(line, bytes) else json.dumps(line, ensure_ascii=False).encode() for line in lines]
    path.write_bytes(b"".join(line + b"\n" for line in raw))
    return path


def by_hand(corpus: Corpus, fates: Sequence[int], unscored: Iterable[int] = ()) -> tuple[Scored, Selection]:
    """Scores that no model made, and a selection with these fates of the rows."""
    n = corpus.n_rows
    codes = (np.array(fates) == ERROR).astype(np.uint8)
    codes[list(unscored)] = 1
    probes = {"danger": np.where(codes, np.nan, np.arange(n) / 7), "safety": np.where(codes, np.nan, 0.1)}
    risk = probes["danger"] - probes["safety"]
    counts: ScoreCounts = {"scored": int((codes == 0).sum()), "reused": 0, "duplicates": 0}
    scored = Scored(corpus, None, ["scored", "no_answer"], codes, probes, risk, np.zeros(n, np.int32), counts, {})
    return scored, Selection(np.array(fates, np.uint8), [], 0)


def open_corpus(sources: Iterable[Any], **how: Any) -> Corpus:
    """The corpus that these sources make."""
    return Corpus.scan(Opener().open(expand(list(sources))), **how)


def split_file(dest: Path, config: Config) -> Path:
    """The one file of a config, of rows that have no split of their own."""
    return dest / FOLDERS[config] / "train-00000-of-00001.parquet"


def saved(dest: Path, config: Config) -> Any:
    """The Arrow files of a config, by split."""
    return datasets.load_from_disk(str(dest if config == "kept" else dest / FOLDERS[config]))


def rows_of(dest: Path, split: str) -> list[dict[str, Any]]:
    """The rows as they were in the input: what no Arrow type holds is stored as JSON."""
    files = [dest / file["path"] for file in read_report(dest)["files"] if file["config"] == split]
    return [row for file in files for row in to_rows(pq.read_table(file))]


def ids_of(dest: Path, split: str = "kept") -> list[int]:
    return [row["id"] for row in rows_of(dest, split)]


def content(dest: Path) -> dict[str, Any]:
    """Every file that a run left, by its name: bytes, and the report without its timing."""
    files: dict[str, Any] = {str(p.relative_to(dest)): p.read_bytes() for p in dest.rglob("*") if p.is_file()}
    report = json.loads(files["_sqsd/report.json"])
    del report["timing"]
    return {**files, "_sqsd/report.json": report}


def unnamed(line: bytes, file: str, number: int) -> bytes:
    """A line as it was in the input, before dropped rows and errors got the name of their file and line."""
    name = b'"sqsd_row": ' + json.dumps(f"{file}:{number}", ensure_ascii=False).encode()
    before, found, after = line.rpartition(name)
    assert found, line
    return before.removesuffix(b", ") + after


def read_report(dest: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((dest / "_sqsd" / "report.json").read_text())
    return report


def segments(home: Path) -> dict[str, tuple[int, int]]:
    """The files of stored scores, by name: a file that was not written again is the same."""
    return {p.name: (p.stat().st_ino, p.stat().st_mtime_ns) for p in (home / "scores").glob("[!.]*")}
