"""Tables whose bytes lie: a wrong offset, a flipped bit, metadata of another kind. Each is refused; none ends us."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict, IterableDataset

from sqsd_filter.corpus.addresses import Opener
from sqsd_filter.corpus.spool import stored
from sqsd_filter.errors import InputError
from tests.corpora import open_corpus

ROWS = pa.table({"instruction": ["aaaa", "bbbb", "cccc"], "output": ["x", "y", "z"]})
CORRUPT = r"is truncated or corrupt \(.*offset"


def forged(data: bytes) -> bytes:
    """Arrow's bytes of ROWS, with an offset that points far beyond its buffer."""
    at = data.index(struct.pack("<4i", 0, 4, 8, 12)) + 12
    return data[:at] + struct.pack("<i", 2**30) + data[at + 4 :]


def ipc(new: Callable[..., pa.ipc.RecordBatchStreamWriter] = pa.ipc.new_stream, table: pa.Table = ROWS) -> bytes:
    sink = pa.BufferOutputStream()
    with new(sink, table.schema) as writer:
        writer.write_table(table)
    data: bytes = sink.getvalue().to_pybytes()
    return data


@pytest.mark.parametrize("new", [pa.ipc.new_stream, pa.ipc.new_file], ids=["stream", "file"])
def test_a_forged_offset_is_refused(new: Callable[..., pa.ipc.RecordBatchStreamWriter], tmp_path: Path) -> None:
    (tmp_path / "in.arrow").write_bytes(forged(ipc(new)))
    with pytest.raises(InputError, match=CORRUPT):
        open_corpus([str(tmp_path / "in.arrow")])


def test_so_it_is_in_a_saved_dataset(tmp_path: Path) -> None:
    Dataset(ROWS).save_to_disk(tmp_path / "saved")
    [file] = (tmp_path / "saved").glob("*.arrow")
    file.write_bytes(forged(file.read_bytes()))
    with pytest.raises(InputError, match=CORRUPT):
        open_corpus([str(tmp_path / "saved")])


def test_and_in_a_dataset_in_memory_or_a_stream_of_one(tmp_path: Path) -> None:
    (tmp_path / "in.arrow").write_bytes(forged(ipc()))
    with pytest.raises(InputError, match=CORRUPT):
        open_corpus([Dataset.from_file(str(tmp_path / "in.arrow"))])
    bad = pa.ipc.open_stream(forged(ipc())).read_all()

    def tables(_: list[str]) -> object:
        yield 0, bad

    from datasets.iterable_dataset import ArrowExamplesIterable

    with pytest.raises(InputError, match=r"damaged files \(.*offset"):
        stored(IterableDataset(ArrowExamplesIterable(tables, {"_": ["one"]})), folder=tmp_path)


@pytest.mark.parametrize("kind", ["in.arrow", "saved"])
def test_a_file_that_is_forged_after_it_was_opened_is_validated_again(kind: str, tmp_path: Path) -> None:
    path = tmp_path / kind
    if kind == "saved":
        Dataset(ROWS).save_to_disk(path)
    else:
        path.write_bytes(ipc())
    corpus = open_corpus([str(path)])
    [file] = path.glob("*.arrow") if path.is_dir() else [path]
    changed = forged(file.read_bytes())
    file.unlink()
    file.write_bytes(changed)
    with pytest.raises(InputError, match=CORRUPT):
        list(corpus.read(0, 3))


def test_a_flipped_bit_in_a_page_with_a_checksum_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "in.parquet"
    pq.write_table(ROWS, path, write_page_checksum=True, compression="none", use_dictionary=False)
    data = bytearray(path.read_bytes())
    data[data.index(b"bbbb")] ^= 4
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"CRC checksum verification failed.*fetch it again"):
        open_corpus([str(path)], visit=lambda row: None)


@pytest.mark.parametrize("content", [b"{", b"[]", b'{"info": [1]}', b'{"info": {"features": 1}}', b"[" * 100_000])
def test_metadata_that_is_none_is_refused(content: bytes, tmp_path: Path) -> None:
    path = str(tmp_path / "in.parquet")
    pq.write_table(ROWS.replace_schema_metadata({"huggingface": content}), path)
    with pytest.raises(InputError, match="metadata for `datasets` that can't be read"):
        open_corpus([path])


@pytest.mark.parametrize(
    "state", [b"{", b"[]", b"{}", b'{"_data_files": [{}]}', b'{"_data_files": [{"filename": "none.arrow"}]}']
)
def test_a_saved_dataset_without_a_readable_state_is_refused(state: bytes, tmp_path: Path) -> None:
    Dataset(ROWS).save_to_disk(tmp_path / "saved")
    (tmp_path / "saved" / "state.json").write_bytes(state)
    with pytest.raises(InputError, match="saved"):
        open_corpus([str(tmp_path / "saved")])


@pytest.mark.parametrize("name", ["../private.arrow", "/etc/passwd"])
def test_a_saved_dataset_does_not_reach_out_of_its_folder(name: str, tmp_path: Path) -> None:
    Dataset(ROWS).save_to_disk(tmp_path / "saved")
    (tmp_path / "private.arrow").write_bytes(ipc())
    (tmp_path / "saved" / "state.json").write_text(json.dumps({"_data_files": [{"filename": name}]}))
    with pytest.raises(InputError, match=f"names the file '{name}' outside of it"):
        Opener().open([str(tmp_path / "saved")])


@pytest.mark.parametrize("name", ["../data/../private.arrow", "../../private.arrow", "../other/private.arrow", ".."])
def test_neither_does_a_split_out_of_the_dataset_above(name: str, tmp_path: Path) -> None:
    DatasetDict({"train": Dataset(ROWS)}).save_to_disk(tmp_path / "saved")
    (tmp_path / "private.arrow").write_bytes(ipc())
    (tmp_path / "saved/train/state.json").write_text(json.dumps({"_data_files": [{"filename": name}]}))
    with pytest.raises(InputError, match=f"names the file '{re.escape(name)}' outside of it"):
        Opener().open([str(tmp_path / "saved")])


@pytest.mark.parametrize("kept", ["data/in.arrow", "in.arrow"])
def test_a_split_of_an_output_has_its_rows_beside_it(kept: str, tmp_path: Path) -> None:
    split, rows = tmp_path / "out/train", tmp_path / "out" / kept
    DatasetDict({"train": Dataset(ROWS)}).save_to_disk(tmp_path / "out")
    rows.parent.mkdir(exist_ok=True)
    [file] = split.glob("*.arrow")
    file.rename(rows)
    state = json.loads((split / "state.json").read_bytes())
    (split / "state.json").write_text(json.dumps({**state, "_data_files": [{"filename": f"../{kept}"}]}))
    for source in (tmp_path / "out", split):
        assert [row.value for row in open_corpus([str(source)]).read(0, 9)] == ROWS.to_pylist()
    (tmp_path / "out/dataset_dict.json").write_text(json.dumps({"splits": ["test"]}))
    with pytest.raises(InputError, match="outside of it"):
        open_corpus([str(split)])
