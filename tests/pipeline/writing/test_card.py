"""The dataset card: valid for everything that reads cards, true of the run, and whole whatever names it holds."""

from __future__ import annotations

import shlex
from html.parser import HTMLParser
from itertools import pairwise, product
from pathlib import Path
from typing import Any, cast

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from huggingface_hub import DatasetCard
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from sqsd_filter.pipeline.report import Report
from sqsd_filter.pipeline.writing import card as cards
from sqsd_filter.pipeline.writing.card import write_card

datasets.disable_progress_bars()

ROWS = {"kept": 3, "dropped": 2, "errors": 1}
REPORT: dict[str, Any] = {
    "rows": {"total": 6, **ROWS},
    "unscored": {"bad_json": 1},
    "pack": {
        "name": "tiny",
        "fingerprint": "0123456789abcdef",
        "base_model": "org/m",
        "weights": {"a": 1.0, "b": -2.5},
    },
    "cut": "drop-top 40%",
    "threshold": 0.125,
    "ties": 0,
    "json_columns": [],
    "to": "parquet",
    "with_scores": False,
    "files": [
        {"path": f"data/{name}-00000-of-00001.parquet", "config": name, "split": "train", "rows": n, "sha256": name}
        for name, n in ROWS.items()
    ],
}
ORIGINAL = """\
---
license: cc-by-sa-3.0
language:
- en
- no
tags: [instructions]
task_categories: [text-generation]
pretty_name: Dolly
size_categories: [10K<n<100K]
configs:
- config_name: default
  data_files: old.jsonl
dataset_info: {features: []}
viewer: false
gated: auto
extra_gated_prompt: Please agree.
---
# Dolly

Fifteen thousand rows.
"""
nasty = st.text(st.characters() | st.sampled_from("`|\\\n\r<>*_[]#$&- "), min_size=1, max_size=12)


def report_with(**changes: Any) -> Report:
    """`REPORT` with these changes: as much of a report as a card needs."""
    return cast("Report", {**REPORT, **changes})


def card_text(originals: list[tuple[str, str]], name: str | None = None, **changes: Any) -> str:
    return cards.card_text(report_with(**changes), originals, name)


def card(originals: dict[str, str] | None = None, name: str | None = None, **changes: Any) -> tuple[Any, str]:
    """The card's header and body for a run whose report differs from `REPORT` by these."""
    text = card_text(list((originals or {}).items()), name, **changes)
    _, start, body = text.split("---\n", 2)
    header = yaml.safe_load(start)
    assert DatasetCard(text).data.to_dict() == header  # type: ignore[no-untyped-call]
    return header, body


class Page(HTMLParser):
    """The page as a browser has it: the tags that open, the text of each <code>, and all text."""

    def __init__(self, markdown: str) -> None:
        super().__init__()
        self.opened: list[str] = []
        self.codes: list[str] = []
        self.text = ""
        self._in_code = False
        self.feed(MarkdownIt("commonmark").enable("table").render(markdown))
        self.close()

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.opened.append(tag)
        if tag == "code":
            self.codes.append("")
            self._in_code = True

    def handle_endtag(self, tag: str) -> None:
        self._in_code = self._in_code and tag != "code"

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._in_code:
            self.codes[-1] += data


def printed(name: str) -> str:
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)


def headings(markdown: str) -> list[tuple[int, str]]:
    pairs = pairwise(MarkdownIt("commonmark").enable("table").parse(markdown))
    return [(int(head.tag[1]), words.content) for head, words in pairs if head.type == "heading_open"]


# ---------------------------------------------------------------------------------------------- the header


def test_every_config_loads_with_all_its_files_and_splits_in_order(tmp_path: Path) -> None:
    files = []
    for config, split, k in product(("kept", "dropped"), ("train", "test"), range(2)):
        path = tmp_path / "data" / f"{config}_{split}-{k:05}-of-00002.parquet"
        path.parent.mkdir(exist_ok=True)
        pq.write_table(pa.table({"file": [path.name] * (k + 1)}), path)
        file = {"path": f"data/{path.name}", "config": config, "split": split, "rows": k + 1, "sha256": path.name}
        files.append(file)
    write_card(tmp_path, report_with(files=files))
    for config in ("kept", "dropped"):
        name = "default" if config == "kept" else config
        builder = datasets.load_dataset_builder(str(tmp_path), name, cache_dir=str(tmp_path / "cache"))
        assert list(builder.config.data_files) == ["train", "test"]
        for split in ("train", "test"):
            loaded = datasets.load_dataset(str(tmp_path), name, split=split, cache_dir=str(tmp_path / "cache"))
            assert loaded["file"][:] == [f"{config}_{split}-0000{k}-of-00002.parquet" for k in (0, 1, 1)]
    assert datasets.get_dataset_config_names(str(tmp_path)) == ["default", "dropped"]
    assert datasets.get_dataset_default_config_name(str(tmp_path)) == "default"


def test_a_header_tells_any_two_contents_apart() -> None:
    kept, dropped, errors = REPORT["files"]
    before, after = (card(files=[kept, file, errors])[0]["configs"] for file in (dropped, {**dropped, "sha256": "x"}))
    assert before[0] == after[0]
    assert before[1] != after[1]
    assert before[2] == after[2]


