"""Rows as lines of JSON with exact values, and members that are added at the end of an existing line, all of whose
other bytes stay.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping
from datetime import date, time
from decimal import Decimal

import pyarrow as pa

from sqsd_filter.corpus.json_schema import to_rows
from sqsd_filter.corpus.table_formats import UNDECODABLE
from sqsd_filter.errors import InputError

_HELD = (  # types that JSON holds, beside nested ones and times
    pa.types.is_null,
    pa.types.is_boolean,
    pa.types.is_integer,
    pa.types.is_floating,
    pa.types.is_decimal,
    pa.types.is_string,
    pa.types.is_large_string,
    pa.types.is_string_view,
    pa.types.is_date,
    pa.types.is_timestamp,
)
_SPACE = b" \t\r\n"
_SPACES = re.compile(r"[ \t\r\n]*")
_DECODER = json.JSONDecoder()


def has_form(kind: pa.DataType) -> bool:
    """Can JSON hold every value of this type exactly, some of them as text?"""
    types = pa.types
    if types.is_dictionary(kind):
        return has_form(kind.value_type)
    if types.is_nested(kind):
        return all(has_form(kind.field(k).type) for k in range(kind.num_fields))
    if types.is_time(kind):
        return bool(kind != pa.time64("ns"))
    return isinstance(kind, pa.JsonType) or any(holds(kind) for holds in _HELD)


def lines(table: pa.Table) -> list[bytes]:
    """Each row as a line: dates and times as ISO text, decimals as text, and values stored as JSON unchanged.

    Raises `InputError` for a value that Python can't represent.
    """
    try:
        return [dump(row) for row in to_rows(table)]
    except UNDECODABLE as problem:
        for name in table.column_names:
            try:
                table[name].to_pylist()
            except UNDECODABLE as reason:
                raise InputError(
                    f"Column {name!r} holds a value that can't be written as JSON ({reason}): use --to parquet."
                ) from problem
        raise


def dump(value: object) -> bytes:
    """A value as one line of JSON."""
    try:
        return json.dumps(value, ensure_ascii=False, default=_text).encode()
    except UnicodeEncodeError:  # a lone surrogate, which JSON can only escape
        return json.dumps(value, default=_text).encode()


def _text(value: Decimal | date | time) -> str:
    return str(value) if isinstance(value, Decimal) else value.isoformat()


def splice(line: bytes, members: Mapping[str, object], old: Collection[str] = ()) -> bytes:
    """The line, a JSON object, with these members at its end and without those of the `old` names."""
    end = line.rstrip(_SPACE)
    before = end[:-1].rstrip(_SPACE)
    kept = _without(before.decode(), old).encode() if old else before
    added = dump(dict(members))[1:-1]
    comma = b", " if added and not kept.endswith(b"{") else b""  # no value ends in this brace
    return kept + comma + added + line[len(before) :]


def _without(text: str, old: Collection[str]) -> str:
    """The text of an object, up to the end of its last value, without these members."""
    start = text.index("{") + 1
    return text[:start] + ",".join(member for name, member in _members(text, start) if name not in old)


def _members(text: str, at: int) -> Iterator[tuple[str, str]]:
    """The name of each member from here to the end, and its text from one comma to the next."""
    while at < len(text):
        name, end = _DECODER.raw_decode(text, _after_spaces(text, at))
        colon = _after_spaces(text, end)
        _, end = _DECODER.raw_decode(text, _after_spaces(text, colon + 1))
        end = _after_spaces(text, end)
        yield name, text[at:end]
        at = end + 1


def _after_spaces(text: str, at: int) -> int:
    spaces = _SPACES.match(text, at)
    assert spaces is not None  # it matches no spaces, too
    return spaces.end()
