"""The text of the dataset card: true of the run, whole whatever names it holds, and followed by the sources' cards."""

from __future__ import annotations

import shlex
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from sqsd_filter.pipeline.writing.writers import OF_LINES
from tests.pipeline.writing.made_up_cards import ORIGINAL, REPORT, Page, card, card_text, headings

nasty = st.text(st.characters() | st.sampled_from("`|\\\n\r<>*_[]#$&- "), min_size=1, max_size=12)


def printed(name: str) -> str:
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)


# ---------------------------------------------------------------------------------------------- the words


def test_it_says_what_was_removed_and_how_to_load_the_rest() -> None:
    _, body = card(ties=1, datasets=[{"id": "org/a", "revision": "c0ffee", "config": "c", "split": "s"}])
    page = Page(body)
    assert headings(body)[0] == (1, "3 of 6 rows, the riskiest removed")
    assert "the riskiest 40% of the scored rows (drop-top 40%)" in page.text
    assert "lowest risk among the dropped rows is 0.125; kept rows with the same risk: 1." in page.text
    assert "Rows without a score: 1 bad_json (1 in errors). Their risk is unknown." in page.text
    assert "org/a, config c, split s, commit c0ffee" in page.text
    assert {"load_dataset(path)", 'load_dataset(path, "dropped")', 'load_dataset(path, "errors")'} < set(page.codes)
    assert {"tiny", "org/m", "sqsd_a", "sqsd_b"} < set(page.codes)
    assert "+1 × sqsd_a -2.5 × sqsd_b" in page.text
    assert "![Histogram of the risk: 3 rows are kept, 2 dropped](_sqsd/risk.png)" in body


@pytest.mark.parametrize(
    ("cut", "words"),
    [
        ("drop-count 2", "This run dropped the 2 riskiest of the scored rows (drop-count 2)."),
        ("max-risk 0.1", "This run dropped the scored rows with a risk above 0.1 (max-risk 0.1)."),
        ("keep-lowest 3", "This run dropped all scored rows but the 3 with the lowest risk (keep-lowest 3)."),
    ],
)
def test_every_rule_is_put_in_words(cut: str, words: str) -> None:
    assert words in Page(card(cut=cut)[1]).text


def test_it_says_when_nothing_was_dropped_and_when_rows_without_a_score_were_kept() -> None:
    rows = {"total": 6, "kept": 5, "dropped": 0, "errors": 1}
    _, body = card(rows=rows, threshold=None, unscored={"no_answer": 3, "bad_json": 1}, pack=None)
    text = Page(body).text
    assert "5 of 6 rows, with their risk" in text
    assert "No row was dropped" in text
    assert "3 no_answer, 1 bad_json (1 in errors, 3 kept)." in text
    assert "The scores were already in the input." in text


@pytest.mark.parametrize("to", ["parquet", "jsonl", "json", "arrow"])
def test_each_format_is_loaded_in_the_same_way(to: str) -> None:
    header, body = card(to=to, rows={**REPORT["rows"], "errors": 0})
    loads = ["load_dataset(path)", 'load_dataset(path, "dropped")', 'load_dataset(path, "errors", streaming=True)']
    assert [code for code in Page(body).codes if code.startswith("load_")][:3] == loads
    assert [config["config_name"] for config in header["configs"]] == ["default", "dropped", "errors"]
    assert ("`load_from_disk(path)`" in body) == (to == "arrow")
    assert ("sqsd_reason" in body) == (to not in OF_LINES) == ("_sqsd/reasons.jsonl" not in body)


def test_it_loads_by_the_name_that_the_dataset_is_to_have() -> None:
    assert 'load_dataset("org/out", "dropped")' in Page(card(name="org/out")[1]).codes


def test_lines_of_json_have_columns_of_scores_only_if_they_were_asked_for() -> None:
    assert "sqsd_risk" not in card(to="jsonl")[1]
    assert "sqsd_risk" in card(to="jsonl", with_scores=True)[1]


def test_a_dataset_without_some_of_the_rows_says_so() -> None:
    header, body = card(files=REPORT["files"][:1])
    assert [config["config_name"] for config in header["configs"]] == ["default"]
    assert "| dropped | 2 | not in this dataset |" in body
    assert 'load_dataset(path, "dropped")' not in body
    assert "sqsd_status" in body
    assert "sqsd_reason" not in body


def rows_of_table(body: str, head: str) -> list[list[str]]:
    """The cells below a table's head."""
    lines = body.partition(f"{head}\n")[2].partition("\n\n")[0].splitlines()[1:]
    return [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in lines]


