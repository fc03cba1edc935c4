"""A lock that one process holds at a time, and that ends with the process, however it ends.

The system's own file locks: unlike a file whose existence is the lock, they leave nothing behind after a kill.
"""

from __future__ import annotations

import fcntl
from pathlib import Path
from typing import IO


def take_lock(path: Path, *, wait: bool = False) -> IO[bytes]:
    """Lock the file at `path`, which is created if missing. The open file that is returned holds the lock until it is
    closed, or until the process ends.

    Where another open file holds the lock, waits for it with `wait`, else raises `BlockingIOError`. On a file system
    without locks (Lustre, say), the file is opened and nothing is locked.
    """
    file = path.open("ab")
    try:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise
    except OSError:
        pass  # a file system without locks
    return file
