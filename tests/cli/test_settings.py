"""Where a setting comes from: flag, environment, config file or default."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.commands import Command
from tests.corpora import read_report


def test_a_flag_beats_the_environment_which_beats_the_config_and_the_report_says_so(
    command: Command, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "c.toml").write_text(
        'drop-top = "50%"\nlimit = 10\nmax-length = 200\nformat = "alpaca"\non_error = "keep"\n'
    )
    monkeypatch.setenv("SQSD_FILTER_MAX_LENGTH", "100")
    monkeypatch.setenv("SQSD_FILTER_LIMIT", "20")
    code, _, err = command("in.jsonl", "out", "--config", "c.toml", "--drop-count", "3", "--limit", "30")
    assert code == 0, err
    report = read_report(Path("out"))
    settings = report["settings"]
    assert (settings["limit"], report["rows"]["total"]) == ({"value": 30, "origin": "flag"}, 30)
    assert (settings["max_length"], report["max_length"]) == ({"value": 100, "origin": "environment"}, 100)
    assert settings["format"] == {"value": "alpaca", "origin": "config"}
    assert settings["on_error"] == {"value": "keep", "origin": "config"}
    assert settings["max_error_rate"] == {"value": "50%", "origin": "default"}
    assert report["cut"] == "drop-count 3"


def test_how_to_cut_can_be_set_apart_from_where(
    command: Command, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "c.toml").write_text('drop-top = "50%"\nper-group = "id"\nper-split = true\n')
    monkeypatch.setenv("SQSD_FILTER_WEIGHTS", "1")
    assert command("in.jsonl", "out", "--config", "c.toml", "--drop-count", "3", "--per-group", "output")[0] == 0
    report = read_report(Path("out"))
    assert report["cut"] == 'drop-count 3, per-group "output", per-split, weights'
    assert report["settings"]["per_group"] == {"value": "output", "origin": "flag"}
    assert report["settings"]["weights"] == {"value": True, "origin": "environment"}


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("drop-top = 5", "5% or 5 rows"),
        ("drop_topp = '5%'", "unknown settings: drop_topp"),
        ("json = true", "unknown settings: json"),
        ("drop-top", "can't be read"),
        ("on-error = 'ignore'\ndrop-top = '5%'", "'ignore' is not one of"),
    ],
)
def test_a_senseless_config_is_a_usage_error(text: str, complaint: str, command: Command, folder: Path) -> None:
    (folder / "c.toml").write_text(text)
    code, _, err = command("in.jsonl", "out", "--config", "c.toml")
    assert code == 2
    assert complaint in err


def test_commands_share_a_config_file(command: Command, folder: Path) -> None:
    (folder / "nightly.toml").write_text('drop-top = "5pct"\nlimit = 20\n')
    assert command("score", "in.jsonl", "scored.parquet", "--config", "nightly.toml")[0] == 0
    assert command("in.jsonl", "out", "--config", "nightly.toml")[0] == 0
    assert read_report(Path("out"))["rows"]["dropped"] == 1
