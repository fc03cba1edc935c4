"""One run from its destination's point of view: claimed, worked on, told of whatever happens, published."""

from __future__ import annotations

import hashlib
import logging
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

from sqsd_filter.corpus.addresses import Source
from sqsd_filter.corpus.repositories import HUB
from sqsd_filter.errors import SQSDError, UsageError
from sqsd_filter.pipeline.page.page import write_page
from sqsd_filter.pipeline.publishing.bucket import Bucket
from sqsd_filter.pipeline.publishing.hub import PushTo
from sqsd_filter.pipeline.publishing.target import Finished, Target, run_id
from sqsd_filter.pipeline.report import versions, write_report
from sqsd_filter.pipeline.stage.engines import Engine
from sqsd_filter.pipeline.writing.card import card_text, write_card
from sqsd_filter.pipeline.writing.destination import (
    LOCK_FILE,
    NOTES_FILE,
    PAGE_FILE,
    REPORT_FILE,
    RUN_FILE,
    Destination,
    lock_run,
    read_json,
)
from sqsd_filter.progress import Meter
from sqsd_filter.scoring.embedded import cache_dir

log = logging.getLogger(__name__)

Made = tuple[dict[str, Any], dict[str, Any]]  # what work has to say: for the report, and the notes for the page


@dataclass(frozen=True)
class Outlet:
    """Where a run goes: a place on this disk, and perhaps a target that gets it from there. Where only the target was
    asked for, the place is a stage that is struck in the end."""

    destination: Destination
    target: Target | None = None
    stage: Path | None = None
    lock: IO[bytes] | None = None  # on the stage
    has_card: bool = True

    @classmethod
    def of(cls, dest: str | Path, overwrite: bool, push: PushTo | None) -> Outlet:
        """Raises `SQSDError` where the run can't go there, as far as can be told before its work."""
        target: Target | None = push and replace(push, overwrite=overwrite or push.overwrite)
        stage, lock = None, None
        if "://" in str(dest):
            url = str(dest)
            there = PushTo.at(url, overwrite=overwrite) if url.startswith(HUB) else None
            same = there is not None and push is not None and there.repo == push.repo
            if push is not None and not (same and there and there.revision in (None, push.revision)):
                raise UsageError(f"{url} and {push.repo} are two destinations: give a folder, and push to one of them.")
            target = target or there or Bucket(url, overwrite=overwrite)
            stage = stage_of(url)
        if target is not None:
            target.check()
        if stage is not None:
            stage.mkdir(parents=True, exist_ok=True)
            lock = lock_run(stage / LOCK_FILE, dest)
        folder = Path(dest) if stage is None else stage / "out"
        destination = Destination(folder, lambda root: root / "sqsd", overwrite=overwrite or stage is not None)
        return cls(destination, target, stage, lock)

    def spare(self, sources: Iterable[Source]) -> None:
        """Raise `DestinationExists` for a source that would be lost with what is replaced, `UsageError` for a folder
        that the output would become a part of."""
        for source in sources:
            for root in source.roots:
                if self.target is not None:
                    self.target.spare(root)
                if self.stage is not None or "://" in root:
                    continue
                self.destination.spare([root])
                target = self.destination.target.resolve()
                if Path(root).is_dir() and target.is_relative_to(Path(root).resolve()):
                    raise UsageError(
                        f"{self.destination.target} lies in the source {root}, and would be read with it the next "
                        "time: choose a destination outside."
                    )

    def close(self) -> None:
        """Strike a stage on which there is nothing to go on from, and let others have it."""
        if self.stage is not None and not self.destination.holds_work():
            shutil.rmtree(self.stage, ignore_errors=True)
        if self.lock is not None:
            self.lock.close()


def stage_of(url: str) -> Path:
    """Where the run to a URL stands until all of it has arrived there."""
    return cache_dir() / "stages" / hashlib.blake2b(url.encode(), digest_size=8).hexdigest()


