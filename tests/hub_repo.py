"""Repositories of the tests' Hub: files as git and LFS know them, commits and refs."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from typing import Any

LFS_SUFFIXES = (".arrow", ".bin", ".gz", ".parquet", ".png", ".safetensors", ".zip", ".zst")
LFS_SIZE = 10_000_000  # bytes from which any file is stored by LFS


def by_lfs(path: str, size: int) -> bool:
    return size > 0 and (path.endswith(LFS_SUFFIXES) or size >= LFS_SIZE)


class NoRevisionError(LookupError):
    """There is no such branch, pull request, tag or commit."""


@dataclass(frozen=True)
class RepoFile:
    data: bytes = field(repr=False)
    lfs: bool = False

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @cached_property
    def pointer(self) -> bytes:
        text = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.data)}\n"
        return text.encode()

    @cached_property
    def oid(self) -> str:
        """The hash of what git holds, as git computes it."""
        blob = self.pointer if self.lfs else self.data
        return hashlib.sha1(b"blob %d\0" % len(blob) + blob).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.oid

    @property
    def lfs_info(self) -> dict[str, Any]:
        info = {"oid": self.sha256, "sha256": self.sha256, "size": len(self.data), "pointerSize": len(self.pointer)}
        return {"lfs": info} if self.lfs else {}


@dataclass(frozen=True)
class Commit:
    title: str
    parents: tuple[str, ...]
    files: dict[str, RepoFile] = field(repr=False)
    date: datetime = field(repr=False)

    @cached_property
    def sha(self) -> str:
        tree = [(path, file.oid) for path, file in sorted(self.files.items())]
        return hashlib.sha1(repr((self.title, self.parents, tree, self.date)).encode()).hexdigest()

    @property
    def when(self) -> str:
        return f"{self.date:%Y-%m-%dT%H:%M:%S}.000Z"

    def entry(self, path: str) -> dict[str, Any] | None:
        """What the Hub tells of a file or folder."""
        if file := self.files.get(path):
            return {"type": "file", "path": path, "oid": file.oid, "size": len(file.data), **file.lfs_info}
        inside = [(name, file.oid) for name, file in sorted(self.files.items()) if name.startswith(f"{path}/")]
        oid = hashlib.sha1(repr(inside).encode()).hexdigest()
        return {"type": "directory", "path": path, "oid": oid, "size": 0} if inside else None


class Repo:
    """One repository: commits by their sha, refs (`refs/heads/main`, `refs/tags/v1`, `refs/pr/1`), LFS objects."""

    def __init__(self, kind: str, name: str, private: bool = False, gated: bool = False) -> None:
        self.kind, self.name, self.private, self.gated = kind, name, private, gated
        self.commits: dict[str, Commit] = {}
        self.refs: dict[str, str] = {}
        self.stored: dict[str, bytes] = {}
        attributes = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES)
        self.commit("refs/heads/main", None, "initial commit", {".gitattributes": RepoFile(attributes.encode())})

    @property
    def web_path(self) -> str:
        return self.name if self.kind == "models" else f"{self.kind}/{self.name}"

    def commit(self, ref: str, parent: Commit | None, title: str, changes: Mapping[str, RepoFile | None]) -> Commit:
        """Moves `ref` to `parent` with the changed files; None deletes one."""
        changed = {**(parent.files if parent else {}), **changes}
        files = {path: file for path, file in changed.items() if file is not None}
        commit = Commit(title, (parent.sha,) if parent else (), files, datetime.now(UTC))
        self.stored |= {file.sha256: file.data for file in files.values() if file.lfs}
        self.commits[commit.sha] = commit
        self.refs[ref] = commit.sha
        return commit

    def ref(self, revision: str) -> str | None:
        """The full name of a branch or pull request."""
        return next((ref for ref in (f"refs/heads/{revision}", revision) if ref in self.refs), None)

    def at(self, revision: str) -> Commit:
        """The commit of a branch, pull request, tag or (abbreviated) sha. Raises NoRevisionError."""
        sha = self.refs.get(self.ref(revision) or f"refs/tags/{revision}")
        found = [sha] if sha else [s for s in self.commits if len(revision) >= 7 and s.startswith(revision)]
        if not found:
            raise NoRevisionError(revision)
        return self.commits[found[0]]

    def history(self, revision: str) -> list[Commit]:
        """The commit and its ancestors, newest first."""
        commits = [self.at(revision)]
        while parents := commits[-1].parents:
            commits.append(self.commits[parents[0]])
        return commits
