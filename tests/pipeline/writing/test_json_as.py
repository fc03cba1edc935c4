"""Values without a common type: as JSON that `datasets` decodes from 4.7 on, or as text that every version reads."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sqsd_filter import Cut, SQSDScorer, Writing, filter_dataset, score_dataset, select_dataset
from sqsd_filter.corpus.json_schema import to_rows
from sqsd_filter.corpus.json_text import json_as_text
from sqsd_filter.errors import InputError, UsageError
from sqsd_filter.pipeline.options import Scoring
from sqsd_filter.pipeline.report import CONFIGS, FinishedReport
from tests.corpora import make_rows, rows_of, write_jsonl

datasets.disable_progress_bars()
MIXED: list[dict[str, Any]] = [
    {"mixed": 1, "deep": [{"any": "x"}, {"other": [0.5]}], "in": {"any": [1, "x"], "n": 2}, "plain": "a"},
    {"mixed": "é", "deep": [], "in": {"any": [], "n": 3}, "plain": None},
    {"mixed": None, "deep": [7], "in": {"any": [None], "n": None}, "plain": "c"},
    {"mixed": {"k": 1e300}, "deep": None, "in": None, "plain": "d"},
]
SCORED = [{**row, "sqsd_risk": float(k), "sqsd_status": "scored"} for k, row in enumerate(MIXED)]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "in.jsonl", [*SCORED, b"broken"])
    return tmp_path


def cut(source: str, dest: str, **writing: Any) -> FinishedReport:
    return select_dataset(source, dest, Cut.of(drop_count=1), Writing(**writing))


def has_json(kind: pa.DataType) -> bool:
    return isinstance(kind, pa.BaseExtensionType) or any(has_json(kind.field(k).type) for k in range(kind.num_fields))


def test_text_has_the_same_values_and_no_type_or_feature_of_newer_versions(folder: Path) -> None:
    as_json, as_text = cut("in.jsonl", "j"), cut("in.jsonl", "t", json_as="text")
    assert as_json["json_columns"] == as_text["json_columns"] == ["mixed", "deep", "in"]
    assert as_json["json_features"] == ["deep", "in"]  # of 1e300 datasets' Json would make another number
    assert "json_features" not in as_text
    for config in CONFIGS:
        assert rows_of(Path("t"), config) == rows_of(Path("j"), config)
    for file in as_text["files"]:
        schema = pq.read_schema(Path("t", file["path"]))
        assert not any(has_json(field.type) for field in schema)
        assert b"huggingface" not in (schema.metadata or {})
    needs = "takes `datasets` 4.7 or later to open these files"
    assert needs in Path("j/README.md").read_text()
    assert needs not in Path("t/README.md").read_text()


@pytest.mark.parametrize("dest", ["out", "out.arrow", "out.parquet"])
def test_text_loads_as_text_and_comes_back_as_the_values(dest: str, folder: Path) -> None:
    to = "arrow" if dest.endswith("arrow") else "parquet"
    report = cut("in.jsonl", dest, json_as="text", to=to)
    [path] = [Path(dest, f["path"]) for f in report["files"] if f["config"] == "kept"]
    loaded = datasets.load_dataset(to, data_files=str(path), split="train", cache_dir="cache")
    assert [value and json.loads(value) for value in loaded["mixed"]] == [1, "é", None]
    assert loaded.features["mixed"] == datasets.Value("string")
    apart = shutil.copy(path, f"apart.{to}")  # beside its run's folder, it stands for the run
    again = select_dataset(apart, "again.jsonl", Cut.of(drop_count=0))
    assert again["rows"]["kept"] == 3
    rows = [json.loads(line) for line in Path("again.jsonl").read_text().splitlines()]
    assert [{name: row[name] for name in MIXED[0]} for row in rows] == MIXED[:3]


def test_other_features_of_the_input_stay(folder: Path) -> None:
    features = datasets.Features(
        {"label": datasets.ClassLabel(names=["a", "b"]), "any": datasets.List(datasets.Json())}
    )
    table = datasets.Dataset.from_dict({"label": [1, 0], "any": [[1, "x"], None]}, features=features).with_format(
        "arrow"
    )[:]
    text = json_as_text(table)
    found = datasets.Features.from_arrow_schema(text.schema)
    assert found == {"label": features["label"], "any": datasets.List(datasets.Value("string"))}
    assert list(to_rows(text)) == list(to_rows(table))
    assert json_as_text(text).equals(text, check_metadata=True)


def test_lines_hold_values_as_they_are(folder: Path) -> None:
    for dest, to in (("out", "jsonl"), ("out.json", None)):
        with pytest.raises(UsageError, match=r"holds every value as it is: leave out json_as \(--json-as\)"):
            cut("in.jsonl", dest, to=to, json_as="text")
    with pytest.raises(UsageError, match="can be written as json or text, not 'yaml'"):
        cut("in.jsonl", "out", to="parquet", json_as="yaml")


class Unused(SQSDScorer):
    """Fails the test when anything is scored."""

    def score(self, *_: Any) -> Any:
        raise AssertionError("scored before the columns were looked at")


@pytest.mark.parametrize(
    "kind", [pa.map_(pa.string(), pa.int64()), pa.list_(pa.map_(pa.string(), pa.int64())), pa.uuid()]
)
def test_a_type_that_datasets_can_t_read_is_refused_before_scoring(
    kind: pa.DataType, folder: Path, tiny_pack: Path
) -> None:
    table = pa.Table.from_pylist(make_rows(3)).append_column("odd", pa.nulls(3, kind))
    pq.write_table(table, "a.parquet")
    for dest in ("out", "out.parquet", "out.arrow"):
        with pytest.raises(InputError, match=r"Column 'odd' holds .*, which can't be written to .* for `datasets` to"):
            filter_dataset("a.parquet", dest, drop_count=1, scorer=Unused(tiny_pack))
    score_dataset("a.parquet", "scored.parquet", Scoring(pack=tiny_pack))  # other readers know the type
    scored = pq.read_table("scored.parquet")
    assert scored["odd"].type == kind
    assert scored["sqsd_risk"].null_count == 0


def test_the_file_of_all_scores_refuses_only_what_parquet_can_t_hold(folder: Path, tiny_pack: Path) -> None:
    table = pa.Table.from_pylist(make_rows(3)).append_column("odd", pa.array([{}] * 3, pa.struct([])))
    with pa.OSFile("a.arrow", "wb") as sink, pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    with pytest.raises(InputError, match=r"Column 'odd' holds struct<>, which a parquet file can't hold: give it"):
        score_dataset("a.arrow", "scored.parquet", Scoring(scorer=Unused(tiny_pack)))


@pytest.mark.parametrize("kind", [pa.list_view(pa.int64()), pa.large_list_view(pa.string())])
@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_so_is_a_view_of_lists_and_views_of_text_are_read(
    suffix: str, kind: pa.DataType, folder: Path, tiny_pack: Path
) -> None:
    def write(table: pa.Table) -> str:
        with pa.OSFile(f"a{suffix}", "wb") as sink:
            if suffix == ".parquet":
                pq.write_table(table, sink)
            else:
                with pa.ipc.new_file(sink, table.schema) as writer:
                    writer.write_table(table)
        return f"a{suffix}"

    rows = pa.Table.from_pylist(make_rows(3))
    path = write(rows.append_column("odd", pa.nulls(3, kind)))
    with pytest.raises(InputError, match=r"Column 'odd' of .* is of the type .*list_view<.*>, which can't be filtered"):
        filter_dataset(path, "out", drop_count=1, scorer=Unused(tiny_pack))
    path = write(rows.append_column("seen", pa.array(["x", None, "y"], pa.string_view())))
    filter_dataset(path, "out", drop_count=1, pack=tiny_pack)
    loaded = datasets.load_dataset("out", cache_dir="cache", split="train")
    assert set(loaded["seen"]) <= {"x", None, "y"}
