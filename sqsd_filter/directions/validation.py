"""What was found about a pack stands in its `pack.json` under "validation", beside what scores depend on."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sqsd_filter.errors import UsageError
from sqsd_filter.scoring.pack import PACK_FILE, embedded_packs
from sqsd_filter.storage.folder import write_json

STEERING = "steering"


def recordable(where: str | Path) -> Path:
    """The folder of a pack that may be written to: `where` as `load_pack` takes it.

    Raises `UsageError` for the name of an embedded pack or one of the Hub, and for a folder that is read-only.
    """
    folder = Path(where).expanduser()
    if str(where) in embedded_packs() or not folder.is_dir():
        raise UsageError(f"The pack '{where}' is no folder of yours to record in: copy it and name the copy's folder.")
    if not os.access(folder, os.W_OK):
        raise UsageError(f"The pack in {folder} can't be recorded in, the folder is read-only: copy it.")
    return folder


def record(folder: Path, key: str, found: Mapping[str, Any]) -> bool:
    """Put `found` under "validation" and `key` into the pack's page. Its fingerprint stays what it was.

    False where that would replace verdicts on the pack as it is by none: then nothing is written.
    """
    path = folder / PACK_FILE
    page = json.loads(path.read_text(encoding="utf-8"))
    known = page.get("validation")
    known = known if isinstance(known, dict) else {}
    on, earlier = verdicts(known)
    if key == STEERING and earlier and verdicts({key: found}) == (on, {}):
        return False
    page["validation"] = {**known, key: found}
    write_json(path, page)
    return True


def verdicts(validation: Any) -> tuple[str | None, dict[str, bool]]:
    """What `steer --record` found: the fingerprint of the pack that was steered, and by adapter whether a direction
    steers, where that was judged. What holds no such record has none."""
    steering = validation.get(STEERING) if isinstance(validation, dict) else None
    if not isinstance(steering, dict):
        return None, {}
    settings, curves = steering.get("settings"), steering.get("directions")
    on = settings.get("pack") if isinstance(settings, dict) else None
    found = [curve for curve in curves if isinstance(curve, dict)] if isinstance(curves, list) else []
    return on, {str(c.get("adapter")): c["steers"] for c in found if isinstance(c.get("steers"), bool)}
