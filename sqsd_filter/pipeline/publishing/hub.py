"""Publishing to a dataset repository of the Hub: everything in one commit, on top of the commit that was looked at."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, cast

from sqsd_filter.corpus.repositories import HUB
from sqsd_filter.errors import SQSDError, UsageError, first_line
from sqsd_filter.pipeline.publishing.target import MARKER, MARKER_FILE, REPORT, Finished, Marker, judge, marker
from sqsd_filter.pipeline.report import CONFIGS, Config, FinishedReport, Published
from sqsd_filter.pipeline.writing.export import REASONS_FILE
from sqsd_filter.pipeline.writing.writers import SAVED_DATASET
from sqsd_filter.storage.layout import REPORT_FILE, own_path, own_paths, stored_path
from sqsd_filter.storage.retries import with_retries

if TYPE_CHECKING:
    from huggingface_hub import DatasetInfo

_OUTDATED = (409, 412)  # statuses when somebody else committed in between
_OF_GIT = ".gitattributes"
_PULL_REQUESTS = 20  # the latest ones, which are looked at


@dataclass(frozen=True)
class _State:
    """A repository as it is now: `commit` is None where it does not exist, `known` is the content of its marker."""

    commit: str | None
    names: frozenset[str]
    known: Marker
    private: bool
    has_branch: bool = True  # if False, the branch will be created as a copy of this commit


@dataclass(frozen=True)
class PushTo:
    """A dataset repository, org/name, to push a finished run to.

    A repository that has to be created is private unless `private` is False; for an existing one, `private` must agree
    with what it is. `rows` names the configs to push: by default kept, dropped and errors to a private repository, and
    only kept to a public one. `create_pr` opens a pull request instead of committing. `overwrite` replaces the content
    of the repository, which its history keeps. Raises `UsageError` for invalid values.
    """

    repo: str
    private: bool | None = None
    revision: str | None = None
    create_pr: bool = False
    rows: Sequence[Config] | None = None
    overwrite: bool = False

    def __post_init__(self) -> None:
        from huggingface_hub.errors import HFValidationError
        from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # public, but not typed so

        try:
            validate_repo_id(self.repo)
        except HFValidationError as problem:
            raise UsageError(f"'{self.repo}' is not a repository to push to ({problem}): write ORG/NAME.") from problem
        if "/" not in self.repo:
            raise UsageError(f"'{self.repo}' is not a repository to push to: write ORG/NAME.")
        if unknown := sorted(set(self.rows or ()) - set(CONFIGS)):
            raise UsageError(f"There are no rows '{unknown[0]}' to push: choose from {', '.join(CONFIGS)}.")

    @classmethod
    def at(
        cls,
        url: str,
        *,
        private: bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        rows: Sequence[Config] | None = None,
        overwrite: bool = False,
    ) -> PushTo:
        """The repository at hf://datasets/org/name or hf://datasets/org/name@branch."""
        repo, _, branch = url.removeprefix(HUB).rstrip("/").partition("@")
        if branch and revision not in (None, branch):
            raise UsageError(f"{url} names another branch than the revision {revision}: give one of them.")
        return cls(repo, private, branch or revision, create_pr, rows, overwrite)

    def check(self) -> None:
        from huggingface_hub import HfApi

        with self._push_errors():
            with_retries(HfApi().whoami)
        self._look(None)

    def spare(self, given: str) -> None:
        """Nothing to do: a commit deletes nothing for good, and sources on the Hub are read at a commit."""

    def published(self, run: str) -> FinishedReport | None:
        there = self._look(run)
        with self._push_errors():
            proposed = self._pull_requests() if self.create_pr and there.commit is not None else []
            for known, commit in [(there.known, there.commit), *proposed]:
                if known.get("run") == run and sorted(self._rows(there)) == known["rows"]:
                    where = stored_path(REPORT_FILE, known["files"])
                    report: FinishedReport = json.loads(self._read(where, commit))
                    return report
        return None

    def _pull_requests(self) -> list[tuple[Marker, str]]:
        """What the markers of the latest pull requests say, each with its commit."""
        from huggingface_hub import HfApi
        from huggingface_hub.errors import RemoteEntryNotFoundError

        refs = with_retries(lambda: HfApi().list_repo_refs(self.repo, repo_type="dataset", include_pull_requests=True))
        markers: list[tuple[Marker, str]] = []
        for ref in (refs.pull_requests or [])[-_PULL_REQUESTS:]:
            for path in own_paths(MARKER_FILE):
                with suppress(RemoteEntryNotFoundError):
                    stored = self._read(path, ref.target_commit)
                    markers.append((judge(self.repo, [], stored, None, overwrite=True), ref.target_commit))
                    break
        return markers

    def publish(self, finished: Finished) -> Published:
        from huggingface_hub import HfApi
        from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

        there, shown = self._look(finished.run), not are_progress_bars_disabled()
        disable_progress_bars()
        try:
            with self._push_errors():
                create_repo = partial(HfApi().create_repo, self.repo, repo_type="dataset", exist_ok=True)
                with_retries(partial(create_repo, private=there.private))
                if self.revision is not None:
                    create_branch = partial(HfApi().create_branch, self.repo, repo_type="dataset", exist_ok=True)
                    with_retries(partial(create_branch, branch=self.revision))
                # a new branch must not keep the files of the branch that it was made from
                target = self if there.has_branch else replace(self, overwrite=True)
                return with_retries(lambda: target.commit(finished), transient_statuses=_OUTDATED)
        finally:
            if shown:
                enable_progress_bars()

    def _look(self, run: str | None) -> _State:
        from huggingface_hub import HfApi
        from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

        def look(revision: str | None) -> DatasetInfo:
            return with_retries(lambda: HfApi().dataset_info(self.repo, revision=revision))

        with self._push_errors():
            has_branch = True
            try:
                info = look(self.revision)
            except RevisionNotFoundError:
                info, has_branch = look(None), False
            except GatedRepoError:
                raise
            except RepositoryNotFoundError:
                return _State(None, frozenset(), {}, self.private is not False)
            if self.private is not None and info.private != self.private:
                is_, asked = ("private", "public") if info.private else ("public", "private")
                raise UsageError(f"{self.repo} is already {is_}: leave out --{asked}, or change it on its page.")
            names = frozenset(s.rfilename for s in info.siblings or []) - {_OF_GIT}
            if not has_branch:
                return _State(info.sha, names, {}, bool(info.private), has_branch)
            marked = stored_path(MARKER_FILE, names)
            stored = self._read(marked, info.sha) if marked in names else None
            known = judge(self.repo, names, stored, run, overwrite=self.overwrite)
            return _State(info.sha, names, known, bool(info.private))

    def _read(self, name: str, commit: str | None) -> bytes:
        from huggingface_hub import hf_hub_download

        path = with_retries(lambda: hf_hub_download(self.repo, name, repo_type="dataset", revision=commit))
        return Path(path).read_bytes()

    def _rows(self, there: _State) -> list[Config]:
        if self.rows is not None:
            return [split for split in CONFIGS if split in self.rows]
        return list(CONFIGS) if there.private else ["kept"]

    def commit(self, finished: Finished) -> Published:
        """Commit the run on top of the repository's latest commit, which must not change meanwhile."""
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

        there = self._look(finished.run)
        rows = self._rows(there)
        content = self._content(finished, rows)
        stale = there.names & (there.names if self.overwrite else set(there.known.get("files", []))) - content.keys()
        made = HfApi().create_commit(
            self.repo,
            [
                *(CommitOperationAdd(name, data) for name, data in content.items()),
                *(CommitOperationDelete(name, is_folder=False) for name in sorted(stale)),
            ],
            commit_message="Add {kept} of {total} rows, filtered by risk".format(**finished.report["rows"]),
            repo_type="dataset",
            revision=self.revision,
            create_pr=self.create_pr,
            parent_commit=there.commit,
        )
        return {"repo": self.repo, "commit": made.oid, "url": made.pr_url or made.commit_url, "rows": rows}

    def _content(self, finished: Finished, rows: Sequence[Config]) -> dict[str, bytes | Path]:
        """The files to commit: the rows to push, and a card and a report that name no other files and no paths."""
        withheld = {file["path"] for file in finished.report["files"] if file["config"] not in rows}
        withheld |= set() if "errors" in rows else {own_path(REASONS_FILE)}
        withheld |= {name for name in finished.report["extra_files"] if name.endswith(SAVED_DATASET)}
        report: FinishedReport = {
            **finished.report,
            "files": [file for file in finished.report["files"] if file["path"] not in withheld],
            "extra_files": [name for name in finished.report["extra_files"] if name not in withheld],
        }
        report = cast("FinishedReport", _without_paths(report))
        names = [*(file["path"] for file in report["files"]), *report["extra_files"]]
        content: dict[str, bytes | Path] = {name: finished.files[name] for name in names}
        content["README.md"] = finished.card(report, self.repo).encode()
        content[REPORT] = (json.dumps(report, indent=2) + "\n").encode()
        content[MARKER] = marker(finished.run, rows, [*content, MARKER], complete=True)
        return content

    @contextmanager
    def _push_errors(self) -> Iterator[None]:
        from huggingface_hub import errors as hub
        from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # of the HTTP client that it uses

        try:
            yield
        except SQSDError:
            raise
        except (HTTPError, hub.LocalTokenNotFoundError, hub.OfflineModeIsEnabled, OSError, RuntimeError) as problem:
            status = getattr(getattr(problem, "response", None), "status_code", None)
            if isinstance(problem, hub.LocalTokenNotFoundError) or status in (401, 403):
                raise SQSDError(
                    f"{self.repo} can't be pushed to with this token: set HF_TOKEN to one that may write there, or use "
                    "'hf auth login', and run the same command again; what was scored is kept."
                ) from problem
            raise SQSDError(
                f"{self.repo} can't be pushed to ({first_line(problem)}): run the same command again later; what was "
                "scored and what has been uploaded is kept."
            ) from problem


def _without_paths(value: object) -> object:
    """The value with each path of this machine reduced to its last part; group values are not taken for paths."""
    if isinstance(value, Mapping):
        return {key: item if key == "groups" else _without_paths(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_paths(item) for item in value]
    if isinstance(value, str) and (value.startswith(("/", "~", "file:")) or ".." in value.split("/")):
        return value.rstrip("/").rpartition("/")[2]
    return value
