"""A Hugging Face Hub on this machine, in memory, for the real clients: huggingface_hub, datasets, transformers, peft.

    with Hub() as hub:
        sha = hub.add("org/name", {"a.jsonl": b"{}"})
        hub.fail("POST", "/commit/", status=429, headers={"Retry-After": "1"})
        subprocess.run([...], env=hub.environment(tmp_path))
        assert len(hub.seen("POST", "/commit/")) == 2

The fixture `hub` is one that this process talks to. Faults are real: they happen on the wire.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import socket
import struct
import sys
import threading
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple, Self
from urllib.parse import unquote

import pytest

from tests.hub_repo import Commit, Repo, RepoFile, by_lfs
from tests.hub_routes import MEMBER, Answer, Call, reply


class Request(NamedTuple):
    """A request that came in; `path` is decoded and has the query, `status` is None where the connection was cut."""

    method: str
    path: str
    status: int | None


@dataclass
class Rule:
    """What happens to the next `times` requests of this method whose path matches."""

    method: str
    pattern: str
    times: float
    answer: Answer | None = None
    received: int | None = None
    sent: int | None = None
    reset: bool = False
    callback: Callable[[], object] | None = None

    def meets(self, method: str, path: str) -> bool:
        return self.times > 0 and method == self.method and re.search(self.pattern, path) is not None


class Hub:
    """The server, running as long as the context lasts."""

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.repos: dict[tuple[str, str], Repo] = {}
        self.lock = threading.RLock()
        self.errors: list[Exception] = []
        self.rules: list[Rule] = []
        self._server = _Server(self)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stops the server. Raises what went wrong inside it or in a callback."""
        self.stop()
        if self.errors:
            raise self.errors[0]

    def stop(self) -> None:
        """From now on nothing listens, and open connections are cut."""
        self._server.shutdown()
        self._server.server_close()
        for connection in list(self._server.connections):
            with contextlib.suppress(OSError):  # it has ended by itself
                _cut(connection)

    def add(
        self,
        name: str,
        files: Mapping[str, bytes | None],
        *,
        kind: str = "datasets",
        private: bool = False,
        gated: bool = False,
        revision: str = "main",
    ) -> str:
        """Commits files (None deletes one), in a new repository if there is none of this name. Returns the sha."""
        with self.lock:
            repo = self.repos.setdefault((kind, name), Repo(kind, name, private, gated))
            changes = {
                path: None if data is None else RepoFile(data, by_lfs(path, len(data))) for path, data in files.items()
            }
            ref = repo.ref(revision) or f"refs/heads/{revision}"
            parent = repo.at(revision if ref in repo.refs else "main")
            return repo.commit(ref, parent, "Add files", changes).sha

    def files(self, name: str, *, kind: str = "datasets", revision: str = "main") -> dict[str, bytes]:
        """Every file at a revision, the `.gitattributes` that each repository is born with left out."""
        with self.lock:
            files = self.repos[kind, name].at(revision).files
            return {path: file.data for path, file in sorted(files.items()) if path != ".gitattributes"}

    def commits(self, name: str, *, kind: str = "datasets", revision: str = "main") -> list[Commit]:
        """The history, newest first; the last is the commit that the repository is born with."""
        with self.lock:
            return self.repos[kind, name].history(revision)

    def fail(
        self, method: str, pattern: str, *, status: int, headers: Mapping[str, str] | None = None, times: float = 1
    ) -> None:
        """Answers the next requests that match with this status, without doing what they ask.

        From 502 on it is a gateway that answers, in HTML.
        """
        answer = reply({"error": f"A {status} that the test wants"}, status)
        if status > 500:
            answer = Answer(b"<html>Sorry.</html>", status, {"Content-Type": "text/html"})
        answer.headers |= headers or {}
        self.rules.append(Rule(method, pattern, times, answer=answer))

    def cut(
        self,
        method: str,
        pattern: str,
        *,
        received: int | None = None,
        sent: int | None = None,
        reset: bool = False,
        times: float = 1,
    ) -> None:
        """Cuts the connection of the next requests that match.

        `received`: after that many bytes of the request's body; nothing is done. `sent`: what is asked is done, then
        that many bytes of the answer's body get through, with 0 not even its head. `reset`: by an RST for sure; it
        makes a difference, since hf_hub_download resumes after a FIN only.
        """
        if (received is None) == (sent is None):
            raise ValueError("Either received or sent.")
        self.rules.append(Rule(method, pattern, times, received=received, sent=sent, reset=reset))

    def on(self, method: str, pattern: str, callback: Callable[[], object], *, times: float = 1) -> None:
        """Calls back when a request that matches has arrived, before anything is done for it."""
        self.rules.append(Rule(method, pattern, times, callback=callback))

    def seen(self, method: str, pattern: str) -> list[Request]:
        """The requests so far of this method whose path matches."""
        return [r for r in list(self.requests) if r.method == method and re.search(pattern, r.path)]

    def fault(self, method: str, path: str) -> Rule | None:
        """Uses up the rules that a request meets, up to the first fault, which is returned."""
        for rule in list(self.rules):
            with self.lock:
                if not rule.meets(method, path):
                    continue
                rule.times -= 1
            if rule.callback is None:
                return rule
            rule.callback()
        return None

    def environment(self, home: Path, token: str | None = MEMBER) -> dict[str, str]:
        """The environment of a subprocess that shall use this Hub, with an empty cache in `home`."""
        foreign = re.compile(r"HF_|HUGGING|TRANSFORMERS_|\w*_proxy$", re.IGNORECASE)
        kept = {name: value for name, value in os.environ.items() if not foreign.match(name)}
        return {**kept, **_settings(self.url, home, token)}

    def connect(self, home: Path, monkeypatch: pytest.MonkeyPatch, token: str | None = MEMBER) -> None:
        """Points this process at this Hub; see `connect`."""
        connect(self.url, home, monkeypatch, token)


