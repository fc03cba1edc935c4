"""Text that is not UTF-8, and other reasons why no line of a file is a row: recognised and named, with the cure."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Iterator
from itertools import chain

from sqsd_filter.errors import InputError

_UTF16 = {codecs.BOM_UTF16_LE: "utf-16-le", codecs.BOM_UTF16_BE: "utf-16-be"}
_UTF32 = {codecs.BOM_UTF32_LE: "UTF-32LE", codecs.BOM_UTF32_BE: "UTF-32BE"}


def encoding_of(head: bytes) -> str | None:
    """The encoding that the first four bytes of a file name, or show; None for UTF-8 and all that is like ASCII."""
    if head[:4] in _UTF32:
        return _UTF32[head[:4]]
    if head[:2] in _UTF16:
        return _UTF16[head[:2]]
    if len(head) == 4 and head.count(0) == 2:
        return {(0, 2): "UTF-16BE", (1, 3): "UTF-16LE"}.get((head.index(0), head.rindex(0)))
    return None


def as_utf8(name: object, blocks: Iterable[bytes]) -> Iterator[bytes]:
    """A file's bytes from its beginning, in UTF-8: UTF-16 with a byte order mark is decoded.

    Raises `InputError` for another encoding with bytes of zero.
    """
    stored = iter(blocks)
    head = b""
    for block in stored:
        head += block
        if len(head) >= 4:
            break
    encoding = encoding_of(head[:4])
    if encoding is None:
        yield from chain([head] if head else [], stored)
        return
    if encoding not in _UTF16.values():
        raise InputError(f"{name} is {encoding}: convert it with `iconv -f {encoding} -t UTF-8`.")
    decoder = codecs.getincrementaldecoder(encoding)("surrogatepass")
    try:
        for block in chain([head[2:]], stored):
            yield decoder.decode(block).encode("utf-8", "surrogatepass")
        decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        raise InputError(f"{name} is UTF-16, but not throughout ({error.reason}): write it again as UTF-8.") from error


def extra_data(text: str, at: int) -> str:
    """What is wrong with a line of JSON that goes on at position `at`, where its value has ended."""
    rest = text[at:]
    if not rest.lstrip().startswith("{"):
        return ""
    if "\r" in text[:at].rstrip(" ")[-1:] + rest[:1]:
        return "its rows end with CR alone: convert the line ends with `tr '\\r' '\\n'`"
    return "more than one object on the line: put each on its own, or name the file .json"


def cure(problem: str) -> str:
    """What the user can do about a line with this problem, as the end of a sentence; "" where that is not known."""
    if problem.startswith("not UTF-8"):
        return "; convert the file to UTF-8, from Windows-1252 for example with `iconv -f WINDOWS-1252 -t UTF-8`"
    if "new-line character seen" in problem:
        return "; its rows end with CR alone: convert the line ends with `tr '\\r' '\\n'`"
    if "enclosed in double quotes" in problem:
        return "; if an object goes over several lines, name the file .json; if it is printed Python, write it as JSON"
    return ""


def last_opened(lines: Iterable[bytes]) -> int:
    """Which of the lines, from 0, opens the quote that none of them closes."""
    inside, opened = False, 0
    for number, line in enumerate(lines):
        quotes = line.replace(b'""', b"").count(b'"')
        if quotes > inside:
            opened = number
        inside ^= bool(quotes % 2)
    return opened
