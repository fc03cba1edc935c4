"""Which reader opens a path: told by its name, and for .json by what is in it."""

import codecs
import json
from itertools import islice
from pathlib import Path

from sqsd_filter.errors import InputError
from sqsd_filter.pipeline.reading.table_formats import Parquet, SavedDataset, Table
from sqsd_filter.pipeline.reading.text_formats import (
    COMPRESSED,
    Csv,
    JsonArray,
    JsonLines,
    TextFile,
    parse_line,
    split_lines,
)

TEXT_FORMATS = {".jsonl": JsonLines, ".ndjson": JsonLines, ".csv": Csv, ".tsv": Csv}
READABLE = ".jsonl, .ndjson, .json, .csv, .tsv (each also .gz or .zst), .parquet, or a folder from save_to_disk"


def open_source(path: Path) -> TextFile | Table:
    """The reader for a path, by its name; a .json file's first bytes tell an array from JSON Lines."""
    if path.is_dir():
        return _open_folder(path)
    kind = path.with_suffix("").suffix if path.suffix in COMPRESSED else path.suffix
    if path.suffix == ".parquet":
        return Parquet(path)
    if kind in TEXT_FORMATS:
        return TEXT_FORMATS[kind](path)
    if kind == ".json":
        return _open_json(path)
    raise InputError(f"{path} has no extension that says what it holds; readable are {READABLE}.")


def _open_folder(path: Path) -> SavedDataset:
    if (path / "state.json").exists():
        return SavedDataset(path)
    if (path / "sqsd" / "run.json").exists():
        raise InputError(
            f"{path} holds what was filtered before; name what to read of it: '{path}/data/kept-*.parquet'."
        )
    splits = path / "dataset_dict.json"
    if splits.exists():
        try:
            names = [str(name) for name in json.loads(splits.read_bytes())["splits"]]
            first = names[0]
        except (ValueError, LookupError, TypeError) as error:
            raise InputError(f"{splits} names no splits; save the dataset again.") from error
        raise InputError(f"{path} holds the splits {', '.join(names)}; name one of them: {path / first}.")
    raise InputError(f"{path} is a folder, but not one that save_to_disk left; name its files, as in '{path}/*.jsonl'.")


def _open_json(path: Path) -> JsonArray | JsonLines:
    file = JsonLines(path)
    first = b""
    for block in file.blocks():
        first = (first + block).removeprefix(codecs.BOM_UTF8).lstrip()[:1]
        if first:
            break
    if first == b"[":
        return JsonArray(path)
    # JSON Lines have a whole object, unindented, on one of the first lines; an object spread over lines has not
    filled = (line.removeprefix(codecs.BOM_UTF8) for line in split_lines(file.blocks()) if line.strip())
    lines = islice(filled, 1000)
    if first == b"{" and not any(line.startswith(b"{") and parse_line(line)[0] is not None for line in lines):
        raise InputError(
            f"{path} holds a single JSON object, not rows; save its rows as an array, or one to a line as .jsonl."
        )
    return file
