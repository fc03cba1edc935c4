"""Results stand in the pack's page and change nothing else of the pack."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from sqsd_filter.directions.validation import record, recordable
from sqsd_filter.errors import UsageError
from sqsd_filter.scoring.pack import load_pack


def test_a_record_joins_the_others_and_leaves_the_fingerprint(tiny_pack: Path, tmp_path: Path) -> None:
    pack = shutil.copytree(tiny_pack, tmp_path / "pack")
    before, page = load_pack(pack).fingerprint, json.loads((pack / "pack.json").read_text())
    record(pack, "states", {"best": 3})
    record(pack, "steering", {"x": 1})
    assert record(pack, "steering", {"x": "α"})
    assert json.loads((pack / "pack.json").read_text()) == {
        **page,
        "validation": {"states": {"best": 3}, "steering": {"x": "α"}},
    }
    assert load_pack(pack).fingerprint == before
    assert load_pack(pack).notes["validation"]["states"] == {"best": 3}


def judged(on: str, steers: bool | None) -> dict[str, Any]:
    return {"settings": {"pack": on}, "directions": [{"adapter": "danger", "steers": steers}]}


@pytest.mark.parametrize(
    ("earlier", "found", "recorded"),
    [
        (judged("a", True), judged("a", None), False),
        (judged("a", False), judged("a", None), False),
        (judged("a", True), judged("a", False), True),
        (judged("a", True), judged("b", None), True),
        (judged("a", None), judged("a", None), True),
    ],
    ids=["null over yes", "null over no", "no over yes", "of another pack", "null over null"],
)
def test_a_verdict_is_not_replaced_by_none(
    tiny_pack: Path, tmp_path: Path, earlier: Any, found: Any, recorded: bool
) -> None:
    pack = shutil.copytree(tiny_pack, tmp_path / "pack")
    assert record(pack, "steering", earlier)
    assert record(pack, "steering", found) is recorded
    assert json.loads((pack / "pack.json").read_text())["validation"]["steering"] == (found if recorded else earlier)


@pytest.mark.parametrize("odd", [None, 7, []], ids=repr)
def test_an_odd_note_is_no_obstacle(tiny_pack: Path, tmp_path: Path, odd: Any) -> None:
    pack = shutil.copytree(tiny_pack, tmp_path / "pack")
    page = json.loads((pack / "pack.json").read_text())
    (pack / "pack.json").write_text(json.dumps({**page, "validation": odd}))
    record(pack, "steering", {"x": 1})
    assert json.loads((pack / "pack.json").read_text()) == {**page, "validation": {"steering": {"x": 1}}}


@pytest.mark.parametrize("name", ["smollm2-135m", "org/name", "nowhere"])
def test_only_a_folder_can_be_recorded_in(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "smollm2-135m").mkdir()  # the name means the embedded one
    with pytest.raises(UsageError, match=f"The pack '{name}' is not a folder that can be written to"):
        recordable(name)
    assert recordable("./smollm2-135m") == Path("smollm2-135m")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "pack").mkdir(mode=0o555)
    with pytest.raises(UsageError, match="read-only"):
        recordable(tmp_path / "pack")
