"""Any table and any lines on their way out: each row goes to one file, in order, with all of its values or bytes."""

from __future__ import annotations

import json
import tempfile
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sqsd_filter.corpus.text_formats import parse_line
from sqsd_filter.pipeline.report import Config, Written
from sqsd_filter.pipeline.writing.export import FATES
from tests.corpora import by_hand, open_corpus, saved, unnamed
from tests.pipeline.writing.made_up_exports import SCORES, export, paths, raw_lines

datasets.disable_progress_bars()
pytestmark = pytest.mark.usefixtures("small_chunks")
MANY = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def tables(root: Path, to: str, report: Written, config: Config) -> pa.Table:
    """What people read of a config, without the columns that were added."""
    is_parquet = to == "parquet"
    table = pq.read_table(paths(root, report, config)) if is_parquet else saved(root, config)["train"].data.table
    return table.select([name for name in table.column_names if not name.startswith("sqsd_")]).combine_chunks()


# ---------------------------------------------------------------------------------------------- any table

Column = tuple[pa.DataType, st.SearchStrategy[Any]]
text = st.text(st.characters(codec="utf-8"), max_size=5)
moments = st.datetimes(datetime(1900, 1, 1), datetime(2200, 1, 1))
IN_JSON: list[Column] = [
    (pa.int8(), st.integers(-(2**7), 2**7 - 1)),
    (pa.int64(), st.integers(-(2**63), 2**63 - 1)),
    (pa.uint64(), st.integers(0, 2**64 - 1)),
    (pa.float32(), st.floats(width=32, allow_nan=False)),
    (pa.float64(), st.floats(allow_nan=False)),
    (pa.bool_(), st.booleans()),
    (pa.string(), text),
    (pa.large_string(), text),
    (pa.date32(), st.dates()),
    (pa.time64("us"), st.times()),
    (pa.timestamp("us"), moments),
    (
        pa.timestamp("us", tz="UTC"),
        moments.map(lambda moment: moment.replace(tzinfo=UTC)),
    ),
    (pa.decimal128(12, 2), st.decimals(-(10**9), 10**9, places=2)),
    (pa.null(), st.none()),
]
YEARS = timedelta(days=9999)
NOT_IN_JSON: list[Column] = [(pa.binary(), st.binary(max_size=5)), (pa.duration("us"), st.timedeltas(-YEARS, YEARS))]


def nested(leaves: list[Column]) -> st.SearchStrategy[Column]:
    def lists(column: Column) -> Column:
        return pa.list_(column[0]), st.lists(st.none() | column[1], max_size=3)

    def structs(columns: list[Column]) -> Column:
        names = [f"f{k}" for k in range(len(columns))]
        kind = pa.struct([(name, kind) for name, (kind, _) in zip(names, columns, strict=True)])
        return kind, st.fixed_dictionaries(
            {name: st.none() | values for name, (_, values) in zip(names, columns, strict=True)}
        )

    return st.recursive(
        st.sampled_from(leaves), lambda c: c.map(lists) | st.lists(c, min_size=1, max_size=3).map(structs), max_leaves=4
    )


@st.composite
def any_table(draw: st.DrawFn, leaves: list[Column]) -> tuple[pa.Table, list[int]]:
    """A table of 1 to 12 rows, and where each of them is to go."""
    columns = draw(st.lists(nested(leaves), min_size=1, max_size=3))
    n = draw(st.integers(1, 12))
    arrays = [pa.array(draw(st.lists(st.none() | v, min_size=n, max_size=n)), kind) for kind, v in columns]
    return pa.table(arrays, [f"c{k}" for k in range(len(arrays))]), draw(fate_lists(n))


def fate_lists(n: int) -> st.SearchStrategy[list[int]]:
    return st.lists(st.sampled_from(list(FATES.values())), min_size=n, max_size=n)


@pytest.mark.parametrize("to", ["parquet", "arrow"])
@MANY
@given(case=any_table([*IN_JSON, *NOT_IN_JSON]), shard_size=st.sampled_from([1, 10**9]))
def test_any_table_comes_back_as_it_was(to: str, case: tuple[pa.Table, list[int]], shard_size: int) -> None:
    table, fates = case
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        pq.write_table(table, root / "in.parquet")
        source = pq.read_table(root / "in.parquet")
        report = export(open_corpus([str(root / "in.parquet")]), fates, root, to, shard_size)
        assert sum(f["rows"] for f in report["files"]) == len(fates)
        for config, code in FATES.items():
            expected = source.filter(pa.array([p == code for p in fates])).combine_chunks()
            table_read = tables(root, to, report, config)
            assert table_read.schema.equals(expected.schema)
            assert table_read.equals(expected)
            again = open_corpus([str(path) for path in paths(root, report, config)])
            values = [row.value or {} for row in again.read(0, again.n_rows)]
            rows = [{name: value[name] for name in table.column_names} for value in values]
            assert rows == expected.to_pylist()


