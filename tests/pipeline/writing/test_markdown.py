"""Markdown that stays what it is: names of any kind, and pages of others inside a page of ours."""

from __future__ import annotations

import re
from typing import Any

from hypothesis import example, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from sqsd_filter.pipeline.writing.markdown import code, demoted, fenced, table

PARSER = MarkdownIt("commonmark").enable("table")
PIECES = ["#", "# ", "=", "-", "---\n", "`", "```", "~~~~", ">", "> ", "- ", "    ", "|", "a", " ", "\n"]
HTML = ["<!--", "-->", "<pre>", "</pre>", "<Script ", "</script>", "<?", "?>", "<!a", "<![CDATA[", "]]>", "<textarea\n"]
ENDS = re.compile(r"(\s|-->|</\w+>|\?>|]]>|>)*$")
LEAVES = ("inline", "fence", "code_block", "html_block")


def blocks(markdown: str) -> list[tuple[str, str]]:
    """Every block with its words, whatever its heading's level; of raw HTML without what ends it."""
    leaves = [(token.type, " ".join(token.content.split())) for token in PARSER.parse(markdown) if token.type in LEAVES]
    return [(kind, ENDS.sub("", words) if kind == "html_block" else words) for kind, words in leaves]


def top_levels(markdown: str) -> list[int]:
    return [int(t.tag[1]) for t in PARSER.parse(markdown) if t.type == "heading_open" and not t.level]


@settings(max_examples=300, deadline=None)
@given(page=st.lists(st.sampled_from(PIECES + HTML), max_size=25).map("".join))
@example(page="|\n---\n---\n")
@example(page="a #\n=")
def test_only_the_levels_of_headings_change_and_nothing_is_left_open(page: str) -> None:
    lower = demoted(page)
    assert top_levels(lower) == [min(6, level + 2) for level in top_levels(page)]
    assert top_levels(f"{lower}\n\n## what follows")[-1:] == [2]
    assert blocks(lower) == blocks(page)


def test_what_is_left_open_is_closed_as_it_was_opened() -> None:
    assert demoted("# a\n~~~~\n# b\n~~~") == "### a\n~~~~\n# b\n~~~\n~~~~"
    for start, end in [
        ("<!-- b", "-->"),
        ("<pre>", "</pre>"),
        ("<SCRIPT src=''>\n\n# b -->", "</script>"),
        ("  <style>", "</style>"),
        ("<textarea", "</textarea>"),
        ("<?b >", "?>"),
        ("<![CDATA[ b >", "]]>"),
        ("<!DOCTYPE", ">"),
    ]:
        assert demoted(f"a\n\n{start}") == f"a\n\n{start}\n{end}"


def test_plain_names_are_plain_code() -> None:
    for name in ("sqsd_risk", 'load_dataset(path, "x")', "größe", "a*b_c[d]<e>"):
        assert code(name) == f"`{name}`"
    assert code("a|b\n") == "<code>a&#124;b&#92;n</code>"


@given(cells=st.lists(st.text(st.characters() | st.sampled_from("|`\\\n"), max_size=8), min_size=2, max_size=2))
def test_a_table_of_names_has_its_cells(cells: list[str]) -> None:
    tokens: list[Any] = PARSER.parse(table(["a", ":b"], [[code(cell) for cell in cells]]))
    body = tokens[[token.type for token in tokens].index("tbody_open") :]
    assert [token.type for token in body].count("td_open") == 2
    assert tokens[-1].type == "table_close"


@given(text=st.text("`~ab \n", max_size=30))
def test_a_code_block_has_its_lines(text: str) -> None:
    [block] = PARSER.parse(fenced(text, "sh"))
    assert block.content == f"{text}\n"
