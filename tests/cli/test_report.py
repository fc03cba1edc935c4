"""`sqsd-filter report` as people type it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.pages import Command


@pytest.mark.parametrize("option", ["--evaluation", "--drift", "--steering"])
def test_a_missing_file_is_an_input_error(option: str, out: Path, tmp_path: Path, report: Command) -> None:
    code, stdout, stderr = report(out, option, tmp_path / "none")
    assert (code, stdout) == (3, "")
    assert "can't be read (No such file or directory)" in stderr
