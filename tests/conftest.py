"""Shared fixtures: packs on tiny random models, one a session."""

from __future__ import annotations

import atexit
import gc
import logging
import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# The address of the last cluster is in this folder: a session of Ray would join another test process's. A short path,
# since sockets lie below it.
os.environ["RAY_TMPDIR"] = tempfile.mkdtemp(prefix="r-")

from tests.compass import make_compass
from tests.hub import Hub
from tests.tiny import ARCHITECTURES, make_pack

atexit.register(shutil.rmtree, os.environ["RAY_TMPDIR"], ignore_errors=True)
signal.signal(signal.SIGINT, signal.default_int_handler)  # started in the background, tests would ignore it for all
torch.set_num_threads(1)  # the models here are too small to share among threads


def pytest_collection_finish() -> None:
    """Exempt all that is imported by now from garbage collection, which otherwise takes half the time of a tiny
    training: transformers and accelerate collect several times in each."""
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first: taken last, they keep one process busy while the other has nothing left to do."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(autouse=True)
def _empty_pictures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Save each picture without what was drawn on it: to render them takes matplotlib longer than all else in a tiny
    run. Tests marked `pictures` look at them. Fixtures of a wider scope and other processes draw in full: a test that
    compares with what they leave needs the mark, too."""
    if "pictures" not in request.keywords:
        save = Figure.savefig

        def empty(figure: Figure, *given: Any, **settings: Any) -> None:
            figure.clear()
            save(figure, *given, **settings)

        monkeypatch.setattr(Figure, "savefig", empty)


@pytest.fixture(autouse=True)
def _own_log_level() -> None:
    """Undo what commands run in this process have set, also by a module's fixtures: after --quiet, the warnings of
    other tests would be lost."""
    logging.getLogger("sqsd_filter").setLevel(logging.NOTSET)


@pytest.fixture(scope="session")
def packs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A pack for each architecture."""
    root = tmp_path_factory.mktemp("packs")
    return {name: make_pack(root / name, architecture=name) for name in ARCHITECTURES}


@pytest.fixture(scope="session")
def tiny_pack(packs: dict[str, Path]) -> Path:
    return packs["llama"]


@pytest.fixture(scope="session")
def compass(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pack whose directions truly steer."""
    return make_compass(tmp_path_factory.mktemp("compass"))


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A Hub that this process talks to, as its member, with an empty cache."""
    with Hub() as hub:
        hub.connect(tmp_path / "huggingface", monkeypatch)
        yield hub


@pytest.fixture(scope="session")
def moto() -> Iterator[str]:
    """The address of an S3 server in this process, which takes any key."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    yield "{}:{}".format(*server.get_host_and_port())
    server.stop()


@pytest.fixture(scope="module")
def session() -> Iterator[None]:
    """Ray on two cores, for the tests of a module."""
    import ray

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_BACKEND_LOG_LEVEL", "fatal")
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    yield
    ray.shutdown()


@pytest.fixture
def command(folder: Path, capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs the command in this process, in the module's `folder`: exit code, stdout, stderr."""
    from sqsd_filter.cli.main import main

    def run(*arguments: str) -> tuple[int, str, str]:
        capfd.readouterr()
        with pytest.raises(SystemExit) as left:
            main(list(arguments))
        out, err = capfd.readouterr()
        assert "Traceback" not in out + err
        return int(left.value.code or 0), out, err

    return run


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """The destination of a finished run, for the command `report`."""
    from tests.pages import finished_run

    return finished_run(tmp_path)


@pytest.fixture
def report(capfd: pytest.CaptureFixture[str]) -> Iterator[Callable[..., tuple[int, str, str]]]:
    """Runs `sqsd-filter report` in this process: exit code, stdout, stderr."""
    from tests.commands import exit_code

    logger = logging.getLogger("sqsd_filter")
    level = logger.level

    def run(*words: object) -> tuple[int, str, str]:
        capfd.readouterr()
        code = exit_code("report", *words)
        out, err = capfd.readouterr()
        assert "Traceback" not in out + err
        return code, out, err

    yield run
    logger.setLevel(level)  # the command set another
