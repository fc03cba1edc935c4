"""Several processes that build one pack, as torchrun starts them, each on its own device.

The first one writes files and reports progress; the others wait for it. A process that torchrun did not start is the
first and only one.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

LONGEST_WAIT = timedelta(hours=2)  # for the first process, which may merge and write a whole base model


def count() -> int:
    """The number of processes."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """The number of this process, from 0."""
    return int(os.environ.get("RANK", "0"))


def is_first() -> bool:
    return rank() == 0


def device() -> str | None:
    """The device this process trains on: its GPU, None for all GPUs if it is alone, or "cpu" if there are none."""
    import torch

    if not torch.cuda.is_available():
        return "cpu"
    if count() > 1:
        return f"cuda:{os.environ['LOCAL_RANK']}"
    return None if torch.cuda.device_count() > 1 else "cuda:0"


@contextmanager
def together() -> Iterator[None]:
    """Inside this context the processes can train together and wait for each other."""
    import torch

    if count() == 1:
        yield
        return
    own_device = device()
    if own_device != "cpu":
        torch.cuda.set_device(own_device)
    torch.distributed.init_process_group("gloo" if own_device == "cpu" else "nccl", timeout=LONGEST_WAIT)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def wait() -> None:
    """Return once all processes have called this."""
    import torch

    if count() > 1:
        torch.distributed.barrier()
