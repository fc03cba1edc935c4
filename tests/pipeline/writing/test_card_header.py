"""The header of the dataset card: valid for everything that reads cards, with what the sources' cards allow."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sqsd_filter.pipeline.report import Config
from sqsd_filter.pipeline.writing.card import write_card
from tests.corpora import FOLDERS
from tests.pipeline.writing.made_up_cards import ORIGINAL, REPORT, card, report_with

datasets.disable_progress_bars()


def test_every_config_loads_with_all_its_files_and_splits_in_order(tmp_path: Path) -> None:
    files = []
    configs: tuple[Config, ...] = ("kept", "dropped")
    for config, split, k in product(configs, ("train", "test"), range(2)):
        path = tmp_path / FOLDERS[config] / f"{split}-{k:05}-of-00002.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        name = str(path.relative_to(tmp_path))
        pq.write_table(pa.table({"file": [name] * (k + 1)}), path)
        file = {"path": name, "config": config, "split": split, "rows": k + 1, "sha256": name}
        files.append(file)
    write_card(tmp_path, report_with(files=files))
    for config in configs:
        name = "default" if config == "kept" else config
        builder = datasets.load_dataset_builder(str(tmp_path), name, cache_dir=str(tmp_path / "cache"))
        assert list(builder.config.data_files) == ["train", "test"]
        for split in ("train", "test"):
            loaded = datasets.load_dataset(str(tmp_path), name, split=split, cache_dir=str(tmp_path / "cache"))
            assert loaded["file"][:] == [f"{FOLDERS[config]}/{split}-0000{k}-of-00002.parquet" for k in (0, 1, 1)]
    assert datasets.get_dataset_config_names(str(tmp_path)) == ["default", "dropped"]
    assert datasets.get_dataset_default_config_name(str(tmp_path)) == "default"


def test_a_header_tells_any_two_contents_apart() -> None:
    kept, dropped, errors = REPORT["files"]
    before, after = (card(files=[kept, file, errors])[0]["configs"] for file in (dropped, {**dropped, "sha256": "x"}))
    assert before[0] == after[0]
    assert before[1] != after[1]
    assert before[2] == after[2]


@pytest.mark.parametrize(
    ("rows", "size"),
    [
        (0, "n<1K"),
        (999, "n<1K"),
        (1000, "1K<n<10K"),
        (15_011, "10K<n<100K"),
        (10**6 - 1, "100K<n<1M"),
        (10**6, "1M<n<10M"),
        (10**12 - 1, "100B<n<1T"),
        (10**12, "n>1T"),
    ],
)
def test_the_size_is_one_of_the_hubs_and_that_of_the_kept_rows(rows: int, size: str) -> None:
    header, _ = card(rows={**REPORT["rows"], "kept": rows}, files=[])
    assert header["size_categories"] == [size]


def test_what_holds_for_the_rows_is_carried_over_and_what_holds_for_the_sources_files_is_not() -> None:
    header, _ = card({"org/dolly": ORIGINAL}, datasets=[{"id": "org/dolly", "revision": "a" * 40}])
    configs = header.pop("configs")
    assert [config["config_name"] for config in configs] == ["default", "dropped", "errors"]
    assert header == {
        "license": "cc-by-sa-3.0",
        "language": ["en", "no"],
        "task_categories": ["text-generation"],
        "pretty_name": "Dolly",
        "tags": ["instructions", "sqsd-filter", "safety", "data-filtering"],
        "size_categories": ["n<1K"],
        "source_datasets": ["org/dolly"],
    }


@pytest.mark.parametrize(
    ("headers", "carried"),
    [
        (["license: mit", "license: mit"], {"license": "mit"}),
        (["license: mit", "license: [apache-2.0, mit]"], {"license": ["mit", "apache-2.0"]}),
        (["license: mit", ""], {}),
        (["license: unknown"], {}),
        (["license:", "license: mit"], {}),
        (["license: {name: mit}"], {}),
        (
            ["license: other\nlicense_name: l\nlicense_link: https://x.org"],
            {"license": "other", "license_name": "l", "license_link": "https://x.org"},
        ),
        (["license: other\nlicense_name: l\nlicense_link: LICENSE"], {"license": "other", "license_name": "l"}),
        (["license: other\nlicense_name: l", "license: mit"], {"license": ["other", "mit"]}),
        (["license: a\nlanguage: [b, c]", "license: a\nlanguage: [c, b]"], {"license": "a", "language": ["b", "c"]}),
        (["license: mit\nlanguage: en", "license: mit\nlanguage: fr"], {"license": "mit"}),
        (["license: mit\npretty_name: 12", "license: mit"], {"license": "mit"}),
        (["license: mit\npretty_name: 1_2"], {"license": "mit", "pretty_name": "1_2"}),
    ],
)  # fmt: skip
def test_licences_come_together_and_other_fields_only_where_all_sources_agree(
    headers: list[str], carried: dict[str, Any]
) -> None:
    header, body = card({f"org/{k}": f"---\n{text}\n---\n" for k, text in enumerate(headers)})
    assert {name: header[name] for name in header if name not in ("tags", "size_categories", "configs")} == carried
    assert ("not known" in body) == ("license" not in carried)
    for licence in [carried["license"]] if isinstance(carried.get("license"), str) else carried.get("license", []):
        assert f"`{licence}`" in body


def test_without_a_source_or_with_one_of_the_hub_that_has_no_card_the_licence_is_to_be_looked_up() -> None:
    assert "license" not in card()[0]
    assert "Look it up" in card()[1]
    header, body = card({"org/a": ORIGINAL}, datasets=[{"id": "org/a"}, {"id": "org/b"}])
    assert "license" not in header
    assert header["source_datasets"] == ["org/a", "org/b"]
    assert "- `org/a`: `cc-by-sa-3.0`\n- `org/b`: not known" in body


BROKEN = {
    "no yaml": "license: mit\n\tlanguage: [",
    "no mapping": "- license\n- mit",
    "a scalar": "mit",
    "odd keys": "? [a, b]\n: c",
    "an alias to itself": "license: &a [*a]",
    "too deep": "language: " + "[" * 1000,
    "control characters": "license: \x00",
    "empty": "",
}


@pytest.mark.parametrize("header", BROKEN.values(), ids=BROKEN)
def test_of_a_broken_header_only_the_text_below_is_taken(header: str) -> None:
    header, body = card({"org/a": f"---\n{header}\n---\nFifteen thousand rows.\n"})
    assert set(header) == {"tags", "size_categories", "configs"}
    assert body.endswith("## The original card of `org/a`\n\nFifteen thousand rows.\n")
