"""What the tests' Hub answers, without the network: its routes, and who may use them.

What one may see and change depends on the token: MEMBER owns every repository, STRANGER sees public ones only and may
write to none, any other token is invalid.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from email.message import Message
from functools import cached_property
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import parse_qs, unquote

import yaml

from tests.hub_repo import Commit, NoRevisionError, Repo, RepoFile, by_lfs

MEMBER, STRANGER = "hf_fake", "hf_stranger"


@dataclass
class Answer:
    body: bytes = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)


def reply(value: Any, status: int = 200, **headers: str) -> Answer:
    return Answer(json.dumps(value).encode(), status, {"Content-Type": "application/json", **headers})


class RefusalError(Exception):
    """An answer in the way the Hub says no; clients choose their exception by status and code."""

    def __init__(self, status: int, message: str, code: str | None = None, **headers: str) -> None:
        super().__init__(message)
        coded = {"X-Error-Code": code} if code else {}
        self.answer = reply({"error": message}, status, **{"X-Error-Message": message, **coded, **headers})


def _head(card: str) -> Any:
    """The metadata that a card begins with. Raises `yaml.YAMLError`."""
    head = re.match(r"---\r?\n(.*?)\r?\n---", card, re.DOTALL)
    return yaml.safe_load(head[1]) if head else {}


Route = Callable[["Call"], Answer]
ROUTES: list[tuple[str, re.Pattern[str], Route]] = []


def route(method: str, pattern: str) -> Callable[[Route], Route]:
    """Registers a method of Call; {api} and {web} stand for a repository's address there, {rev} for a revision."""
    name = r"(?P<name>[^/]+(?:/[^/]+)?)"
    parts = {"api": rf"/api/(?P<kind>models|datasets)/{name}", "web": rf"/(?:(?P<kind>datasets)/)?{name}"}
    compiled = re.compile(pattern.format(**parts, rev="(?P<revision>[^/]+)"))

    def register(handler: Route) -> Route:
        ROUTES.append((method, compiled, handler))
        return handler

    return register


