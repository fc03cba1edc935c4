"""The state of a run as a file in Prometheus' text format, for node-exporter's textfile collector and the like.

It is written when the run starts, every few seconds, and when it ends or fails. Files of several runs may lie in one
folder: every sample has the label `run`, the file's name.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from sqsd_filter.errors import InputError
from sqsd_filter.progress import Meter, Progress
from sqsd_filter.wording import printable

if TYPE_CHECKING:
    from sqsd_filter.pipeline.report import RunFigures

log = logging.getLogger(__name__)

WRITE_EVERY = 15.0  # seconds
STATES = ("running", "ok", "failed", "interrupted")
PHASE_FIGURES = {
    "rows": "Rows done",
    "expected": "Rows there are to do, where that is known",
    "seconds": "Time spent",
    "rows_per_second": "Rows done per second",
    "tokens": "Tokens run through the model, padding left out",
    "tokens_per_second": "Tokens per second",
}


class Metrics:
    """Keeps a file in step with a run, and counts for it: `meter` is the `Progress` to hand to the run.

    Without a path it only counts. Raises `InputError` on entry where the file can't be written; later it warns.
    """

    def __init__(self, path: str | Path | None, progress: Progress) -> None:
        self.meter = Meter(progress)
        self.report: RunFigures | None = None
        self._path = Path(path) if path else None
        self._started = time.time()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._keep_writing, daemon=True)

    def __enter__(self) -> Metrics:
        if self._path is not None:
            try:
                self._write("running")
            except OSError as problem:
                raise InputError(f"The metrics file can't be written ({problem}): name another.") from problem
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._path is None:
            return
        self._over.set()
        self._thread.join()
        self.meter.alive = self.meter.alive and 0
        interrupted = kind is not None and issubclass(kind, KeyboardInterrupt)
        self._try_to_write("ok" if kind is None else "interrupted" if interrupted else "failed")

    def _keep_writing(self) -> None:
        while not self._over.wait(WRITE_EVERY):
            self._try_to_write("running")

    def _try_to_write(self, state: str) -> None:
        try:
            self._write(state)
        except Exception as problem:  # neither the run nor this thread should end for it
            log.warning("the metrics file %s can't be written (%s)", self._path, problem)

    def _write(self, state: str) -> None:
        from prometheus_client import CollectorRegistry, Gauge, write_to_textfile

        assert self._path is not None
        report = self.report
        registry, now, run = CollectorRegistry(), time.time(), printable(self._path.stem)

        def gauge(name: str, help: str, values: Mapping[str, float | None], label: str = "") -> None:
            labels = ["run", label] if label else ["run"]
            metric = Gauge(f"sqsd_filter_{name}", help, labels, registry=registry)
            for key, value in values.items():
                if value is not None:
                    metric.labels(run, *([printable(key)] if label else [])).set(value)

        gauge("state", "1 for what the run is", {s: float(s == state) for s in STATES}, "state")
        gauge("started_seconds", "When the run started, Unix time", {"": self._started})
        gauge("updated_seconds", "When this file was written, Unix time", {"": now})
        gauge("duration_seconds", "How long the run has taken so far", {"": now - self._started})
        phases: Mapping[str, Mapping[str, object]] = self.meter.figures()
        for name, help in PHASE_FIGURES.items():
            by_phase = {phase: _number(figures.get(name)) for phase, figures in phases.items()}
            gauge(f"phase_{name}", f"{help}, by phase", by_phase, "phase")
        gauge("replicas_alive", "Models at work on Ray", {"": self.meter.alive})
        gauge("shards_retried", "Shards that had to be started again", {"": self.meter.retried})
        rows: Mapping[str, object] = report["rows"] if report else {}
        fates = {fate: _number(count) for fate, count in rows.items()}
        gauge("rows", "Rows of a finished run, by fate", fates, "fate")
        gauge("unscored_rows", "Rows without a score, by reason", report["unscored"] if report else {}, "reason")
        gauge("threshold", "Lowest risk among the dropped rows", {"": report["threshold"] if report else None})
        write_to_textfile(str(self._path), registry)


def _number(figure: object) -> float | None:
    return float(figure) if isinstance(figure, int | float) else None
