"""Which reader opens a file: decided by its name, and for .json by its content."""

from __future__ import annotations

import codecs
from itertools import islice

from sqsd_filter.corpus.compression import COMPRESSED
from sqsd_filter.corpus.files import SourceFile
from sqsd_filter.corpus.json_sequence import JsonSequence, is_sequence
from sqsd_filter.corpus.long_rows import split_lines
from sqsd_filter.corpus.table_formats import ArrowTable, ParquetTable, Table
from sqsd_filter.corpus.text_formats import Csv, JsonArray, JsonLines, TextFile, parse_line
from sqsd_filter.errors import InputError

Reader = TextFile | Table

TABLE_FORMATS = {".parquet": ParquetTable, ".arrow": ArrowTable}
TEXT_FORMATS = {".jsonl": JsonLines, ".ndjson": JsonLines, ".csv": Csv, ".tsv": Csv}
READABLE = ".jsonl, .ndjson, .json, .csv, .tsv (each also .gz or .zst), .parquet or .arrow"


def kind(file: SourceFile) -> str | None:
    """The suffix that names the file's format; None if no suffix does."""
    *before, last = ["", *file.suffixes]
    if last in TABLE_FORMATS:
        return last
    suffix = before[-1] if last in COMPRESSED and before else last
    return suffix if suffix in TEXT_FORMATS or suffix == ".json" else None


def open_file(file: SourceFile) -> Reader:
    """The reader for a file. Raises `InputError` for a name or a content that can't be read."""
    suffix = kind(file)
    if suffix is None:
        raise InputError(f"{file} has no extension that names its format: rename it; readable are {READABLE}.")
    if suffix in TABLE_FORMATS:
        return TABLE_FORMATS[suffix](file)
    return TEXT_FORMATS[suffix](file) if suffix in TEXT_FORMATS else _open_json(file)


def _open_json(file: SourceFile) -> JsonArray | JsonLines | JsonSequence:
    """The reader for a .json file: its beginning says whether it is an array, JSON Lines or objects in sequence."""
    reader = JsonLines(file)
    first = b""
    for block in reader.blocks():
        first = (first + block).removeprefix(codecs.BOM_UTF8).lstrip()[:1]
        if first:
            break
    if first == b"[":
        return JsonArray(file)
    # JSON Lines have a whole object, unindented, on one of the first lines; an object over many lines has not
    pieces = split_lines(reader.blocks(), reader.longest)
    filled = (line.removeprefix(codecs.BOM_UTF8) for line, _ in pieces if line.strip())
    lines = islice(filled, 1000)
    if first == b"{" and not any(line.startswith(b"{") and parse_line(line)[0] is not None for line in lines):
        if is_sequence(reader):
            return JsonSequence(file)
        raise InputError(
            f"{file} holds a single JSON object, not rows; save its rows as an array, or as .jsonl, one row per line."
        )
    return reader
