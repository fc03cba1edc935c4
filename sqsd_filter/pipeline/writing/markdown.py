"""Markdown in which names, values and other people's pages can't break the layout."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from markdown_it import MarkdownIt

from sqsd_filter.wording import printable

MARKUP = set("`|\\")  # characters that inline code in a table cell must escape
HTML_ENDS = {
    **{f"<{tag}": f"</{tag}>" for tag in ("pre", "script", "style", "textarea")},
    "<!--": "-->",
    "<![cdata[": "]]>",
    "<?": "?>",
    "<!": ">",
}  # by their starts, the ends of HTML blocks that an empty line does not end


def code(text: str) -> str:
    """The text as inline code on one line, also in a table; characters that can't be printed are shown as escapes."""
    shown = printable(text)
    if shown and shown == shown.strip() and not MARKUP & set(shown):
        return f"`{shown}`"
    return f"<code>{''.join(c if c.isalnum() or c == ' ' else f'&#{ord(c)};' for c in shown)}</code>"


def fenced(text: str, language: str) -> str:
    """The text as a code block, with its lines; other characters that can't be printed are shown as escapes."""
    text = printable(text, keep="\n\t")
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text}\n{fence}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of Markdown cells, each of one line; columns whose head begins with a colon are aligned to the right."""
    ruler = ["---:" if name.startswith(":") else "---" for name in head]
    lines = [[name.removeprefix(":") for name in head], ruler, *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def demoted(page: str, levels: int = 2) -> str:
    """The page with its headings `levels` lower (6 is the lowest), so that it can be a section of another page.

    Its lines must end with \\n. A block of code or HTML that is left open is closed, so that it can't swallow the text
    after it.
    """
    lines = page.split("\n")
    blocks = MarkdownIt("commonmark").enable("table").parse(f"{page}\n\n# what follows")
    for block in reversed(blocks):  # from the end, so that the lines before keep their numbers
        start, end = block.map or (0, 0)
        if block.type != "heading_open" or block.level or start > len(lines):
            continue
        mark = "#" * min(6, int(block.tag[1:]) + levels)
        if block.markup[0] == "#":
            lines[start] = mark + lines[start].strip().removeprefix(block.markup)
        else:  # underlined
            title = " ".join(line.strip() for line in lines[start : end - 1])
            end_mark = " #" * title.endswith("#")  # the last # of a heading is not shown
            lines[start:end] = [f"{mark} {title}{end_mark}", ""]  # else the line below could make it a table
    last = blocks[-1]
    if last.type == "heading_close":
        return "\n".join(lines)
    opening = last.content.lstrip().lower()
    lines.append(last.markup or next(end for start, end in HTML_ENDS.items() if opening.startswith(start)))
    return "\n".join(lines)