FEATURES = datasets.Features(
    {
        "label": datasets.ClassLabel(names=["bad", "good"]),
        "turns": datasets.List({"role": datasets.Value("string"), "label": datasets.ClassLabel(names=["a", "b"])}),
        "image": datasets.Image(),
        "sounds": datasets.List(datasets.Audio(sampling_rate=16_000)),
        "any": datasets.Json(),
        "pair": datasets.List(datasets.Value("int16"), length=2),
        "words": datasets.LargeList(datasets.Value("large_string")),
        "matrix": datasets.Array2D((2, 2), "float32"),
        "at": datasets.Value("timestamp[us, tz=Europe/Paris]"),
    }
)


@pytest.mark.parametrize("to", ["parquet", "arrow"])
def test_features_of_every_kind_survive(to: str, tmp_path: Path) -> None:
    row = {
        "label": 1,
        "turns": [{"role": "user", "label": 0}],
        "image": {"bytes": b"\x89PNG", "path": "a.png"},
        "sounds": [{"bytes": b"RIFF", "path": None}],
        "any": '{"k": [1, "x"]}',
        "pair": [1, 2],
        "words": ["é", None],
        "matrix": [[0.1, 0.2], [0.3, 0.4]],
        "at": 10**15,
    }
    rows = [row, {"matrix": row["matrix"]}] * 5
    columns = []
    for kind in FEATURES.arrow_schema:
        values = [row.get(kind.name) for row in rows]
        extended = isinstance(kind.type, pa.BaseExtensionType)
        array = pa.array(values, kind.type.storage_type if extended else kind.type)
        columns.append(pa.ExtensionArray.from_storage(kind.type, array) if extended else array)
    table = pa.Table.from_arrays(columns, schema=FEATURES.arrow_schema)
    pq.write_table(table, tmp_path / "in.parquet")
    fates = [0, 1, 2, 0, 0, 0, 0, 0, 0, 0]
    report = export(open_corpus([str(tmp_path / "in.parquet")]), fates, tmp_path / "out", to)
    for config, code in FATES.items():
        if to == "arrow":
            loaded = saved(tmp_path / "out", config)["train"]
        else:
            files = [str(path) for path in paths(tmp_path / "out", report, config)]
            loaded = datasets.load_dataset(
                "parquet", data_files=files, split="train", cache_dir=str(tmp_path / "cache")
            )
        loaded = loaded.select_columns(list(FEATURES))
        assert loaded.features == FEATURES
        expected = datasets.Dataset(table).select([k for k, p in enumerate(fates) if p == code])
        assert loaded.with_format("arrow")[:].to_pylist() == expected.with_format("arrow")[:].to_pylist()


def in_json(value: Any) -> Any:
    """What JSON has of a value: the same, or its text."""
    if isinstance(value, dict):
        return {key: in_json(child) for key, child in value.items()}
    if isinstance(value, list):
        return [in_json(child) for child in value]
    if isinstance(value, Decimal):
        return f"{value}"
    return value.isoformat() if isinstance(value, date | time) else value


@MANY
@given(case=any_table(IN_JSON), shard_size=st.sampled_from([1, 10**9]), with_scores=st.booleans())
def test_any_table_becomes_lines_of_exact_values(
    case: tuple[pa.Table, list[int]], shard_size: int, with_scores: bool
) -> None:
    table, fates = case
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        pq.write_table(table, root / "in.parquet")
        rows = pq.read_table(root / "in.parquet").to_pylist()
        report = export(open_corpus([str(root / "in.parquet")]), fates, root, "jsonl", shard_size, with_scores)
        for config, code in FATES.items():
            objects = [json.loads(line) for line in raw_lines(root, report, config)]
            added = SCORES if with_scores and config != "errors" else []
            added = [*added, *(["sqsd_row"] if config != "kept" else [])]
            assert all(list(row) == [*table.column_names, *added] for row in objects)
            own = [{name: row[name] for name in table.column_names} for row in objects]
            assert own == [in_json(row) for row, p in zip(rows, fates, strict=True) if p == code]


