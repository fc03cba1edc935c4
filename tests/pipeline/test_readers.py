"""Whatever people read an output with, they get the kept rows and no others."""

from __future__ import annotations

from pathlib import Path

import datasets
import pytest

from tests.pipeline.readers import KEPT, calls, rows_read, table_lines, write_output

datasets.disable_progress_bars()
DOCS = Path(__file__).parents[2] / "docs" / "output.md"


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for each format, with an output in it."""
    root = tmp_path_factory.mktemp("outputs")
    with pytest.MonkeyPatch.context() as patch:
        for to in {to for to, _, _ in calls()}:
            (root / to).mkdir()
            patch.chdir(root / to)
            write_output(to)
    return root


@pytest.mark.usefixtures("session")
@pytest.mark.parametrize(("to", "call"), [(to, call) for to, _, call in calls()])
def test_every_reader_gets_the_kept_rows_only(
    to: str, call: str, outputs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(outputs / to)
    assert rows_read(call) == KEPT


@pytest.mark.parametrize("to", ["parquet", "jsonl", "json", "arrow"])
def test_the_card_still_gives_the_other_rows(to: str, outputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(outputs / to)
    assert rows_read('load_dataset("out", "dropped")["train"]') == 10
    assert rows_read('load_dataset("out", "errors")["train"]') == 5


def test_the_table_in_the_docs_is_what_was_read() -> None:
    formats = ("| parquet |", "| jsonl |", "| json |", "| arrow |")
    assert [line for line in DOCS.read_text().splitlines() if line.startswith(formats)] == table_lines()
