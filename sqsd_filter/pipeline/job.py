"""One run from its destination's point of view: claimed, filled, reported on whatever happens, published."""

from __future__ import annotations

import hashlib
import logging
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, cast

from sqsd_filter.corpus.addresses import Source
from sqsd_filter.corpus.repositories import HUB
from sqsd_filter.errors import SQSDError, UsageError, option
from sqsd_filter.pipeline.page.notes import Notes
from sqsd_filter.pipeline.page.page import write_page
from sqsd_filter.pipeline.publishing.bucket import Bucket
from sqsd_filter.pipeline.publishing.hub import PushTo
from sqsd_filter.pipeline.publishing.target import Finished, Target, run_id
from sqsd_filter.pipeline.report import (
    EngineFacts,
    FinishedReport,
    Outcome,
    Report,
    RunContent,
    RunFacts,
    ScoreFacts,
    Timing,
    versions,
    write_report,
)
from sqsd_filter.pipeline.stage.engines import Engine
from sqsd_filter.pipeline.writing.card import PICTURE_FILE, card_text, write_card
from sqsd_filter.pipeline.writing.destination import (
    LOCK_FILE,
    NOTES_FILE,
    PAGE_FILE,
    Destination,
    lock_run,
    read_report,
)
from sqsd_filter.pipeline.writing.histogram import write_histogram
from sqsd_filter.pipeline.writing.one_file import FileForm
from sqsd_filter.progress import Meter
from sqsd_filter.scoring.embedded import cache_dir
from sqsd_filter.storage.layout import REPORT_FILE, RUN_FILE, home_beside, home_in
from sqsd_filter.storage.secrets import check_address, redacted

log = logging.getLogger(__name__)

Work = Callable[[], tuple[RunContent, Notes]]  # writes the rows, and returns what report and page say of them


@dataclass(frozen=True)
class Outlet:
    """Where a run goes: a destination on this disk, and perhaps a target to which it is published from there. If only
    the target was asked for, the destination lies in a staging folder that is deleted in the end."""

    destination: Destination
    target: Target | None = None
    stage: Path | None = None
    lock: IO[bytes] | None = None  # on the staging folder
    has_card: bool = True

    @classmethod
    def of(cls, dest: str | Path, form: FileForm | None, overwrite: bool, push: PushTo | None) -> Outlet:
        """`form` is that of the one file that DEST is, None for a folder.

        Raises `SQSDError` where the run can't be written there, as far as that is known before its work.
        """
        if form is not None and push is not None:
            raise UsageError(
                f"{dest} is one file, and {push.repo} gets a whole output: name a folder as destination, or leave out "
                f"{option('push_to')}."
            )
        target: Target | None = push and replace(push, overwrite=overwrite or push.overwrite)
        stage, lock = None, None
        if "://" in str(dest):
            check_address(str(dest))
            url = str(dest)
            there = PushTo.at(url, overwrite=overwrite) if url.startswith(HUB) else None
            same = there is not None and push is not None and there.repo == push.repo
            if push is not None and not (same and there and there.revision in (None, push.revision)):
                raise UsageError(f"{url} and {push.repo} are two destinations: give a folder, and push to one of them.")
            target = target or there or Bucket(url, overwrite=overwrite, is_file=form is not None)
            stage = stage_of(url)
        if target is not None:
            target.check()
        if stage is not None:
            stage.mkdir(parents=True, exist_ok=True)
            lock = lock_run(stage / LOCK_FILE, dest)
        place = Path(dest) if stage is None else staged(stage, form)
        home_of = home_in if form is None else home_beside
        destination = Destination(place, home_of, overwrite=overwrite or stage is not None)
        return cls(destination, target, stage, lock)

    def spare(self, sources: Iterable[Source]) -> None:
        """Raise `DestinationExists` for a source that would be deleted with what the run replaces, `UsageError` for a
        source folder in which the output would lie."""
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
        """Delete a staging folder without any work in it, and unlock it."""
        if self.stage is not None and not self.destination.holds_work():
            shutil.rmtree(self.stage, ignore_errors=True)
        if self.lock is not None:
            self.lock.close()


