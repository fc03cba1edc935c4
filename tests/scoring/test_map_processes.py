"""The processes of a `map`: each has its GPU, none waits for the threads of its parent."""

from __future__ import annotations

import ctypes
import os
import pickle
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from sqsd_filter import SQSDScorer
from sqsd_filter.errors import UsageError
from sqsd_filter.scoring.placement import check_device, choose_device, thread_pool
from tests import tiny
from tests.scoring.map_rows import run_script
from tests.tiny import CONVERSATIONS, make_pack


@pytest.mark.parametrize(
    ("named", "rank", "gpus", "device"),
    [
        (None, None, 0, "cpu"),
        (None, 3, 0, "cpu"),
        (None, None, 4, "cuda"),
        (None, 0, 4, "cuda:0"),
        (None, 5, 4, "cuda:1"),
        ("cuda", 7, 4, "cuda:3"),
        ("cuda:2", 1, 4, "cuda:2"),
        ("cuda", 1, 0, "cuda"),
        ("cpu", 1, 4, "cpu"),
    ],
)
def test_processes_take_turns_on_the_gpus(
    monkeypatch: pytest.MonkeyPatch, named: str | None, rank: int | None, gpus: int, device: str
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert choose_device(named, rank) == device


def test_a_process_stays_on_the_gpu_of_its_rank(tiny_pack: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    scorer = SQSDScorer(tiny_pack)
    assert (scorer.device, scorer.dtype) == ("cuda", "bfloat16")
    with pytest.raises(UsageError, match="The device 'cuda:1' can't be used"):
        scorer({"messages": CONVERSATIONS}, 3)
    assert pickle.loads(pickle.dumps(scorer)).device == "cuda"  # another process has a rank of its own


def test_a_fork_that_can_not_use_its_parents_gpu_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("Cannot re-initialize CUDA in forked subprocess. To use CUDA with multiprocessing, ...")

    monkeypatch.setattr(torch, "empty", refuse)
    with pytest.raises(UsageError, match=r"forked subprocess\): call multiprocess\.set_start_method\('spawn'\)"):
        check_device("cuda")


PROCESSES = """
import faulthandler, os, sys
import torch, multiprocess
from datasets import Dataset
from sqsd_filter import SQSDScorer
from tests.tiny import chat

def main(pack, how):
    if how == "spawn":
        multiprocess.set_start_method("spawn")
    torch.set_num_threads(2)
    (torch.ones(800, 800) @ torch.ones(800, 800)).sum()  # OpenMP has threads now, which a fork lacks
    scorer, turns = SQSDScorer(pack), [chat(str(k), "a") for k in range(8)]
    risk = scorer.score(turns).risk
    if how == "bare fork":
        for own in (scorer, SQSDScorer(pack)):
            if (child := os.fork()) == 0:
                faulthandler.dump_traceback_later(90, exit=True)  # where it waits for ever, if it does
                os._exit(int((own.score(turns).risk != risk).any() or own.model.workers != 2))
            assert os.waitpid(child, 0)[1] == 0
        return
    scored = Dataset.from_dict({"messages": turns}).map(scorer, batched=True, num_proc=2, batch_size=2)
    assert abs(risk - scored["sqsd_risk"][:]).max() <= 2e-6 and torch.get_num_threads() == 2

if __name__ == "__main__":
    main(*sys.argv[1:])
    print("the same scores everywhere")
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", ["fork", "bare fork", "spawn"])
def test_processes_of_a_parent_that_has_computed_do_not_wait_for_its_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    large = {**tiny.ARCHITECTURES["llama"], "hidden_size": 256, "intermediate_size": 1024}  # worth several threads
    monkeypatch.setitem(tiny.ARCHITECTURES, "llama", large)
    pack = make_pack(tmp_path / "pack")
    (tmp_path / "script.py").write_text(PROCESSES)
    assert "the same scores everywhere" in run_script(tmp_path / "script.py", str(pack), how)


@pytest.mark.skipif(sys.platform != "linux", reason="finds its threads in /proc")
def test_a_pool_that_is_left_has_no_thread_on_its_way_out() -> None:
    libc, key = ctypes.CDLL(None), ctypes.c_uint()
    libc.pthread_key_create(ctypes.byref(key), ctypes.cast(libc.usleep, ctypes.c_void_p))

    def linger(_: int) -> int:  # 0.2 s before it ends, as MKL takes some time for its buffers
        libc.pthread_setspecific(key, ctypes.c_void_p(200_000))
        return threading.get_native_id()

    with thread_pool(2) as pool:
        threads = set(pool.map(linger, range(2)))
    assert threads
    assert not threads & set(map(int, os.listdir("/proc/self/task")))
