"""Corpora in text files: JSON Lines, JSON arrays and CSV, plain or compressed, as records with their line, byte offset
and bytes. A reader holds one block and one record in memory, never a file.
"""

from __future__ import annotations

import codecs
import csv
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any, ClassVar, NoReturn

from sqsd_filter.corpus.compression import COMPRESSED, decompress
from sqsd_filter.corpus.conversation import MAX_DEPTH
from sqsd_filter.corpus.encodings import as_utf8, cure, encoding_of, extra_data, last_opened
from sqsd_filter.corpus.files import SourceFile, unreadable
from sqsd_filter.corpus.long_rows import CUT_TO, SETTING, longest_row, split_lines, too_long
from sqsd_filter.errors import InputError

# offset of its first byte, line it starts on, value or None, why it is None, its bytes without the newline
Record = tuple[int, int, dict[str, Any] | None, str, bytes]
Absorb = Callable[[bytes], None]  # gets every byte read from disk, for hashing

BLOCK = 1 << 18
TOO_DEEP = f"nested deeper than {MAX_DEPTH} levels"
TOO_LONG_INT = "an integer of more than 4300 digits"


class InexactError(ValueError):
    """JSON that Python would read as something else."""


class LongRecordError(csv.Error):
    """A record of a CSV file that is too long to be read."""


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        raise InexactError(f"{next(name for name in names if names.count(name) > 1)!a} stands twice in one object")
    return value


def _finite(digits: str) -> float:
    number = float(digits)
    if math.isinf(number):
        raise InexactError("a number too large for a float")
    if not number and digits.lower().partition("e")[0].strip("-0."):
        raise InexactError("a number too small for a float")
    return number


_DECODER = json.JSONDecoder(object_pairs_hook=_once, parse_float=_finite)
_LENIENT = json.JSONDecoder(parse_int=lambda _: 0)  # only to find where a value ends


class TextFile:
    """A file read as records, from its start or from a mark: the (offset, line) where a record begins."""

    verbatim: ClassVar[bool] = False  # a record's bytes are a JSON line

    def __init__(self, file: SourceFile) -> None:
        self.file, self.name = file, file.name
        self.longest = longest_row()
        self.blank_lines = 0  # passed over since the start
        self._seekable: bool | None = None

    @property
    def seekable(self) -> bool:
        if self._seekable is None:
            self._seekable = self.file.compression not in COMPRESSED and encoding_of(self._head()) is None
        return self._seekable

    def _head(self) -> bytes:
        """The first four bytes."""
        try:
            with self.file.open() as opened:
                return opened.read(4)
        except OSError as error:
            raise unreadable(self.file, error) from error

    def records(self, mark: tuple[int, int] = (0, 1), absorb: Absorb | None = None) -> Iterator[Record]:
        raise NotImplementedError

    def blocks(self, offset: int = 0, absorb: Absorb | None = None) -> Iterator[bytes]:
        """The file's bytes from `offset` on, decompressed, in UTF-8."""
        try:
            with self.file.open() as opened:
                opened.seek(offset)
                stored = iter(lambda: opened.read(BLOCK), b"")
                plain = decompress(self.file, _tee(stored, absorb) if absorb else stored)
                yield from plain if offset else as_utf8(self.file, plain)
        except OSError as error:
            raise unreadable(self.file, error) from error


def _tee(blocks: Iterable[bytes], absorb: Absorb) -> Iterator[bytes]:
    for block in blocks:
        absorb(block)
        yield block


class JsonLines(TextFile):
    verbatim = True

    def records(self, mark: tuple[int, int] = (0, 1), absorb: Absorb | None = None) -> Iterator[Record]:
        offset, line = mark
        self.blank_lines = 0
        for raw, size in split_lines(self.blocks(offset, absorb), self.longest):
            if offset == 0:
                raw = raw.removeprefix(codecs.BOM_UTF8)
            if size > self.longest:
                yield offset, line, None, too_long(self.longest), raw
            elif raw and not raw.isspace():
                value, problem = parse_line(raw)
                yield offset, line, value, problem, raw
            else:
                self.blank_lines += 1
            offset += size + 1
            line += 1


def parse_line(raw: bytes) -> tuple[dict[str, Any] | None, str]:
    """The JSON object of one line and "", or None and the reason."""
    try:
        value = _DECODER.decode(raw.decode())
    except UnicodeDecodeError as error:
        return None, f"not UTF-8: byte {error.start + 1}"
    except json.JSONDecodeError as error:
        known = extra_data(error.doc, error.pos) if error.msg == "Extra data" else ""
        return None, f"not JSON: {known or f'{error.msg} at column {error.colno}'}"
    except RecursionError:
        return None, TOO_DEEP
    except InexactError as error:
        return None, str(error)
    except ValueError:
        return None, TOO_LONG_INT
    problem = unfit(value, raw)
    return (None, problem) if problem else (value, "")


