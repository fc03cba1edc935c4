"""Text files that are not one row per line of UTF-8: read where that is safe, else named with the line and the cure."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sqsd_filter.errors import InputError
from tests.corpora import open_corpus
from tests.corpus.source_files import peek, values, write

ROWS = [{"instruction": f"q {k}", "output": f"é {k}"} for k in range(600)]
TEXT = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
CSV = "instruction,output\n" + "".join(f"q {k},é {k}\n" for k in range(600))


@pytest.mark.parametrize(("name", "text"), [("a.jsonl", TEXT), ("a.json", json.dumps(ROWS)), ("a.csv", CSV)])
@pytest.mark.parametrize("mark", [("utf-16-le", b"\xff\xfe"), ("utf-16-be", b"\xfe\xff")], ids=lambda mark: mark[0])
def test_utf_16_with_a_byte_order_mark_is_read(name: str, text: str, mark: tuple[str, bytes], tmp_path: Path) -> None:
    path = write(tmp_path / name, mark[1] + text.encode(mark[0]))
    corpus = open_corpus([path])
    assert values(corpus) == ROWS
    assert [row.value for row in corpus.read(590, 592)] == ROWS[590:592]
    [chunk] = corpus.chunks()
    assert chunk.table.to_pylist() == ROWS


@pytest.mark.parametrize(
    ("encoding", "said"),
    [("utf-16-le", "UTF-16LE"), ("utf-16-be", "UTF-16BE"), ("utf-32", "UTF-32LE")],
)
def test_other_wide_encodings_are_named_with_the_cure(encoding: str, said: str, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", TEXT.encode(encoding))
    with pytest.raises(InputError, match=rf"a\.jsonl is {said}: convert it with `iconv -f {said} -t UTF-8`"):
        peek([path])


def test_utf_16_that_ends_in_the_middle_of_a_character_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is UTF-16, but not throughout"):
        peek([write(tmp_path / "a.jsonl", b"\xff\xfe" + TEXT.encode("utf-16-le")[:-1])])


UNREADABLE = {  # what no row can be read from, and what is said of its first line
    "windows-1252": ('{"q": "é"}\n'.encode("cp1252"), r"line 1: not UTF-8: byte 8; convert .*WINDOWS-1252"),
    "carriage-returns": (b'{"q": 1}\r{"q": 2}\r', r"line 1: not JSON: its rows end with CR alone: convert"),
    "one-line": (b'{"q": 1}{"q": 2}\n', "line 1: not JSON: more than one object on the line"),
    "over-lines": (b'\n{\n "q": 1\n}\n', "line 2: not JSON: Expecting property name .*name the file .json"),
    "printed-python": (b"{'q': 1}\n", "line 1: not JSON: Expecting property name .*if it is printed Python"),
}


@pytest.mark.parametrize(("data", "said"), UNREADABLE.values(), ids=UNREADABLE)
def test_a_file_without_a_readable_row_says_why_with_its_first_line(data: bytes, said: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=rf"No readable row was found in the input. The first is .*a\.jsonl, {said}"):
        peek([write(tmp_path / "a.jsonl", data)])


def test_a_csv_header_in_another_encoding_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"unreadable header row \(not UTF-8: byte 1\); convert the file to UTF-8"):
        peek([write(tmp_path / "a.csv", "é,a\n1,2\n".encode("cp1252"))])


def test_csv_with_carriage_returns_alone_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"unreadable header row .*convert the line ends with `tr"):
        peek([write(tmp_path / "a.csv", b"q,a\r1,2\r")])


@pytest.mark.parametrize("between", ["", " ", "\n", "\r\n\r\n"], ids=repr)
@pytest.mark.parametrize("indent", [None, 2])
def test_objects_in_sequence_are_rows(between: str, indent: int | None, tmp_path: Path) -> None:
    objects = [json.dumps(row, indent=indent, ensure_ascii=False) for row in ROWS]
    corpus = open_corpus([write(tmp_path / "a.json", between.join(objects).encode())])
    assert values(corpus) == ROWS
    assert [row.value for row in corpus.read(520, 522)] == ROWS[520:522]


def test_rows_over_several_lines_have_the_line_on_which_they_begin(tmp_path: Path) -> None:
    text = "\n" + "\n\n".join(json.dumps(row, indent=1) for row in ROWS)
    corpus = open_corpus([write(tmp_path / "a.json", text.encode())])
    assert [row.line for row in corpus.read(0, 600)] == [2 + 5 * k for k in range(600)]
    assert [row.line for row in corpus.read(550, 551)] == [2 + 5 * 550]


def test_a_broken_object_in_a_sequence_is_named_with_its_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"broken JSON: Expecting value, .* on line 2"):
        open_corpus([write(tmp_path / "a.json", b'{"a": 1}{"a": 2}\n{"a": }')])


def test_blank_lines_are_no_rows_and_are_counted(tmp_path: Path) -> None:
    lines = b'{"a": 1}\n\n  \r\n{"a": 2}\n\n'
    corpus = open_corpus([write(tmp_path / "a.jsonl", lines), write(tmp_path / "b.csv", b"\na\n1\n\n2\n")])
    assert values(corpus) == [{"a": 1}, {"a": 2}, {"a": "1"}, {"a": "2"}]
    assert [row.line for row in corpus.read(0, 4)] == [1, 4, 3, 5]
    assert [given.get("blank_lines") for given in corpus.inputs] == [3, 1]


@pytest.mark.parametrize(
    ("data", "line"),
    [
        (b'q,a\n1,2\n3,"open\n5,6\n', 3),
        (b'q,a\n1,"closed"\n3,"over\nlines","and open\n5,6\n', 4),
        (b'q,a\n1,2\n3,"open', 3),
    ],
)
def test_a_quote_that_is_never_closed_is_named_with_its_line(data: bytes, line: int, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"a quote that is never closed: it opens on line {line};"):
        open_corpus([write(tmp_path / "a.csv", data)])
