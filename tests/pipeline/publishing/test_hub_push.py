"""Pushing to a Hub on this machine: one commit, nothing foreign touched, nothing public that should not be."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

from sqsd_filter.errors import DestinationExists, SQSDError, UsageError
from sqsd_filter.pipeline.publishing.hub import PushTo
from sqsd_filter.pipeline.publishing.target import MARKER, REPORT, Finished
from sqsd_filter.pipeline.report import CONFIGS, Config, FinishedReport
from tests.hub import Hub

DATA = {
    "data/train-00000-of-00001.parquet": b"PAR1" + b"k" * 5000,
    "_sqsd/dropped/train-00000-of-00001.parquet": b"PAR1" + b"d" * 5000,
    "_sqsd/errors/train-00000-of-00001.jsonl": b"{}\n",
    "_sqsd/reasons.jsonl": b"{}\n",
}
KEPT = {"data/train-00000-of-00001.parquet", "README.md", "_sqsd/risk.png", REPORT, MARKER}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sqsd_filter.storage.retries.FIRST_WAIT", 0.01)


def finished(folder: Path, run: str = "one", more: bytes = b"") -> Finished:
    files = {**DATA, "README.md": b"local", "_sqsd/risk.png": b"PNG", "_sqsd/run.json": b"{}", REPORT: b"{}"}
    files |= {"_sqsd/scores/a.parquet": b"scores"}
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content + more)
    configs = dict(zip(CONFIGS, DATA, strict=False))
    report = {
        "rows": {"kept": 1, "total": 3},
        "files": [{"path": name, "config": config} for config, name in configs.items()],
        "extra_files": ["_sqsd/reasons.jsonl", "_sqsd/risk.png", "README.md"],
        "inputs": [{"path": "/home/somebody/in.jsonl"}, {"path": "file:///home/somebody/b.jsonl"}],
        "command": ["sqsd-filter", "../../somebody/*.jsonl", "out"],
        "groups": {"groups": [{"value": "/a/b"}]},
        "settings": {"metrics_file": {"value": "/var/metrics/a.prom"}},
    }

    def card(report: Any, name: str) -> str:
        return f"# {name}: {', '.join(file['config'] for file in report['files'])}\n"

    return Finished(run, {name: folder / name for name in files}, cast("FinishedReport", report), card)


def test_a_private_repository_is_made_and_holds_all_rows_in_one_commit(hub: Hub, tmp_path: Path) -> None:
    target, run = PushTo("org/out"), finished(tmp_path)
    target.check()
    assert target.published("one") is None
    pushed = target.publish(run)
    files = hub.files("org/out")
    assert set(files) == {*DATA, *KEPT}
    assert {name: files[name] for name in DATA} == DATA
    assert files["README.md"] == b"# org/out: kept, dropped, errors\n"
    assert hub.repos["datasets", "org/out"].private
    assert len(hub.seen("POST", "/commit/")) == 1
    assert pushed == {**pushed, "repo": "org/out", "rows": ["kept", "dropped", "errors"]}
    assert pushed["commit"] in pushed["url"]
    report: Any = target.published("one")
    assert report is not None
    assert b"somebody" not in files[REPORT]
    assert b"/var" not in files[REPORT]
    assert report["inputs"] == [{"path": "in.jsonl"}, {"path": "b.jsonl"}]
    assert report["command"] == ["sqsd-filter", "*.jsonl", "out"]
    assert report["groups"] == {"groups": [{"value": "/a/b"}]}


@pytest.mark.parametrize(
    ("rows", "more"),
    [
        (None, set()),
        (["kept", "dropped"], {"_sqsd/dropped/train-00000-of-00001.parquet"}),
        (["errors", "kept"], {"_sqsd/errors/train-00000-of-00001.jsonl", "_sqsd/reasons.jsonl"}),
    ],
)
def test_only_the_kept_rows_go_public_unless_others_are_named(
    rows: Sequence[Config] | None, more: set[str], hub: Hub, tmp_path: Path
) -> None:
    PushTo("org/out", private=False, rows=rows).publish(finished(tmp_path))
    files = hub.files("org/out")
    assert set(files) == KEPT | more
    assert not hub.repos["datasets", "org/out"].private
    report = json.loads(files[REPORT])
    named = [*(file["path"] for file in report["files"]), *report["extra_files"]]
    assert set(named) == set(files) - {REPORT, MARKER}


def test_a_file_that_the_run_did_not_write_is_never_pushed(hub: Hub, tmp_path: Path) -> None:
    run = finished(tmp_path)
    (tmp_path / "data" / "dropped-copy.parquet").write_bytes(b"rows")
    files = {**run.files, "data/dropped-copy.parquet": tmp_path / "data" / "dropped-copy.parquet"}
    PushTo("org/out", private=False).publish(replace(run, files=files))
    assert set(hub.files("org/out")) == KEPT


def test_rows_that_are_no_longer_to_be_there_are_taken_back(hub: Hub, tmp_path: Path) -> None:
    run = finished(tmp_path)
    PushTo("org/out").publish(run)
    hub.repos["datasets", "org/out"].private = False
    hub.add("org/out", {"LICENSE": b"theirs"})
    assert PushTo("org/out").published("one") is None
    PushTo("org/out").publish(run)
    assert set(hub.files("org/out")) == KEPT | {"LICENSE"}
    assert PushTo("org/out").published("one") is not None


def test_a_new_branch_holds_this_run_alone_whatever_it_was_made_from(hub: Hub, tmp_path: Path) -> None:
    run = finished(tmp_path)
    hub.add("org/out", {"theirs.txt": b"theirs"}, private=True)
    target = PushTo("org/out", revision="v1")
    target.check()
    assert target.published("one") is None
    target.publish(run)
    assert set(hub.files("org/out", revision="v1")) == {*DATA, *KEPT}
    assert target.published("one") is not None
    assert set(hub.files("org/out")) == {"theirs.txt"}


def test_the_same_proposal_is_made_once(hub: Hub, tmp_path: Path) -> None:
    hub.add("org/out", {}, private=True)
    target = PushTo("org/out", create_pr=True)
    assert target.published("one") is None
    target.publish(finished(tmp_path))
    assert target.published("one") is not None
    assert target.published("two") is None


def test_a_public_repository_that_is_there_gets_the_kept_rows_only(hub: Hub, tmp_path: Path) -> None:
    hub.add("org/out", {})
    PushTo("org/out").publish(finished(tmp_path))
    assert set(hub.files("org/out")) == KEPT
    with pytest.raises(UsageError, match="org/out is already public: leave out --private"):
        PushTo("org/out", private=True).check()


def test_foreign_content_is_refused_before_any_work_and_replaced_only_when_asked(hub: Hub, tmp_path: Path) -> None:
    hub.add("org/out", {"README.md": b"theirs", "data/theirs.parquet": b"x" * 9000}, private=True)
    with pytest.raises(DestinationExists, match=r"org/out holds README\.md and 1 more, which this command did not"):
        PushTo("org/out").check()
    PushTo("org/out", overwrite=True).publish(finished(tmp_path))
    assert set(hub.files("org/out")) == {*DATA, *KEPT}
    assert len(hub.seen("POST", "/commit/")) == 1


def test_the_same_run_is_done_and_another_one_refused(hub: Hub, tmp_path: Path) -> None:
    PushTo("org/out").publish(finished(tmp_path / "a"))
    with pytest.raises(DestinationExists, match="org/out holds another run"):
        PushTo("org/out").published("two")
    PushTo("org/out", overwrite=True).publish(finished(tmp_path / "b", "two", b"new"))
    assert PushTo("org/out").published("two") is not None
    assert hub.files("org/out")["data/train-00000-of-00001.parquet"].endswith(b"new")
    assert PushTo("org/out", rows=["kept"]).published("two") is None


def test_a_branch_and_a_proposal_leave_main_alone(hub: Hub, tmp_path: Path) -> None:
    hub.add("org/out", {}, private=True)
    before = hub.commits("org/out")
    PushTo("org/out", revision="v1").publish(finished(tmp_path))
    assert set(hub.files("org/out", revision="v1")) == {*DATA, *KEPT}
    pushed = PushTo("org/out", create_pr=True).publish(finished(tmp_path))
    assert set(hub.files("org/out", revision="refs/pr/1")) == {*DATA, *KEPT}
    assert "discussions/1" in pushed["url"]
    assert hub.commits("org/out") == before


def test_a_commit_in_between_is_looked_at_before_the_next_try(hub: Hub, tmp_path: Path) -> None:
    hub.add("org/out", {}, private=True)
    hub.on("POST", "/preupload/", lambda: hub.add("org/out", {"theirs.txt": b"theirs"}))
    with pytest.raises(DestinationExists, match=r"org/out holds theirs\.txt"):
        PushTo("org/out").publish(finished(tmp_path))
    assert set(hub.files("org/out")) == {"theirs.txt"}
    hub.on("POST", "/preupload/", lambda: hub.add("org/out", {"more.txt": b"more"}))
    PushTo("org/out", overwrite=True).publish(finished(tmp_path))
    assert set(hub.files("org/out")) == {*DATA, *KEPT}


def test_a_busy_hub_and_broken_uploads_get_another_try_and_nothing_is_sent_twice(hub: Hub, tmp_path: Path) -> None:
    hub.fail("POST", "/commit/", status=429, headers={"Retry-After": "0"}, times=2)
    hub.fail("POST", "/commit/", status=503, headers={"Retry-After": "0"})
    hub.fail("POST", "/commit/", status=409)
    hub.cut("PUT", "", received=1000)
    PushTo("org/out").publish(finished(tmp_path))
    assert set(hub.files("org/out")) == {*DATA, *KEPT}
    stored = [request.path for request in hub.seen("PUT", "") if request.status == 200]
    assert len(stored) == len(set(stored)) == 3


def test_an_answer_that_got_lost_makes_no_second_commit(hub: Hub, tmp_path: Path) -> None:
    hub.cut("POST", "/commit/", sent=0)
    run = finished(tmp_path)
    PushTo("org/out").publish(run)
    assert set(hub.files("org/out")) == {*DATA, *KEPT}
    assert len([commit for commit in hub.commits("org/out") if "rows" in str(commit)]) == 1


def test_a_failed_upload_goes_on_with_the_next_call(hub: Hub, tmp_path: Path) -> None:
    hub.fail("POST", "/commit/", status=500, headers={"Retry-After": "0"}, times=math.inf)
    with pytest.raises(SQSDError, match=r"org/out can't be pushed to .*what has been uploaded is kept"):
        PushTo("org/out").publish(finished(tmp_path))
    uploads = len(hub.seen("PUT", ""))
    hub.rules.clear()
    PushTo("org/out").publish(finished(tmp_path))
    assert len(hub.seen("PUT", "")) == uploads


@pytest.mark.parametrize("token", [None, "hf_stranger", "hf_wrong"])
def test_a_token_that_may_not_write_is_one_sentence(
    token: str | None, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("org/out", {}, private=False)
    hub.connect(tmp_path / "home", monkeypatch, token)

    def push() -> None:
        PushTo("org/out").check()
        PushTo("org/out").publish(finished(tmp_path))

    with pytest.raises(SQSDError, match="org/out can't be pushed to with this token: set HF_TOKEN"):
        push()


@pytest.mark.parametrize(
    ("repo", "rows", "said"),
    [
        ("out", None, "'out' is not a repository to push to: write ORG/NAME"),
        ("org/a--b", None, "'org/a--b' is not a repository to push to"),
        ("org/out", ["kept", "bad"], "There are no rows 'bad' to push: choose from kept, dropped, errors"),
    ],
)
def test_senseless_requests_are_usage_errors(repo: str, rows: Any, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        PushTo(repo, rows=rows)