def _settings(url: str, home: Path, token: str | None) -> dict[str, str]:
    return {
        "HF_ENDPOINT": url,
        "HF_TOKEN": token or "",
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",  # an LFS file would go to a server of its own
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_UPDATE_DOWNLOAD_COUNTS": "0",  # datasets would ask S3
        "no_proxy": "127.0.0.1",
    }


def connect(url: str, home: Path, monkeypatch: pytest.MonkeyPatch, token: str | None = MEMBER) -> None:
    """Points this process, which has its libraries imported already, at the Hub with this address.

    The libraries look at huggingface_hub.constants and datasets.config whenever they need a value, and at HF_TOKEN
    and peft at HF_HUB_OFFLINE in the environment. Bound to an endpoint when made are the two HfApi instances behind
    huggingface_hub's functions and transformers, and file systems, which are kept by their arguments. (Not changed:
    huggingface_hub.hffs, the CLI, which hosts get the token after a redirect: none is sent here.)
    """
    import transformers.utils.hub
    from datasets import config
    from huggingface_hub import HfFileSystem, constants, hf_api
    from huggingface_hub.utils._http import close_session

    for name, text in _settings(url, home, token).items():
        monkeypatch.setenv(name, text)
    resolve = "/resolve/{revision}/"
    hub_values = {
        "ENDPOINT": url,
        "HUGGINGFACE_CO_URL_TEMPLATE": url + "/{repo_id}" + resolve + "{filename}",
        "HF_HOME": str(home),
        "HF_HUB_CACHE": str(home / "hub"),
        "HF_TOKEN_PATH": str(home / "token"),
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_DISABLE_TELEMETRY": True,
    }
    datasets_values = {
        "HF_ENDPOINT": url,
        "HUB_DATASETS_URL": url + "/datasets/{repo_id}" + resolve + "{path}",
        "HF_DATASETS_CACHE": home / "datasets",
        "DOWNLOADED_DATASETS_PATH": home / "datasets" / "downloads",
        "EXTRACTED_DATASETS_PATH": home / "datasets" / "downloads" / "extracted",
        "HF_HUB_OFFLINE": False,
        "HF_UPDATE_DOWNLOAD_COUNTS": False,
    }
    for module, values in ((constants, hub_values), (config, datasets_values)):
        for name, value in values.items():
            monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(hf_api.api, "endpoint", url)
    monkeypatch.setattr(transformers.utils.hub, "_hf_api", None)
    monkeypatch.setattr(HfFileSystem, "_cache", {})
    close_session()  # which may have read other proxies


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def __init__(self, hub: Hub) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.hub = hub
        self.connections: weakref.WeakSet[socket.socket] = weakref.WeakSet()

    def get_request(self) -> tuple[socket.socket, Any]:
        connection, address = super().get_request()
        self.connections.add(connection)
        return connection, address

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Keeps what went wrong, but for connections that either side has cut."""
        problem = sys.exception()
        if isinstance(problem, Exception) and not isinstance(problem, ConnectionError):
            self.hub.errors.append(problem)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1  # an answer's head and body leave together
    server: _Server

    def handle_call(self) -> None:
        hub, path = self.server.hub, unquote(self.path)
        rule = hub.fault(self.command, path)
        if rule and rule.received is not None:
            self._body(rule.received)
            self._cut(path, rule)
            return
        body = self._body()
        with hub.lock:
            call = Call(hub.repos, hub.url, self.command, self.path, self.headers, body)
            answer = rule.answer if rule and rule.answer else call.answer()
        if rule and rule.sent is not None:
            if rule.sent:
                self._send(answer, rule.sent)
            self._cut(path, rule)
            return
        hub.requests.append(Request(self.command, path, answer.status))
        self._send(answer)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_call

    def _send(self, answer: Answer, limit: int | None = None) -> None:
        self.send_response(answer.status)
        for name, value in {**answer.headers, "Content-Length": str(len(answer.body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(answer.body[:limit] if self.command != "HEAD" else b"")
        self.wfile.flush()

    def _cut(self, path: str, rule: Rule) -> None:
        self.server.hub.requests.append(Request(self.command, path, None))
        self.close_connection = True
        _cut(self.connection, rule.reset)

    def _body(self, limit: float = math.inf) -> bytes:
        """The request's body, or its first bytes. No client sends one in chunks."""
        length = int(min(limit, int(self.headers.get("Content-Length", 0))))
        body = self.rfile.read(length)
        if len(body) < length:
            raise ConnectionResetError("The client has gone.")
        return body

    def log_message(self, *_: object) -> None:
        """Not to stderr; tests read `Hub.requests`."""


def _cut(connection: socket.socket, reset: bool = False) -> None:
    """Ends a connection at once, also while other objects hold the socket."""
    if reset:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        os.close(connection.detach())
    else:
        connection.shutdown(socket.SHUT_RDWR)
