"""The score store: a folder of immutable segments that map conversations to their scores.

A segment is a parquet file named after the settings its scores depend on; it is written under another name, synced
and renamed, so a segment that has its name is whole. Resuming, and cutting again at another threshold, are look-ups.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sqsd_filter.errors import SQSDError
from sqsd_filter.scoring.scorer import TRANSIENT, Scores

log = logging.getLogger(__name__)

KEY_BYTES = 16
SETTINGS = b"sqsd_settings"  # where a segment says what its scores depend on
KEYS = np.dtype(f"S{KEY_BYTES}")  # compares and sorts as bytes


def settings_id(settings: Mapping[str, Any]) -> str:
    """16 hex digits of everything that a score depends on besides its conversation."""
    return hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=8).hexdigest()


@dataclass(frozen=True)
class Found:
    """Stored scores of some keys, aligned with them; `known` is false where there are none."""

    known: np.ndarray
    own: np.ndarray  # from a shard of this run, not carried over from another one
    probes: dict[str, np.ndarray]
    status: np.ndarray
    detail: np.ndarray
    tokens: np.ndarray


class ScoreStore:
    """Segments of one folder that belong to the given settings."""

    def __init__(self, folder: Path, settings: Mapping[str, Any], probes: Sequence[str]) -> None:
        self.folder, self.settings, self.probes = folder, dict(settings), list(probes)
        self.id = settings_id(settings)
        self._settings = json.dumps(self.settings, sort_keys=True).encode()

    def segments(self) -> list[Path]:
        return sorted(self.folder.glob(f"{self.id}-*.parquet"))

    def append(self, name: str, keys: Sequence[bytes], scores: Scores) -> Path:
        """Write one segment, whole or not at all. Raises `SQSDError` when the disk refuses."""
        table = pa.table(
            {
                "key": pa.array(keys, pa.binary(KEY_BYTES)),
                **{p: pa.array(scores.probes[p], pa.float64()) for p in self.probes},
                "status": pa.array(scores.status, pa.string()),
                "detail": pa.array(scores.detail, pa.string()),
                "tokens": pa.array(scores.tokens, pa.int32()),
            }
        ).replace_schema_metadata({SETTINGS: self._settings})
        path = self.folder / f"{self.id}-{name}.parquet"
        if path.exists() and self._load(path) is not None:  # rows of that shard that are tried again, beside the others
            path = path.with_stem(f"{path.stem}-again-{hashlib.blake2b(b''.join(keys), digest_size=8).hexdigest()}")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_whole(path, lambda sink: pq.write_table(table, sink))
        except OSError as problem:
            raise SQSDError(
                f"The scores can't be written to {self.folder} ({problem}): make room there and run the same command "
                "again; what was scored so far is kept."
            ) from problem
        return path

    def adopt(self, other: Path) -> None:
        """Carry over another store's segments for these settings."""
        for number, segment in enumerate(ScoreStore(other, self.settings, self.probes).segments()):
            self.folder.mkdir(parents=True, exist_ok=True)
            target = self.folder / f"{self.id}-reused-{number:05d}.parquet"
            if not target.exists():
                content = segment.read_bytes()
                write_whole(target, lambda sink, content=content: sink.write(content))

    def lookup(self, keys: np.ndarray) -> Found:
        """Scores of `keys` (n,) S16. A segment that can't be read is skipped with a warning, never trusted."""
        n = len(keys)
        found = Found(
            known=np.zeros(n, bool),
            own=np.zeros(n, bool),
            probes={p: np.full(n, np.nan) for p in self.probes},
            status=np.full(n, "", object),
            detail=np.full(n, "", object),
            tokens=np.zeros(n, np.int64),
        )
        order = np.argsort(keys, kind="stable")
        ordered = keys[order]
        for segment in self.segments():
            table = self._load(segment)
            if table is None:
                continue
            stored = np.array(table["key"].to_pylist(), dtype=KEYS)
            at = np.searchsorted(ordered, stored)
            hit = np.flatnonzero(at < n)
            hit = hit[ordered[at[hit]] == stored[hit]]
            statuses = np.array(table["status"].to_pylist(), object)
            where = order[at[hit]]
            better = ~(found.known[where] & np.isin(statuses[hit], TRANSIENT))  # a score is never given up again
            hit, where = hit[better], where[better]
            found.known[where] = True
            found.own[where] = f"{self.id}-reused-" not in segment.name
            for probe in self.probes:
                found.probes[probe][where] = table[probe].to_numpy()[hit]
            found.status[where] = statuses[hit]
            found.detail[where] = np.array(table["detail"].to_pylist(), object)[hit]
            found.tokens[where] = table["tokens"].to_numpy()[hit]
        return found

    def _load(self, segment: Path) -> pa.Table | None:
        try:
            table = pq.read_table(segment, columns=["key", *self.probes, "status", "detail", "tokens"])
            if (table.schema.metadata or {}).get(SETTINGS) != self._settings:
                raise KeyError("other settings")
        except (pa.ArrowException, OSError, KeyError) as problem:
            log.warning("skipping %s, which is not a readable score segment (%s)", segment, problem)
            return None
        return table


def write_whole(path: Path, write: Any) -> None:
    """Call `write(file)` on a temporary neighbour, sync it and give it its name: the file is whole or not there."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as sink:
            write(sink)
            sink.flush()
            os.fsync(sink.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
