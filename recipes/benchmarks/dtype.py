"""Does bfloat16 rank rows as float32 does? Scores the same rows in both and compares.

python recipes/benchmarks/dtype.py ROWS... [--limit 400] [--pack NAME|DIR|HUB]
"""

from __future__ import annotations

import argparse
import os
import platform
import tempfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch

from sqsd_filter import SQSDScorer, score_dataset

TOP = 0.05


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows", nargs="+")
    parser.add_argument("--limit", type=int, default=400)
    parser.add_argument("--pack", default="smollm2-135m")
    options = parser.parse_args()
    found, seconds = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for dtype in ("float32", "bfloat16"):
            path = Path(folder) / f"{dtype}.parquet"
            report = score_dataset(
                options.rows, path, scorer=SQSDScorer(options.pack, dtype=dtype), limit=options.limit
            )
            columns = pq.read_table(path, columns=["sqsd_risk", "sqsd_danger", "sqsd_safety"])
            found[dtype] = {name: columns[name].to_numpy() for name in columns.column_names}
            seconds[dtype] = report["timing"]["seconds"]
    print(
        f"{report['rows']['scored']} rows, {report['tokens']} tokens, torch {torch.__version__}, {platform.machine()} "
        f"with {os.cpu_count()} CPUs; float32 {seconds['float32']:.0f} s, bfloat16 {seconds['bfloat16']:.0f} s"
    )
    for name, full in found["float32"].items():
        half = found["bfloat16"][name]
        scored = np.isfinite(full) & np.isfinite(half)
        print(f"{name:12} {compare(full[scored], half[scored])}")


def compare(full: np.ndarray, half: np.ndarray) -> str:
    """Spearman's correlation, how much of the top is the same, and the largest difference beside the spread."""
    ranks = [np.argsort(np.argsort(values)) for values in (full, half)]
    k = max(1, round(TOP * len(full)))
    top = [set(np.argsort(-values)[:k].tolist()) for values in (full, half)]
    shared = len(top[0] & top[1])
    return (
        f"Spearman {np.corrcoef(*ranks)[0, 1]:.4f}   top {TOP:.0%}: {shared} of {k} the same   "
        f"largest difference {np.abs(full - half).max():.3f}, standard deviation {full.std():.3f}"
    )


if __name__ == "__main__":
    main()
