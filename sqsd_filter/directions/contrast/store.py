"""The vectors of rows on disk, in half precision: a build that was killed goes on from them.

Each process appends vectors to a file of its own, and then their keys to the list beside it. What the list does not
name is cut off when the files are opened again.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from sqsd_filter.errors import SQSDError
from sqsd_filter.storage.folder import write_text

DTYPE = np.dtype(np.float16)


class UpdateStore:
    """Vectors (width,) by key, a hexadecimal digest. Those that were made with other settings are dropped."""

    def __init__(self, folder: Path, settings: Mapping[str, object], width: int, own: int) -> None:
        """`own` is the number of this process, which only this process may use."""
        self.folder, self.width, self.own = folder, width, own
        self.settings = json.dumps({**settings, "width": width}, sort_keys=True)
        folder.mkdir(parents=True, exist_ok=True)
        keys = self._keys(own) or []
        write_text(self._list(own), "".join(f"{line}\n" for line in (self.settings, *keys)))
        self._vectors(own).touch()
        with self._vectors(own).open("r+b") as file:
            file.truncate(len(keys) * self.row_bytes)

    @property
    def row_bytes(self) -> int:
        return self.width * DTYPE.itemsize

    def make_room(self, rows: int) -> None:
        """Raise `SQSDError` where the disk has no room for so many more vectors."""
        needed, free = rows * self.row_bytes, shutil.disk_usage(self.folder).free
        if needed > free:
            raise SQSDError(
                f"The updates of {rows:,} rows take {needed / 1e9:.1f} GB in {self.folder}, which has {free / 1e9:.1f} "
                "GB left: free some space, or take fewer rows."
            )

    def append(self, keys: Sequence[str], vectors: np.ndarray) -> None:
        """Keep vectors (n, width) under their keys."""
        with self._vectors(self.own).open("ab") as file:
            file.write(vectors.astype(DTYPE).tobytes())
        with self._list(self.own).open("a", encoding="utf-8") as file:
            file.writelines(f"{key}\n" for key in keys)

    def places(self) -> dict[str, tuple[int, int]]:
        """The file's number and the position in it of each vector."""
        numbers = sorted(int(path.stem.partition("-")[2]) for path in self.folder.glob("updates-*.keys"))
        return {key: (number, k) for number in numbers for k, key in enumerate(self._keys(number) or ())}

    def vectors(self, keys: Iterable[str]) -> StoredVectors:
        """The vectors of these rows, in this order. Raises `KeyError` for one that is not kept."""
        places = self.places()
        return StoredVectors(self, [places[key] for key in keys])

    def _keys(self, number: int) -> list[str] | None:
        """The keys in a process's list; None if there is none, or if it is of other settings."""
        try:
            lines = self._list(number).read_text(encoding="utf-8").split("\n")[:-1]  # the last may be cut off
        except FileNotFoundError:
            return None
        whole = self._vectors(number).stat().st_size // self.row_bytes if self._vectors(number).exists() else 0
        return lines[1 : whole + 1] if lines and lines[0] == self.settings else None

    def _list(self, number: int) -> Path:
        return self.folder / f"updates-{number}.keys"

    def _vectors(self, number: int) -> Path:
        return self.folder / f"updates-{number}.f16"


class StoredVectors:
    """Vectors of n rows that stay on disk."""

    def __init__(self, store: UpdateStore, places: Sequence[tuple[int, int]]) -> None:
        self.rows = len(places)
        self._parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []  # a file, positions in it, rows
        for number in sorted({number for number, _ in places}):
            rows = np.array([n for n, (file, _) in enumerate(places) if file == number])
            positions = np.array([places[n][1] for n in rows])
            path = store.folder / f"updates-{number}.f16"
            file = np.memmap(path, DTYPE, "r", shape=(path.stat().st_size // store.row_bytes, store.width))
            self._parts.append((file, positions, rows))

    def columns(self, where: slice) -> np.ndarray:
        """Some coordinates of all rows: (n, columns) float32."""
        chosen = np.empty((self.rows, where.stop - where.start), np.float32)
        for file, positions, rows in self._parts:
            chosen[rows] = file[positions, where]
        return chosen
