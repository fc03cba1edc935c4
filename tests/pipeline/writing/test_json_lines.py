"""Lines of JSON: members put into them and taken out again leave every other byte alone, and values are exact."""

from __future__ import annotations

import json
import math
from datetime import date, datetime, time, timedelta, timezone
from decimal import Decimal
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sqsd_filter.errors import InputError
from sqsd_filter.pipeline.writing.json_lines import dump, has_form, lines, splice

SCORES = {"sqsd_risk": 0.1 + 0.2, "sqsd_danger": -1e-300, "sqsd_status": "scored"}
OLD = {"sqsd_risk": None, "sqsd_other": [{"}": ","}], "sqsd_status": "no_answer"}
DUMPED = '"sqsd_risk": 0.30000000000000004, "sqsd_danger": -1e-300, "sqsd_status": "scored"'


@pytest.mark.parametrize(
    ("line", "spliced"),
    [
        ('{"a": 1}', '{"a": 1, SCORES}'),
        ('{"a": 1}\r', '{"a": 1, SCORES}\r'),
        (' {"a":{}} \t', ' {"a":{}, SCORES} \t'),
        ('{"a": "}{" }', '{"a": "}{", SCORES }'),
        ("{}", "{SCORES}"),
        ("{ } ", "{SCORES } "),
        ('{"é": "\\u007d\u2028"}', '{"é": "\\u007d\u2028", SCORES}'),
    ],
)
def test_members_join_the_end_of_a_line(line: str, spliced: str) -> None:
    assert splice(line.encode(), SCORES).decode() == spliced.replace("SCORES", DUMPED)


@pytest.mark.parametrize(
    ("line", "spliced"),
    [
        ('{"sqsd_risk": 1, "a":1.0 }', '{ "a":1.0, SCORES }'),
        ('{"a": 1e5,"sqsd_other":{"x": [1, "," ]} , "b":"\\u00e9"}\r', '{"a": 1e5, "b":"\\u00e9", SCORES}\r'),
        ('{ "\\u0073qsd_risk" : 0.1 }', "{SCORES }"),
        ('{"mine": {"sqsd_risk": 1}}', '{"mine": {"sqsd_risk": 1}, SCORES}'),
        ("{}", "{SCORES}"),
    ],
)
def test_members_of_an_earlier_run_go_wherever_they_are(line: str, spliced: str) -> None:
    assert splice(line.encode(), SCORES, list(OLD)).decode() == spliced.replace("SCORES", DUMPED)


def test_nothing_to_put_in_and_nothing_to_take_out_leaves_a_line_as_it_is() -> None:
    for line in (b'{"a": 1}\r', b"{ }", b'{"a":1 }'):
        assert splice(line, {}) == line == splice(line, {}, ["other"])


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
names = st.text() | st.sampled_from(["sqsd_risk", "sqsd_other", "sqsd_status", "sqsd_notes"])
separators = st.tuples(st.sampled_from([",", ", ", " ,\t"]), st.sampled_from([":", ": ", " : "]))
ends = st.sampled_from(["", " ", "\r", "\t \r"])


@given(st.dictionaries(names, json_values, max_size=5), separators, st.booleans(), ends)
def test_any_line_keeps_its_values_and_bytes(
    row: dict[str, Any], separators: tuple[str, str], ascii: bool, end: str
) -> None:
    line = (json.dumps(row, separators=separators, ensure_ascii=ascii) + end).encode(errors="replace")
    value = json.loads(line)
    spliced = splice(line, {"new": 0.1})
    assert spliced.startswith(line.rstrip()[:-1])
    assert spliced.endswith(b"}" + end.encode())
    assert list(json.loads(spliced).items()) == [*((k, v) for k, v in value.items() if k != "new"), ("new", 0.1)]

    others = {k: v for k, v in value.items() if k not in OLD}
    cleared = splice(line, {}, list(OLD))
    assert list(json.loads(cleared).items()) == list(others.items())
    assert splice(splice(cleared, OLD), SCORES, [*OLD, *SCORES]) == splice(cleared, SCORES)  # as if never scored before


@given(st.floats())
def test_a_float_reads_back_as_itself(number: float) -> None:
    back = json.loads(dump(number))
    assert back == number or (math.isnan(back) and math.isnan(number))


def test_values_without_a_form_in_json_are_their_iso_or_decimal_text() -> None:
    paris = timezone(timedelta(hours=1))
    row: dict[str, Any] = {
        "stamp": datetime(2024, 1, 31, 12, 0, 0, 1),
        "zoned": [datetime(2024, 1, 31, tzinfo=paris)],
        "day": {"at": date(9999, 12, 31)},
        "time": time(1, 2, 3),
        "price": Decimal("1.50"),
        "big": 2**63 - 1,
        "text": "é\u2028\n",
    }
    schema = pa.schema(
        {
            "stamp": pa.timestamp("us"),
            "zoned": pa.list_(pa.timestamp("s", tz="+01:00")),
            "day": pa.struct({"at": pa.date32()}),
            "time": pa.time32("s"),
            "price": pa.decimal128(10, 2),
            "big": pa.int64(),
            "text": pa.string(),
        }
    )
    [line] = lines(pa.Table.from_pylist([row], schema))
    back = json.loads(line)
    assert b"\n" not in line
    assert "é\u2028".encode() in line
    assert back == {**row, "stamp": "2024-01-31T12:00:00.000001", "zoned": ["2024-01-31T00:00:00+01:00"]} | {
        "day": {"at": "9999-12-31"},
        "time": "01:02:03",
        "price": "1.50",
    }
    assert datetime.fromisoformat(back["zoned"][0]) == row["zoned"][0]
    nanoseconds = pa.table({"stamp": pa.array([1], pa.timestamp("ns"))})
    assert lines(nanoseconds) == [b'{"stamp": "1970-01-01T00:00:00.000000001"}']


@pytest.mark.parametrize(
    "kind",
    [
        pa.binary(),
        pa.struct({"bytes": pa.binary(), "path": pa.string()}),
        pa.list_(pa.large_binary()),
        pa.map_(pa.string(), pa.binary(4)),
        pa.dictionary(pa.int8(), pa.binary()),
        pa.duration("s"),
        pa.time64("ns"),
        pa.uuid(),
    ],
    ids=str,
)
def test_json_has_no_form_for_binary_values_and_durations(kind: pa.DataType) -> None:
    assert not has_form(kind)


def test_a_value_that_python_does_not_have_is_an_input_error_that_names_its_column() -> None:
    table = pa.table({"id": [1], "when": pa.array([10**15], pa.timestamp("ms"))})
    with pytest.raises(InputError, match=r"Column 'when' holds a value that can't be written as JSON .*: use --to pa"):
        lines(table)