class Call:
    """One request on its way to an answer; `named` are the parts of its path."""

    def __init__(
        self, repos: dict[tuple[str, str], Repo], url: str, method: str, target: str, headers: Message, body: bytes
    ) -> None:
        self.path, _, query = target.partition("?")
        self.repos, self.url, self.method, self.headers, self.body = repos, url, method, headers, body
        self.query = parse_qs(query)
        self.token = headers.get("Authorization", "").removeprefix("Bearer ") or None
        self.named: dict[str, str] = {}

    def answer(self) -> Answer:
        method = "GET" if self.method == "HEAD" else self.method
        if self.token not in (None, MEMBER, STRANGER):
            return RefusalError(401, "Invalid credentials in Authorization header").answer
        for verb, pattern, handler in ROUTES:
            if verb == method and (match := pattern.fullmatch(self.path)):
                self.named = {key: unquote(value) for key, value in match.groupdict().items() if value}
                try:
                    return handler(self)
                except RefusalError as refusal:
                    return refusal.answer
                except NoRevisionError as problem:
                    return RefusalError(404, f"Invalid rev id: {problem}", "RevisionNotFound").answer
        return reply({"error": f"This Hub has no {method} {self.path}."}, 404)

    def json(self) -> dict[str, Any]:
        body: dict[str, Any] = json.loads(self.body)
        return body

    @cached_property
    def key(self) -> tuple[str, str]:
        """Kind and name of the repository, from the path or, to create and delete, from the body."""
        if "name" in self.named:
            return self.named.get("kind", "models"), self.named["name"]
        request = self.json()
        return f"{request.get('type') or 'model'}s", f"{request.get('organization') or 'member'}/{request['name']}"

    @cached_property
    def repo(self) -> Repo:
        """The repository asked for. What one may not see does not exist; without a token one is told to log in."""
        repo = self.repos.get(self.key)
        if repo is None or (repo.private and self.token != MEMBER):
            self.check_login()
            raise RefusalError(404, "Repository not found", "RepoNotFound")
        return repo

    @property
    def commit(self) -> Commit:
        return self.repo.at(self.named.get("revision", "main"))

    @property
    def file_path(self) -> str:
        return self.named.get("path", "").strip("/")

    def check_gate(self) -> None:
        if self.repo.gated and self.token != MEMBER:
            why = f"Access to {self.repo.kind[:-1]} {self.repo.name} is restricted"
            if self.token is None:
                raise RefusalError(401, f"{why}: log in first.", "GatedRepo")
            raise RefusalError(403, f"{why}: ask at {self.url}/{self.repo.web_path}.", "GatedRepo")

    def check_login(self) -> None:
        """Clients take any 401 that an https Hub gives about a repository for RepoNotFound; over http they are told."""
        if self.token is None:
            raise RefusalError(401, "Invalid username or password.", "RepoNotFound" if "name" in self.named else None)

    def check_write(self) -> None:
        self.check_login()
        if self.token != MEMBER and "create_pr" not in self.query:
            raise RefusalError(403, "Forbidden: this token may not write here")

    @route("GET", "/api/whoami-v2")
    def whoami(self) -> Answer:
        self.check_login()
        name, orgs = ("member", [{"type": "org", "name": "org"}]) if self.token == MEMBER else ("stranger", [])
        auth = {"type": "access_token", "accessToken": {"displayName": "test", "role": "write"}}
        return reply({"type": "user", "id": name, "name": name, "fullname": name, "orgs": orgs, "auth": auth})

    @route("POST", "/api/validate-yaml")
    def validate_yaml(self) -> Answer:
        try:
            fine = isinstance(_head(self.json()["content"]), dict)
        except yaml.YAMLError:
            fine = False
        errors = [] if fine else [{"message": "The metadata is no YAML mapping."}]
        return reply({"errors": errors, "warnings": []}, 400 if errors else 200)

    @route("POST", "/api/repos/create")
    def create_repo(self) -> Answer:
        self.check_write()
        there = self.key in self.repos
        repo = self.repos.setdefault(self.key, Repo(*self.key, private=self.json().get("visibility") == "private"))
        answer = {"url": f"{self.url}/{repo.web_path}", "name": repo.name, "id": repo.name}
        return reply({**answer, "error": "There is a repository of this name"}, 409) if there else reply(answer)

    @route("DELETE", "/api/repos/delete")
    def delete_repo(self) -> Answer:
        repo = self.repo
        self.check_write()
        del self.repos[repo.kind, repo.name]
        return Answer()

    @route("GET", "{api}/auth-check(?P<write>/write)?")
    def auth_check(self) -> Answer:
        self.check_gate()
        if "write" in self.named:
            self.check_write()
        return Answer()

    @route("GET", "{api}(?:/revision/{rev})?")
    def info(self) -> Answer:
        repo, commit = self.repo, self.commit
        siblings = [
            {"rfilename": path, "size": len(file.data), "blobId": file.oid, **file.lfs_info}
            for path, file in sorted(commit.files.items())
        ]
        facts = {"id": repo.name, "sha": commit.sha, "lastModified": commit.when, "disabled": False, "tags": []}
        if "README.md" in commit.files:
            facts["cardData"] = _head(commit.files["README.md"].data.decode())
        gated = "manual" if repo.gated else False
        return reply({**facts, "private": repo.private, "gated": gated, "siblings": siblings})

    @route("GET", "{api}/tree/{rev}(?P<path>/.*)?")
    def tree(self) -> Answer:
        commit, folder = self.commit, self.file_path
        prefix = f"{folder}/" if folder else ""
        files = {path for path in commit.files if path.startswith(prefix)}
        if folder and not files:
            raise RefusalError(404, f"{folder} does not exist", "EntryNotFound")
        folders = {str(parent) for path in files for parent in PurePosixPath(path).parents} - {"."}
        found = {path for path in files | folders if path.startswith(prefix)}
        if self.query.get("recursive") != ["true"]:
            found = {path for path in found if "/" not in path.removeprefix(prefix)}
        return reply([commit.entry(path) for path in sorted(found)])

    @route("POST", "{api}/paths-info/{rev}")
    def paths_info(self) -> Answer:
        self.check_gate()
        entries = [self.commit.entry(path) for path in parse_qs(self.body.decode()).get("paths", [])]
        return reply([entry for entry in entries if entry])

    @route("GET", "{api}/refs")
    def refs(self) -> Answer:
        def described(start: str, prefix: str) -> list[dict[str, str]]:
            refs = [(ref, sha) for ref, sha in self.repo.refs.items() if ref.startswith(start)]
            return [{"name": ref.removeprefix(prefix), "ref": ref, "targetCommit": sha} for ref, sha in refs]

        branches, tags = described("refs/heads/", "refs/heads/"), described("refs/tags/", "refs/tags/")
        return reply({"branches": branches, "tags": tags, "converts": [], "pullRequests": described("refs/pr/", "")})

    @route("GET", "{api}/commits/{rev}")
    def commits(self) -> Answer:
        def described(commit: Commit) -> dict[str, Any]:
            about = {"id": commit.sha, "title": commit.title, "message": "", "date": commit.when}
            return {**about, "authors": [{"user": "member"}]}

        return reply([described(commit) for commit in self.repo.history(self.named["revision"])])

    @route("POST", "{api}/branch/{rev}")
    def create_branch(self) -> Answer:
        return self._create_ref(f"refs/heads/{self.named['revision']}", self.json().get("startingPoint", "main"))

    @route("POST", "{api}/tag/{rev}")
    def create_tag(self) -> Answer:
        return self._create_ref(f"refs/tags/{self.json()['tag']}", self.named["revision"])

    def _create_ref(self, ref: str, revision: str) -> Answer:
        sha = self.repo.at(revision).sha
        self.check_write()
        if ref in self.repo.refs:
            raise RefusalError(409, f"{ref} exists already")
        self.repo.refs[ref] = sha
        return Answer()

    @route("POST", "{api}/preupload/{rev}")
    def preupload(self) -> Answer:
        there = self.commit.files
        self.check_write()

        def described(path: str, size: int) -> dict[str, Any]:
            mode = "lfs" if by_lfs(path, size) else "regular"
            old = {"oid": there[path].etag} if path in there else {}
            return {"path": path, "uploadMode": mode, "shouldIgnore": False, **old}

        return reply({"files": [described(file["path"], file["size"]) for file in self.json()["files"]]})

    @route("POST", r"{web}\.git/info/lfs/objects/batch")
    def lfs_batch(self) -> Answer:
        repo = self.repo
        self.check_login()  # a stranger may upload, for a pull request

        def described(oid: str, size: int) -> dict[str, Any]:
            there = {"href": f"{self.url}/lfs/{repo.kind}/{repo.name}/{oid}"}
            missing = {} if oid in repo.stored else {"actions": {"upload": there, "verify": there}}
            return {"oid": oid, "size": size, **missing}

        return reply({"transfer": "basic", "objects": [described(o["oid"], o["size"]) for o in self.json()["objects"]]})

    @route("PUT", r"/lfs/(?P<kind>\w+)/(?P<name>.+)/(?P<oid>\w+)")
    def lfs_upload(self) -> Answer:
        """Needs no token: the address was given to someone who may write, as a signed one of S3 is."""
        if hashlib.sha256(self.body).hexdigest() != self.named["oid"]:
            raise RefusalError(400, "The content does not have this hash")
        self.repos[self.key].stored[self.named["oid"]] = self.body
        return Answer()

    @route("POST", r"/lfs/(?P<kind>\w+)/(?P<name>.+)/(?P<oid>\w+)")
    def lfs_verify(self) -> Answer:
        if len(self.repo.stored.get(self.named["oid"], b"")) != self.json()["size"]:
            raise RefusalError(404, "No object of this hash and size was uploaded")
        return Answer()

    @route("POST", "{api}/commit/{rev}")
    def create_commit(self) -> Answer:
        repo, revision = self.repo, self.named["revision"]
        self.check_write()
        header, *operations = [json.loads(line) for line in self.body.splitlines()]
        parent, ref = repo.at(revision), repo.ref(revision)
        wanted = header["value"].get("parentCommit", parent.sha)
        web, pull = f"{self.url}/{repo.web_path}", {}
        if "create_pr" in self.query:
            number = sum(name.startswith("refs/pr/") for name in repo.refs) + 1
            parent, ref = repo.at(wanted), f"refs/pr/{number}"
            pull = {"pullRequestUrl": f"{web}/discussions/{number}"}
        elif ref is None:
            raise RefusalError(404, f"{revision} is no branch", "RevisionNotFound")
        elif not parent.sha.startswith(wanted):
            raise RefusalError(412, "There was another commit since")
        commit = repo.commit(ref, parent, header["value"]["summary"], self._changes(operations, parent.files))
        return reply({"success": True, "commitOid": commit.sha, "commitUrl": f"{web}/commit/{commit.sha}", **pull})

    def _changes(self, operations: list[dict[str, Any]], there: Mapping[str, RepoFile]) -> dict[str, RepoFile | None]:
        changes: dict[str, RepoFile | None] = {}
        for operation in operations:
            path: str = operation["value"]["path"]
            match operation:
                case {"key": "file", "value": {"content": content}}:
                    changes[path] = RepoFile(base64.b64decode(content))
                case {"key": "lfsFile", "value": {"oid": oid}}:
                    if oid not in self.repo.stored:
                        raise RefusalError(400, f"The LFS object of {path} was not uploaded")
                    changes[path] = RepoFile(self.repo.stored[oid], lfs=True)
                case {"key": "deletedFile"}:
                    if path not in there:
                        raise RefusalError(404, "A file with this name doesn't exist", "EntryNotFound")
                    changes[path] = None
                case {"key": "deletedFolder"}:
                    folder = path.rstrip("/") + "/"
                    changes |= dict.fromkeys(name for name in there if name.startswith(folder))
        return changes

    @route("GET", "{web}/resolve/{rev}/(?P<path>.+)")
    def resolve(self) -> Answer:
        if self.file_path != "README.md":  # one may read what one would have to agree to
            self.check_gate()
        commit, file = self.commit, self.commit.files.get(self.file_path)
        if file is None:
            raise RefusalError(404, "Entry not found", "EntryNotFound", **{"X-Repo-Commit": commit.sha})
        size, etag = len(file.data), f'"{file.etag}"'
        headers = {"X-Repo-Commit": commit.sha, "ETag": etag, "Accept-Ranges": "bytes"}
        if file.lfs:
            headers |= {"X-Linked-ETag": etag, "X-Linked-Size": str(size)}
        if not (wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))):
            return Answer(file.data, 200, headers)
        first = int(wanted[1])
        stop = min(size, int(wanted[2]) + 1) if wanted[2] else size
        if first >= size:
            raise RefusalError(416, "No such range", **{"Content-Range": f"bytes */{size}"})
        return Answer(file.data[first:stop], 206, {**headers, "Content-Range": f"bytes {first}-{stop - 1}/{size}"})