def stage_of(url: str) -> Path:
    """The staging folder of the run to a URL."""
    return cache_dir() / "stages" / hashlib.blake2b(url.encode(), digest_size=8).hexdigest()


def staged(stage: Path, form: FileForm | None) -> Path:
    """The destination in a staging folder."""
    return stage / f"out{form.suffix if form is not None else ''}"


@dataclass
class Job:
    """All that runs have in common, whatever they write.

    Two runs with the same `identity` are the same run; `record` only goes into the report. `originals` has the name and
    card of each dataset that was read.
    """

    outlet: Outlet
    identity: Mapping[str, object]
    meter: Meter
    record: Mapping[str, object]
    started: float
    facts: ScoreFacts = field(default_factory=ScoreFacts)
    engine: Engine | None = None
    originals: Sequence[tuple[str, str]] = ()

    @property
    def published_run(self) -> str:
        """The run's id at a target. Explanations are not published, so they don't change it."""
        return run_id({name: value for name, value in self.identity.items() if name != "explain"})

    def carry_out(self, work: Work) -> FinishedReport:
        """Claim the destination, do the work, write a report whatever happens, and publish. Returns the report.

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
                f"The run can't go on ({problem}): fix that and run the same command again; no score is lost."
            ) from problem
        finally:
            self.meter.finish()
            destination.release()

    def _on_disk(self, work: Work) -> FinishedReport:
        destination = self.outlet.destination
        if destination.claim(self.identity, to_publish=self.outlet.target is not None):
            report = read_report(destination.home)
            assert report is not None
            report["already_done"] = True
        else:
            report = self._carry_out(work)
        destination.publish()
        return report

    def _published(self, target: Target, report: FinishedReport) -> FinishedReport:
        run, layout = self.published_run, self.outlet.destination.layout
        if target.published(run) is not None:
            return report
        self.meter.start("publishing", None)
        home = layout.home
        names = [*(file["path"] for file in report["files"]), *report["extra_files"]]
        own = [home / RUN_FILE, home / REPORT_FILE, *sorted((home / "scores").glob("[!.]*"))]
        own += [page for name in (PAGE_FILE, NOTES_FILE) if (page := home / name).is_file()]
        files = {name: layout.path(name) for name in names}
        files |= {str(path.relative_to(layout.base)): path for path in own}

        def card(report: Report, name: str) -> str:
            return card_text(report, self.originals, name)

        where = target.publish(Finished(run, files, report, card))
        return {**report, "published": where, "already_done": False}

    def _carry_out(self, work: Work) -> FinishedReport:
        # a caller may record anything, but under the keys of the type it is what the type says
        record = cast("RunFacts", {"settings": {}, **self.record})
        facts: RunFacts = {**record, "versions": versions(), **self.facts}
        known: RunFacts | Report = facts
        try:
            content, notes = work()
            known = report = Report(**facts, **content)
            if self.outlet.has_card:
                layout = self.outlet.destination.layout
                write_histogram(layout.home / PICTURE_FILE, notes["histogram"], report)
                write_card(layout.base, report, self.originals)
            self._write_page(report, notes)
        except BaseException as problem:
            status = "interrupted" if isinstance(problem, KeyboardInterrupt) else "failed"
            with suppress(OSError):  # the disk may be what failed
                self._write_report(
                    {"status": status, **known, "error": redacted(str(problem)) or status, "timing": self._timing()}
                )
            raise
        finished: FinishedReport = {**Outcome(status="ok"), **report, "timing": self._timing()}
        self._write_report(finished)
        return finished

    def _write_page(self, report: Report, notes: Notes) -> None:
        """All rows are written: a page that can't be written is only a warning."""
        home = self.outlet.destination.home
        try:
            write_page(home, report, notes)
        except OSError as problem:
            log.warning(
                "The page can't be written (%s); all rows are there. Make room and start the same command again.",
                problem,
            )

    def _timing(self) -> Timing:
        return {
            "seconds": round(time.time() - self.started, 3),
            "started": round(self.started, 3),
            **(self.engine.facts() if self.engine else EngineFacts()),
            "phases": self.meter.figures(),
        }

    def _write_report(self, report: Mapping[str, object]) -> None:
        write_report(self.outlet.destination.home / REPORT_FILE, report)
