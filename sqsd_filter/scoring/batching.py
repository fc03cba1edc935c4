"""Rows into bins: sorted by length, as many as a token budget holds, halved when memory runs out or a row fails; and
bins into tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch

from sqsd_filter.errors import SQSDError
from sqsd_filter.scoring.chat_encoder import Encoded

# Rough bytes a token's activations take between forward and backward, as multiples of a layer's widths: residuals,
# norms, attention and its inputs (hidden), the gated product and its factors (intermediate).
_PER_HIDDEN = 16
_PER_INTERMEDIATE = 5


# A bin of so many tokens keeps a device busy; from there on it takes no row shorter than this share of its longest one.
_FULL = 2048
_ALIKE = 0.8


def micro_batches(lengths: Sequence[int], budget: int) -> Iterator[list[int]]:
    """Indices of rows in bins, longest first: rows times the bin's longest length stays within `budget` tokens.

    A row longer than the budget is a bin of its own, and a bin that is large enough ends where padding would become
    dear. The order within equal lengths is the input's, so that the same
    rows always give the same bins.
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
    """Tokens a bin may hold. On a CPU (`free_bytes` None) larger bins are no faster; on a GPU half the free memory."""
    if free_bytes is None:
        return 512
    per_token = bytes_per_value * layers * (_PER_HIDDEN * hidden + _PER_INTERMEDIATE * intermediate)
    return max(1024, min(65536, int(free_bytes * 0.5) // per_token))


def next_tokens(rows: Sequence[Encoded], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Right-padded inputs and next-token targets (b, t), the target -1 where nothing is supervised.

    A causal model needs no attention mask for right padding: no real token sees a pad, and pads get no gradient.
    """
    lasts = [int(np.flatnonzero(row.answer)[-1]) for row in rows]  # nothing after it has a gradient
    ids_bt = torch.zeros((len(rows), max(lasts)), dtype=torch.long)
    targets_bt = torch.full((len(rows), max(lasts)), -1, dtype=torch.long)
    for k, (row, last) in enumerate(zip(rows, lasts, strict=True)):
        ids = torch.from_numpy(row.ids)
        ids_bt[k, :last] = ids[:last]
        targets_bt[k, :last] = torch.where(torch.from_numpy(row.answer)[1 : last + 1], ids[1 : last + 1], -1)
    return ids_bt.to(device), targets_bt.to(device)


def is_out_of_memory(problem: BaseException) -> bool:
    """Did this exception come from a failed allocation, on a GPU or on the host?"""
    return isinstance(problem, torch.OutOfMemoryError | MemoryError) or (
        isinstance(problem, RuntimeError) and "can't allocate memory" in str(problem)
    )


def is_device_lost(problem: BaseException) -> bool:
    """Did the device itself fail, so that nothing more can run on it in this process?"""
    lost = getattr(torch, "AcceleratorError", ())
    return isinstance(problem, lost) and not is_out_of_memory(problem)


def retry_in_halves(run: Callable[[list[int]], None], rows: list[int], give_up: Callable[[int, str], None]) -> None:
    """`run(rows)`; where that fails the halves are run instead, and a single row that fails is given up: `give_up` is
    told its error, "" for a lack of memory. Errors that aren't a row's (the device's, `SQSDError`) come through."""
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
