"""How much scoring costs beside the forward and backward pass it rides on, and what the dense form would cost.

    python recipes/benchmarks/speed.py [--rows 256] [--shape PACK|1b] [--dtype float32|bfloat16] [--dense-rows 32]

(a) the scorer at one state; (a2) at both states; (b) the same batches through the same model, stock linears, forward
and input-gradient backward with logits at the same positions; (c) the dense row-at-a-time form. All run in turn on
each block of rows in one process, so that the ratios hold when the machine's speed drifts. The shape is a pack's model
or, with `1b`, three layers of a 1B model's widths with random weights. Row lengths follow databricks-dolly-15k.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import random_pack
import torch

from sqsd_filter.scoring.batching import micro_batches
from sqsd_filter.scoring.chat_encoder import Encoded
from sqsd_filter.scoring.engine import LossGradient, SQSDModel
from sqsd_filter.scoring.models import load_model
from sqsd_filter.scoring.pack import Pack, load_pack
from sqsd_filter.scoring.reference import ReferenceScorer
from sqsd_filter.scoring.scorer import SQSDScorer

# Tokens of databricks-dolly-15k's prompts and answers under SmolLM2's template, at these percentages of its rows.
AT = (0, 20, 40, 60, 70, 80, 90, 95, 98, 100)
PROMPT = (31, 39, 43, 55, 94, 189, 307, 450, 694, 1024)
ANSWER = (2, 17, 35, 63, 84, 114, 178, 267, 425, 1024)
LONGEST = 1024


def rows_of_real_lengths(count: int, vocabulary: int) -> list[Encoded]:
    """Random tokens, prompts and answers as long as real ones."""
    random = np.random.default_rng(0)
    rows = []
    for _ in range(count):
        prompt, answer = (int(np.interp(100 * random.random(), AT, lengths)) for lengths in (PROMPT, ANSWER))
        total = min(LONGEST, prompt + answer)
        mask = np.zeros(total, dtype=bool)
        mask[min(prompt, total - 1) :] = True
        rows.append(Encoded(random.integers(3, vocabulary, total), mask))
    return rows


def make_pack(shape: str, folder: Path) -> Pack:
    """The pack of that name or folder, or for `1b` a random one on a few layers of a 1B model's widths."""
    if shape != "1b":
        return load_pack(shape)
    return random_pack.make_pack(
        folder,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=3,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=49152,
        tie_word_embeddings=True,
    )


def one_state(pack: Pack) -> Pack:
    """The same pack with its first probe alone: one pass."""
    return Pack(pack.path, pack.name, pack.base_model, pack.probes[:1], max_length=pack.max_length)


def plain(pack: Pack, dtype: str) -> Callable[[list[Encoded]], None]:
    gradient = LossGradient(load_model(pack.base_model, dtype=getattr(torch, dtype)))
    return lambda rows: gradient.backward(*gradient.tensors(rows))


def scored(pack: Pack, dtype: str) -> Callable[[list[Encoded]], None]:
    engine = SQSDModel.load(SQSDScorer(pack, dtype=dtype))
    return lambda rows: engine.project(rows) is None


def seconds(run: Callable[[list[Encoded]], None], batches: list[list[Encoded]]) -> float:
    began = time.perf_counter()
    for batch in batches:
        run(batch)
    return time.perf_counter() - began


def peak_memory(kind: str, arguments: argparse.Namespace) -> float:
    """Peak resident MiB of a fresh process that runs the longest rows through (a) or (b)."""
    command = [sys.executable, __file__, "--only", kind, "--shape", arguments.shape, "--dtype", arguments.dtype]
    run = subprocess.run([*command, "--rows", str(arguments.rows)], capture_output=True, text=True, check=True)
    return float(run.stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--block", type=int, default=16, help="rows measured in turn")
    parser.add_argument("--shape", default="smollm2-135m", help="a pack, or `1b`")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--dense-rows", type=int, default=32, help="rows that (c) is measured on; 0: leave it out")
    parser.add_argument("--budget", type=int, default=512)
    parser.add_argument("--only", choices=["a", "b"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        measure(arguments, Path(folder))


def measure(arguments: argparse.Namespace, folder: Path) -> None:
    pack, dtype = make_pack(arguments.shape, folder), arguments.dtype
    rows = rows_of_real_lengths(arguments.rows, 49152)
    if arguments.only:
        run = plain(pack, dtype) if arguments.only == "b" else scored(one_state(pack), dtype)
        seconds(run, [[row] for row in sorted(rows, key=len)[-2:]])
        # Not ru_maxrss: a process starts with that of the one that started it.
        peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
        print(int(peak.split()[1]) / 1024)
        return
    runs = {"b": plain(pack, dtype), "a": scored(one_state(pack), dtype), "a2": scored(pack, dtype)}
    dense = ReferenceScorer(one_state(pack), dtype=dtype) if arguments.dense_rows else None
    if dense:
        dense.load()
    ratios: dict[str, list[float]] = {"a/b": [], "a2/b": [], "c/a": []}
    times = dict.fromkeys(runs, 0.0)
    useful = padded = 0
    for start in range(0, len(rows), arguments.block):
        block = rows[start : start + arguments.block]
        batches = [[block[k] for k in members] for members in micro_batches([len(r) for r in block], arguments.budget)]
        useful += sum(len(r) for r in block)
        padded += sum(len(batch) * max(len(r) for r in batch) for batch in batches)
        if start == 0:
            for run in runs.values():
                seconds(run, batches[-2:])
        took = {name: seconds(run, batches) for name, run in runs.items()}
        for name in runs:
            times[name] += took[name]
        ratios["a/b"].append(took["a"] / took["b"])
        ratios["a2/b"].append(took["a2"] / took["b"])
        if dense and start < arguments.dense_rows:
            began = time.perf_counter()
            for row in block:
                dense.project(row)
            ratios["c/a"].append((time.perf_counter() - began) / took["a"])
    print(f"{arguments.shape}, {dtype}, {len(rows)} rows, {useful} tokens, {torch.get_num_threads()} threads, "
          f"torch {torch.__version__}, {platform.machine()} with {os.cpu_count()} CPUs")  # fmt: skip
    pace = {name: f"{useful / spent:.0f}" for name, spent in times.items()}
    print(f"useful among padded tokens: {useful / padded:.3f} in these blocks")
    for size in (128, 512, 4096):
        shard = [len(row) for row in rows_of_real_lengths(size, 49152)]
        for budget in (arguments.budget, 65536):
            whole = sum(len(members) * shard[members[0]] for members in micro_batches(shard, budget))
            print(f"  {sum(shard) / whole:.3f} in a shard of {size} rows with bins of at most {budget} tokens")
    print(f"tokens/s (b) {pace['b']}, (a) {pace['a']}, (a2) {pace['a2']}")
    for name, values in ratios.items():
        if values:
            print(f"{name:5} median {np.median(values):.3f}   min {min(values):.3f}   max {max(values):.3f}")
    del runs, dense
    a, b = peak_memory("a", arguments), peak_memory("b", arguments)
    print(f"peak memory (a) {a:.0f} MiB, (b) {b:.0f} MiB, ratio {a / b:.3f}")


if __name__ == "__main__":
    main()
