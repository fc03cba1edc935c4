"""From JSON values to Arrow columns and back, exactly: the types that hold every value unchanged. Values that no single
Arrow type can hold (7 beside "7", dicts whose keys differ, 2**70) are stored as JSON in a string.

Dicts with the same keys in another order are one struct, in the order of the first: messages that mix role, content
with content, role stay messages, which is worth more than the order of keys inside a value.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from decimal import Decimal
from functools import cache
from typing import Any

import pyarrow as pa

Values = list[Any]
Encoder = Callable[[Any], Any]

# A plain string field with this metadata holds JSON text: values that `datasets.Json`, which decodes with pandas'
# ujson, would change (integers past 64 bits, non-finite or extreme floats).
JSON_TEXT = {"encoding": "json"}
EXACT_IN_DOUBLE = 2**53
MAX_TYPE_DEPTH = 16  # parquet readers fail at 100 levels, and a list of dicts takes three


class Shape:
    """The types seen at one position in the rows: grows with `see`, and gives the Arrow field that holds all values.

    A dict becomes a struct only while all dicts at its position have the same keys: in a struct a missing key and a
    null are the same. Differing keys, mixed types (also int beside float), empty dicts and deep nesting make the
    position JSON. From then on only `lossless` is tracked, so an open-ended map takes no memory.
    """

    __slots__ = ("depth", "fields", "high", "item", "kind", "lossless", "low", "numeric")

    def __init__(self, depth: int = 0) -> None:
        self.depth = depth
        self.kind: type | None = None  # NoneType stays None; `object` is a mixture
        self.fields: dict[str, Shape] = {}
        self.item: Shape | None = None
        self.low = self.high = 0
        self.numeric = True  # a mixture of int and float only
        self.lossless = True  # `datasets.Json` decodes every value seen exactly

    def see(self, value: Any) -> None:  # noqa: ANN401  # any JSON; narrowed by `kind`, which is faster than isinstance
        kind = type(value)
        if kind is not self.kind:
            if value is None:
                return
            if self.kind is None:
                self.kind = kind
                if kind in (dict, list) and self.depth == MAX_TYPE_DEPTH:
                    self._mix()
                elif kind is dict and any("\0" in key for key in value):
                    self._mix()  # Arrow cuts field names at a NUL
                elif kind is dict:
                    self.fields = {key: Shape(self.depth + 1) for key in value}
                elif kind is list:
                    self.item = Shape(self.depth + 1)
            elif self.kind is not object:
                self._mix()
        if self.kind is str:
            return
        if kind is int and (value > self.high or value < self.low):
            self.low, self.high = min(self.low, value), max(self.high, value)
        if self.kind is dict:
            fields = self.fields
            if not value or value.keys() != fields.keys():
                self._mix()
            else:
                for key, child in value.items():
                    shape = fields[key]
                    if type(child) is not str or shape.kind is not str:
                        shape.see(child)
                return
        elif self.kind is list:
            assert self.item is not None
            for child in value:
                self.item.see(child)
            return
        self.numeric = self.numeric and kind in (int, float)
        self.lossless = self.lossless and _json_is_lossless(value)

    def _mix(self) -> None:
        children = [*self.fields.values(), *([self.item] if self.item else [])]
        self.numeric = self.kind in (int, float)
        self.lossless = self.lossless and all(child.all_lossless() for child in children)
        self.kind, self.fields, self.item = object, {}, None

    def all_lossless(self) -> bool:
        """Does `datasets.Json` decode every value seen here and below exactly?"""
        children = [*self.fields.values(), *([self.item] if self.item else [])]
        return self.lossless and all(child.all_lossless() for child in children)

    def field(self, name: str) -> pa.Field:
        """The Arrow field that holds every value seen; of type null if there was none."""
        if self.kind is dict:
            return pa.field(name, pa.struct([shape.field(key) for key, shape in self.fields.items()]))
        if self.kind is list:
            assert self.item is not None
            item = self.item.field("item")
            if pa.types.is_list(item.type) and _storage(item.type) != item.type:
                # for a list in a list, `datasets` checks only the first value for JSON to decode
                item = self.item.as_json_field("item")
            return pa.field(name, pa.list_(item))
        if self.kind is int and self.low >= -(2**63) and self.high < 2**63:
            return pa.field(name, pa.int64())
        if self.kind is int and self.low >= 0 and self.high < 2**64:
            return pa.field(name, pa.uint64())
        if self.kind in _LEAVES:
            return pa.field(name, _LEAVES[self.kind])
        if self.numeric and self.kind is object and not self.lossless and max(-self.low, self.high) <= EXACT_IN_DOUBLE:
            return pa.field(name, pa.float64())  # equal numbers, at least: 1 comes back as 1.0
        return self.as_json_field(name)

    def as_json_field(self, name: str) -> pa.Field:
        """The field that holds every value as JSON."""
        if self.all_lossless():
            return pa.field(name, pa.json_())
        return pa.field(name, pa.string(), metadata=JSON_TEXT)


_LEAVES = {None: pa.null(), str: pa.string(), bool: pa.bool_(), float: pa.float64()}


def _json_is_lossless(value: object) -> bool:
    """Does pandas' ujson read this value's JSON back exactly, given the spelling that `dumps` chooses?"""
    if isinstance(value, float):
        return value == 0 or 1e-6 <= abs(value) < 1e15
    if isinstance(value, int):
        return -(2**63) <= value < 2**64
    if isinstance(value, dict):
        return all(_json_is_lossless(child) for child in value.values())
    if isinstance(value, list):
        return all(_json_is_lossless(child) for child in value)
    return True


def is_json_text(field: pa.Field) -> bool:
    return bool((field.metadata or {}).get(b"encoding") == b"json")


def with_marks(schema: pa.Schema, marked: pa.Schema) -> pa.Schema:
    """The schema of a dataset's features, which drop `JSON_TEXT`, with that metadata from one with the same columns."""
    pairs = [(field, marked.field(field.name)) for field in schema]
    fields = [field if mark.type != field.type else mark.with_nullable(field.nullable) for field, mark in pairs]
    return pa.schema(fields, schema.metadata)


