"""Several processes that build one pack, as torchrun starts them, each with a device of its own: the first one writes
and speaks, the others wait for it. A process that torchrun did not start is the first and the only one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

LONGEST_WAIT = timedelta(hours=2)  # for the first process, which may merge and write a whole base model


def count() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    return int(os.environ.get("RANK", "0")) == 0


def device() -> str | None:
    """Where this process trains: on its GPU, on all of them (None) if it is alone, or on the CPU if there is none."""
    import torch

    if not torch.cuda.is_available():
        return "cpu"
    if count() > 1:
        return f"cuda:{os.environ['LOCAL_RANK']}"
    return None if torch.cuda.device_count() > 1 else "cuda:0"


@contextmanager
def together() -> Iterator[None]:
    """The processes can wait for each other, and train together."""
    import torch

    if count() == 1:
        yield
        return
    where = device()
    if where != "cpu":
        torch.cuda.set_device(where)
    torch.distributed.init_process_group("gloo" if where == "cpu" else "nccl", timeout=LONGEST_WAIT)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def wait() -> None:
    """Go on when all processes are here."""
    import torch

    if count() > 1:
        torch.distributed.barrier()
