"""Small corpora for tests of whole runs, and what a run left of them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from sqsd_filter.pipeline.reading.json_schema import to_rows

SPLITS = ("kept", "dropped", "errors")


def make_rows(n: int) -> list[dict[str, Any]]:
    return [{"id": k, "instruction": f"What is {k} plus {k % 7}?", "output": f"It is {k + k % 7}."} for k in range(n)]


def write_jsonl(path: Path, lines: Iterable[dict[str, Any] | bytes]) -> Path:
    """Rows as JSON, bytes as they are, one to a line."""
    raw = [line if isinstance(line, bytes) else json.dumps(line, ensure_ascii=False).encode() for line in lines]
    path.write_bytes(b"".join(line + b"\n" for line in raw))
    return path


def split_file(dest: Path, split: str) -> Path:
    return dest / "data" / f"{split}-00000-of-00001.parquet"


def rows_of(dest: Path, split: str) -> list[dict[str, Any]]:
    """The rows as they were in the input: what no Arrow type holds is stored as JSON."""
    return list(to_rows(pq.read_table(split_file(dest, split))))


def ids_of(dest: Path, split: str = "kept") -> list[int]:
    return [row["id"] for row in rows_of(dest, split)]


def content(dest: Path) -> dict[str, Any]:
    """Every file that a run left, by its name: bytes, and the report without its timing."""
    found: dict[str, Any] = {str(p.relative_to(dest)): p.read_bytes() for p in dest.rglob("*") if p.is_file()}
    report = json.loads(found["sqsd/report.json"])
    del report["timing"]
    return {**found, "sqsd/report.json": report}


def read_report(dest: Path) -> dict[str, Any]:
    return json.loads((dest / "sqsd" / "report.json").read_text())