def json_columns(schema: pa.Schema) -> list[str]:
    """The columns that store some values as JSON."""
    return [field.name for field in schema if _recode(field, str)]


def without_nulls(field: pa.Field) -> pa.Field:
    """The field with string in place of every null type: casts of null-typed children are broken in pyarrow 26."""
    kind = field.type
    if pa.types.is_null(kind):
        return field.with_type(pa.string())
    if pa.types.is_struct(kind):
        return field.with_type(pa.struct([without_nulls(child) for child in kind]))
    if pa.types.is_list(kind):
        return field.with_type(pa.list_(without_nulls(kind.value_field)))
    return field


def unify(a: pa.Field, b: pa.Field) -> pa.Field | None:
    """The field that holds the values of both without changing any; None if there is no such field."""
    if a.equals(b, check_metadata=True) or pa.types.is_null(b.type):
        return a.with_nullable(a.nullable or b.nullable)
    if pa.types.is_null(a.type):
        return b.with_nullable(True)
    if is_json_text(a) != is_json_text(b):
        return None
    kind = _unify_types(a.type, b.type)
    return None if kind is None else a.with_type(kind).with_nullable(a.nullable or b.nullable)


def _unify_types(a: pa.DataType, b: pa.DataType) -> pa.DataType | None:
    is_ = pa.types
    if is_.is_struct(a) and is_.is_struct(b):
        theirs = {field.name: field for field in b}
        fields = [unify(field, theirs.pop(field.name, pa.field(field.name, pa.null()))) for field in a]
        fields += [field.with_nullable(True) for field in theirs.values()]
        return None if any(field is None for field in fields) else pa.struct(fields)
    if _is_list(a) and _is_list(b):
        item = unify(a.value_field, b.value_field)
        make = pa.large_list if is_.is_large_list(a) or is_.is_large_list(b) else pa.list_
        return None if item is None else make(item)
    if a == b:
        return a
    if is_.is_integer(a) and is_.is_integer(b):
        small, wide = sorted((a, b), key=lambda kind: (kind.bit_width, is_.is_signed_integer(kind)))
        unsigned_fits = small.bit_width < wide.bit_width and is_.is_signed_integer(wide)
        return wide if unsigned_fits or is_.is_signed_integer(small) == is_.is_signed_integer(wide) else None
    if is_.is_floating(a) and is_.is_floating(b):
        return max(a, b, key=lambda kind: kind.bit_width)
    for narrow, large in ((pa.string(), pa.large_string()), (pa.binary(), pa.large_binary())):
        if {a, b} == {narrow, large}:
            return large
    if is_.is_dictionary(a) or is_.is_dictionary(b):
        return _unify_types(*(kind.value_type if is_.is_dictionary(kind) else kind for kind in (a, b)))
    if is_.is_decimal(a) and is_.is_decimal(b):
        return _decimal(a, b)
    if is_.is_date(a) and is_.is_date(b):
        return pa.date64()
    for timed in (is_.is_timestamp, is_.is_duration):
        if timed(a) and timed(b) and getattr(a, "tz", None) == getattr(b, "tz", None):
            return max(a, b, key=lambda kind: _UNITS.index(kind.unit))
    return None


_UNITS = ("s", "ms", "us", "ns")


def _decimal(a: pa.DataType, b: pa.DataType) -> pa.DataType | None:
    """The type for the digits of both before and after the point, if there is one."""
    scale = max(a.scale, b.scale)
    digits = max(a.precision - a.scale, b.precision - b.scale) + scale
    make = pa.decimal128 if digits <= 38 else pa.decimal256
    return make(digits, scale) if digits <= 76 else None


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind))


