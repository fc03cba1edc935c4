"""One Arrow schema for inputs that have different ones, without changing a value."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from sqsd_filter.corpus.json_schema import unify, without_nulls
from sqsd_filter.errors import InputError


def merge_schemas(inputs: Sequence[tuple[str, pa.Schema]]) -> pa.Schema:
    """The schema that holds the rows of all inputs, given as names and schemas.

    Raises `InputError` for a column that would have to change values of one of them.
    """
    fields: dict[str, pa.Field] = {}
    features: dict[str, Any] = {}  # a Hugging Face feature is kept if all inputs with its column agree on it
    origin: dict[str, str] = {}
    for path, schema in inputs:
        own = _features(schema)
        for field in schema:
            name = field.name
            if name not in fields:
                fields[name], features[name], origin[name] = field, own.get(name), path
                continue
            both = unify(fields[name], field)
            known, feature = features[name], own.get(name)
            relabelled = known != feature and "ClassLabel" in str(known) and "ClassLabel" in str(feature)
            if both is None or relabelled:
                kinds = "other labels" if relabelled else f"{fields[name].type} and {field.type}"
                raise InputError(
                    f"Column {name!r} of {origin[name]} and of {path} can't be one column without changing values "
                    f"({kinds}); filter the two apart, or convert one."
                )
            fields[name] = both
            features[name] = feature if feature == known else None
    schemas = [schema for _, schema in inputs]
    merged = [
        without_nulls(field if all(name in schema.names for schema in schemas) else field.with_nullable(True))
        for name, field in fields.items()
    ]
    agreed = {name: feature for name, feature in features.items() if feature is not None}
    metadata = {"huggingface": json.dumps({"info": {"features": agreed}})} if agreed else None
    return pa.schema(merged, metadata=metadata)


def _features(schema: pa.Schema) -> dict[str, Any]:
    stored = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    features: dict[str, Any] = (stored.get("info") or {}).get("features") or {}
    return features


def conform(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """The table under the corpus's schema: its own buffers, except for columns that are widened or missing.

    Raises `InputError` for a value that the wider type can't hold: a time far from now in nanoseconds.
    """
    columns = []
    for field in schema:
        if field.name not in table.column_names:
            columns.append(pa.nulls(table.num_rows, field.type))
        else:
            column = table.column(field.name)
            columns.append(column if column.type == field.type else _widened(column, field))
    return pa.Table.from_arrays(columns, schema=schema)


def _widened(column: pa.ChunkedArray, field: pa.Field) -> pa.ChunkedArray:
    try:
        return column.cast(field.type)
    except pa.ArrowInvalid as problem:
        raise InputError(
            f"Column {field.name!r} has another type in other inputs, and a value that {field.type} can't hold "
            f"({problem}): convert the inputs to one type."
        ) from problem


def plain_schema(schema: pa.Schema) -> pa.Schema:
    """The schema in which text and bytes have their plain types in place of views, which most of Arrow can't filter."""
    fields = [field.with_type(_without_views(field.type)) for field in schema]
    return pa.schema(fields, schema.metadata)


def _without_views(kind: pa.DataType) -> pa.DataType:
    is_ = pa.types
    if is_.is_string_view(kind):
        return pa.string()
    if is_.is_binary_view(kind):
        return pa.binary()
    if is_.is_struct(kind):
        return pa.struct([field.with_type(_without_views(field.type)) for field in kind])
    if is_.is_list(kind):
        return pa.list_(kind.value_field.with_type(_without_views(kind.value_type)))
    if is_.is_large_list(kind):
        return pa.large_list(kind.value_field.with_type(_without_views(kind.value_type)))
    return kind


def has_list_view(kind: pa.DataType) -> bool:
    """Is it a view of lists, which `datasets` can't read and pyarrow 26 casts wrongly, or is there one inside?"""
    if pa.types.is_list_view(kind) or pa.types.is_large_list_view(kind):
        return True
    return any(has_list_view(kind.field(k).type) for k in range(kind.num_fields))
