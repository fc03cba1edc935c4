"""Which reader opens a file: told by its name, and for .json by what is in it."""

from __future__ import annotations

import codecs
from itertools import islice

from sqsd_filter.corpus.files import File
from sqsd_filter.corpus.table_formats import ArrowFile, Parquet, Table
from sqsd_filter.corpus.text_formats import (
    COMPRESSED,
    Csv,
    JsonArray,
    JsonLines,
    TextFile,
    parse_line,
    split_lines,
)
from sqsd_filter.errors import InputError

Reader = TextFile | Table

TABLE_FORMATS = {".parquet": Parquet, ".arrow": ArrowFile}
TEXT_FORMATS = {".jsonl": JsonLines, ".ndjson": JsonLines, ".csv": Csv, ".tsv": Csv}
READABLE = ".jsonl, .ndjson, .json, .csv, .tsv (each also .gz or .zst), .parquet or .arrow"


def kind(file: File) -> str | None:
    """The suffix that says what the file holds; None where none does."""
    *before, last = ["", *file.suffixes]
    if last in TABLE_FORMATS:
        return last
    told = before[-1] if last in COMPRESSED and before else last
    return told if told in TEXT_FORMATS or told == ".json" else None


def open_file(file: File) -> Reader:
    """The reader for a file, by its name; a .json file's first bytes tell an array from JSON Lines."""
    told = kind(file)
    if told is None:
        raise InputError(f"{file} has no extension that says what it holds; readable are {READABLE}.")
    if told in TABLE_FORMATS:
        return TABLE_FORMATS[told](file)
    return TEXT_FORMATS[told](file) if told in TEXT_FORMATS else _open_json(file)


def _open_json(file: File) -> JsonArray | JsonLines:
    reader = JsonLines(file)
    first = b""
    for block in reader.blocks():
        first = (first + block).removeprefix(codecs.BOM_UTF8).lstrip()[:1]
        if first:
            break
    if first == b"[":
        return JsonArray(file)
    # JSON Lines have a whole object, unindented, on one of the first lines; an object spread over lines has not
    filled = (line.removeprefix(codecs.BOM_UTF8) for line in split_lines(reader.blocks()) if line.strip())
    lines = islice(filled, 1000)
    if first == b"{" and not any(line.startswith(b"{") and parse_line(line)[0] is not None for line in lines):
        raise InputError(
            f"{file} holds a single JSON object, not rows; save its rows as an array, or one to a line as .jsonl."
        )
    return reader
