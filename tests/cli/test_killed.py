"""A run that was killed at any moment is finished by the same command."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import time
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import pytest

from sqsd_filter.cli.main import main
from sqsd_filter.pipeline.report import CONFIGS
from tests.commands import CUT, Command, entries, one_sentence
from tests.corpora import content, make_rows, read_report, segments, split_file, write_jsonl

pytestmark = pytest.mark.pictures  # the processes that are killed draw them


def moments(fast: str, **names: int) -> pytest.MarkDecorator:
    """A test at each of these moments; all but the `fast` one are slow."""
    cases = [pytest.param(at, id=name, marks=() if name == fast else pytest.mark.slow) for name, at in names.items()]
    return pytest.mark.parametrize("moment", cases)


def test_output_that_cannot_be_printed_is_a_failure_but_no_bug(
    started: Callable[..., ForkServerProcess], folder: Path
) -> None:
    (folder / "stdout").symlink_to("/dev/full")
    process = started(0, 0, "in.jsonl", "out", *CUT, "--json")
    process.join(60)
    assert process.exitcode == 1
    assert "No space left" in one_sentence((folder / "stderr").read_text())
    assert read_report(folder / "out")["status"] == "ok"


# 1,030 rows are three shards, each with a few conversations of its own; a line or two of every fate
ROWS = [row if k % 512 < 6 else {**make_rows(1)[0], "id": k} for k, row in enumerate(make_rows(1030))]
LINES: list[dict[str, Any] | bytes] = [
    *ROWS[:700],
    b"broken",
    {"id": -1, "instruction": "?", "output": ""},
    *ROWS[700:],
]
BIG = ("big.jsonl", "out", *CUT, "--pack")


@pytest.fixture
def big(folder: Path, tiny_pack: Path) -> list[str]:
    write_jsonl(folder / "big.jsonl", LINES)
    return [*BIG, str(tiny_pack)]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, tiny_pack: Path) -> dict[str, Any]:
    """What a run leaves that nothing happens to."""
    home, folder = Path.cwd(), tmp_path_factory.mktemp("undisturbed")
    write_jsonl(folder / "big.jsonl", LINES)
    os.chdir(folder)
    try:
        with pytest.raises(SystemExit):
            main([*BIG, str(tiny_pack), "-q"])
    finally:
        os.chdir(home)
    return content(folder / "out")


@moments(
    "shard_1",
    start=1,
    shard_0=2,
    shard_1=3,
    shard_2=4,
    kept=5,
    dropped=6,
    errors=7,
    picture=8,
    card=9,
    notes=10,
    page=11,
    report=12,
)
def test_a_run_killed_at_any_moment_is_finished_by_the_same_command_to_the_same_bytes(
    moment: int, big: list[str], killed: Callable[..., int], command: Command, undisturbed: dict[str, Any]
) -> None:
    assert killed(moment, signal.SIGKILL, *big) == -signal.SIGKILL
    before = segments(Path("out/_sqsd"))
    assert len(before) == min(max(moment - 2, 0), 3)  # each of the moments 3 to 5 comes after a shard
    assert command(*big)[0] == 0
    after = segments(Path("out/_sqsd"))
    assert before.items() <= after.items()
    assert len(after) == 3
    assert content(Path("out")) == undisturbed


@pytest.mark.parametrize("moment", [2, 4, 6, 9])
@pytest.mark.parametrize("to", ["parquet", "arrow", "jsonl"])
def test_several_files_of_any_format_appear_as_if_nothing_had_happened(
    to: str, moment: int, killed: Callable[..., int], command: Command, folder: Path
) -> None:
    rows = [{"id": k, "sqsd_risk": k * 7919 % 5000 / 7, "sqsd_status": "scored"} for k in range(5000)]  # three batches
    write_jsonl(folder / "scored.jsonl", rows)
    select = ["select", "scored.jsonl", "out", *CUT, "--to", to, "--shard-size", "1KB"]
    assert killed(moment, signal.SIGKILL, *select) == -signal.SIGKILL
    assert command(*select)[0] == 0
    assert "already done" in command(*select)[1]
    found = content(Path("out"))
    shutil.rmtree("out")
    assert command(*select)[0] == 0
    assert content(Path("out")) == found
    assert len([name for name in found if "of-00003" in name]) == 6


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-C", "SIGTERM"])
def test_an_interrupted_run_prints_the_command_that_goes_on(
    kind: int, big: list[str], killed: Callable[..., int], command: Command, folder: Path, undisturbed: dict[str, Any]
) -> None:
    assert killed(4, kind, *big) == 130
    said = (folder / "stderr").read_text()
    assert (folder / "stdout").read_text() == ""
    assert "Traceback" not in said
    assert read_report(Path("out"))["status"] == "interrupted"
    assert not (folder / "out" / "_sqsd" / "lock").exists()
    before = segments(Path("out/_sqsd"))
    program, *arguments = shlex.split(said.splitlines()[-1])
    assert program == "sqsd-filter"
    assert command(*arguments)[0] == 0
    assert len(before) >= 2
    assert before.items() <= segments(Path("out/_sqsd")).items()
    assert content(Path("out")) == undisturbed


def test_two_runs_on_one_destination_are_one_too_many(
    big: list[str], started: Callable[..., ForkServerProcess], command: Command, undisturbed: dict[str, Any]
) -> None:
    first = started(3, signal.SIGSTOP, *big)
    stat, deadline = Path(f"/proc/{first.pid}/stat"), time.monotonic() + 60
    while stat.read_text().rsplit(")", 1)[1].split()[0] != "T":
        assert time.monotonic() < deadline
        assert first.exitcode is None
        time.sleep(0.02)
    for extra in ([], ["--overwrite"]):
        code, _, err = command(*big, *extra)
        assert code == 5
        assert "Another run is writing to out right now" in one_sentence(err)
    assert first.pid is not None
    os.kill(first.pid, signal.SIGCONT)
    first.join(60)
    assert first.exitcode == 0
    assert content(Path("out")) == undisturbed


@moments("half_swapped", scores=2, export=5, report=11, swap=12, half_swapped=13)
def test_a_killed_overwrite_never_costs_the_old_output_and_can_be_finished(
    moment: int, command: Command, killed: Callable[..., int], folder: Path
) -> None:
    command("in.jsonl", "out", *CUT)
    command("in.jsonl", "straight", *CUT)
    before = content(Path("out"))
    write_jsonl(folder / "in.jsonl", make_rows(63))
    command("in.jsonl", "straight", *CUT, "--overwrite")
    replace = ["in.jsonl", "out", *CUT, "--overwrite"]
    assert killed(moment, signal.SIGKILL, *replace) == -signal.SIGKILL
    assert content(Path(".out.sqsd-old" if moment == 13 else "out")) == before
    assert command(*replace)[0] == 0
    for config in CONFIGS:
        assert split_file(Path("out"), config).read_bytes() == split_file(Path("straight"), config).read_bytes()
    assert read_report(Path("out"))["rows"]["reused"] == 60
    assert entries(folder) == ["in.jsonl", "out", "stderr", "stdout", "straight"]


@moments("swap", report=7, swap=8, no_file=9, old_home=10, no_home=11)
def test_a_score_file_and_its_home_are_swapped_together_even_when_killed(
    moment: int, command: Command, killed: Callable[..., int], folder: Path
) -> None:
    command("score", "in.jsonl", "a.parquet")
    command("score", "in.jsonl", "straight.parquet")
    write_jsonl(folder / "in.jsonl", make_rows(63))
    command("score", "in.jsonl", "straight.parquet", "--overwrite")
    replace = ["score", "in.jsonl", "a.parquet", "--overwrite"]
    assert killed(moment, signal.SIGKILL, *replace) == -signal.SIGKILL
    assert command(*replace)[0] == 0
    assert Path("a.parquet").read_bytes() == Path("straight.parquet").read_bytes()
    expected = [
        "a.parquet",
        "a.parquet.sqsd",
        "in.jsonl",
        "stderr",
        "stdout",
        "straight.parquet",
        "straight.parquet.sqsd",
    ]
    assert entries(folder) == expected
    assert "already done" in command("score", "in.jsonl", "a.parquet")[1]


@pytest.mark.parametrize("moment", [2, 4, 5, 6, 8])
@pytest.mark.parametrize("name", ["out.jsonl", "out.json.gz", "out.parquet"])
def test_one_file_appears_as_if_nothing_had_happened(
    name: str, moment: int, killed: Callable[..., int], command: Command, folder: Path
) -> None:
    rows = [{"id": k, "sqsd_risk": k * 7919 % 5000 / 7, "sqsd_status": "scored"} for k in range(5000)]
    write_jsonl(folder / "scored.jsonl", rows)
    select = ["select", "scored.jsonl", name, *CUT]
    assert killed(moment, signal.SIGKILL, *select) == -signal.SIGKILL
    assert command(*select)[0] == 0
    assert "already done" in command(*select)[1]
    assert entries(folder) == sorted(["in.jsonl", name, f"{name}.sqsd", "scored.jsonl", "stderr", "stdout"])
    assert command("select", "scored.jsonl", f"straight-{name}", *CUT)[0] == 0
    files = [Path(name), *(p for part in ("dropped", "errors") for p in Path(f"{name}.sqsd", part).iterdir())]
    assert len(files) == 3
    for file in files:
        assert file.read_bytes() == Path(f"straight-{file}").read_bytes()


@moments("swap", report=9, swap=10, no_file=11, old_home=12, no_home=13)
def test_a_file_and_its_home_are_swapped_together_even_when_killed(
    moment: int, command: Command, killed: Callable[..., int], folder: Path
) -> None:
    command("in.jsonl", "a.jsonl", *CUT)
    write_jsonl(folder / "in.jsonl", make_rows(63))
    command("in.jsonl", "straight.jsonl", *CUT)
    replace = ["in.jsonl", "a.jsonl", *CUT, "--overwrite"]
    assert killed(moment, signal.SIGKILL, *replace) == -signal.SIGKILL
    assert command(*replace)[0] == 0
    assert Path("a.jsonl").read_bytes() == Path("straight.jsonl").read_bytes()
    names = ["a.jsonl", "a.jsonl.sqsd", "in.jsonl", "stderr", "stdout", "straight.jsonl", "straight.jsonl.sqsd"]
    assert entries(folder) == names
    assert "already done" in command(*replace[:-1])[1]
