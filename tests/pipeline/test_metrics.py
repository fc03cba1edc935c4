"""The figures of a run, in its report and in Prometheus' text format, whatever its end."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from sqsd_filter.cli.main import main
from sqsd_filter.errors import InputError, RowErrorBudgetExceeded
from sqsd_filter.pipeline import metrics
from sqsd_filter.pipeline.report import FinishedReport
from sqsd_filter.pipeline.run import filter_dataset
from sqsd_filter.progress import Silent
from sqsd_filter.scoring.results import Scores
from sqsd_filter.scoring.scorer import SQSDScorer
from tests.corpora import make_rows, read_report, write_jsonl

FILE = "nightly.prom"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "in.jsonl", [*make_rows(20), b"broken", make_rows(1)[0]])
    return tmp_path


def samples() -> dict[str, Any]:
    """By name, or by name and the label besides `run`."""
    found = {}
    for family in text_string_to_metric_families(Path(FILE).read_text()):
        for sample in family.samples:
            assert sample.labels.pop("run") == "nightly"
            name = sample.name.removeprefix("sqsd_filter_")
            found["/".join([name, *sample.labels.values()])] = sample.value
    return found


def run(pack: Path, **named: Any) -> FinishedReport:
    with metrics.Metrics(FILE, Silent()) as watched:
        scorer = named.pop("scorer", None) or SQSDScorer(pack)
        report = filter_dataset("in.jsonl", "out", drop_top="5%", scorer=scorer, progress=watched.meter, **named)
        watched.report = report
    return report


def test_a_finished_run_says_what_became_of_the_rows_and_how_fast(folder: Path, tiny_pack: Path) -> None:
    report, found = run(tiny_pack), samples()
    assert {k: v for k, v in found.items() if k.startswith("state/")} == {
        "state/ok": 1,
        "state/running": 0,
        "state/failed": 0,
        "state/interrupted": 0,
    }
    assert {f"rows/{fate}": n for fate, n in report["rows"].items()}.items() <= found.items()
    assert (found["rows/scored"], found["rows/duplicates"], found["unscored_rows/bad_json"]) == (20, 1, 1)
    assert found["threshold"] == report["threshold"]
    phases = report["timing"]["phases"]
    assert [(name, phase["rows"]) for name, phase in phases.items()] == [
        ("reading", 22),
        ("lookup", 0),
        ("scoring", 20),
        ("writing", 22),
    ]
    for name, phase in phases.items():
        assert found[f"phase_rows/{name}"] == phase["rows"]
        assert phase["rows_per_second"] * phase["seconds"] == pytest.approx(phase["rows"], rel=0.05)
    assert 0 < found["phase_tokens/scoring"] == phases["scoring"]["tokens"] <= report["tokens"]
    assert found["started_seconds"] <= found["updated_seconds"]
    assert "replicas_alive" not in found
    assert found["shards_retried"] == 0


def test_a_run_that_fails_says_so_and_how_far_it_came(folder: Path, tiny_pack: Path) -> None:
    with pytest.raises(RowErrorBudgetExceeded):
        run(tiny_pack, on_error="fail")
    found, report = samples(), read_report(folder / "out")
    assert (found["state/failed"], report["status"]) == (1, "failed")
    assert found["phase_rows/scoring"] == report["timing"]["phases"]["scoring"]["rows"] == 20
    assert "rows/total" not in found


def test_a_run_that_never_starts_says_so(folder: Path, tiny_pack: Path) -> None:
    (folder / "in.jsonl").unlink()
    with pytest.raises(InputError):
        run(tiny_pack)
    assert samples()["state/failed"] == 1


def test_an_interrupted_run_says_so_and_was_running_before(
    folder: Path, tiny_pack: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Interrupted(SQSDScorer):
        def score(self, *arguments: Any) -> Scores:
            found = super().score(*arguments)
            assert samples()["state/running"] == 1
            raise KeyboardInterrupt
            return found

    monkeypatch.setattr(metrics, "WRITE_EVERY", 0.01)
    with pytest.raises(KeyboardInterrupt):
        run(tiny_pack, scorer=Interrupted(tiny_pack))
    assert samples()["state/interrupted"] == 1
    assert read_report(folder / "out")["timing"]["phases"]["scoring"]["rows"] == 20
    assert [p.name for p in folder.glob("*.prom*")] == [FILE]


def test_a_metrics_file_that_can_not_be_written_is_an_error_before_any_work_and_one_that_can_tells_the_end(
    folder: Path, tiny_pack: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["in.jsonl", "out", "--drop-count", "1", "--pack", str(tiny_pack), "--metrics-file"]
    code, _, err = call(capsys, *arguments, "no/where.prom")
    assert code == 3
    assert re.search(r"^Error: The metrics file can't be written \(.*no/where.*\): name another\.$", err)
    assert not Path("out").exists()
    assert call(capsys, *arguments, FILE, "--dry-run")[0] == 0
    assert not Path(FILE).exists()
    assert call(capsys, *arguments, FILE)[0] == 0
    assert samples()["state/ok"] == 1
    assert call(capsys, *arguments, FILE, "--replicas", "0")[0] == 2
    assert samples()["state/failed"] == 1
    assert call(capsys, *arguments[:-2], "no/pack", "--metrics-file", FILE)[0] == 1
    assert samples()["state/failed"] == 1


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as end:
        main(list(arguments))
    return int(end.value.code or 0), *capsys.readouterr()


def test_it_is_kept_up_to_date_and_a_failing_disk_does_not_end_the_run(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(metrics, "WRITE_EVERY", 0.01)
    with metrics.Metrics(FILE, Silent()) as watched:
        watched.meter.start("scoring", 10)
        watched.meter.replicas(3, 1)
        watched.meter.advance(4, 100)
        while samples().get("phase_rows/scoring") != 4:
            pass
        assert (samples()["replicas_alive"], samples()["shards_retried"]) == (3, 1)
        while not Path(FILE).is_dir():  # the file may be written again at any moment
            Path(FILE).unlink(missing_ok=True)
            with suppress(FileExistsError):
                Path(FILE).mkdir()
    assert f"the metrics file {FILE} can't be written" in caplog.text
