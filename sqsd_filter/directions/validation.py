"""Verdicts on a pack, kept in its `pack.json` under "validation", outside what scores depend on."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

from sqsd_filter.errors import UsageError
from sqsd_filter.scoring.pack import PACK_FILE, embedded_packs
from sqsd_filter.storage.folder import write_json

STEERING = "steering"


def recordable(where: str | Path) -> Path:
    """The folder of the pack `where`, which is named as for `load_pack` and must be writable.

    Raises `UsageError` for an embedded pack, a pack on the Hub or a read-only folder.
    """
    folder = Path(where).expanduser()
    if str(where) in embedded_packs() or not folder.is_dir():
        raise UsageError(
            f"The pack '{where}' is not a folder that can be written to: copy it and name the copy's folder."
        )
    if not os.access(folder, os.W_OK):
        raise UsageError(f"The pack folder {folder} is read-only: copy it and name the copy's folder.")
    return folder


def record(folder: Path, key: str, report: Mapping[str, object]) -> bool:
    """Write `report` to pack.json under "validation" and `key`. The pack's fingerprint does not change.

    Returns False, and writes nothing, if a report without verdicts would replace verdicts on this very pack.
    """
    path = folder / PACK_FILE
    page = json.loads(path.read_text(encoding="utf-8"))
    known = page.get("validation")
    known = known if isinstance(known, dict) else {}
    on, earlier = verdicts(known)
    if key == STEERING and earlier and verdicts({key: report}) == (on, {}):
        return False
    page["validation"] = {**known, key: report}
    write_json(path, page)
    return True


def verdicts(validation: object) -> tuple[str | None, dict[str, bool]]:
    """The verdicts of `steer --record`: the fingerprint of the pack that was steered, and by adapter whether the
    direction steers, if that was judged. (None, {}) for anything without such a record."""
    steering = validation.get(STEERING) if isinstance(validation, dict) else None
    if not isinstance(steering, dict):
        return None, {}
    settings, curves = steering.get("settings"), steering.get("directions")
    on = settings.get("pack") if isinstance(settings, dict) else None
    judged = [curve for curve in curves if isinstance(curve, dict)] if isinstance(curves, list) else []
    return on, {str(c.get("adapter")): c["steers"] for c in judged if isinstance(c.get("steers"), bool)}
