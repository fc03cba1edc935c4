"""`sqsd-filter explain` as people type it: what it prints, and what the page shows afterwards."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sqsd_filter.pipeline.page.page import was_extended
from tests.pages import Command


@pytest.fixture
def scored(command: Command, folder: Path) -> Path:
    assert command("in.jsonl", "out", "--drop-count", "3")[0] == 0
    return Path("out/_sqsd")


def test_rows_of_a_finished_run_are_explained_on_stdout_and_on_its_page(command: Command, scored: Path) -> None:
    before = (scored / "report.html").read_text()
    assert "sqsd-filter explain OUT" in before
    code, out, err = command("explain", "out", "--riskiest", "2")
    assert (code, err) == (0, "")
    assert out.count(")   risk ") == 2
    assert out.count("  words    “") == 2
    assert out.endswith(f"On the page: {scored / 'report.html'}\n")
    page = (scored / "report.html").read_text()
    assert page.count("these words carry most") == 2
    assert '<mark class="m2">' in page
    assert "sqsd-filter explain OUT" not in page


def test_json_has_the_parts_of_the_rows_that_were_named(command: Command, scored: Path) -> None:
    code, out, _ = command("explain", "out", "--row", "5", "--row", "2", "--json")
    assert code == 0
    assert [row["row"] for row in json.loads(out)["rows"]] == [4, 1]
    assert [row["row"] + 1 for row in json.loads((scored / "explained.json").read_text())["rows"]] in ([5, 2], [2, 5])


def test_a_page_with_more_on_it_is_not_made_shorter_in_silence(command: Command, scored: Path) -> None:
    page = scored / "report.html"
    page.write_text(
        page.read_text().replace('<section id="dropped">', '<section id="drift"></section><section id="x">')
    )
    assert was_extended(Path("out"))
    code, _, err = command("explain", "out", "--riskiest", "1")
    assert code == 0
    assert "without what 'sqsd-filter report' had added to it: run that again." in err
    assert command("explain", "out", "--riskiest", "1")[2] == ""


def test_what_is_no_run_is_one_sentence(command: Command, scored: Path) -> None:
    code, out, err = command("explain", "in.jsonl")
    assert (code, out) == (3, "")
    assert err == "Error: in.jsonl holds no finished run: name the destination of one.\n"
