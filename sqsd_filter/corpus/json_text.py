"""Values without a common type as plain text of JSON, for readers that do not know Arrow's type for JSON."""

from __future__ import annotations

import json
from typing import Any

import pyarrow as pa

from sqsd_filter.corpus.json_schema import JSON_TEXT, feature


def json_features(schema: pa.Schema) -> list[str]:
    """The columns with values of Arrow's type for JSON, which is the feature Json of `datasets`."""
    return [field.name for field in schema if _text_field(field) != field]


def json_as_text(table: pa.Table) -> pa.Table:
    """The table with plain text, marked as `JSON_TEXT`, in place of Arrow's type for JSON. The features of `datasets`
    in its metadata are changed alike, and left out if they say no more than the types do."""
    fields = [_text_field(field) for field in table.schema]
    columns = [
        column if column.type == field.type else column.cast(field.type)
        for column, field in zip(table.columns, fields, strict=True)
    ]
    metadata = dict(table.schema.metadata or {})
    if b"huggingface" in metadata:
        info = json.loads(metadata[b"huggingface"])
        features = _text_feature((info.get("info") or {}).get("features") or {})
        if features == {field.name: feature(field.type) for field in fields}:
            del metadata[b"huggingface"]
        elif info.get("info"):
            info["info"]["features"] = features
            metadata[b"huggingface"] = json.dumps(info).encode()
    return pa.Table.from_arrays(columns, schema=pa.schema(fields, metadata or None)) if fields else table


def _text_field(field: pa.Field) -> pa.Field:
    kind = field.type
    if isinstance(kind, pa.JsonType):
        return field.with_type(kind.storage_type).with_metadata({**(field.metadata or {}), **JSON_TEXT})
    if pa.types.is_struct(kind):
        return field.with_type(pa.struct([_text_field(child) for child in kind]))
    if pa.types.is_large_list(kind):
        return field.with_type(pa.large_list(_text_field(kind.value_field)))
    if pa.types.is_fixed_size_list(kind):
        return field.with_type(pa.list_(_text_field(kind.value_field), kind.list_size))
    if pa.types.is_list(kind):
        return field.with_type(pa.list_(_text_field(kind.value_field)))
    return field


def _text_feature(known: Any) -> Any:  # noqa: ANN401  any JSON
    """A feature of `datasets`, or several, with text in place of Json."""
    if isinstance(known, list):
        return [_text_feature(child) for child in known]
    if not isinstance(known, dict):
        return known
    if known.get("_type") == "Json":
        return feature(pa.string())
    return {key: _text_feature(child) for key, child in known.items()}
