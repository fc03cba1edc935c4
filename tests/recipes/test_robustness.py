"""The scripts in recipes/robustness at their smallest size, what they find, and their figures in the docs."""

from __future__ import annotations

import importlib
import json
import signal
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.recipes.scripts import RECIPES

SCRIPTS = RECIPES / "robustness"
CHANGES = ("input replaced", "input rewritten")
FAULTS = ("none", "disk full", "command killed", "store refuses", *CHANGES, "replica killed")
Run = Callable[..., tuple[int, dict[str, Any]]]


@pytest.fixture(autouse=True)
def _on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scripts import each other as they do when they are run."""
    for folder in (SCRIPTS, RECIPES / "benchmarks"):
        monkeypatch.syspath_prepend(str(folder))


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a script in the test's folder: exit code, and the figures that it prints and writes."""

    def start(name: str, *arguments: object) -> tuple[int, dict[str, Any]]:
        capsys.readouterr()
        code = script(name).main(["--work", str(tmp_path), *map(str, arguments)])
        figures = json.loads(capsys.readouterr().out)
        assert figures == json.loads((tmp_path / f"{name}.json").read_text())
        return code, figures

    return start


def script(name: str) -> ModuleType:
    return importlib.import_module(name)


def test_a_killed_run_is_compared_with_an_undisturbed_one(run: Run, tmp_path: Path) -> None:
    code, figures = run("kills", "--kills", 1, "--rows", 20, "--forms", "jsonl")
    assert (code, figures["faults"]) == (0, [])
    assert figures["kills"] == figures["by form"]["jsonl"] >= 1
    rounds = (tmp_path / "kills.jsonl").read_text()
    assert run("kills", "--kills", 1, "--rows", 20, "--forms", "jsonl")[1] == figures  # nothing is left to do
    assert (tmp_path / "kills.jsonl").read_text() == rounds


@pytest.mark.slow
def test_every_form_of_output_is_killed(run: Run) -> None:
    code, figures = run("kills", "--kills", 14, "--rows", 20, "--replicas", 1)
    assert (code, figures["faults"]) == (0, [])
    assert all(count for form, count in figures["by form"].items() if form != "compact")  # which is over in no time


def test_every_mutated_line_and_value_is_accounted_for(run: Run) -> None:
    code, figures = run("mutations", "--lines", 300, "--files", 10)
    assert (code, figures["faults"]) == (0, [])
    assert figures["kept"] + figures["dropped"] + figures["errors"] == figures["lines"] >= 300
    assert min(figures[name] for name in ("kept", "dropped", "errors", "values compared")) > 0
    assert set(figures["files"].values()) == {2}


