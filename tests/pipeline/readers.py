"""What people read an output with, and how many of its rows each reads: `python -m tests.pipeline.readers` prints the
table of docs/output.md. With a folder, it leaves the outputs there, for tests/pipeline/trainers.py.

The output holds 200 rows: 185 kept, 10 dropped, 5 errors.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from sqsd_filter import Cut, Writing, select_dataset
from tests.corpora import write_jsonl

ROWS, KEPT = 200, 185
MODULES = ("duckdb", "pandas", "polars", "pyarrow.dataset", "pyarrow.parquet", "ray.data")
READERS: dict[str, dict[str, Sequence[str]]] = {
    "parquet": {
        "datasets": (
            'load_dataset("out")["train"]',
            'load_dataset("out/data")["train"]',
            'load_dataset("parquet", data_dir="out")["train"]',
            'load_dataset("parquet", data_files="out/data/*")["train"]',
            'load_dataset("parquet", data_files="out.parquet")["train"]',
        ),
        "pyarrow": (
            'pyarrow.dataset.dataset("out/data").to_table()',
            'pyarrow.dataset.dataset("out", exclude_invalid_files=True).to_table()',
            'pyarrow.parquet.read_table("out/data")',
        ),
        "pandas": ('pandas.read_parquet("out/data")',),
        "polars": ('polars.read_parquet("out/data")', 'polars.scan_parquet("out/data/*.parquet").collect()'),
        "DuckDB": ("duckdb.sql(\"FROM 'out/data/*.parquet'\").fetchall()",),
        "Ray Data": ('ray.data.read_parquet("out/data").take_all()', 'ray.data.read_parquet("out").take_all()'),
        "LLaMA-Factory": ('every_file_of("out/data")',),
    },
    "jsonl": {
        "datasets": (
            'load_dataset("out")["train"]',
            'load_dataset("out/data")["train"]',
            'load_dataset("json", data_files="out.jsonl")["train"]',
        ),
        "pyarrow": ('pyarrow.dataset.dataset("out/data", format="json").to_table()',),
        "pandas": ('pandas.read_json("out/data/train-00000-of-00001.jsonl", lines=True)',),
        "polars": ('polars.read_ndjson("out/data/*.jsonl")',),
        "DuckDB": ("duckdb.sql(\"FROM 'out/data/*.jsonl'\").fetchall()",),
        "Ray Data": ('ray.data.read_json("out/data").take_all()',),
        "LLaMA-Factory": ('every_file_of("out/data")',),
    },
    "json": {
        "datasets": (
            'load_dataset("out")["train"]',
            'load_dataset("out/data")["train"]',
            'load_dataset("json", data_files="out.json")["train"]',
        ),
        "pandas": (
            'pandas.read_json("out/data/train-00000-of-00001.json")',
            'pandas.read_json("out.json")',
        ),
        "polars": ('polars.read_json("out/data/train-00000-of-00001.json")',),
        "DuckDB": ("duckdb.sql(\"FROM 'out/data/*.json'\").fetchall()",),
        "LLaMA-Factory": ('every_file_of("out/data")',),
    },
    "arrow": {
        "datasets": (
            'load_dataset("out")["train"]',
            'load_dataset("out/data")["train"]',
            'load_from_disk("out")["train"]',
            'load_dataset("arrow", data_files="out.arrow")["train"]',
        ),
        "polars": ('polars.read_ipc_stream("out/data/train-00000-of-00001.arrow")',),
        "LLaMA-Factory": ('every_file_of("out/data")',),
    },
}


def write_output(to: str) -> None:
    """Write the output into the folder out of the working directory, and with its kept rows in one file."""
    scored = [{"id": k, "text": f"row {k}", "sqsd_risk": k / 10, "sqsd_status": "scored"} for k in range(195)]
    unscored = [{"id": k, "text": f"row {k}", "sqsd_risk": None, "sqsd_status": "no_answer"} for k in range(195, 200)]
    write_jsonl(Path("in.jsonl"), [*scored, *unscored])
    for dest in ("out", f"out.{to}"):
        select_dataset("in.jsonl", dest, Cut.of(drop_count=10), Writing(to=to))


def rows_read(call: str) -> int:
    """How many rows a call reads, in the working directory."""
    import datasets

    names: dict[str, Any] = {top: __import__(name) for name in MODULES if (top := name.partition(".")[0]) in call}
    with tempfile.TemporaryDirectory() as cache:

        def load_dataset(*given: str, **options: Any) -> Any:
            return datasets.load_dataset(*given, cache_dir=cache, **options)

        def every_file_of(folder: str) -> Any:
            """As LLaMA-Factory reads a local folder: all files in it, in the format that the first one's name says."""
            files = [os.path.join(folder, name) for name in os.listdir(folder)]
            kind = {"jsonl": "json"}.get(suffix := files[0].rpartition(".")[2], suffix)
            return load_dataset(kind, data_files=files)["train"]

        names |= {"load_dataset": load_dataset, "load_from_disk": datasets.load_from_disk}
        where = re.sub("""(["'])out""", rf"\1{Path('out').resolve()}", call)  # Ray's processes work elsewhere
        return len(eval(where, {**names, "every_file_of": every_file_of}))


def calls() -> Iterator[tuple[str, str, str]]:
    """Format, reader and call of all readers that are installed."""
    for to, readers in READERS.items():
        for reader, several in readers.items():
            if find_spec(reader.lower()) or reader in ("Ray Data", "LLaMA-Factory"):
                yield from ((to, reader, call) for call in several)


def table_lines() -> list[str]:
    """The table of docs/output.md without the numbers."""
    return [f"| {to} | {reader} | `{call}` | {KEPT} |" for to, reader, call in calls()]


def leave(folder: Path) -> None:
    """Write an output in each format into a folder of its own."""
    for to in READERS:
        place = folder / to
        place.mkdir(parents=True)
        os.chdir(place)
        write_output(to)


def main() -> None:
    """Read an output in each format with each reader, and print how many of its rows each read."""
    print(f"| `--to` | reader | call | rows read of {ROWS} |\n| --- | --- | --- | --- |")
    for to in READERS:
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)
            write_output(to)
            for form, reader, call in calls():
                if form == to:
                    print(f"| {to} | {reader} | `{call}` | {rows_read(call)} |")
            os.chdir("/")


if __name__ == "__main__":
    leave(Path(sys.argv[1]).resolve()) if sys.argv[1:] else main()