# ---------------------------------------------------------------------------------------------- any lines

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=6,
)
names = st.sampled_from(["a", "b", *SCORES])
rows = st.dictionaries(names, json_values, max_size=4)
lines = st.one_of(
    st.builds(lambda row, end: json.dumps(row).encode() + end, rows, st.sampled_from([b"", b" ", b"\r"])),
    st.builds(lambda row: json.dumps(row, ensure_ascii=False, separators=(",", ":")).encode(), rows),
)
unreadable = st.sampled_from([b"{", b"}\r", b"\xff", b"[1]", b'{"a": 1, "a": 2}', b'{"a": "\\ud800"}', b"1e999"])


@st.composite
def any_lines(draw: st.DrawFn) -> tuple[list[bytes], list[int]]:
    """Lines, some of which are no rows, and where each is to go: those only to errors."""
    drawn = draw(st.lists(lines.map(lambda line: (line, None)) | unreadable.map(lambda line: (line, 2)), min_size=1))
    sorted_out = draw(fate_lists(len(drawn)))
    return [line for line, _ in drawn], [p if q is None else q for (_, q), p in zip(drawn, sorted_out, strict=True)]


@MANY
@given(case=any_lines(), shard_size=st.sampled_from([1, 10**9]), last=st.booleans())
def test_lines_come_out_byte_for_byte_but_for_the_names_of_rows_not_kept(
    case: tuple[list[bytes], list[int]], shard_size: int, last: bool
) -> None:
    source, fates = case
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        content = b"".join(line + b"\n" for line in source)
        (root / "in.jsonl").write_bytes(content if last else content[:-1])
        report = export(open_corpus([str(root / "in.jsonl")]), fates, root, "jsonl", shard_size)
        out = {code: iter(raw_lines(root, report, config)) for config, code in FATES.items()}
        written = [next(out[p]) for p in fates]
        for k, (line, p) in enumerate(zip(source, fates, strict=True)):
            is_row = parse_line(line.removeprefix(b"\xef\xbb\xbf"))[0] is not None
            assert (unnamed(written[k], str(root / "in.jsonl"), k + 1) if p and is_row else written[k]) == line
        assert [next(rest, None) for rest in out.values()] == [None] * 3
        reasons = [json.loads(line) for line in (root / "_sqsd/reasons.jsonl").read_bytes().splitlines()]
        assert [r["line"] for r in reasons] == [k for k, p in enumerate(fates, 1) if p == 2]


@MANY
@given(case=any_lines())
def test_scores_join_any_lines_and_nothing_else_of_them_changes(case: tuple[list[bytes], list[int]]) -> None:
    source, fates = case
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        (root / "in.jsonl").write_bytes(b"".join(line + b"\n" for line in source))
        corpus = open_corpus([str(root / "in.jsonl")])
        scored, _ = by_hand(corpus, fates)
        report = export(corpus, fates, root, "jsonl", with_scores=True)
        out = {code: iter(raw_lines(root, report, config)) for config, code in FATES.items()}
        for k, (line, p) in enumerate(zip(source, fates, strict=True)):
            written = next(out[p])
            file = str(root / "in.jsonl")
            if p == 2:
                is_row = parse_line(line)[0] is not None
                assert (unnamed(written, file, k + 1) if is_row else written) == line
                continue
            written = unnamed(written, file, k + 1) if p else written
            scores = [scored.risk[k], scored.probes["danger"][k], scored.probes["safety"][k], "scored"]
            value = json.loads(line)
            others = [(name, cell) for name, cell in value.items() if name not in SCORES]
            assert list(json.loads(written).items()) == [*others, *zip(SCORES, scores, strict=True)]
            if len(others) == len(value):
                assert written.startswith(line.rstrip()[:-1])
                assert written.endswith(line[len(line.rstrip()) - 1 :])


@pytest.mark.parametrize("to", ["parquet", "arrow"])
@MANY
@given(source=st.lists(st.dictionaries(st.sampled_from("abc"), json_values, min_size=1), min_size=1, max_size=7))
def test_json_of_any_shape_survives_a_way_through_tables(to: str, source: list[dict[str, Any]]) -> None:
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        (root / "in.jsonl").write_bytes(b"".join(json.dumps(row).encode() + b"\n" for row in source))
        report = export(open_corpus([str(root / "in.jsonl")]), [0] * len(source), root / "there", to)
        corpus = open_corpus([str(path) for path in paths(root / "there", report, "kept")])
        report = export(corpus, [0] * len(source), root / "back", "jsonl")
        kept = [json.loads(line) for line in raw_lines(root / "back", report, "kept")]
        assert kept == [{name: row.get(name) for name in corpus.schema.names if name not in SCORES} for row in source]