def unfit(value: object, raw: bytes) -> str:
    """Why this JSON value with the text `raw` can't be a row; "" if it can."""
    if type(value) is not dict:
        return "not an object"
    if raw.count(b"[") + raw.count(b"{") > MAX_DEPTH and _too_deep(value):
        return TOO_DEEP
    if b"\\u0000" in raw and any("\0" in key for key in value):
        return "NUL in a column name"
    if b"\\ud" in raw or b"\\uD" in raw:
        for key, child in value.items():
            try:
                json.dumps([key, child], ensure_ascii=False).encode()
            except UnicodeEncodeError:
                return f"lone surrogate in {key!a}"
    return ""


def _too_deep(value: object) -> bool:
    level: list[Any] = [value]
    for _ in range(MAX_DEPTH):
        level = [
            child
            for parent in level
            for child in (parent.values() if isinstance(parent, dict) else parent)
            if isinstance(child, dict | list)
        ]
        if not level:
            return False
    return True


class JsonArray(TextFile):
    """The elements of one JSON array, decoded one at a time."""

    def records(self, mark: tuple[int, int] = (0, 1), absorb: Absorb | None = None) -> Iterator[Record]:
        offset, line = mark
        window = Window(self.name, self.blocks(offset, absorb), offset, line, self.longest)
        if offset == 0:
            window.next_char()
            window.advance()  # past the opening bracket
            if window.next_char() == "]":
                window.advance()
                window.expect_end()
                return
        while True:
            window.next_char()
            yield window.record()
            char = window.next_char()
            if char not in (",", "]"):
                window.fail("Expecting ',' or ']'")
            window.advance()
            if char == "]":
                window.expect_end()
                return
            window.row += 1


class Window:
    """The part of a JSON file being decoded: one block of text, or as many as its first value needs. `line` is the line
    that it has come to."""

    _space = re.compile(r"[ \t\n\r]*")
    _token = re.compile(r'"(?:[^"\\]|\\.)*"|[\[\]{}]', re.DOTALL)

    def __init__(self, name: str, blocks: Iterator[bytes], offset: int, line: int, longest: int) -> None:
        self.name, self.offset, self.line, self.row, self.longest = name, offset, line, 1, longest
        self.text, self.at = "", 0
        self._blocks = blocks
        self._decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        if offset == 0 and self.grow() and self.text.startswith("\ufeff"):
            self.advance(1, len(codecs.BOM_UTF8))

    def grow(self) -> bool:
        """Drop the decoded text and at least double the rest, so that a huge value takes linear time."""
        parts = [self.text[self.at :]]
        if len(parts[0]) > self.longest:
            self.fail(f"a value of more than {self.longest:,} characters ({SETTING})")
        wanted = max(len(parts[0]), 1)
        for block in self._blocks:
            parts.append(self._decoder.decode(block))
            wanted -= len(parts[-1])
            if wanted <= 0:
                break
        else:
            parts.append(self._decoder.decode(b"", final=True))
        self.text, self.at = "".join(parts), 0
        return len(self.text) > len(parts[0])

    def advance(self, characters: int = 1, size: int = 1) -> None:
        self.line += self.text.count("\n", self.at, self.at + characters)
        self.at += characters
        self.offset += size

    def next_char(self) -> str:
        """Move to the next character that is not white space; "" at the end of the file."""
        while True:
            match = self._space.match(self.text, self.at)
            spaces = match.end() - self.at if match else 0
            self.advance(spaces, spaces)
            if self.at < len(self.text):
                return self.text[self.at]
            if not self.grow():
                return ""

    def record(self) -> Record:
        """The value that begins here as a record. The window moves to its end."""
        offset, line = self.offset, self.line
        value, problem, text = self.value()
        try:
            raw = text.encode()
            problem = problem or unfit(value, raw)
        except UnicodeEncodeError:
            raw, problem = text.encode("utf-8", "surrogateescape"), "not UTF-8"
        self.advance(len(text), len(raw))
        return offset, line, None if problem else value, problem, raw

    def value(self) -> tuple[Any, str, str]:
        """The value that begins here, the reason why it can't be read (or ""), and its text."""
        problem, decoder = "", _DECODER
        while True:
            end: int | None
            try:
                value, end = decoder.raw_decode(self.text, self.at)
            except json.JSONDecodeError as error:
                # a value cut off by the window breaks near its end, or in a string that begins anywhere
                cut_off = error.pos > len(self.text) - 16 or error.msg.startswith("Unterminated string")
                if not (cut_off and self.grow()):
                    self.fail(error.msg)
                continue
            except RecursionError:
                value, end, problem = None, self._closing_bracket(), TOO_DEEP
            except ValueError as error:
                problem = str(error) if isinstance(error, InexactError) else TOO_LONG_INT
                decoder = _LENIENT
                continue
            if end is None:
                if not self.grow():
                    self.fail("Unterminated array or object")
                continue
            length = end - self.at
            if end < len(self.text) or not self.grow():
                return value, problem, self.text[self.at : self.at + length]

    def _closing_bracket(self) -> int | None:
        """Where the array or object that begins here ends; None if beyond this window."""
        depth = 0
        for token in self._token.finditer(self.text, self.at):
            depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(token.group(), 0)
            if depth == 0:
                return token.end()
        return None

    def expect_end(self) -> None:
        if self.next_char():
            self.fail("Extra data after the array")

    def fail(self, complaint: str) -> NoReturn:
        raise InputError(
            f"{self.name} is broken JSON: {complaint}, in or after element {self.row} at byte {self.offset} on line "
            f"{self.line}; repair it, or save the rows as JSON Lines, where a bad row loses only itself."
        )


