"""A pack from what SQSD's authors publish on the Hub (`Wxxxx/SQSD`): it scores as their scripts do.

Danger is taken at a checkpoint of a benign fine-tune with its own scaling, safety at the safety adapter itself with the
scaling 1.0; thinking is off and rows end at 1,024 tokens (arXiv 2605.04572).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sqsd_filter.directions.adapter_folder import is_free, whole_folder, write_adapter
from sqsd_filter.errors import PackError, UsageError
from sqsd_filter.scoring.adapters import load_adapter
from sqsd_filter.scoring.pack import (
    ADAPTER_FILES,
    CORE,
    FORMAT,
    HUB_NAME,
    PACK_FILE,
    Pack,
    Probe,
    from_hub,
    load_pack,
)
from sqsd_filter.storage.retries import with_retries

BOTH = "both"
INITIAL, SAFETY = "initial-state/dolly_ckpt_5850", "Direction/PKURLHF-10K_Safety"
# What the paper says of each folder; the names are the authors', misspelled ones too.
PUBLISHED: dict[str, dict[str, Any]] = {
    "Direction/Beaver-Danger": {"data": "BeaverTails, unsafe rows", "rows": 3000, "method": "sft"},
    "Direction/Ageis_Danger": {"data": "Aegis, unsafe rows", "method": "sft"},
    SAFETY: {"data": "PKU-SafeRLHF", "rows": 10000, "method": "dpo"},
    INITIAL: {"data": "Dolly", "rows": 5000, "steps": 5850, "method": "sft"},
}
DANGERS = {"Beaver-Danger": "danger_beaver", "Ageis_Danger": "danger_aegis"}  # and the probes' names, where both are
BASE_MODELS = {"Wxxxx/SQSD": "Qwen/Qwen3-8B"}  # for the case that the adapters name a path of their maker's machine
TEMPLATE = {"enable_thinking": False}
MAX_LENGTH = 1024


@dataclass(frozen=True)
class _Source:
    """A repository at one commit, or a folder of the same layout: its files, and how to have some of them here."""

    where: str
    facts: dict[str, str]
    licence: str | None
    paths: frozenset[str]
    fetch: Callable[[Iterable[str]], Path]


def import_pack(
    source: str, name: str, target: str | Path, *, danger: str = "Beaver-Danger", base_model: str | None = None
) -> Pack:
    """Make the pack `name` in the folder `target`; one that is there already, from the same source, is loaded.

    `source` is a Hub repository, `org/name[@revision]`, or a folder of that layout; `danger` one of `DANGERS`, or
    "both" for two danger probes of half the weight; `base_model` is needed where the adapters name none that others
    could have. Raises `PackError` where the source lacks something, `UsageError`, `DestinationExists`.
    """
    target = Path(target)
    adapters, probes = _plan(danger)
    found = _look(source)
    for folder in adapters.values():
        _check(found, folder)
    root = found.fetch([f"{folder}/{file}" for folder in adapters.values() for file in ADAPTER_FILES])
    for folder in adapters.values():
        load_adapter(root / folder)
    configs = {k: json.loads((root / f / ADAPTER_FILES[0]).read_text("utf-8")) for k, f in adapters.items()}
    pack = {
        "format": FORMAT,
        "name": name,
        "base_model": base_model or _base_model(found, configs.values()),
        "base_revision": None,
        "chat_template_kwargs": TEMPLATE,
        "max_length": MAX_LENGTH,
        "probes": [asdict(probe) for probe in probes],
        "provenance": {key: _provenance(found, root, folder) for key, folder in adapters.items()},
    }
    if not is_free(target) and _identity(_read(target / PACK_FILE)) == _identity(pack):
        return load_pack(target)
    with whole_folder(target) as made:
        from safetensors.torch import load_file

        for key, folder in adapters.items():
            write_adapter(made / key, configs[key], load_file(root / folder / ADAPTER_FILES[1]))
        (made / PACK_FILE).write_text(json.dumps(pack, indent=1) + "\n", encoding="utf-8")
    return load_pack(target)


def _plan(danger: str) -> tuple[dict[str, str], list[Probe]]:
    """The pack's adapters by the folders they come from, and its probes."""
    if danger not in (*DANGERS, BOTH):
        raise UsageError(f"There is no danger direction '{danger}': name one of {', '.join(DANGERS)} or {BOTH}.")
    dangers = DANGERS if danger == BOTH else {danger: "danger"}
    adapters = {probe: f"Direction/{folder}" for folder, probe in dangers.items()}
    probes = [Probe(probe, 1.0 / len(dangers), probe, "initial") for probe in adapters]
    return {**adapters, "initial": INITIAL, "safety": SAFETY}, [*probes, Probe("safety", -1.0, "safety", "safety", 1.0)]