def with_features(schema: pa.Schema) -> pa.Schema:
    """The schema with the metadata by which `datasets` restores its Json features; unchanged if it has none."""
    if not any(_recode(field, str) for field in schema):
        return schema
    features = {field.name: feature(field.type) for field in schema}
    return schema.with_metadata({"huggingface": json.dumps({"info": {"features": features}})})


def feature(kind: pa.DataType) -> dict[str, Any]:
    """A type as `datasets` writes it in a schema's metadata."""
    if pa.types.is_struct(kind):
        return {field.name: feature(field.type) for field in kind}
    if pa.types.is_list(kind):
        return {"feature": feature(kind.value_type), "_type": "List"}
    if pa.types.is_fixed_size_list(kind):
        return {"feature": feature(kind.value_type), "length": kind.list_size, "_type": "List"}
    if isinstance(kind, pa.JsonType):
        return {"_type": "Json"}
    return {"dtype": {"double": "float64", "float": "float32"}.get(str(kind), str(kind)), "_type": "Value"}


def to_table(rows: Sequence[dict[str, Any] | None], schema: pa.Schema) -> pa.Table:
    """The rows under the schema; a row that is None and a missing column are null."""
    if not schema.names:
        return bare_rows(len(rows))
    columns = []
    for field in schema:
        values: Values = [None if row is None else row.get(field.name) for row in rows]
        if encode := _recode(field, dumps):
            values = [None if value is None else encode(value) for value in values]
            # pyarrow builds no nested extension arrays, but casts to them
            columns.append(pa.array(values, type=_storage(field.type)).cast(field.type))
        else:
            columns.append(pa.array(values, type=field.type))
    return pa.Table.from_arrays(columns, schema=schema)


def bare_rows(n: int) -> pa.Table:
    """A table of n rows without columns."""
    return pa.table({"": pa.nulls(n)}).select([])


def to_rows(table: pa.Table) -> Iterator[dict[str, Any]]:
    """The table's rows as Python values, with JSON decoded."""
    decoders = {field.name: decode for field in table.schema if (decode := _recode(field, _loads))}
    for row in table.to_pylist():
        for name, decode in decoders.items():
            if row[name] is not None:
                row[name] = decode(row[name])
        yield row


def _recode(field: pa.Field, leaf: Encoder) -> Encoder | None:
    """A function that applies `leaf` to the parts of a value of this field that are JSON; None if none are."""
    kind = field.type
    if is_json_text(field) or isinstance(kind, pa.JsonType):
        return leaf
    if _is_list(kind) and (item := _recode(kind.value_field, leaf)):
        return lambda values: [None if value is None else item(value) for value in values]
    if pa.types.is_struct(kind):
        fields = {child.name: recode for child in kind if (recode := _recode(child, leaf))}
        if fields:
            return lambda value: (
                value | {name: recode(value[name]) for name, recode in fields.items() if value.get(name) is not None}
            )
    return None


def _storage(kind: pa.DataType) -> pa.DataType:
    if isinstance(kind, pa.JsonType):
        return kind.storage_type
    if pa.types.is_struct(kind):
        return pa.struct([field.with_type(_storage(field.type)) for field in kind])
    if pa.types.is_large_list(kind):
        return pa.large_list(kind.value_field.with_type(_storage(kind.value_type)))
    if pa.types.is_list(kind):
        return pa.list_(kind.value_field.with_type(_storage(kind.value_type)))
    return kind


def _loads(text: str) -> object:
    try:
        return json.loads(text)
    except ValueError:  # another writer's column: `datasets` keeps such text, too
        return text


def dumps(value: object) -> str:
    """JSON that every exact parser and pandas' ujson read as exactly this value.

    ujson multiplies by powers of ten and so reads "0.3" as 0.30000000000000004, but "30000000000000e-14" correctly.
    Each float gets the first spelling that ujson reads exactly.
    """
    text = json.dumps(value, ensure_ascii=False)
    if isinstance(value, float):
        return _spell(value, text)
    if not _has_float(value):
        return text
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key, ensure_ascii=False)}: {dumps(x)}" for key, x in value.items()) + "}"
    assert isinstance(value, list)
    return "[" + ", ".join(dumps(x) for x in value) + "]"


def _has_float(value: object) -> bool:
    if isinstance(value, dict):
        value = list(value.values())
    return isinstance(value, float) or (isinstance(value, list) and any(_has_float(x) for x in value))


def _spell(number: float, text: str) -> str:
    if number.is_integer() or not _json_is_lossless(number):
        return text
    spellings = (text, *(f"{Decimal(text).scaleb(-power):f}e{power}" for power in range(-15, 16)))
    return next((spelling for spelling in spellings if _ujson_loads()(spelling) == number), text)


@cache
def _ujson_loads() -> Callable[[str], Any]:
    from pandas.io.json import ujson_loads  # what `datasets.Json` decodes with

    loads: Callable[[str], Any] = ujson_loads
    return loads