def test_a_night_of_faults_loses_nothing(run: Run) -> None:
    code, figures = run("nightly", "--minutes", 0.01, "--rows", 5, "--ray", 0)
    assert (code, figures["faults"]) == (0, [])
    assert figures["nights"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_of_a_night_is_survived(fault: str, tmp_path: Path) -> None:
    nightly, workbench = script("nightly"), script("workbench")
    workbench.make_pack(tmp_path)
    corpus = nightly.Corpus(20)
    assert tuple(nightly.FAULTS) == FAULTS
    with workbench.ray_sessions() as sessions:
        quiet = nightly.run_night(tmp_path, 0, corpus, "none", sessions)
        disturbed = nightly.run_night(tmp_path, 1, corpus, fault, sessions)
    assert quiet["faults"] + disturbed["faults"] == []
    assert disturbed["reused"] >= 100


def test_many_rows_are_counted_with_the_memory_that_they_take(run: Run) -> None:
    code, figures = run("million", "--rows", 50)
    assert (code, figures["faults"]) == (0, [])
    assert (figures["kept"], figures["dropped"]) == (47, 3)
    assert 0 < figures["peak MB"] <= 1500


# ------------------------------------------------------------------------------------------- they do find what is wrong


def test_a_line_in_two_places_or_in_none_is_found(tmp_path: Path) -> None:
    placed = script("mutations").placed
    lines = [b'{"id": 1}', b"broken", b'{"id": 2}', b'{"id": 3}']
    (tmp_path / "in.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    home = tmp_path / "out" / "_sqsd"
    parts = {
        tmp_path / "out" / "data": [lines[0], lines[3]],
        home / "dropped": [b'{"id": 2, "sqsd_row": "in.jsonl:3"}'],
        home / "errors": [b"broken"],
    }

    def write() -> tuple[dict[str, int], list[str]]:
        for folder, content in parts.items():
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "train.jsonl").write_bytes(b"".join(line + b"\n" for line in content))
        (home / "reasons.jsonl").write_text('{"line": 2}\n')
        found: tuple[dict[str, int], list[str]] = placed(tmp_path)
        return found

    assert write() == ({"lines": 4, "kept": 2, "dropped": 1, "errors": 1}, [])
    parts[tmp_path / "out" / "data"] = [lines[0]]
    assert write()[1] == ["1 lines are kept and 2 are left, or their bytes or order differ"]
    parts[tmp_path / "out" / "data"] = [lines[3], lines[0]]
    assert len(write()[1]) == 1
    parts[tmp_path / "out" / "data"] = [lines[0], lines[3]]
    parts[home / "dropped"] = [b'{"id": 9, "sqsd_row": "in.jsonl:3"}', b'{"id": 2, "sqsd_row": "in.jsonl:3"}']
    assert write()[1] == ["line 3 has other bytes", "line 3 is in two places, or nowhere in the input"]


def test_another_value_than_the_second_parsers_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    second_parser = script("second_parser")
    rows = [{"a": 1.0, "b": "x"}, {"a": -0.0, "b": None}]
    path = tmp_path / "in.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path)
    assert second_parser._examine(path) == {"outcome": "read", "rows": 2, "compared": 2, "faults": []}  # noqa: SLF001
    monkeypatch.setattr(second_parser, "_pyarrow_rows", lambda _: [rows[0], {"a": 0.0, "b": None}])
    [fault] = second_parser._examine(path)["faults"]  # noqa: SLF001
    assert "-0.0" in fault
    (tmp_path / "in.jsonl").write_bytes(b'{"a": 1}\n{"a": 1, "a": 2}\n')
    found = second_parser._examine(tmp_path / "in.jsonl")  # noqa: SLF001
    assert (found["compared"], found["stricter"], found["faults"]) == (1, {"stands twice in one object": 1}, [])
    monkeypatch.setattr(second_parser, "STRICTER", ())
    assert len(second_parser._examine(tmp_path / "in.jsonl")["faults"]) == 1  # noqa: SLF001


def test_mutations_are_the_same_for_the_same_seed() -> None:
    mutate, workbench = script("mutate"), script("workbench")

    def some(seed: int) -> list[bytes]:
        source = mutate.Chance(seed)
        rows = [workbench.make_row(k, source) for k in range(10)]
        return [mutate.mutate_line(row, source) for row in rows] + [
            mutate.mutated_file(kind, rows, source) for kind in mutate.KINDS
        ]

    assert some(1) == some(1) != some(2)


def test_rows_that_are_lost_doubled_or_changed_are_found(tmp_path: Path) -> None:
    nightly, workbench = script("nightly"), script("workbench")
    source = nightly.random.Random(0)
    rows = [{**workbench.make_row(k, source), "sqsd_risk": float(k)} for k in range(20)]

    def wrong(kept: list[dict[str, Any]], dropped: list[dict[str, Any]]) -> list[str]:
        for folder, part in (("data", kept), ("_sqsd/dropped", dropped)):
            (tmp_path / "out" / folder).mkdir(parents=True, exist_ok=True)
            plain = [{key: value for key, value in row.items() if key not in ("big", "nested")} for row in part]
            pq.write_table(pa.Table.from_pylist(plain), tmp_path / "out" / folder / "train.parquet")
        found: list[str] = nightly.wrong_with(tmp_path / "out", rows)
        return found

    assert wrong(rows[:19], rows[19:]) == []
    assert wrong(rows[:18], rows[19:]) == ["1 rows lost, 0 doubled"]
    assert wrong([rows[0], *rows[:18]], rows[19:]) == ["1 rows lost, 1 doubled"]
    assert wrong([{**rows[0], "zip": "7"}, *rows[1:19]], rows[19:]) == ["1 rows changed"]
    assert wrong(rows[1:], rows[:1]) == ["a kept row is riskier than a dropped one"]
    assert wrong(rows[:18], rows[18:]) == ["2 of 20 rows dropped"]
    assert wrong([{**rows[0], "sqsd_risk": 0.5}, *rows[1:19]], rows[19:]) == ["1 rows have another risk"]


def test_a_line_that_was_cut_off_is_no_round(tmp_path: Path) -> None:
    journal = script("workbench").Journal
    journal(tmp_path / "j").add({"faults": [], "n": 1})
    with (tmp_path / "j").open("a") as sink:
        sink.write('{"faults": ["x')
    again = journal(tmp_path / "j")
    again.add({"faults": ["lost"], "n": 2})
    assert (journal(tmp_path / "j").total("n"), again.faults) == (3, ["lost"])


def test_ctrl_c_ends_the_process_that_runs_and_prints_the_figures_so_far(run: Run, tmp_path: Path) -> None:
    workbench, begun = script("workbench"), []

    def stop(*_: object) -> dict[str, Any]:
        begun.append(workbench.Child(tmp_path, "filter", "--help"))
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script("nightly"), "run_night", stop)
        code, figures = run("nightly", "--minutes", 1)
    assert (code, figures["nights"]) == (0, 0)
    begun[0].process.join(60)
    assert begun[0].process.exitcode == -signal.SIGKILL


def test_the_page_on_output_has_the_table_of_the_committed_figures() -> None:
    table = script("table")
    results = json.loads(table.RESULTS.read_text(encoding="utf-8"))
    assert table.table(results) in (RECIPES.parent / "docs" / "output.md").read_text(encoding="utf-8")


def test_figures_are_put_beside_those_of_other_scripts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = script("table")
    committed = json.loads(table.RESULTS.read_text(encoding="utf-8"))
    monkeypatch.setattr(table, "RESULTS", tmp_path / "results.json")
    for name, figures in committed.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(figures))
        table.gather(tmp_path)
        (tmp_path / f"{name}.json").unlink()
    assert json.loads((tmp_path / "results.json").read_text()) == committed
