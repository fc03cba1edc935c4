"""The upkeep of a store that runs share: what is in it, and fewer files for the same scores."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from sqsd_filter.pipeline.scores.store import SETTINGS, ScoreStore, settings_id
from sqsd_filter.storage.folder import Folder, sweep

DAY = 86400.0  # seconds after which an unfinished file was left by a process that was killed


@dataclass
class Holding:
    """The segments of one settings: the names of their probes, and the (rows, bytes) of each file."""

    settings: dict[str, Any]
    probes: list[str]
    files: dict[str, tuple[int, int]] = field(default_factory=dict)


def describe(where: str) -> dict[str, Any]:
    """What a store holds, for each settings, and the names of files that are no score segments.

    Raises `InputError` where there is no such folder, or it can't be read.
    """
    holdings, foreign = _look(Folder(where))
    stores = [
        {
            "id": id,
            "settings": held.settings,
            "files": len(held.files),
            "rows": sum(rows for rows, _ in held.files.values()),
            "bytes": sum(size for _, size in held.files.values()),
        }
        for id, held in holdings.items()
    ]
    return {"where": where, "stores": stores, "foreign": foreign}


def compact_all(where: str) -> dict[str, Any]:
    """Join the segments of each settings, and sweep up after killed processes. Raises `InputError`, `SQSDError`."""
    folder = Folder(where)
    holdings, foreign = _look(folder)
    files = 0
    for held in holdings.values():
        store = ScoreStore(folder, held.settings, held.probes)
        store.compact()
        files += len(set(store.segments()) - set(foreign))
    if folder.local is not None:
        sweep(folder.local, older_than=DAY)
    before = sum(len(held.files) for held in holdings.values())
    return {"where": where, "files_before": before, "files": files, "foreign": foreign}


def _look(folder: Folder) -> tuple[dict[str, Holding], list[str]]:
    """What a folder holds, by the id of the settings, and the names of files there that are no segments."""
    found: dict[str, Holding] = {}
    foreign = []
    for name in folder.names(must_exist=True):
        try:
            content = folder.read(name)
        except FileNotFoundError:
            continue  # joined with others meanwhile
        try:
            page = pq.read_metadata(pa.BufferReader(content))
            settings = json.loads((page.schema.to_arrow_schema().metadata or {})[SETTINGS])
        except (pa.ArrowException, OSError, KeyError, ValueError):
            foreign.append(name)
            continue
        id = settings_id(settings)
        if not name.startswith(f"{id}-"):
            foreign.append(name)
            continue
        schema = page.schema.to_arrow_schema()
        held = found.setdefault(id, Holding(settings, [f.name for f in schema if f.type == pa.float64()]))
        held.files[name] = (page.num_rows, content.size)
    return found, foreign
