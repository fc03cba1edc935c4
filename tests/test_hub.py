"""The tests' Hub and the real clients: it keeps what it gets, refuses as the real one does, and its faults bite."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, List, Value, get_dataset_config_names, load_dataset
from datasets.exceptions import DatasetNotFoundError
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    HfFileSystem,
    create_repo,
    delete_repo,
    hf_hub_download,
    snapshot_download,
    whoami,
)
from huggingface_hub.errors import (
    BadRequestError,
    GatedRepoError,
    HfHubHTTPError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import httpx  # type: ignore[attr-defined]  # the HTTP client that it uses, whichever that is
from huggingface_hub.utils._http import get_session
from huggingface_hub.utils.sha import git_hash
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.hub import Hub
from tests.hub_routes import MEMBER, STRANGER
from tests.tiny import make_adapter, make_model

NOISE = random.Random(0).randbytes(12_000_000)
CONFIGS = b"""---
configs:
- config_name: en
  data_files:
  - {split: train, path: en/train.jsonl}
  - {split: test, path: en/test.jsonl}
- config_name: fr
  data_files: fr.jsonl
---
"""


def commit(files: dict[str, bytes | Path], **options: Any) -> Any:
    """One commit to org/name."""
    operations = [CommitOperationAdd(path, data) for path, data in files.items()]
    options = {"commit_message": "Change", "repo_type": "dataset", **options}
    return HfApi().create_commit("org/name", operations, **options)


def download(name: str, path: str, **options: Any) -> bytes:
    return Path(hf_hub_download(name, path, repo_type="dataset", **options)).read_bytes()


def test_a_pushed_dataset_loads_as_it_was_at_once_and_streamed(hub: Hub) -> None:
    features = Features(
        {"text": Value("large_string"), "label": ClassLabel(names=["a", "b"]), "n": List(Value("int8"))}
    )
    rows = [{"text": "007", "label": 1, "n": [1, 2]}, {"text": None, "label": 0, "n": []}]
    pushed = Dataset.from_list(rows, features=features)
    pushed.push_to_hub("org/name", private=True)
    assert HfApi().dataset_info("org/name").private
    loaded = load_dataset("org/name", split="train")
    assert loaded.features == features
    assert loaded[:] == pushed[:]
    assert list(load_dataset("org/name", split="train", streaming=True)) == rows
    assert [c.title for c in hub.commits("org/name")] == ["Upload dataset", "initial commit"]


def test_the_configs_and_splits_that_a_card_names_are_found(hub: Hub) -> None:
    lines = {path: json.dumps({"from": path}).encode() for path in ("en/train.jsonl", "en/test.jsonl", "fr.jsonl")}
    sha = hub.add("org/name", {"README.md": CONFIGS, **lines})
    hub.add("org/name", {"fr.jsonl": b'{"from": "later"}'})
    assert get_dataset_config_names("org/name") == ["en", "fr"]
    found = {name: part[:]["from"] for name, part in load_dataset("org/name", "en").items()}
    assert found == {"train": ["en/train.jsonl"], "test": ["en/test.jsonl"]}
    assert load_dataset("org/name", "fr", split="train")[:] == {"from": ["later"]}
    assert load_dataset("org/name", "fr", split="train", revision=sha)[:] == {"from": ["fr.jsonl"]}
    with pytest.raises(ValueError, match=re.escape("BuilderConfig 'de' not found. Available: ['en', 'fr']")):
        load_dataset("org/name", "de")


def test_files_come_back_with_the_hashes_of_git_and_lfs(hub: Hub, tmp_path: Path) -> None:
    path = tmp_path / "noise"
    path.write_bytes(NOISE)
    files = {"README.md": CONFIGS, "a/b c é.txt": b"x\r\n", "empty.zst": b"", "d.parquet": b"PAR1", "noise": NOISE}
    create_repo("org/name", repo_type="dataset")
    done = commit({**files, "noise": path})
    assert hub.files("org/name") == dict(sorted(files.items()))
    assert {name: download("org/name", name) for name in files} == files
    entries: dict[str, Any] = {
        f.path: f for f in HfApi().get_paths_info("org/name", list(files), repo_type="dataset", revision=done.oid)
    }
    assert {name for name, file in entries.items() if file.lfs} == {"d.parquet", "noise"}
    assert entries["a/b c é.txt"].blob_id == git_hash(b"x\r\n")
    assert entries["d.parquet"].size == 4
    copy = Path(snapshot_download("org/name", repo_type="dataset", revision="main"))
    assert copy.name == done.oid
    assert (copy / "a" / "b c é.txt").read_bytes() == b"x\r\n"


def test_what_lfs_holds_is_not_sent_again_and_what_is_there_not_committed_again(hub: Hub) -> None:
    create_repo("org/name", repo_type="dataset")
    commit({"a.parquet": b"1"})
    commit({"b.parquet": b"1"})
    commit({"b.parquet": b"1"})
    assert len(hub.seen("PUT", "^/lfs/")) == 1
    assert len(hub.seen("POST", "/commit/")) == 2
    assert hub.files("org/name") == {"a.parquet": b"1", "b.parquet": b"1"}


def test_files_and_folders_are_deleted(hub: Hub) -> None:
    hub.add("org/name", {"a": b"1", "b/c": b"2", "b/d/e": b"3", "bc": b"4"})
    gone = [CommitOperationDelete("a"), CommitOperationDelete("b/")]
    HfApi().create_commit("org/name", gone, commit_message="Delete", repo_type="dataset")
    assert hub.files("org/name") == {"bc": b"4"}
    with pytest.raises(RemoteEntryNotFoundError):
        HfApi().delete_file("a", "org/name", repo_type="dataset")


def test_a_competing_commit_makes_the_parent_stale(hub: Hub) -> None:
    head = hub.add("org/name", {"a": b"1"})
    hub.on("POST", "/commit/main", lambda: hub.add("org/name", {"a": b"2"}))
    with pytest.raises(HfHubHTTPError) as refused:
        commit({"b": b"1"}, parent_commit=head)
    assert refused.value.response.status_code == 412
    assert hub.files("org/name") == {"a": b"2"}
    commit({"b": b"1"}, parent_commit=hub.commits("org/name")[0].sha[:7])
    assert hub.files("org/name") == {"a": b"2", "b": b"1"}


def test_a_pull_request_leaves_main_alone(hub: Hub) -> None:
    head = hub.add("org/name", {"a": b"1"})
    made = commit({"b": b"1"}, create_pr=True)
    assert (made.pr_num, made.pr_revision) == (1, "refs/pr/1")
    assert made.pr_url == f"{hub.url}/datasets/org/name/discussions/1"
    commit({"c": b"1"}, revision="refs/pr/1")
    assert hub.files("org/name") == {"a": b"1"}
    assert hub.files("org/name", revision="refs/pr/1") == {"a": b"1", "b": b"1", "c": b"1"}
    assert [c.sha for c in hub.commits("org/name", revision="refs/pr/1")][1:3] == [made.oid, head]
    refs = HfApi().list_repo_refs("org/name", repo_type="dataset", include_pull_requests=True)
    assert refs.pull_requests
    assert [r.ref for r in refs.pull_requests] == ["refs/pr/1"]
    assert refs.branches[0].target_commit == head


def test_branches_and_tags_are_names_of_commits(hub: Hub) -> None:
    first, second = hub.add("org/name", {"a": b"1"}), hub.add("org/name", {"a": b"2"})
    api = HfApi()
    api.create_tag("org/name", tag="v1", revision=first, repo_type="dataset")
    api.create_branch("org/name", branch="x/y", revision="v1", repo_type="dataset")
    commit({"b": b"3"}, revision="x/y", parent_commit=first)
    assert download("org/name", "a", revision="v1") == download("org/name", "a", revision="x/y") == b"1"
    assert hub.files("org/name", revision="x/y") == {"a": b"1", "b": b"3"}
    log = api.list_repo_commits("org/name", repo_type="dataset")
    assert [c.commit_id for c in log] == [c.sha for c in hub.commits("org/name")]
    assert log[0].commit_id == second
    refs = api.list_repo_refs("org/name", repo_type="dataset")
    assert [r.name for r in refs.branches] == ["main", "x/y"]
    assert [(r.name, r.target_commit) for r in refs.tags] == [("v1", first)]
    with pytest.raises(RevisionNotFoundError):
        commit({"b": b"3"}, revision="v1")
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_tag("org/name", tag="v1", repo_type="dataset")
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_branch("org/name", branch="x/y", repo_type="dataset")


def test_a_repository_is_created_once_and_deleted(hub: Hub) -> None:
    assert create_repo("org/name", private=True).repo_id == "org/name"
    assert HfApi().model_info("org/name").private
    assert whoami()["name"] == "member"
    with pytest.raises(HfHubHTTPError, match="409"):
        create_repo("org/name")
    assert create_repo("org/name", exist_ok=True).repo_id == "org/name"
    delete_repo("org/name")
    with pytest.raises(RepositoryNotFoundError):
        HfApi().model_info("org/name")


def test_a_card_without_valid_metadata_is_refused_before_anything_is_sent(hub: Hub) -> None:
    create_repo("org/name", repo_type="dataset")
    with pytest.raises(ValueError, match="Invalid metadata"):
        commit({"README.md": b"---\na: [\n---\n", "a.parquet": b"1"})
    assert not hub.seen("PUT", "/lfs/")
    assert hub.files("org/name") == {}


def test_no_object_is_taken_by_halves(hub: Hub) -> None:
    hub.add("org/name", {"a": b"1"})
    assert get_session().put(f"{hub.url}/lfs/datasets/org/name/{'0' * 64}", content=b"1").status_code == 400
    hub.fail("PUT", "^/lfs/", status=200, times=2)
    with pytest.raises(RuntimeError, match="Error while uploading"):
        commit({"a.parquet": b"1"})
    hub.fail("POST", "^/lfs/", status=200)
    with pytest.raises(BadRequestError):
        commit({"a.parquet": b"1"})
    assert hub.files("org/name") == {"a": b"1"}
    beyond = get_session().get(f"{hub.url}/datasets/org/name/resolve/main/a", headers={"Range": "bytes=1-"})
    assert beyond.status_code == 416


def test_a_file_system_globs_and_reads_ranges(hub: Hub) -> None:
    hub.add("org/name", {"a/1.parquet": NOISE[:1000], "a/b/2.parquet": b"2", "c/3.jsonl": b"3"})
    files = HfFileSystem()
    assert files.glob("datasets/org/name/**/*.parquet") == [f"datasets/org/name/a/{x}.parquet" for x in ("1", "b/2")]
    assert files.ls("datasets/org/name/a", detail=False) == [f"datasets/org/name/a/{x}" for x in ("1.parquet", "b")]
    with files.open("hf://datasets/org/name/a/1.parquet", block_size=64) as file:
        file.seek(500)
        assert file.read(100) == NOISE[500:600]
        file.seek(-10, 2)
        assert file.read() == NOISE[990:1000]
    assert hub.seen("GET", "/resolve/")[0].status == 206


def test_models_and_adapters_load_as_from_their_folders(hub: Hub, tmp_path: Path) -> None:
    base, adapter = make_model(tmp_path / "base"), make_adapter(tmp_path / "base", tmp_path / "adapter")
    for name, folder in (("org/base", base), ("org/adapter", adapter)):
        hub.add(name, {p.name: p.read_bytes() for p in folder.iterdir()}, kind="models", private=True)
    there = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("org/base"), "org/adapter")
    here = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    tokens = AutoTokenizer.from_pretrained("org/base")("the quick brown fox", return_tensors="pt")
    with torch.no_grad():
        assert torch.equal(there(**tokens).logits, here(**tokens).logits)
    assert hub.seen("GET", "/org/adapter/resolve/.*safetensors")


@pytest.mark.parametrize(
    ("token", "name", "options", "error", "status"),
    [
        pytest.param(MEMBER, "org/none", {}, RepositoryNotFoundError, 404, id="unknown"),
        pytest.param(None, "org/none", {}, RepositoryNotFoundError, 401, id="unknown, without a token"),
        pytest.param(STRANGER, "org/private", {}, RepositoryNotFoundError, 404, id="private"),
        pytest.param(None, "org/private", {}, RepositoryNotFoundError, 401, id="private, without a token"),
        pytest.param(STRANGER, "org/gated", {}, GatedRepoError, 403, id="gated"),
        pytest.param(None, "org/gated", {}, GatedRepoError, 401, id="gated, without a token"),
        pytest.param(MEMBER, "org/open", {"revision": "v9"}, RevisionNotFoundError, 404, id="revision"),
        pytest.param(MEMBER, "org/open", {"path": "b"}, RemoteEntryNotFoundError, 404, id="file"),
        pytest.param("hf_wrong", "org/open", {}, HfHubHTTPError, 401, id="wrong token"),
    ],
)
def test_refusals_raise_what_those_of_the_real_hub_do(
    hub: Hub,
    monkeypatch: pytest.MonkeyPatch,
    token: str | None,
    name: str,
    options: dict[str, str],
    error: type,
    status: int,
) -> None:
    for kind in ("open", "private", "gated"):
        files = {"README.md": b"read me", "a": b"1"}
        hub.add(f"org/{kind}", files, private=kind == "private", gated=kind == "gated")
    monkeypatch.setenv("HF_TOKEN", token or "")
    with pytest.raises(HfHubHTTPError) as refused:
        download(name, **{"path": "a", **options})
    assert (type(refused.value), refused.value.response.status_code) == (error, status)


def test_the_card_of_a_gated_repository_is_for_everyone(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add("org/name", {"README.md": b"read me", "a.jsonl": b"{}"}, gated=True)
    monkeypatch.setenv("HF_TOKEN", STRANGER)
    assert download("org/name", "README.md") == b"read me"
    assert HfApi().dataset_info("org/name").gated == "manual"
    with pytest.raises(DatasetNotFoundError, match="is a gated dataset"):
        load_dataset("org/name")


def test_a_stranger_may_only_propose(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add("org/name", {"a": b"1"})
    monkeypatch.setenv("HF_TOKEN", STRANGER)
    with pytest.raises(HfHubHTTPError, match="403"):
        commit({"b.parquet": b"2"})
    with pytest.raises(HfHubHTTPError, match="403"):
        HfApi().auth_check("org/name", repo_type="dataset", write=True)
    with pytest.raises(HfHubHTTPError, match="403"):
        create_repo("org/new")
    assert commit({"b.parquet": b"2"}, create_pr=True).pr_num == 1
    assert hub.files("org/name") == {"a": b"1"}


def test_transfers_wait_as_a_rate_limit_asks_and_go_on(hub: Hub) -> None:
    create_repo("org/name", repo_type="dataset")
    hub.fail("PUT", "^/lfs/", status=429, headers={"Retry-After": "0"})
    commit({"a.parquet": b"1"})
    assert [r.status for r in hub.seen("PUT", "^/lfs/")] == [429, 200]
    assert download("org/name", "a.parquet") == b"1"


@pytest.mark.parametrize(
    ("method", "pattern"),
    [("POST", "/commit/"), ("POST", "/validate-yaml"), ("POST", "/repos/create"), ("GET", "^/api/datasets/org/name$")],
    ids=["commit", "card", "create", "info"],
)
def test_the_clients_do_not_repeat_these_by_themselves(hub: Hub, method: str, pattern: str) -> None:
    hub.fail(method, pattern, status=429, headers={"Retry-After": "0"})
    with pytest.raises(HfHubHTTPError, match="429"):
        Dataset.from_dict({"a": [1]}).push_to_hub("org/name", private=True)
    assert [r.status for r in hub.seen(method, pattern)] == [429]
    Dataset.from_dict({"a": [1]}).push_to_hub("org/name", private=True)
    assert len(hub.commits("org/name")) == 2


def test_a_gateway_answers_in_html_which_the_check_of_a_card_takes_for_json(hub: Hub) -> None:
    hub.add("org/name", {})
    hub.fail("POST", "/validate-yaml", status=503)
    with pytest.raises(json.JSONDecodeError):
        commit({"README.md": b"read me"})


def test_a_download_that_ends_early_resumes(hub: Hub) -> None:
    hub.add("org/name", {"noise": NOISE})
    hub.cut("GET", "/resolve/", sent=11_000_000)
    assert download("org/name", "noise") == NOISE
    assert [r.status for r in hub.seen("GET", "/resolve/")] == [None, 206]


def test_a_download_that_is_reset_fails(hub: Hub) -> None:
    hub.add("org/name", {"noise": NOISE})
    hub.cut("GET", "/resolve/", sent=11_000_000, reset=True)
    with pytest.raises(httpx.ReadError):
        download("org/name", "noise")
    assert download("org/name", "noise") == NOISE


def test_an_upload_that_is_cut_off_is_sent_again_and_whole(hub: Hub, tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    path.write_bytes(NOISE)
    create_repo("org/name", repo_type="dataset")
    hub.cut("PUT", "^/lfs/", received=1_000_000)
    commit({"a.parquet": path})
    assert [r.status for r in hub.seen("PUT", "^/lfs/")] == [None, 200]
    assert hub.files("org/name") == {"a.parquet": NOISE}


@pytest.mark.parametrize(
    ("fault", "landed"), [({"received": 0}, False), ({"sent": 0}, True)], ids=["request", "answer"]
)
def test_a_commit_whose_request_or_answer_is_lost_fails(hub: Hub, fault: dict[str, Any], landed: bool) -> None:
    hub.add("org/name", {})
    hub.cut("POST", "/commit/", **fault)
    with pytest.raises((httpx.RemoteProtocolError, httpx.ReadError)):
        commit({"a": b"1"})
    assert hub.files("org/name") == ({"a": b"1"} if landed else {})
    assert [r.status for r in hub.seen("POST", "/commit/")] == [None]


def test_a_hub_that_is_stopped_answers_nobody(hub: Hub) -> None:
    hub.add("org/name", {"a": b"1"})
    HfApi().dataset_info("org/name")
    hub.stop()
    with pytest.raises(httpx.ConnectError):
        HfApi().dataset_info("org/name")


def test_what_goes_wrong_in_a_callback_comes_out_in_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ZeroDivisionError), Hub() as hub:  # noqa: PT012  # it is raised when the Hub stops
        hub.connect(tmp_path, monkeypatch)
        hub.on("GET", "whoami", lambda: 1 / 0)
        with pytest.raises(httpx.RemoteProtocolError):
            whoami()


def test_a_subprocess_finds_the_hub_in_its_environment(hub: Hub, tmp_path: Path) -> None:
    hub.add("org/name", {"a": b"1"}, private=True)
    code = "from huggingface_hub import hf_hub_download as get; print(get('org/name', 'a', repo_type='dataset'))"
    run = [sys.executable, "-c", code]
    home = tmp_path / "home"
    done = subprocess.run(run, env=hub.environment(home), check=True, capture_output=True, text=True)
    path = Path(done.stdout.strip())
    assert path.is_relative_to(home)
    assert path.read_bytes() == b"1"
    other = hub.environment(tmp_path / "other", token=None)
    assert "RepositoryNotFoundError" in subprocess.run(run, env=other, capture_output=True, text=True).stderr
