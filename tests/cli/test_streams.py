"""What the command prints: the result on stdout, everything else on stderr."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest

from tests.commands import CUT, Command, entries, one_sentence
from tests.corpora import make_rows, read_report, write_jsonl


def test_the_summary_is_a_dozen_lines_on_stdout_and_no_bar_is_drawn_off_a_terminal(command: Command) -> None:
    code, out, err = command("in.jsonl", "out", *CUT)
    assert code == 0
    assert len(out.splitlines()) <= 12
    assert "57 of 60 rows kept in out (drop-top 5%)" in out
    assert 'load_dataset("out", "dropped")' in out
    assert err == "reading rows as alpaca (instruction, output)\n"


def test_select_says_whose_scores_it_cut_and_that_no_model_was_run(command: Command, folder: Path) -> None:
    command("in.jsonl", "out", *CUT)
    code, out, _ = command("select", "out", "other", "--drop-top", "10%")
    assert code == 0
    assert "\n  scores   from out; no model was run\n" in out
    assert "by the model" not in out
    assert "tokens" not in out
    report = read_report(folder / "other")
    assert report["scores_from"] == "out"
    assert (report["rows"]["scored"], report["rows"]["reused"]) == (0, 60)


def test_the_summary_shows_the_largest_groups_in_aligned_lines(command: Command, folder: Path) -> None:
    names = ["maths", "line\nbreak", "", None, {"of": 1}, "x" * 99, *"abcdefg"]
    write_jsonl(folder / "in.jsonl", [{**row, "kind": names[row["id"] % 17 % 13]} for row in make_rows(60)])
    code, out, _ = command("in.jsonl", "out", *CUT, "--per-group", "kind")
    head, *lines = out[out.index("  groups ") :].splitlines()
    assert code == 0
    assert head == "  groups          13   by 'kind'"
    assert [line[:45].strip() for line in lines[:3]] == ["maths", '"line\\nbreak"', '""']
    assert {"null", '{"of": 1}', "x" * 39 + "…"} < {line[:45].strip() for line in lines[:10]}
    assert len(lines) == 11
    assert lines[10] == "    ... and 3 more"
    found = sorted(read_report(folder / "out")["groups"]["groups"], key=lambda group: -group["scored"])
    for line, group in zip(lines[:10], found[:10], strict=True):
        tail = f"   from risk {group['threshold']:.4f}" if group["dropped"] else ""
        assert line[44:] == f"   {group['scored']} rows   {group['dropped']} dropped{tail}"

    _, out, _ = command("select", "out", "other", "--drop-top", "99%", "--per-group", "kind", "--per-split")
    assert "\n  spared          13   rows that the cut would drop are kept" in out
    assert "\n    train: maths " in out
    _, out, _ = command("select", "out", "weights", *CUT, "--weights", "--per-split")
    weights = read_report(folder / "weights")["weights"]["sum"]
    assert f"  weights  {weights:>9,.1f}   is the sum" in out
    assert "\n  splits           1\n    train   60 rows" in out


def test_the_summary_tells_how_to_load_what_was_written(command: Command) -> None:
    _, out, _ = command("in.jsonl", "arrow", *CUT, "--to", "arrow")
    assert 'load_dataset("arrow", "dropped")' in out
    _, out, _ = command("in.jsonl", "lines", *CUT, "--to", "jsonl", "--shard-size", "1KB", "--with-scores")
    assert 'load_dataset("lines", "dropped")' in out
    report = read_report(Path("lines"))
    assert (report["shard_size"], report["settings"]["with_scores"]["origin"]) == (1000, "flag")


def test_json_puts_the_report_and_nothing_else_on_stdout(command: Command) -> None:
    code, out, err = command("in.jsonl", "out", *CUT, "--json")
    assert code == 0
    assert json.loads(out) == read_report(Path("out"))
    assert "{" not in err
    _, again, _ = command("in.jsonl", "out", *CUT, "--json", "-q")
    assert json.loads(again) == {**json.loads(out), "already_done": True}


def test_quiet_prints_nothing_unless_something_is_wrong(command: Command) -> None:
    assert command("in.jsonl", "out", *CUT, "-q") == (0, "", "")
    code, out, err = command("none.jsonl", "out", *CUT, "-q")
    assert (code, out) == (3, "")
    assert one_sentence(err)


@pytest.mark.parametrize("colour", [True, False], ids=["colour", "NO_COLOR"])
def test_a_terminal_gets_a_bar_coloured_unless_told_otherwise(
    colour: bool, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "sqsd_filter.cli.output.Display.bars", property(lambda self: True, lambda self, value: None), raising=False
    )
    monkeypatch.setenv("TQDM_MININTERVAL", "0")
    if not colour:
        monkeypatch.setenv("NO_COLOR", "1")
    code, out, err = command("in.jsonl", "out", *CUT)
    assert code == 0
    assert "57 of 60" in out
    assert all(text in err for text in ("reading:", "scoring:", "writing:", "/60"))
    assert ("\x1b[3" in err) == colour


def test_off_a_terminal_a_line_now_and_then_tells_pace_and_time_left(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from sqsd_filter.cli.output import Display

    clock = iter([0.0, 31.0, 40.0, 62.0, 93.0])
    monkeypatch.setattr("sqsd_filter.cli.output.time.monotonic", lambda: next(clock))
    display = Display()
    display.start("scoring", 1240)
    for _ in range(4):
        display.advance(155, 3100)
    assert capsys.readouterr().err.splitlines() == [
        "scoring: 155 of 1,240 rows, 5.0 rows/s, 100 tokens/s",  # a model was loaded meanwhile
        "scoring: 465 of 1,240 rows, 7.5 rows/s, 150 tokens/s, 1 min 18 s left",  # 310 rows took 31 s
        "scoring: 620 of 1,240 rows, 6.7 rows/s, 133 tokens/s, 1 min 23 s left",
    ]


@pytest.mark.parametrize(("replicas", "known"), [(1, 256), (4, 620)], ids=["one", "four"])
def test_the_time_left_is_that_of_whole_shards_not_of_their_longest_rows(
    replicas: int, known: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from sqsd_filter.cli.output import Display

    clock = itertools.count(0.0, 31.0)
    monkeypatch.setattr("sqsd_filter.cli.output.time.monotonic", lambda: next(clock))
    display = Display()
    display.start("scoring", 1240)
    display.replicas(replicas, 0)
    for _ in range(1240):
        display.advance(1)
    lines = capsys.readouterr().err.splitlines()
    assert [int(line.split()[1].replace(",", "")) for line in lines if " left" in line] == list(range(known, 1240))


def test_a_dry_run_tells_the_cost_and_writes_nothing(command: Command, folder: Path) -> None:
    code, out, _ = command("in.jsonl", "out", *CUT, "--dry-run")
    assert code == 0
    assert "60 rows of 1 file, read as alpaca (instruction, output)" in out
    assert "tokens" in out
    assert "in.jsonl (60 rows)" in out
    guess = json.loads(command("score", "in.jsonl", "out.parquet", "--dry-run", "--json")[1])
    assert guess["to_score"] == 60
    assert guess["passes"] == 2
    report = json.loads(command("in.jsonl", "real", *CUT, "--json")[1])
    assert guess["tokens"] == report["tokens"]
    assert entries(folder) == ["in.jsonl", "real"]
    for scorer, passes in (("length", "no pass"), ("danger", "one pass"), ("sqsd", "2 passes")):
        assert f"; {passes} through the model" in command("in.jsonl", "out", *CUT, "--scorer", scorer, "--dry-run")[1]
