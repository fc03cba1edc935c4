"""How much scoring costs beside the forward and backward pass it rides on, and what the dense form would cost.

    python recipes/benchmarks/speed.py [--rows 256] [--shape PACK|1b|tiny] [--dtype float32|bfloat16] [--dense-rows 32]

(a) the scorer at one state; (a2) at both states; (b) the same batches through the same model, stock linears, forward
and input-gradient backward with logits at the same positions; (c) the dense row-at-a-time form. All run in turn on
each block of rows in one process, so that the ratios hold when the machine's speed drifts. The shape is a pack's model
or one with random weights: `1b` has three layers of a 1B model's widths, `tiny` shows in seconds that the script runs.
Row lengths follow databricks-dolly-15k.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import random_pack
import torch

from sqsd_filter.scoring.batching import micro_batches, next_tokens
from sqsd_filter.scoring.chat_encoder import Encoded
from sqsd_filter.scoring.loss_gradient import LossGradient
from sqsd_filter.scoring.models import load_model
from sqsd_filter.scoring.pack import Pack, load_pack
from sqsd_filter.scoring.reference import ReferenceScorer
from sqsd_filter.scoring.scorer import SQSDScorer
from sqsd_filter.scoring.scoring_model import SQSDModel

# Tokens of databricks-dolly-15k's prompts and answers under SmolLM2's template, at these percentages of its rows.
AT = (0, 20, 40, 60, 70, 80, 90, 95, 98, 100)
PROMPT = (31, 39, 43, 55, 94, 189, 307, 450, 694, 1024)
ANSWER = (2, 17, 35, 63, 84, 114, 178, 267, 425, 1024)
LONGEST = 1024

SHAPES: dict[str, dict[str, int]] = {
    "1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 3,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 49152,
        "tie_word_embeddings": True,
    },
    "tiny": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 512,
        "tie_word_embeddings": True,
    },
}


def rows_of_real_lengths(count: int, vocabulary: int, longest: int = LONGEST) -> list[Encoded]:
    """Random tokens, prompts and answers as long as real ones, up to `longest` tokens."""
    random = np.random.default_rng(0)
    rows = []
    for _ in range(count):
        prompt, answer = (int(np.interp(100 * random.random(), AT, lengths)) for lengths in (PROMPT, ANSWER))
        total = min(longest, prompt + answer)
        mask = np.zeros(total, dtype=bool)
        mask[min(prompt, total - 1) :] = True
        rows.append(Encoded(random.integers(3, vocabulary, total), mask))
    return rows


def make_pack(shape: str, folder: Path) -> Pack:
    """The pack of that name or folder, or a random one on a model of one of the `SHAPES`."""
    return random_pack.make_pack(folder, None, **SHAPES[shape]) if shape in SHAPES else load_pack(shape)


def vocabulary_of(shape: str) -> int:
    return SHAPES[shape]["vocab_size"] if shape in SHAPES else 49152


def one_state(pack: Pack) -> Pack:
    """The same pack with its first probe alone: one pass."""
    return replace(pack, probes=pack.probes[:1])


def plain(pack: Pack, dtype: str) -> Callable[[list[Encoded]], None]:
    gradient = LossGradient(load_model(pack.base_model, dtype=getattr(torch, dtype)))
    return lambda rows: gradient.backward(*next_tokens(rows, gradient.device))


def scored(pack: Pack, dtype: str) -> Callable[[list[Encoded]], None]:
    model = SQSDModel.load(SQSDScorer(pack, dtype=dtype))

    def score(rows: list[Encoded]) -> None:
        model.project(rows)

    return score


def seconds(run: Callable[[list[Encoded]], None], batches: list[list[Encoded]]) -> float:
    began = time.perf_counter()
    for batch in batches:
        run(batch)
    return time.perf_counter() - began


def peak_memory(kind: str, arguments: argparse.Namespace) -> float:
    """Peak resident MiB of a fresh process that runs the longest rows through (a) or (b)."""
    command = [sys.executable, __file__, "--only", kind, "--shape", arguments.shape, "--dtype", arguments.dtype]
    command += ["--rows", str(arguments.rows), "--longest", str(arguments.longest)]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(run.stdout.split()[-1])


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--block", type=int, default=16, help="rows measured in turn")
    parser.add_argument("--shape", default="smollm2-135m", help=f"a pack, or {' or '.join(SHAPES)}")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--dense-rows", type=int, default=32, help="rows that (c) is measured on; 0: leave it out")
    parser.add_argument("--longest", type=int, default=LONGEST, help="tokens that rows are cut to")
    parser.add_argument("--budget", type=int, default=512, help="padded tokens of a micro-batch")
    parser.add_argument("--only", choices=["a", "b"], help=argparse.SUPPRESS)
    arguments = parser.parse_args(given)
    with tempfile.TemporaryDirectory() as folder:
        measure(arguments, Path(folder))


def measure(arguments: argparse.Namespace, folder: Path) -> None:
    pack, dtype = make_pack(arguments.shape, folder), arguments.dtype
    rows = rows_of_real_lengths(arguments.rows, vocabulary_of(arguments.shape), arguments.longest)
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
        shard = [len(row) for row in rows_of_real_lengths(size, vocabulary_of(arguments.shape), arguments.longest)]
        for budget in (arguments.budget, 65536):
            whole = sum(len(members) * shard[members[0]] for members in micro_batches(shard, budget))
            print(f"  {sum(shard) / whole:.3f} in a shard of {size} rows with micro-batches of at most {budget} tokens")
    print(f"tokens/s (b) {pace['b']}, (a) {pace['a']}, (a2) {pace['a2']}")
    for name, values in ratios.items():
        if values:
            print(f"{name:5} median {np.median(values):.3f}   min {min(values):.3f}   max {max(values):.3f}")
    del runs, dense
    a, b = peak_memory("a", arguments), peak_memory("b", arguments)
    print(f"peak memory (a) {a:.0f} MiB, (b) {b:.0f} MiB, ratio {a / b:.3f}")


if __name__ == "__main__":
    main()