def test_groups_get_a_line_each_up_to_fifty_and_the_others_one() -> None:
    groups = [{"value": k, "scored": k + 10, "dropped": k, "threshold": k / 8} for k in range(53)]
    _, body = card(groups={"column": "topic", "groups": groups, "spared": 4}, threshold=None)
    table = rows_of_table(body, "| `topic` | scored | dropped | threshold |")
    assert len(table) == 51
    assert table[0] == ["`52`", "62", "52", "6.5"]
    assert table[49] == ["`3`", "13", "3", "0.375"]
    assert table[50] == ["others: 3", str(10 + 11 + 12), str(0 + 1 + 2)]
    assert "with the same `topic` was cut on its own" in body
    assert "no group is emptied: 4 rows" in body


def test_splits_are_told_with_their_groups_or_alone() -> None:
    piece = {"split": "test", "value": "a", "scored": 3, "dropped": 0, "threshold": None}
    _, both = card(groups={"column": "topic", "groups": [piece], "spared": 0})
    assert rows_of_table(both, "| split | `topic` | scored | dropped | threshold |") == [["`test`", "`a`", "3", "0"]]
    del piece["value"]
    _, alone = card(groups={"column": None, "groups": [piece], "spared": 0})
    assert rows_of_table(alone, "| split | scored | dropped | threshold |") == [["`test`", "3", "0"]]
    assert "Each split was cut on its own" in alone
    assert "emptied" not in alone


def test_values_of_groups_that_are_no_text_or_long_can_be_told() -> None:
    groups = [{"value": v, "scored": 1, "dropped": 0, "threshold": None} for v in (None, True, 7, "x" * 100)]
    _, body = card(groups={"column": "topic", "groups": groups, "spared": 0})
    assert set(Page(body).codes) > {"null", "true", "7", "x" * 79 + "…"}


WEIGHTED = {"total": 6, "kept": 5, "dropped": 0, "errors": 1}


def test_weighted_rows_are_said_to_be_weighted_and_none_dropped() -> None:
    weights = {"formula": "1 / (1 + exp(risk))", "threshold": 0.5, "scale": 0.25, "sum": 2.75}
    _, body = card(weights=weights, rows=WEIGHTED, files=[REPORT["files"][0], REPORT["files"][2]])
    text = Page(body).text
    assert "5 rows, weighted by their risk" in text
    assert "No row was dropped." in text
    assert "sqsd_weight" in text
    assert "1 / (1 + exp(risk)) with the threshold 0.5 and the scale 0.25. The weights add up to 2.75." in text
    assert "| dropped" not in body


@pytest.mark.parametrize(
    ("with_scores", "weighted", "words"),
    [
        (False, False, "byte for byte. "),
        (True, False, "byte for byte, with its scores added at the end. "),
        (False, True, "byte for byte, with its weight added at the end. "),
        (True, True, "byte for byte, with its scores and its weight added at the end. "),
    ],
)
def test_what_is_added_to_lines_of_json_is_named(with_scores: bool, weighted: bool, words: str) -> None:
    weights = {"formula": "f", "threshold": 0.5, "scale": 0.25, "sum": 1.5}
    changes: dict[str, Any] = {"weights": weights, "rows": WEIGHTED} if weighted else {}
    assert words in card(to="jsonl", with_scores=with_scores, **changes)[1]


def test_groups_that_are_weighted_apart_have_their_own_scales() -> None:
    weights = {"formula": "f", "threshold": None, "scale": None, "sum": 1.5}
    group = {"value": "a", "scored": 5, "dropped": 0, "threshold": 0.5, "scale": 0.25, "sum": 1.5}
    _, body = card(weights=weights, rows=WEIGHTED, groups={"column": "c", "groups": [group], "spared": 0})
    assert "with the threshold and scale below" in body
    assert rows_of_table(body, "| `c` | scored | threshold | scale | sum |") == [["`a`", "5", "0.5", "0.25", "1.5"]]


@settings(max_examples=50, deadline=None)
@given(command=st.lists(st.text(st.sampled_from("`~' \n\"\\|<*é👩")), min_size=1, max_size=4))
def test_the_command_can_be_copied_from_the_page(command: list[str]) -> None:
    _, body = card(command=command)
    [block] = [token for token in MarkdownIt("commonmark").parse(body) if token.type == "fence"]
    assert shlex.split(block.content) == command


# ---------------------------------------------------------------------------------------------- whatever the names


