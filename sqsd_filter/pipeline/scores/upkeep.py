"""Upkeep of a store that runs share: describe its content, and join its segments into fewer files."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from sqsd_filter.pipeline.scores.store import SETTINGS, ScoreStore, settings_id
from sqsd_filter.storage.folder import Folder, sweep

DAY = 86400.0  # seconds after which an unfinished file is taken for that of a killed process


@dataclass
class Holding:
    """The segments with the same settings: the names of their probes, and the (rows, bytes) of each file."""

    settings: dict[str, Any]
    probes: list[str]
    files: dict[str, tuple[int, int]] = field(default_factory=dict)


def describe(where: str) -> dict[str, Any]:
    """The content of a store by settings, and the names of files in it that are not score segments.

    Raises `InputError` where the folder does not exist or can't be read.
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
    """Join segments with the same settings, and remove files of killed processes. Raises `InputError`, `SQSDError`."""
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
    """The segments in a folder by the id of their settings, and the names of the other files there."""
    holdings: dict[str, Holding] = {}
    foreign = []
    for name in folder.names(must_exist=True):
        try:
            content = folder.read(name)
        except FileNotFoundError:
            continue  # joined with other segments meanwhile
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
        held = holdings.setdefault(id, Holding(settings, [f.name for f in schema if f.type == pa.float64()]))
        held.files[name] = (page.num_rows, content.size)
    return holdings, foreign
