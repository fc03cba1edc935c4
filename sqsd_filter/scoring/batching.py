"""Micro-batches: rows of similar length that run through the model together.

They are as large as a token budget allows, become tensors, run in parallel on a CPU, and are halved where memory runs
out or a row fails.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial

import numpy as np
import torch

from sqsd_filter.errors import SQSDError
from sqsd_filter.scoring.chat_encoder import Encoded
from sqsd_filter.scoring.placement import thread_pool

# Roughly how many values per token and layer are kept between forward and backward pass, as multiples of the layer's
# widths: residuals, norms, attention and its inputs (hidden), the gated product and its factors (intermediate).
_PER_HIDDEN = 16
_PER_INTERMEDIATE = 5

# A micro-batch of _FULL tokens keeps a device busy. A larger one takes only rows of at least _ALIKE times its longest.
_FULL = 2048
_ALIKE = 0.8


def micro_batches(lengths: Sequence[int], budget: int) -> Iterator[list[int]]:
    """Indices of the rows of each micro-batch, longest first; rows times longest length stay within `budget` tokens.

    A row longer than the budget is a micro-batch of its own. A micro-batch that is large enough ends where padding
    would become expensive. Rows of equal length keep the order of the input, so that the same rows always give the same
    micro-batches.
    """
    order = sorted(range(len(lengths)), key=lambda k: (-lengths[k], k))
    at = 0
    while at < len(order):
        longest = max(1, lengths[order[at]])
        members = order[at : at + max(1, budget // longest)]
        size = min(len(members), -(-_FULL // longest))
        while size < len(members) and lengths[members[size]] >= _ALIKE * longest:
            size += 1
        yield members[:size]
        at += size


def default_budget(*, free_bytes: int | None, layers: int, hidden: int, intermediate: int, bytes_per_value: int) -> int:
    """Padded tokens of a micro-batch.

    They are 512 on a CPU (`free_bytes` None), where larger ones are no faster. On a GPU they fill half of the free
    memory.
    """
    if free_bytes is None:
        return 512
    per_token = bytes_per_value * layers * (_PER_HIDDEN * hidden + _PER_INTERMEDIATE * intermediate)
    return max(1024, min(65536, int(free_bytes * 0.5) // per_token))


def next_tokens(rows: Sequence[Encoded], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Right-padded inputs and next-token targets (b, t); the target is -1 where nothing is supervised.

    A causal model needs no attention mask for right padding: no real token sees a pad, and pads get no gradient.
    """
    lasts = [int(np.flatnonzero(row.answer)[-1]) for row in rows]  # later tokens have no gradient
    ids_bt = torch.zeros((len(rows), max(lasts)), dtype=torch.long)
    targets_bt = torch.full((len(rows), max(lasts)), -1, dtype=torch.long)
    for k, (row, last) in enumerate(zip(rows, lasts, strict=True)):
        ids = torch.from_numpy(row.ids)
        ids_bt[k, :last] = ids[:last]
        targets_bt[k, :last] = torch.where(torch.from_numpy(row.answer)[1 : last + 1], ids[1 : last + 1], -1)
    return ids_bt.to(device), targets_bt.to(device)


def is_out_of_memory(problem: BaseException) -> bool:
    """Does this exception come from a failed allocation, on a GPU or on the host?"""
    return isinstance(problem, torch.OutOfMemoryError | MemoryError) or (
        isinstance(problem, RuntimeError) and "can't allocate memory" in str(problem)
    )


def is_device_lost(problem: BaseException) -> bool:
    """Did the device itself fail, so that nothing more can run on it in this process?"""
    lost = getattr(torch, "AcceleratorError", ())
    return isinstance(problem, lost) and not is_out_of_memory(problem)


def retry_in_halves(run: Callable[[list[int]], None], rows: list[int], give_up: Callable[[int, str], None]) -> None:
    """`run(rows)`; where that fails, run its halves instead, and so on down to single rows.

    A single row that fails goes to `give_up` with its error, which is "" where memory ran out. Errors that no row has
    caused (a lost device, `SQSDError`) are raised.
    """
    try:
        run(rows)
        return
    except SQSDError:
        raise
    except Exception as problem:
        if is_device_lost(problem):
            raise
        error = "" if is_out_of_memory(problem) else f"{type(problem).__name__}: {problem}"
    if torch.cuda.is_available():  # outside the handler: its traceback would keep the tensors alive
        torch.cuda.empty_cache()
    if len(rows) == 1:
        give_up(rows[0], error)
        return
    middle = len(rows) // 2
    retry_in_halves(run, rows[:middle], give_up)
    retry_in_halves(run, rows[middle:], give_up)


def run_parallel(run: Callable[[list[int]], None], batches: Iterable[list[int]], workers: int) -> None:
    """`run` every micro-batch, `workers` of them at a time, each in a single thread; with 0 workers, one after the
    other in the calling thread.

    The first error is raised once the micro-batches that are running have ended.
    """
    if workers == 0:
        for members in batches:
            run(members)
        return
    outside = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with thread_pool(workers, partial(torch.set_num_threads, 1)) as pool:
            try:
                for future in [pool.submit(run, members) for members in batches]:
                    future.result()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
    finally:
        torch.set_num_threads(outside)
