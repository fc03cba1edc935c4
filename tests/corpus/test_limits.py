"""Inputs that would take all memory or all time: each has a limit, and the rest of the file is read on."""

from __future__ import annotations

import gzip
import os
import resource
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

from sqsd_filter.corpus import compression
from sqsd_filter.corpus.long_rows import CUT_TO, LONGEST_ROW
from sqsd_filter.errors import InputError, UsageError
from tests.corpora import open_corpus
from tests.corpus.source_files import write

LONG = b'{"a": "' + b"x" * 5000 + b'"}'


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows may have 2,000 bytes."""
    monkeypatch.setenv("SQSD_FILTER_LONGEST_ROW", "2000")


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("block", [64, 1 << 18])
def test_a_long_line_is_an_unreadable_row_and_the_rest_is_read_on(
    block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sqsd_filter.corpus.text_formats.BLOCK", block)
    lines = [b'{"a": "1"}', LONG, b'{"a": "2"}', b"y" * 3000, b"", LONG[:1999] + b'"}']
    corpus = open_corpus([write(tmp_path / "a.jsonl", b"\n".join(lines))])
    rows = list(corpus.read(0, 9))
    assert [row.value for row in rows if row.value] == [{"a": "1"}, {"a": "2"}]
    assert [row.line for row in rows] == [1, 2, 3, 4, 6]  # a blank line is no row
    problem = f"longer than 2,000 bytes (SQSD_FILTER_LONGEST_ROW), its first {CUT_TO:,} are kept"
    assert [(row.problem, row.raw) for row in rows[1:4:2]] == [(problem, LONG[:CUT_TO]), (problem, b"y" * CUT_TO)]
    assert rows[4].problem == problem
    [chunk] = corpus.chunks()
    assert chunk.table["a"].to_pylist() == ["1", None, "2", None, None]


@pytest.mark.usefixtures("short")
def test_so_is_a_long_record_of_a_csv_file(tmp_path: Path) -> None:
    open_quote = b'"' + b"\n".join([b"z" * 100] * 30)
    data = b"\n".join(
        [b"a,b", b"1,2", b"x" * 3000 + b",2", b"3,4", b'5,"' + b"\n".join([b"y" * 900] * 4) + b'"', b"7,8"]
    )
    rows = list(open_corpus([write(tmp_path / "a.csv", data)]).read(0, 99))
    assert [row.value for row in rows if row.value] == [
        {"a": "1", "b": "2"},
        {"a": "3", "b": "4"},
        {"a": "7", "b": "8"},
    ]
    assert [row.line for row in rows if row.value] == [2, 4, 9]
    assert [row.problem[:23] for row in rows if "longer" in row.problem] == ["longer than 2,000 bytes"] * 2
    assert all(len(row.raw or b"") <= CUT_TO for row in rows)
    never_closed = write(tmp_path / "b.csv", b"a,b\n1,2\n3," + open_quote)
    [first, *others] = open_corpus([never_closed]).read(0, 99)
    assert first.value == {"a": "1", "b": "2"}
    assert others
    assert not any(row.value for row in others)


@pytest.mark.usefixtures("short")
def test_a_long_element_of_an_array_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sqsd_filter.corpus.text_formats.BLOCK", 512)
    path = write(tmp_path / "a.json", b'[{"a": 1}, ' + LONG + b"]")
    with pytest.raises(
        InputError, match=r"a value of more than 2,000 characters \(SQSD_FILTER_LONGEST_ROW\), .*element 2"
    ):
        open_corpus([path])


@pytest.mark.parametrize("given", ["16MB", "-1", "1.5", "10"])
def test_a_limit_that_is_none_is_a_usage_error(given: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SQSD_FILTER_LONGEST_ROW", given)
    with pytest.raises(UsageError, match=f"SQSD_FILTER_LONGEST_ROW is '{given}': give a number of bytes"):
        open_corpus([write(tmp_path / "a.jsonl", b"{}")])


def zst(data: bytes) -> bytes:
    return zstandard.ZstdCompressor().compress(data)


@pytest.mark.parametrize(("suffix", "pack"), [(".gz", gzip.compress), (".zst", zst)])
def test_a_small_file_of_one_huge_line_takes_little_memory(
    suffix: str, pack: Callable[[bytes], bytes], tmp_path: Path
) -> None:
    path = write(tmp_path / f"a.jsonl{suffix}", pack(b'{"a": 1}\n' + bytes(20 * LONGEST_ROW) + b'\n{"a": 2}\n'))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    rows = list(open_corpus([path]).read(0, 9))
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert [row.value for row in rows] == [{"a": 1}, None, {"a": 2}]
    assert (after - before) * 1024 < 12 * LONGEST_ROW


def test_a_file_that_decompresses_without_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compression, "TRUSTED", 1 << 20)
    rows = b'{"a": 1}\n' * 200_000
    assert open_corpus([write(tmp_path / "a.jsonl.gz", gzip.compress(rows))]).n_rows == 200_000
    with pytest.raises(
        InputError, match=r"a\.jsonl\.zst is a decompression bomb: its first [\d,]+ bytes become [\d,]+"
    ):
        open_corpus([write(tmp_path / "a.jsonl.zst", zst(rows * 100))])


def pipe(path: Path) -> None:
    os.mkfifo(path)


def listening(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        os.chdir(path.parent)  # an address has 108 bytes at most
        server.bind(path.name)


def endless(path: Path) -> None:
    path.symlink_to("/dev/zero")


@pytest.mark.parametrize(
    ("make", "kind"), [(pipe, "pipe"), (listening, "socket"), (endless, "device")], ids=["pipe", "socket", "device"]
)
@pytest.mark.parametrize("name", ["in.jsonl", "in.parquet", "in.arrow", "in.json"])
def test_what_is_no_file_is_refused_and_never_waited_for(
    make: Callable[[Path], None], kind: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make(tmp_path / name)
    with pytest.raises(InputError, match=f"Cannot read .*{name}: it is a {kind}, not a file; write its content to one"):
        open_corpus([str(tmp_path / name)])


def test_a_link_to_itself_is_refused(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").symlink_to("in.jsonl")
    with pytest.raises(InputError, match=r"in\.jsonl"):
        open_corpus([str(tmp_path / "in.jsonl")])


def test_a_folder_that_links_to_itself_is_read_once(tmp_path: Path) -> None:
    folder = tmp_path / "rows"
    folder.mkdir()
    write(folder / "a.jsonl", b'{"a": 1}\n')
    (folder / "loop").symlink_to(".")
    (folder / "up").symlink_to("..")
    assert open_corpus([str(folder / "**" / "*.jsonl")]).n_rows == 1
    assert open_corpus([str(folder)]).n_rows == 1
