"""What data and addresses are called reaches no terminal, card or metric as it is."""

from __future__ import annotations

import json
import os
import pty
import shutil
import sys
from pathlib import Path

import pytest

from sqsd_filter.errors import UsageError
from sqsd_filter.storage.secrets import check_address, redacted
from sqsd_filter.wording import printable
from tests.commands import CUT, Command, one_sentence
from tests.corpora import make_rows, write_jsonl

CLEAR = "\x1b[2J\x1b]0;owned\x07"
NAMES = [CLEAR, "\x9b2J", "two\nlines", "\u202eback", "\r", "\x00x"]


def on_a_terminal(*arguments: str) -> bytes:
    """What the command prints where stdout and stderr are a terminal."""
    child, terminal = pty.fork()
    if child == 0:
        os.execv(sys.executable, [sys.executable, "-m", "sqsd_filter", *arguments])
    printed = b""
    try:
        while block := os.read(terminal, 1 << 16):
            printed += block
    except OSError:  # the other end is closed
        pass
    os.waitpid(child, 0)
    return printed


@pytest.mark.parametrize("name", NAMES[:-1])
def test_a_column_is_named_with_escapes(name: str, command: Command, folder: Path) -> None:
    write_jsonl(folder / "in.jsonl", [{**row, f"{name}q": 1} for row in make_rows(20)])
    code, _, err = command("in.jsonl", "out", *CUT, "--per-group", "none")
    assert code == 3
    assert printable(name) in one_sentence(err).replace("\\\\", "\\")
    assert one_sentence(err).isprintable()


@pytest.mark.parametrize("name", NAMES[:-1])
def test_so_is_a_file_in_errors_summaries_and_the_card(name: str, command: Command, folder: Path) -> None:
    write_jsonl(folder / f"{name}.jsonl", make_rows(20))
    code, out, err = command(f"{name}.jsonl", "out", *CUT, "--dry-run")
    assert code == 0
    assert all(line.isprintable() for line in (out + err).splitlines())
    assert printable(name) in out
    write_jsonl(folder / f"{name}.jsonl", [])
    code, _, err = command(f"{name}.jsonl", "out", *CUT)
    assert code == 3
    assert one_sentence(err).isprintable()
    write_jsonl(folder / f"{name}.jsonl", make_rows(20))
    code, out, err = command(f"{name}.jsonl", "out", *CUT, "--metrics-file", f"{name}.prom")
    assert code == 0
    card = (folder / "out" / "README.md").read_text()
    metrics = (folder / f"{name}.prom").read_text()
    assert all(line.isprintable() for text in (out, err, card, metrics) for line in text.split("\n"))


def test_a_terminal_is_left_alone(folder: Path) -> None:
    write_jsonl(folder / "in.jsonl", [{f"{CLEAR}q": 1}])
    printed = on_a_terminal("in.jsonl", "out", *CUT)
    assert b"\\x1b[2J" in printed
    assert b"\x1b" not in printed


def test_a_card_of_a_stranger_is_shown_with_escapes(command: Command, folder: Path) -> None:
    (folder / "rows").mkdir()
    write_jsonl(folder / "rows" / "train.jsonl", make_rows(20))
    (folder / "rows" / "README.md").write_text(f"---\nlicense: mit\n---\n# Title\n\nHi {CLEAR}\x9b2J there\n")
    assert command("rows", "out", *CUT)[0] == 0
    card = (folder / "out" / "README.md").read_text()
    assert "Hi \\x1b[2J" in card
    assert all(line.isprintable() for line in card.split("\n"))


def test_a_marker_does_not_make_a_card_ours(command: Command, folder: Path) -> None:
    marker = "<!-- sqsd-filter: below are the cards of the sources -->"
    (folder / "rows").mkdir()
    write_jsonl(folder / "rows" / "train.jsonl", make_rows(20))
    (folder / "rows" / "README.md").write_text(f"A\n{marker}\n## What it can promise\n\nThese rows are safe.\n")
    assert command("rows", "out", *CUT)[0] == 0
    card = (folder / "out" / "README.md").read_text()
    assert "\n## What it can promise" not in card
    assert "## The original card of `rows`\n\nA\n" in card
    assert command("out:default", "again", *CUT)[0] == 0
    assert (folder / "again" / "README.md").read_text().count("## The original card of `rows`") == 1


SECRET = "MARKPASSWORD1234567890"
SECRETS = [
    f"https://u:{SECRET}@127.0.0.1:9/m",
    f"https://{SECRET}@127.0.0.1:9/m",
    f"hf://datasets/org/name?token={SECRET}",
    f"https://127.0.0.1:9/m?auth={SECRET}",
    f"https://127.0.0.1:9/m?x=1&jwt={SECRET}",
    f"https://127.0.0.1:9/m?code={SECRET}",
    f"https://127.0.0.1:9/m?GoogleAccessId={SECRET}",
    f"https://127.0.0.1:9/m?X-Amz-Credential={SECRET}",
    f"https://127.0.0.1:9/m#access_token={SECRET}",
    f"s3://AKIA{SECRET}@bucket/m",
    f"https://127.0.0.1:9/hf_{SECRET}/m",
]


@pytest.mark.parametrize("address", SECRETS)
@pytest.mark.parametrize(
    "arguments",
    ["{} out", "in.jsonl {}", "in.jsonl out --model {}", "in.jsonl out --pack {}", "in.jsonl out --score-store {}"],
)
def test_a_secret_in_an_address_reaches_no_file_and_no_terminal(
    address: str, arguments: str, command: Command, folder: Path
) -> None:
    code, out, err = command(*arguments.format(address).split(), *CUT)
    assert code == 2
    assert one_sentence(err) == "Error: A URL must not hold a password or a key: give those in the environment."
    assert SECRET not in out
    assert not any(SECRET in path.read_text(errors="replace") for path in folder.rglob("*.json"))


@pytest.mark.parametrize("address", SECRETS)
def test_a_message_of_a_library_that_quotes_an_address_is_redacted(address: str) -> None:
    message = redacted(f"Cannot reach '{address}' (tried {address}).")
    assert SECRET not in message
    assert message.startswith("Cannot reach '")


@pytest.mark.parametrize(
    "address",
    [
        "s3://bucket/part-*.jsonl?endpoint_override=localhost:9000&scheme=http&region=eu",
        "hf://datasets/org/name@refs/convert/parquet/x.parquet",
        "abfs://container@account.dfs.core.windows.net/in.jsonl",
        "sftp://me@host/in.jsonl",
        "https://host/a.jsonl?download=1#rows",
        "no address: a:b@c?key=1",
    ],
)
def test_an_address_without_a_secret_is_left_as_it_is(address: str) -> None:
    check_address(address)
    if "://" in address:
        assert redacted(f"see {address}.") == f"see {address}."


def test_what_is_no_url_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="A URL can't be read"):
        check_address("https://[::1/x")


def test_a_secret_in_a_pack_is_refused_as_well(command: Command, folder: Path, tiny_pack: Path) -> None:
    shutil.copytree(tiny_pack, folder / "pack")
    path = folder / "pack" / "pack.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model": SECRETS[0]}))
    code, out, err = command("in.jsonl", "out", *CUT, "--pack", "pack")
    assert (code, out) == (2, "")
    assert SECRET not in err
