"""A dataset's own words about itself: they may be wrong, and they may not reach out of it."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import pytest

from sqsd_filter.errors import InputError
from tests.corpora import make_rows, open_corpus, write_jsonl
from tests.hub import Hub


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """A folder with one file of rows, beside a file that is none of its business."""
    folder = tmp_path / "dataset"
    folder.mkdir()
    write_jsonl(folder / "train.jsonl", make_rows(5))
    write_jsonl(tmp_path / "private.jsonl", make_rows(1))
    return folder


def card(data_files: str) -> str:
    return f"---\nconfigs:\n- config_name: default\n  data_files: {data_files}\n---\n"


OUTSIDE = [
    "../private.jsonl",
    "[{split: train, path: ../private.jsonl}]",
    "[{split: train, path: [train.jsonl, ../private.jsonl]}]",
    "x/../../private.jsonl",
    "'../*.jsonl'",
    "/etc/passwd",
    "file:///etc/passwd",
    "http://127.0.0.1:9/x.jsonl",
    "hf://datasets/other/name/x.jsonl",
    "'zip://x.jsonl::http://127.0.0.1:9/x.zip'",
]


@pytest.mark.parametrize("data_files", OUTSIDE)
def test_a_card_that_names_files_outside_is_refused(data_files: str, dataset: Path) -> None:
    (dataset / "README.md").write_text(card(data_files))
    with pytest.raises(
        InputError, match=r"The card of .*dataset names .*, which is outside of the dataset: if you want"
    ):
        open_corpus([str(dataset)])


@pytest.mark.parametrize("data_dir", ["..", "/etc"])
def test_so_is_one_that_names_a_folder_outside(data_dir: str, dataset: Path) -> None:
    (dataset / "README.md").write_text(f"---\nconfigs:\n- config_name: default\n  data_dir: {data_dir}\n---\n")
    with pytest.raises(InputError, match="outside of the dataset"):
        open_corpus([str(dataset)])


def test_a_card_of_the_hub_may_not_name_files_of_this_machine(hub: Hub, dataset: Path) -> None:
    hub.add("org/a", {"README.md": card(str(dataset / "train.jsonl")).encode(), "train.jsonl": b'{"a": 1}\n'})
    with pytest.raises(InputError, match="outside of the dataset"):
        open_corpus(["org/a"])


@pytest.mark.parametrize(
    "data_files", ["train.jsonl", "'*.jsonl'", "./train.jsonl", "[{split: test, path: train.jsonl}]"]
)
def test_a_card_may_name_what_is_inside(data_files: str, dataset: Path) -> None:
    (dataset / "README.md").write_text(card(data_files))
    assert open_corpus([str(dataset)]).n_rows == 5


@pytest.mark.parametrize(
    "header",
    [
        "license: !!python/object/apply:os.system [id]",
        "a: " + "[" * 5000 + "]" * 5000,
        "a: [",
        "a: &a [*a, *a",
        "configs: 7",
        "configs: [7]",
        "configs:\n- data_files: x",
        "configs:\n- config_name: default\n  data_files: {7: 8}",
        "configs:\n- config_name: default\n  data_files: none.jsonl",
        "dataset_info: 7",
        "dataset_info:\n  features: 7",
        "dataset_info:\n  features:\n  - name: id\n    dtype: nonsense",
        "configs:\n- config_name: a\n  data_files: train.jsonl\n  delimiter: [7]\n",
    ],
)
def test_whatever_a_header_holds_is_one_sentence_or_read(header: str, dataset: Path) -> None:
    (dataset / "README.md").write_text(f"---\n{header}\n---\n")
    with suppress(InputError):
        assert open_corpus([str(dataset)]).n_rows == 5


def test_a_script_is_one_sentence_and_is_not_run(dataset: Path) -> None:
    (dataset / "dataset.py").write_text("raise SystemExit")
    with pytest.raises(InputError, match="Dataset scripts are no longer supported"):
        open_corpus([str(dataset)])
