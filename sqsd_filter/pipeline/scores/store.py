"""The score store: a folder of immutable segments that map conversations to their scores.

A segment is a parquet file named after the settings its scores depend on; it is written whole or not at all, and its
pages carry checksums. Resuming, cutting again at another threshold, and scoring only what is new since last night are
look-ups. A run's own store lies in its destination; one shared by runs may lie in any folder or bucket.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sqsd_filter.errors import SQSDError
from sqsd_filter.pipeline.scores.keys import KEY_BYTES, KEYS, Lookup, distinct
from sqsd_filter.scoring.results import Scores
from sqsd_filter.scoring.scorer import TRANSIENT
from sqsd_filter.storage.folder import Folder

log = logging.getLogger(__name__)

SETTINGS = b"sqsd_settings"  # in a segment's metadata: the settings that its scores depend on
REUSED = "reused"  # in the names of segments whose scores were copied from another store
AT_ONCE = 1 << 20  # keys that are read or written at a time


def settings_id(settings: Mapping[str, object]) -> str:
    """16 hex digits, different for any two settings that scores depend on."""
    return hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=8).hexdigest()


@dataclass(frozen=True)
class StoredScores:
    """Stored scores of n keys, aligned with them.

    `codes` (n,) uint8 into `statuses`, 0 where a key is not stored; `own` (n,) bool, true where this run scored it;
    `probes` (n,) float64 each, `tokens` (n,) int32; `details` say why a row has no score.
    """

    codes: np.ndarray
    statuses: list[str]
    own: np.ndarray
    probes: dict[str, np.ndarray]
    details: dict[int, str]
    tokens: np.ndarray

    @classmethod
    def none(cls, n: int, probes: Sequence[str]) -> StoredScores:
        values = {name: np.full(n, np.nan) for name in probes}
        return cls(np.zeros(n, np.uint8), [""], np.zeros(n, bool), values, {}, np.zeros(n, np.int32))

    @property
    def known(self) -> np.ndarray:
        """(n,) bool: is the key stored?"""
        mask: np.ndarray = self.codes != 0
        return mask

    @property
    def settled(self) -> np.ndarray:
        """(n,) bool: known, and not with a status that another try may change."""
        mask: np.ndarray = self.known & ~self.has(*TRANSIENT)
        return mask

    def has(self, *statuses: str) -> np.ndarray:
        """(n,) bool: known, with one of these statuses."""
        return np.isin(self.codes, [self.code(s) for s in statuses if s in self.statuses])

    def code(self, status: str) -> int:
        if status not in self.statuses:
            self.statuses.append(status)
        return self.statuses.index(status)

    def scores(self, at: np.ndarray) -> Scores:
        """The scores of some of the keys, without risks."""
        return Scores(
            {name: values[at] for name, values in self.probes.items()},
            np.zeros(0),
            [self.statuses[c] for c in self.codes[at]],
            [self.details.get(int(k), "") for k in at],
            self.tokens[at],
        )


class ScoreStore:
    """The segments in a folder or at a URL that belong to the given settings."""

    def __init__(self, where: Folder | Path, settings: Mapping[str, object], probes: Sequence[str]) -> None:
        self.folder = where if isinstance(where, Folder) else Folder(where)
        self.settings, self.probes = dict(settings), list(probes)
        self.id = settings_id(settings)
        self._settings = json.dumps(self.settings, sort_keys=True).encode()
        self._skipped: set[str] = set()

    def segments(self) -> list[str]:
        """The names of the segments, sorted."""
        return [name for name in self.folder.names() if name.startswith(f"{self.id}-")]

    def append(self, name: str, keys: Sequence[bytes] | np.ndarray, scores: Scores) -> str:
        """Write one segment, whole or not at all, and return its name. Raises `SQSDError` when it can't be written.

        An existing segment of that name stays, and the new one gets another: it has rows that were tried again.
        """
        table = self._table(keys, scores)
        file = f"{self.id}-{name}.parquet"
        if self.folder.has(file) and self._readable(file):
            file = f"{self.id}-{name}-again-{_digest(keys)}.parquet"
        self._write(file, table)
        return file

    def take(self, keys: np.ndarray, scores: StoredScores, wanted: np.ndarray) -> None:
        """Copy the `wanted` (n,) bool among scores of another store. Raises `SQSDError` when they can't be written."""
        hits = np.flatnonzero(wanted)
        for start in range(0, len(hits), AT_ONCE):
            at = hits[start : start + AT_ONCE]
            self.append(f"{REUSED}-{_digest(keys[at])}", keys[at], scores.scores(at))

    def adopt(self, keys: np.ndarray, other: ScoreStore) -> None:
        """Copy the settled scores of `keys` (n,) S16 from another store, where this one has none."""
        theirs = other.lookup(keys)
        self.take(keys, theirs, theirs.settled & ~self.lookup(keys).settled)

    def lookup(self, keys: np.ndarray) -> StoredScores:
        """The scores of `keys` (n,) S16, all different.

        A segment that can't be read is skipped with a warning. Takes about 50 bytes per key.
        """
        stored, lookup = StoredScores.none(len(keys), self.probes), Lookup(keys)
        for name, batch in self._batches():
            hit, where = lookup.find(_keys(batch))
            codes = _codes(stored, batch)
            worse = [stored.code(status) for status in ("", *TRANSIENT)]
            again = stored.known[where] & np.isin(codes[hit], worse)
            hit, where = hit[~again], where[~again]  # a failed try never replaces a score
            stored.codes[where] = codes[hit]
            stored.own[where] = not name.startswith(f"{self.id}-{REUSED}-")
            stored.tokens[where] = batch["tokens"].to_numpy()[hit]
            for probe in self.probes:
                stored.probes[probe][where] = batch[probe].to_numpy()[hit]
            for k in np.flatnonzero(stored.codes[where] != stored.code("scored")).tolist():
                stored.details[int(where[k])] = batch["detail"][int(hit[k])].as_py() or ""
        return stored

    def compact(self) -> None:
        """Join all segments into as few as possible.

        Other runs may read and write meanwhile: new segments are written before old ones are deleted, a reader that
        misses a file looks again, and segments that can't be read stay. Raises `SQSDError`.
        """
        old: set[str] = set()
        keys = np.concatenate([np.zeros(0, KEYS), *(_keys(batch) for name, batch in self._batches(old))])
        keys = keys[distinct(keys).first]
        stored, new = self.lookup(keys), set()
        if not stored.known.all():
            raise SQSDError(f"Some segments of {self.folder} could be read only once: nothing was joined; try again.")
        for start in range(0, len(keys), AT_ONCE):
            at = np.arange(start, min(len(keys), start + AT_ONCE))
            name = f"{self.id}-{_digest(keys[at])}.parquet"
            self._write(name, self._table(keys[at], stored.scores(at)))
            new.add(name)
        for name in sorted(old - new):
            try:
                self.folder.delete(name)
            except OSError as problem:
                raise SQSDError(
                    f"{self.folder.path(name)} can't be deleted ({problem}): check your rights there; nothing is lost."
                ) from problem

    def _batches(self, whole: set[str] | None = None) -> Iterator[tuple[str, pa.RecordBatch]]:
        """All stored rows, by segment; where another process joins segments meanwhile, the joined ones are read.

        Adds the names of segments that were read to their end to `whole`. Raises `InputError` where a segment can't be
        fetched.
        """
        tried: set[str] = set()
        while waiting := [name for name in self.segments() if name not in tried]:
            for name in waiting:
                tried.add(name)
                try:
                    content = self.folder.read(name)
                except FileNotFoundError:
                    break  # joined with others: look again
                try:
                    yield from ((name, batch) for batch in self._parse(content))
                except (pa.ArrowException, OSError, KeyError) as problem:
                    self._skip(name, problem)
                else:
                    if whole is not None:
                        whole.add(name)

    def _skip(self, name: str, problem: Exception) -> None:
        if name not in self._skipped:
            self._skipped.add(name)
            log.warning("skipping %s, which is not a readable score segment (%s)", self.folder.path(name), problem)

    def _parse(self, content: pa.Buffer) -> Iterator[pa.RecordBatch]:
        """The rows of a segment. Raises `ArrowException`, `OSError` (pyarrow's for bad pages) or `KeyError`."""
        file = pq.ParquetFile(pa.BufferReader(content), read_dictionary=["status"], page_checksum_verification=True)
        schema = file.schema_arrow
        wanted = [(name, schema.field(name).type) for name in ("key", *self.probes, "tokens", "status", "detail")]
        if (schema.metadata or {}).get(SETTINGS) != self._settings:
            raise KeyError("other settings")
        if wanted[0][1] != pa.binary(KEY_BYTES) or any(t != pa.float64() for _, t in wanted[1:-3]):
            raise KeyError("other columns")
        yield from file.iter_batches(AT_ONCE, columns=[name for name, _ in wanted])

    def _readable(self, name: str) -> bool:
        try:
            for _ in self._parse(self.folder.read(name)):
                pass
        except (pa.ArrowException, OSError, KeyError):
            return False
        return True

    def _table(self, keys: Sequence[bytes] | np.ndarray, scores: Scores) -> pa.Table:
        packed = pa.py_buffer(np.array(keys, dtype=KEYS).tobytes())
        return pa.table(
            {
                "key": pa.FixedSizeBinaryArray.from_buffers(pa.binary(KEY_BYTES), len(keys), [None, packed]),
                **{p: pa.array(scores.probes[p], pa.float64()) for p in self.probes},
                "status": pa.array(scores.status, pa.string()),
                "detail": pa.array(scores.detail, pa.string()),
                "tokens": pa.array(scores.tokens, pa.int32()),
            }
        ).replace_schema_metadata({SETTINGS: self._settings})

    def _write(self, name: str, table: pa.Table) -> None:
        try:
            self.folder.write(name, lambda sink: pq.write_table(table, sink, write_page_checksum=True))
        except (OSError, pa.ArrowException) as problem:
            raise SQSDError(
                f"The scores can't be written to {self.folder} ({problem}): check the free space and your rights there "
                "and run the same command again; what was scored so far is kept."
            ) from problem


def _keys(batch: pa.RecordBatch) -> np.ndarray:
    """(n,) S16 without a copy."""
    column = batch["key"]
    keys: np.ndarray = np.frombuffer(column.buffers()[1], dtype=KEYS)
    return keys[column.offset : column.offset + len(column)]


def _codes(stored: StoredScores, batch: pa.RecordBatch) -> np.ndarray:
    """The statuses of a batch as codes (n,) of `stored`."""
    column = batch["status"]
    codes = np.array([stored.code(status) for status in column.dictionary.to_pylist()], np.uint8)
    of_rows: np.ndarray = codes[column.indices.to_numpy()]
    return of_rows


def _digest(keys: Sequence[bytes] | np.ndarray) -> str:
    return hashlib.blake2b(np.array(keys, dtype=KEYS).tobytes(), digest_size=8).hexdigest()
