"""Where a scorer runs: the device, the threads and the process."""

from __future__ import annotations

import gc
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

from sqsd_filter.errors import UsageError, first_line

T = TypeVar("T")

_forked = False


def _remember() -> None:
    global _forked
    _forked = True


os.register_at_fork(after_in_child=_remember)


def choose_device(named: str | None, rank: int | None = None) -> str:
    """The device that was named, else a GPU where there is one, else the CPU.

    A process with a rank takes the GPU with that number, modulo the number of GPUs; a GPU named by its number is kept.
    """
    if named not in (None, "cuda"):
        return named
    import torch

    gpus = torch.cuda.device_count()  # is_available would start CUDA, which no fork could use then
    if not gpus:
        return named or "cpu"
    return "cuda" if rank is None else f"cuda:{rank % gpus}"


def check_device(device: str) -> None:
    """Raise `UsageError` where this process can't use the device."""
    import torch

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as problem:
        first = first_line(problem).split(". ")[0].rstrip(".")
        fix = (
            "call multiprocess.set_start_method('spawn') before anything else"
            if "forked subprocess" in first
            else "name a device that torch has on this machine"
        )
        raise UsageError(f"The device '{device}' can't be used ({first}): {fix}.") from problem


def free_memory(device: str) -> int:
    """Free bytes of a GPU's memory, or of this machine's."""
    import psutil
    import torch

    free: int = torch.cuda.mem_get_info(device)[0] if device.startswith("cuda") else psutil.virtual_memory().available
    return free


def release_memory() -> None:
    """Give back the memory of models that are no longer referred to."""
    import torch

    gc.collect()
    torch.cuda.empty_cache()  # does nothing where no GPU was used


def limit_threads() -> None:
    """Limit one of several processes of `map` to one thread: the other processes have the other cores."""
    multiprocess = sys.modules.get("multiprocess")  # which `datasets` uses instead of multiprocessing
    if multiprocess is not None and multiprocess.parent_process() is not None:
        import torch

        torch.set_num_threads(1)


@contextmanager
def thread_pool(threads: int, prepare: Callable[[], object] = lambda: None) -> Iterator[ThreadPoolExecutor]:
    """A pool whose threads, each of which runs `prepare` first, no longer exist when the block ends.

    Before Python 3.13 a joined thread may still be exiting. MKL then takes locks to free its buffers, and after a fork
    at that moment they would stay locked in the child (seen with torch 2.13: `mm_account_ptr_by_tid` spins).
    """
    started: list[int] = []

    def begin() -> None:
        started.append(threading.get_native_id())
        prepare()

    try:
        with ThreadPoolExecutor(threads, initializer=begin) as pool:
            yield pool
    finally:
        for thread in started:
            while os.path.exists(f"/proc/self/task/{thread}"):
                time.sleep(1e-4)


def sound(run: Callable[[], T]) -> T:
    """`run()`, in a new thread after a fork: in the forked thread, OpenMP may wait forever for threads that exist only
    in the parent."""
    if not _forked:
        return run()
    with thread_pool(1) as pool:
        return pool.submit(run).result()
