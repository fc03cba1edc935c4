"""What the cache of `datasets` sees of an object: its content, wherever it lies and runs.

`Dataset.map` finds its cached result by a hash of the function's pickle. The pickle must also bring the function to
other processes, with the paths and devices that a hash should not depend on. So the two are told apart here.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any


class State(dict[str, Any]):
    """What `__getstate__` returns: pickle and copy take all of it, the hashing of `datasets` what `content` gives."""

    def __init__(self, state: Mapping[str, Any], content: Callable[[], Mapping[str, Any]] | None = None) -> None:
        super().__init__(state)
        self.content = content
        # There is no public way to tell hashing from pickling. This is how `datasets` itself hashes tokenizers; should
        # it change, hashes would depend on paths again, and the tests say so.
        if (hashing := sys.modules.get("datasets.utils._dill")) is not None:
            hashing.pklregister(State)(_save_content)

    def __reduce__(self) -> tuple[Any, ...]:
        return State, (dict(self),)


def _save_content(pickler: Any, state: State) -> None:
    assert state.content is not None
    pickler.save_reduce(dict, (dict(state.content()),), obj=state)
