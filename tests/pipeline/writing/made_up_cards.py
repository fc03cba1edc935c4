"""Cards of made-up runs, and what a reader finds in them."""

from __future__ import annotations

from html.parser import HTMLParser
from itertools import pairwise
from typing import Any, cast

import yaml
from huggingface_hub import DatasetCard
from markdown_it import MarkdownIt

from sqsd_filter.pipeline.report import Report
from sqsd_filter.pipeline.writing import card as cards
from tests.corpora import FOLDERS

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
        {"path": f"{folder}/train-00000-of-00001.parquet", "config": name, "split": "train", "rows": n, "sha256": name}
        for (name, n), folder in zip(ROWS.items(), FOLDERS.values(), strict=True)
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


def headings(markdown: str) -> list[tuple[int, str]]:
    pairs = pairwise(MarkdownIt("commonmark").enable("table").parse(markdown))
    return [(int(head.tag[1]), words.content) for head, words in pairs if head.type == "heading_open"]