@pytest.mark.parametrize(
    ("rows", "size"),
    [
        (0, "n<1K"),
        (999, "n<1K"),
        (1000, "1K<n<10K"),
        (15_011, "10K<n<100K"),
        (10**6 - 1, "100K<n<1M"),
        (10**6, "1M<n<10M"),
        (10**12 - 1, "100B<n<1T"),
        (10**12, "n>1T"),
    ],
)
def test_the_size_is_one_of_the_hubs_and_that_of_the_kept_rows(rows: int, size: str) -> None:
    header, _ = card(rows={**REPORT["rows"], "kept": rows}, files=[])
    assert header["size_categories"] == [size]


def test_what_holds_for_the_rows_is_carried_over_and_what_holds_for_the_sources_files_is_not() -> None:
    header, _ = card({"org/dolly": ORIGINAL}, datasets=[{"id": "org/dolly", "revision": "a" * 40}])
    configs = header.pop("configs")
    assert [config["config_name"] for config in configs] == ["default", "dropped", "errors"]
    assert header == {
        "license": "cc-by-sa-3.0",
        "language": ["en", "no"],
        "task_categories": ["text-generation"],
        "pretty_name": "Dolly",
        "tags": ["instructions", "sqsd-filter", "safety", "data-filtering"],
        "size_categories": ["n<1K"],
        "source_datasets": ["org/dolly"],
    }


@pytest.mark.parametrize(
    ("headers", "carried"),
    [
        (["license: mit", "license: mit"], {"license": "mit"}),
        (["license: mit", "license: [apache-2.0, mit]"], {"license": ["mit", "apache-2.0"]}),
        (["license: mit", ""], {}),
        (["license: unknown"], {}),
        (["license:", "license: mit"], {}),
        (["license: {name: mit}"], {}),
        (
            ["license: other\nlicense_name: l\nlicense_link: https://x.org"],
            {"license": "other", "license_name": "l", "license_link": "https://x.org"},
        ),
        (["license: other\nlicense_name: l\nlicense_link: LICENSE"], {"license": "other", "license_name": "l"}),
        (["license: other\nlicense_name: l", "license: mit"], {"license": ["other", "mit"]}),
        (["license: a\nlanguage: [b, c]", "license: a\nlanguage: [c, b]"], {"license": "a", "language": ["b", "c"]}),
        (["license: mit\nlanguage: en", "license: mit\nlanguage: fr"], {"license": "mit"}),
        (["license: mit\npretty_name: 12", "license: mit"], {"license": "mit"}),
        (["license: mit\npretty_name: 1_2"], {"license": "mit", "pretty_name": "1_2"}),
    ],
)  # fmt: skip
def test_licences_come_together_and_other_fields_only_where_all_sources_agree(
    headers: list[str], carried: dict[str, Any]
) -> None:
    header, body = card({f"org/{k}": f"---\n{text}\n---\n" for k, text in enumerate(headers)})
    assert {name: header[name] for name in header if name not in ("tags", "size_categories", "configs")} == carried
    assert ("not known" in body) == ("license" not in carried)
    for licence in [carried["license"]] if isinstance(carried.get("license"), str) else carried.get("license", []):
        assert f"`{licence}`" in body


def test_without_a_source_or_with_one_of_the_hub_that_has_no_card_the_licence_is_to_be_looked_up() -> None:
    assert "license" not in card()[0]
    assert "Look it up" in card()[1]
    header, body = card({"org/a": ORIGINAL}, datasets=[{"id": "org/a"}, {"id": "org/b"}])
    assert "license" not in header
    assert header["source_datasets"] == ["org/a", "org/b"]
    assert "- `org/a`: `cc-by-sa-3.0`\n- `org/b`: not known" in body


BROKEN = {
    "no yaml": "license: mit\n\tlanguage: [",
    "no mapping": "- license\n- mit",
    "a scalar": "mit",
    "odd keys": "? [a, b]\n: c",
    "an alias to itself": "license: &a [*a]",
    "too deep": "language: " + "[" * 1000,
    "control characters": "license: \x00",
    "empty": "",
}


@pytest.mark.parametrize("header", BROKEN.values(), ids=BROKEN)
def test_of_a_broken_header_only_the_text_below_is_taken(header: str) -> None:
    header, body = card({"org/a": f"---\n{header}\n---\nFifteen thousand rows.\n"})
    assert set(header) == {"tags", "size_categories", "configs"}
    assert body.endswith("## The original card of `org/a`\n\nFifteen thousand rows.\n")


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
    assert "![Histogram of the risk: 3 rows are kept, 2 dropped](sqsd/risk.png)" in body


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


@pytest.mark.parametrize("to", ["parquet", "jsonl", "arrow"])
def test_each_form_is_loaded_in_its_own_way(to: str) -> None:
    files = [{**file, "path": file["path"].replace("data/", f"{file['config']}/")} for file in REPORT["files"]]
    header, body = card(to=to, rows={**REPORT["rows"], "errors": 0}, files=files)
    loads = ["load_dataset(path)", 'load_dataset(path, "dropped")', 'load_dataset(path, "errors", streaming=True)']
    if to == "arrow":
        loads = [f'load_from_disk(path)["{name}"]' for name in ROWS]
    assert [code for code in Page(body).codes if code.startswith("load_")][:3] == loads
    assert ("configs" in header) == (to != "arrow")
    assert ("sqsd_reason" in body) == (to != "jsonl") == ("data/reasons.jsonl" not in body)


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