def _look(source: str) -> _Source:
    folder = Path(source).expanduser()
    if folder.is_dir():
        paths = frozenset(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
        return _Source(source, {"folder": folder.resolve().name}, None, paths, lambda _: folder)
    if not HUB_NAME.fullmatch(source) or folder.exists():
        raise PackError(f"There is no '{source}' to import: name a folder, or a Hub repository as org/name.")
    from huggingface_hub import HfApi, snapshot_download

    repo, _, revision = source.partition("@")
    with from_hub(f"repository '{source}'"):
        info = with_retries(lambda: HfApi().model_info(repo, revision=revision or None))

    def fetch(paths: Iterable[str]) -> Path:
        with from_hub(f"repository '{source}'"):
            return Path(with_retries(lambda: snapshot_download(repo, revision=info.sha, allow_patterns=list(paths))))

    paths = frozenset(file.rfilename for file in info.siblings or [])
    licence = getattr(info.card_data, "license", None)
    return _Source(repo, {"repository": repo, "commit": str(info.sha)}, licence, paths, fetch)


def _check(source: _Source, folder: str) -> None:
    inside = {path.removeprefix(f"{folder}/") for path in source.paths if path.startswith(f"{folder}/")}
    if not inside:
        raise PackError(
            f"{source.where} has no {folder}: import needs the layout of Wxxxx/SQSD, that is {', '.join(PUBLISHED)}."
        )
    config, weights = ADAPTER_FILES
    if weights not in inside and any(path.endswith(".bin") for path in inside):
        raise PackError(
            f"{source.where} holds pickled weights (.bin) in {folder}, which are never loaded: ask for them as "
            f"{weights}, or save the adapter again with safe_serialization=True."
        )
    if missing := [file for file in (config, weights) if file not in inside]:
        raise PackError(f"{source.where} lacks {' and '.join(missing)} in {folder}: import a complete copy.")


def _base_model(source: _Source, configs: Iterable[Mapping[str, Any]]) -> str:
    """The one model of the Hub that the adapters name, else the published one's."""
    named = {str(config.get("base_model_name_or_path")) for config in configs}
    plausible = sorted(name for name in named if HUB_NAME.fullmatch(name))
    if len(plausible) > 1:
        raise UsageError(
            f"The adapters in {source.where} name several base models ({', '.join(plausible)}): say which with "
            "--base-model."
        )
    base = plausible[0] if plausible else BASE_MODELS.get(source.where)
    if base is None:
        raise UsageError(f"The adapters in {source.where} name no base model of the Hub: name it with --base-model.")
    return base


def _provenance(source: _Source, root: Path, folder: str) -> dict[str, Any]:
    with (root / folder / ADAPTER_FILES[1]).open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {
        **PUBLISHED[folder],
        "licence": source.licence,
        "source": {**source.facts, "path": folder, "sha256": digest},
    }


def _identity(page: Any) -> Any:
    """What makes a page that of this import, whatever was recorded in it or added since: what scores depend on, and
    where each adapter is from. None for anything else than a page with that."""
    try:
        sources = {name: told["source"] for name, told in page["provenance"].items()}
        return {key: page.get(key) for key in CORE}, sources
    except (AttributeError, KeyError, TypeError):
        return None


def _read(path: Path) -> Any:
    """What a file of JSON holds, None where there is no such file or something else in it."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
