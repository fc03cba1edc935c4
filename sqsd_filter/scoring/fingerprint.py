"""What the cache of `datasets` hashes of an object: its content, without paths and devices.

`Dataset.map` finds its cached result by a hash of the function's pickle. The pickle must also bring the function to
other processes, with the paths and devices that the hash should not depend on. So hashing and pickling differ here.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Protocol


class PickleState(dict[str, object]):
    """What `__getstate__` returns. Pickle and copy use all of it; the hashing of `datasets` uses `content()`."""

    def __init__(self, state: Mapping[str, object], content: Callable[[], Mapping[str, object]] | None = None) -> None:
        super().__init__(state)
        self.content = content
        # There is no public way to hash and pickle differently. `datasets` hashes tokenizers in this way; if that
        # changes, hashes depend on paths again, and a test fails.
        if (hashing := sys.modules.get("datasets.utils._dill")) is not None:
            hashing.pklregister(PickleState)(_save_content)

    def __reduce__(self) -> tuple[type[PickleState], tuple[dict[str, object]]]:
        return PickleState, (dict(self),)


class _Pickler(Protocol):
    """The pickler of `datasets`."""

    def save_reduce(self, build: Callable[..., object], arguments: tuple[object, ...], *, obj: object) -> None: ...


def _save_content(pickler: _Pickler, state: PickleState) -> None:
    assert state.content is not None
    pickler.save_reduce(dict, (dict(state.content()),), obj=state)
