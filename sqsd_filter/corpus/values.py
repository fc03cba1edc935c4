"""Values as rows hold them: what counts as missing, JSON or printed Python in text, and plain JSON types."""

from __future__ import annotations

import ast
import json
import math
from collections.abc import Mapping
from typing import Any

MAX_DEPTH = 200  # levels in a row; far below Python's recursion limit, whose reach depends on version and caller
MAX_PRINTED = 1 << 20  # characters of printed Python that are parsed: each takes about 100 bytes of memory


def is_missing(value: object) -> bool:
    """Is there no value? Null, NaN, blank text, the texts "null" and "NaN", an empty list or object mean none."""
    if isinstance(value, str):
        return not value or value.isspace() or (len(value) < 100 and value.strip().lower() in ("null", "nan"))
    return is_null(value) or (isinstance(value, list | tuple | Mapping) and not value)


def is_null(value: object) -> bool:
    """Is it null or NaN, as tables have it where a value is missing?"""
    return value is None or (isinstance(value, float) and math.isnan(value))


def as_flag(value: object) -> bool | None:
    """True or false, also as text, which CSV has; None for anything else."""
    if isinstance(value, str):
        return {"true": True, "false": False}.get(value.strip().lower())
    return value if isinstance(value, bool) else None


def parse_if_json(value: object) -> Any:  # noqa: ANN401  # JSON: callers check what they need
    """The value of JSON text; any other value, and text that is not JSON, stays the same."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def parse_text(value: object) -> Any:  # noqa: ANN401  # JSON: callers check what they need
    """The value of JSON text, or of a list or an object that Python has printed; any other value stays the same."""
    parsed = parse_if_json(value)
    if not isinstance(value, str) or parsed is not value or not looks_printed(value):
        return parsed
    try:
        return as_json(ast.literal_eval(value.strip()), nulls=True)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return value


def looks_printed(value: object) -> bool:
    """Does it look like text that Python has printed for a list of objects, or for one?"""
    if not isinstance(value, str) or len(value) > MAX_PRINTED:
        return False
    return "".join(value[:100].split()).startswith(("[{'", "{'", "[['", "array([{'"))


def as_json(value: object, nulls: bool, depth: int = 0) -> object:
    """The value in JSON's types, without keys that are null unless `nulls` are kept. Raises `TypeError`."""
    if depth > MAX_DEPTH:
        raise TypeError("something nested too deeply")
    if isinstance(value, Mapping):
        return {str(key): as_json(item, nulls, depth + 1) for key, item in value.items() if nulls or item is not None}
    if isinstance(value, list | tuple):
        return [as_json(item, nulls, depth + 1) for item in value]
    if value is None or isinstance(value, str | int | float):
        return value
    raise TypeError(type(value).__name__)