@dataclass
class Job:
    """Everything a run has in common, whatever it exports.

    `identity` is what makes two runs the same; `record` is only told in the report. `originals` has the cards of the
    datasets that were read.
    """

    outlet: Outlet
    identity: dict[str, Any]
    meter: Meter
    record: Mapping[str, Any]
    started: float
    facts: dict[str, Any] = field(default_factory=dict)
    engine: Engine | None = None
    originals: Sequence[tuple[str, str]] = ()

    @property
    def published_run(self) -> str:
        """The run as a target knows it: explanations never get there, so they make no other run of it."""
        return run_id({name: value for name, value in self.identity.items() if name != "explain"})

    def carry_out(self, work: Callable[[], Made]) -> dict[str, Any]:
        """Claim the destination, do the work, leave a report whatever happens, publish. Returns the report.

        Raises `SQSDError` where the disk or the target refuses.
        """
        destination, target, stage = self.outlet.destination, self.outlet.target, self.outlet.stage
        try:
            report = target.published(self.published_run) if target is not None else None
            if report is not None and stage is not None:
                report["already_done"] = True
            else:
                report = self._on_disk(work)
                if target is not None:
                    report = self._published(target, report)
            if stage is not None:
                shutil.rmtree(stage)
            return report
        except OSError as problem:
            raise SQSDError(
                f"The run can't go on ({problem}): mend that and run the same command again; no score is lost."
            ) from problem
        finally:
            self.meter.finish()
            destination.release()

    def _on_disk(self, work: Callable[[], Made]) -> dict[str, Any]:
        destination = self.outlet.destination
        if destination.claim(self.identity):
            report = {**read_json(destination.home / REPORT_FILE), "already_done": True}
        else:
            report = self._carry_out(work)
        destination.publish()
        return report

    def _published(self, target: Target, report: dict[str, Any]) -> dict[str, Any]:
        run, root = self.published_run, self.outlet.destination.root
        if target.published(run) is not None:
            return report
        self.meter.start("publishing", None)
        home = self.outlet.destination.home
        names = [*(file["path"] for file in report["files"]), *report["extra_files"]]
        own = [home / RUN_FILE, home / REPORT_FILE, *sorted((home / "scores").glob("[!.]*"))]
        own += [page for name in (PAGE_FILE, NOTES_FILE) if (page := home / name).is_file()]
        files = {name: root / name for name in names} | {str(path.relative_to(root)): path for path in own}

        def card(told: Mapping[str, Any], name: str) -> str:
            return card_text(told, self.originals, name)

        where = target.publish(Finished(run, files, report, card))
        return {**report, "published": where, "already_done": False}

    def _carry_out(self, work: Callable[[], Made]) -> dict[str, Any]:
        base = {"settings": {}, **self.record, "versions": versions(), **self.facts}
        found: dict[str, Any] = {}
        try:
            found, notes = work()
            if self.outlet.has_card:
                write_card(self.outlet.destination.root, {**base, **found}, self.originals)
            self._write_page({**base, **found}, notes)
        except BaseException as problem:
            status = "interrupted" if isinstance(problem, KeyboardInterrupt) else "failed"
            with suppress(OSError):  # the disk may be what failed
                self._report({"status": status, **base, **found, "error": str(problem) or status})
            raise
        return self._report({"status": "ok", **base, **found})

    def _write_page(self, report: Mapping[str, Any], notes: Mapping[str, Any]) -> None:
        """The rows are all written: a page that can't be is no reason to fail."""
        home = self.outlet.destination.home
        try:
            write_page(home, report, notes)
        except OSError as problem:
            log.warning(
                "The page can't be written (%s); all rows are there. Make room and start the same command again.",
                problem,
            )

    def _report(self, report: dict[str, Any]) -> dict[str, Any]:
        timing: dict[str, Any] = {"seconds": round(time.time() - self.started, 3), "started": round(self.started, 3)}
        timing |= self.engine.facts() if self.engine else {}
        timing |= {"phases": self.meter.figures()}
        report = {**report, "timing": timing}
        write_report(self.outlet.destination.home / REPORT_FILE, report)
        return report
