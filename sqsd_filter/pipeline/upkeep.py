"""The upkeep of a store that runs share: what is in it, and fewer files for the same scores."""

from __future__ import annotations

import json
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from sqsd_filter.pipeline.folder import Folder, sweep
from sqsd_filter.pipeline.store import SETTINGS, ScoreStore, settings_id

DAY = 86400.0  # seconds after which an unfinished file was left by a process that was killed


def describe(where: str) -> dict[str, Any]:
    """What a store holds, for each settings, and the names of files that are no score segments.

    Raises `InputError` where there is no such folder.
    """
    stores, foreign = _stores_at(where)
    found = [
        {
            "id": store.id,
            "settings": store.settings,
            "files": len(names),
            "rows": sum(_rows(store.folder, name) for name in names),
            "bytes": sum(store.folder.size(name) for name in names),
        }
        for store in stores
        for names in [[name for name in store.segments() if name not in foreign]]
    ]
    return {"where": where, "stores": found, "foreign": foreign}


def compact_all(where: str) -> dict[str, Any]:
    """Join the segments of each settings, and sweep up after killed processes. Raises `InputError`, `SQSDError`."""
    stores, foreign = _stores_at(where)
    before = sum(len(store.segments()) for store in stores)
    for store in stores:
        store.compact()
        if store.folder.local is not None:
            sweep(store.folder.local, older_than=DAY)
    after = sum(len(store.segments()) for store in stores)
    return {"where": where, "files_before": before, "files": after, "foreign": foreign}


def _rows(folder: Folder, name: str) -> int:
    with folder.open(name) as source:
        return pq.read_metadata(source).num_rows


def _stores_at(where: str) -> tuple[list[ScoreStore], list[str]]:
    """The stores in a folder or at a URL, one for each settings, and the names of files there that are none's."""
    folder = Folder(where)
    found: dict[str, ScoreStore] = {}
    foreign = []
    for name in folder.names(must_exist=True):
        try:
            with folder.open(name) as source:
                schema = pq.read_schema(source)
            settings = json.loads((schema.metadata or {})[SETTINGS])
        except (pa.ArrowException, OSError, KeyError, ValueError):
            foreign.append(name)
            continue
        id = settings_id(settings)
        if not name.startswith(f"{id}-"):
            foreign.append(name)
            continue
        probes = [field.name for field in schema if field.type == pa.float64()]
        found.setdefault(id, ScoreStore(folder, settings, probes))
    return list(found.values()), foreign
