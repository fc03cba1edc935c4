"""Markdown that stays what it is, whatever names, values and pages of others it holds."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from markdown_it import MarkdownIt

MARKUP = set("`|\\")  # what inline code in a table cell can't hold as it is
HTML_ENDS = {
    **{f"<{tag}": f"</{tag}>" for tag in ("pre", "script", "style", "textarea")},
    "<!--": "-->",
    "<![cdata[": "]]>",
    "<?": "?>",
    "<!": ">",
}  # of blocks of HTML that go on past an empty line


def code(text: str) -> str:
    """The text as inline code on one line, in a table too; what can't be printed is shown as its escape."""
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    if shown and shown == shown.strip() and not MARKUP & set(shown):
        return f"`{shown}`"
    return f"<code>{''.join(c if c.isalnum() or c == ' ' else f'&#{ord(c)};' for c in shown)}</code>"


def fenced(text: str, language: str) -> str:
    """The text as a code block, its lines as they are."""
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text}\n{fence}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Cells of Markdown, each in one line; columns whose head begins with a colon are numbers, set to the right."""
    ruler = ["---:" if name.startswith(":") else "---" for name in head]
    lines = [[name.removeprefix(":") for name in head], ruler, *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def demoted(page: str, levels: int = 2) -> str:
    """The page with its headings so many levels lower (6 is the lowest), so that it can be a section of another.

    Line ends are to be \\n. A block of code or HTML left open is closed, so that it doesn't swallow what follows.
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
            end_mark = " #" * title.endswith("#")  # the last of them isn't shown
            lines[start:end] = [f"{mark} {title}{end_mark}", ""]  # the line below must not make it a table
    last = blocks[-1]
    if last.type == "heading_close":
        return "\n".join(lines)
    opening = last.content.lstrip().lower()
    lines.append(last.markup or next(end for start, end in HTML_ENDS.items() if opening.startswith(start)))
    return "\n".join(lines)
