"""A dataset repository of the Hub: everything in one commit, on top of what was looked at."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqsd_filter.errors import SQSDError, UsageError
from sqsd_filter.pipeline.folder import first_line
from sqsd_filter.pipeline.patience import patiently
from sqsd_filter.pipeline.publishing.target import MARKER, REPORT, Finished, judge, marker
from sqsd_filter.pipeline.reading.repositories import HUB
from sqsd_filter.pipeline.writing.export import CONFIGS, REASONS

_MOVED_ON = (409, 412)  # somebody else committed in between
_GITS_OWN = ".gitattributes"
_ALONG = "sqsd/risk.png"  # of the folder sqsd/; the report is written anew


@dataclass(frozen=True)
class _There:
    """A repository as it is now; `commit` is None where there is none."""

    commit: str | None
    names: frozenset[str]
    known: Mapping[str, Any]
    private: bool


@dataclass(frozen=True)
class PushTo:
    """A dataset repository, org/name, to push a finished run to.

    `private` is for a repository that has to be created (private unless False), and has to agree with one that is
    there. `rows` names what goes there: by default kept, dropped and errors into a private repository, the kept rows
    alone into a public one. With `create_pr` the commit is proposed instead of made. `overwrite` replaces what the
    repository holds; its history keeps it. Raises `UsageError` for anything else.
    """

    repo: str
    private: bool | None = None
    revision: str | None = None
    create_pr: bool = False
    rows: Sequence[str] | None = None
    overwrite: bool = False

    def __post_init__(self) -> None:
        if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", self.repo):
            raise UsageError(f"'{self.repo}' is no repository to push to: write ORG/NAME.")
        if unknown := sorted(set(self.rows or ()) - set(CONFIGS)):
            raise UsageError(f"There are no rows '{unknown[0]}' to push: choose from {', '.join(CONFIGS)}.")

    @classmethod
    def at(cls, url: str, *, revision: str | None = None, **how: Any) -> PushTo:
        """The repository at hf://datasets/org/name or hf://datasets/org/name@branch."""
        repo, _, branch = url.removeprefix(HUB).rstrip("/").partition("@")
        return cls(repo, revision=branch or revision, **how)

    def check(self) -> None:
        from huggingface_hub import HfApi

        with self._told():
            patiently(HfApi().whoami)
        self._look(None)

    def published(self, run: str) -> dict[str, Any] | None:
        there = self._look(run)
        if there.known.get("run") != run or set(self._rows(there)) - set(there.known["rows"]):
            return None
        with self._told():
            report: dict[str, Any] = json.loads(self._read(REPORT, there.commit))
            return report

    def publish(self, finished: Finished) -> dict[str, Any]:
        from huggingface_hub import HfApi

        new: dict[str, Any] = {"repo_type": "dataset", "exist_ok": True}
        private = self._look(finished.run).private
        with self._told():
            patiently(lambda: HfApi().create_repo(self.repo, private=private, **new))
            if self.revision is not None:
                patiently(lambda: HfApi().create_branch(self.repo, branch=str(self.revision), **new))
            return patiently(lambda: self._commit(finished, self._look(finished.run)), also=_MOVED_ON)

    def _look(self, run: str | None) -> _There:
        from huggingface_hub import HfApi
        from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

        def look(revision: str | None) -> Any:
            return patiently(lambda: HfApi().dataset_info(self.repo, revision=revision))

        with self._told():
            try:
                info = look(self.revision)
            except RevisionNotFoundError:
                info = look(None)  # from which the branch will be made
            except GatedRepoError:
                raise
            except RepositoryNotFoundError:
                return _There(None, frozenset(), {}, self.private is not False)
            if self.private is not None and info.private != self.private:
                found, asked = ("private", "public") if info.private else ("public", "private")
                raise UsageError(f"{self.repo} is {found} already: leave out --{asked}, or change it on its page.")
            names = frozenset(s.rfilename for s in info.siblings) - {_GITS_OWN}
            stored = self._read(MARKER, info.sha) if MARKER in names else None
            known = judge(self.repo, names, stored, run, overwrite=self.overwrite)
            return _There(info.sha, names, known, bool(info.private))

    def _read(self, name: str, commit: str | None) -> bytes:
        from huggingface_hub import hf_hub_download

        where: Any = {"repo_type": "dataset", "revision": commit}
        return Path(patiently(lambda: hf_hub_download(self.repo, name, **where))).read_bytes()

    def _rows(self, there: _There) -> list[str]:
        if self.rows is not None:
            return [split for split in CONFIGS if split in self.rows]
        return list(CONFIGS) if there.private else ["kept"]

    def _commit(self, finished: Finished, there: _There) -> dict[str, Any]:
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

        rows = self._rows(there)
        content = self._content(finished, rows)
        made = HfApi().create_commit(
            self.repo,
            [
                *(CommitOperationAdd(name, data) for name, data in content.items()),
                *(CommitOperationDelete(name, is_folder=False) for name in sorted(there.names - content.keys())),
            ],
            commit_message="Add {kept} of {total} rows, filtered by risk".format(**finished.report["rows"]),
            repo_type="dataset",
            revision=self.revision,
            create_pr=self.create_pr,
            parent_commit=there.commit,
        )
        return {"repo": self.repo, "commit": made.oid, "url": made.pr_url or made.commit_url, "rows": rows}

    def _content(self, finished: Finished, rows: Sequence[str]) -> dict[str, bytes | Path]:
        """What the repository is to hold: the rows meant for it, a card and a report that tell of no others' place."""
        withheld = {file["path"] for file in finished.report["files"] if file["config"] not in rows}
        withheld |= set() if "errors" in rows else {REASONS}
        files = [file for file in finished.report["files"] if file["path"] not in withheld]
        report = _without_paths({**finished.report, "files": files})
        content: dict[str, bytes | Path] = {
            name: path
            for name, path in finished.files.items()
            if name not in withheld and (name == _ALONG or not name.startswith("sqsd/"))
        }
        content["README.md"] = finished.card(report, self.repo).encode()
        content[REPORT] = (json.dumps(report, indent=2) + "\n").encode()
        content[MARKER] = marker(finished.run, rows, complete=True)
        return content

    @contextmanager
    def _told(self) -> Iterator[None]:
        from huggingface_hub import errors as hub

        try:
            yield
        except SQSDError:
            raise
        except (hub.HTTPError, hub.LocalTokenNotFoundError, hub.OfflineModeIsEnabled, OSError, RuntimeError) as problem:
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


def _without_paths(value: Any) -> Any:
    """The value with the last part in the place of each absolute path of this machine."""
    if isinstance(value, Mapping):
        return {key: _without_paths(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_paths(item) for item in value]
    return os.path.basename(value) if isinstance(value, str) and os.path.isabs(value) else value