def named(name: str) -> dict[str, Any]:
    """What of a report holds names that others gave."""
    group = {"value": name, "split": name, "scored": 1, "dropped": 1, "threshold": 0.0, "scale": 1.0, "sum": 1.0}
    return {
        "pack": {**REPORT["pack"], "name": name, "base_model": name, "weights": {name: 1.0}},
        "json_columns": [name, name],
        "unscored": {name: 1},
        "groups": {"column": name, "groups": [group, group], "spared": 1},
        "files": [],
        "datasets": [{"id": name, "config": name, "split": name, "revision": name}],
        "weights": {"formula": name, "threshold": 0.0, "scale": 1.0, "sum": 1.0},
        "command": ["sqsd-filter"],
    }


@settings(max_examples=50, deadline=None)
@given(name=nasty)
def test_no_name_breaks_the_page_or_the_header(name: str) -> None:
    field = "x" + "".join(c for c in name if c.isprintable())
    original = f"---\n{yaml.safe_dump({'license': field, 'pretty_name': field, 'tags': [field]})}---\ntext\n"
    header, body = card({name: original}, **named(name))
    page, plain = Page(body), Page(card({"plain": "---\nlicense: mit\n---\ntext\n"}, **named("plain"))[1])
    assert page.opened == plain.opened
    assert page.codes.count(printed(name)) >= 16
    assert page.codes.count(printed(f"sqsd_{name}")) == 2
    assert header["license"] == header["pretty_name"] == header["tags"][0] == field


# ---------------------------------------------------------------------------------------------- the original's text


def test_the_original_text_stands_below_in_a_section_of_its_own() -> None:
    text = (
        "# Title\n\n```md\n# in code\n```\n\nUnder *lined*\nin two\n====\n\n> # quoted\n\n###### deep ##\n\n#no heading"
    )
    _, body = card({"org/a": f"---\nlicense: mit\n---\n{text}", "org/b": "Only words.\r\n\r\n# B\r\n"})
    below = body.partition("## The original card")[2]
    assert headings(f"## The original card{below}") == [
        (2, "The original card of `org/a`"),
        (3, "Title"),
        (3, "Under *lined* in two"),
        (1, "quoted"),
        (6, "deep"),
        (2, "The original card of `org/b`"),
        (3, "B"),
    ]
    assert "```md\n# in code\n```" in below
    assert "#no heading" in below
    assert "Only words.\n\n### B" in below


def test_filtering_twice_nests_nothing_and_keeps_the_first_sources_card() -> None:
    first = card_text([("org/dolly", ORIGINAL)], datasets=[{"id": "org/dolly"}])
    second = card_text([("out", first)])
    for source in (first, second):
        header, body = card({"out": source})
        assert headings(body).count((2, "The original card of `org/dolly`")) == 1
        assert body.endswith("### Dolly\n\nFifteen thousand rows.\n")
        assert body.count("## Limits") == 1
        assert "Filtered before by this tool: `out`" in body
        assert header["source_datasets"] == ["org/dolly"]
        assert header["license"] == "cc-by-sa-3.0"
        assert header["tags"] == ["instructions", "sqsd-filter", "safety", "data-filtering"]
    assert card_text([("out", second)]) == second


def test_a_card_without_text_below_it_adds_no_section() -> None:
    _, body = card({"out": card_text([]), "two": ORIGINAL.split("# Dolly")[0]})
    assert "original card" not in body
    assert "Filtered before by this tool: `out`" in body


def test_a_source_by_its_path_is_named_by_its_last_part() -> None:
    _, body = card({"/home/somebody/corpus": ORIGINAL})
    assert "somebody" not in body
    assert "The original card of `corpus`" in body


def test_another_card_cannot_pass_for_the_end_of_ours() -> None:
    marker = "<!-- sqsd-filter: below are the cards of the sources -->"
    _, body = card({"org/a": f"lost\n{marker}\nkept {marker} too", "org/b": "and this"})
    assert body.count(marker) == 1
    assert "kept  too" in body
    assert "and this" in body


def test_two_sources_of_one_name_keep_both_their_licences() -> None:
    sources = [("/a/corpus", "---\nlicense: cc-by-nc-4.0\n---\nfirst"), ("/b/corpus", "---\nlicense: mit\n---\nsecond")]
    text = card_text(sources)
    assert yaml.safe_load(text.split("---")[1])["license"] == ["cc-by-nc-4.0", "mit"]
    assert "first" in text
    assert "second" in text
