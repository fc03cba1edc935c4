"""The command in a process of its own, which may kill itself at any moment."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

from sqsd_filter.cli.main import main


def run_command(folder: Path, pack: Path, moment: int, kind: int, arguments: list[str]) -> None:
    """Run the command, and send this process the signal `kind` just before its `moment`-th file gets its name.

    Its output goes to the files stdout and stderr in `folder`.
    """
    os.chdir(folder)
    os.environ["SQSD_FILTER_PACK"] = str(pack)  # the fork server has the environment that it was started in
    torch.set_num_threads(1)
    for stream, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    renamed = 0

    def watch(event: str, _: object) -> None:
        nonlocal renamed
        if event == "os.rename":
            renamed += 1
            if renamed == moment:
                os.kill(os.getpid(), kind)

    sys.addaudithook(watch)
    main(arguments)