class Csv(TextFile):
    """Records under a header row; every value stays a string."""

    def records(self, mark: tuple[int, int] = (0, 1), absorb: Absorb | None = None) -> Iterator[Record]:
        rows = self._rows(0, 1, absorb)
        header = self._header(next((row for row in rows if row[3] or row[-1].strip(b" \r")), None))
        if mark[0]:
            rows = self._rows(*mark, absorb)
        self.blank_lines = 0
        for offset, line, fields, problem, raw in rows:
            if not problem and not raw.strip(b" \r"):
                self.blank_lines += 1
                continue
            if fields and len(fields) != len(header):
                problem = f"{len(fields)} fields under a header of {len(header)}"
            yield offset, line, None if problem else dict(zip(header, fields, strict=True)), problem, raw

    def _header(self, row: tuple[int, int, list[str], str, bytes] | None) -> list[str]:
        if row is None:
            return []
        _, _, names, problem, _ = row
        if problem:
            fix = cure(problem) or "; correct its first line"
            raise InputError(f"{self.name} has an unreadable header row ({problem}){fix}.")
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise InputError(f"{self.name} has two columns named {twice[0]!r}; rename one in its first line.")
        return names

    def _rows(self, offset: int, line: int, absorb: Absorb | None) -> Iterator[tuple[int, int, list[str], str, bytes]]:
        csv.field_size_limit(max(csv.field_size_limit(), self.longest))
        lines = _CsvLines(split_lines(self.blocks(offset, absorb), self.longest), self.longest, at_start=offset == 0)
        # strict: a stray quote is an error; otherwise it would change the value
        reader = csv.reader(lines, delimiter="\t" if ".tsv" in self.file.suffixes else ",", strict=True)
        while True:
            lines.begin()
            fields: list[str] = []
            problem = ""
            try:
                fields = next(reader)
            except StopIteration:
                return
            except LongRecordError as error:
                problem = str(error)
            except csv.Error as error:
                if "unexpected end of data" in str(error):
                    opened = line + last_opened(lines.taken)
                    raise InputError(
                        f"{self.name} has a quote that is never closed: it opens on line {opened}; "
                        "close it, or write two quotes for one in the text."
                    ) from error
                problem = f"not CSV: {error}"
            raw = b"\n".join(lines.taken)
            try:
                raw.decode()
            except UnicodeDecodeError as error:
                problem = problem or f"not UTF-8: byte {error.start + 1}"
            yield offset, line, fields, problem, raw
            offset += lines.size
            line += lines.count


class _CsvLines:
    """Lines for Python's CSV reader, with those that it took for the record that it reads. It can go on after an error,
    which a generator can't."""

    def __init__(self, lines: Iterator[tuple[bytes, int]], longest: int, *, at_start: bool) -> None:
        self._lines, self._longest, self._at_start = lines, longest, at_start
        self.begin()

    def begin(self) -> None:
        """The next line begins a record."""
        self.taken: list[bytes] = []
        self.count = self.size = 0  # of its lines, and their bytes with the newlines

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        raw, size = next(self._lines)
        self.taken.append(raw)
        self.count += 1
        self.size += size + 1
        if self.size > self._longest + 1:
            self.taken = [b"\n".join(self.taken)[:CUT_TO]]
            raise LongRecordError(too_long(self._longest))
        start = self._at_start and raw.startswith(codecs.BOM_UTF8)
        self._at_start = False
        return raw[3 * start :].decode("utf-8", "surrogateescape") + "\n"
