"""Import of the adapters that SQSD's authors publish on the Hub (`Wxxxx/SQSD`) as a pack that scores as their scripts.

The danger probe is taken at a checkpoint of a benign fine-tune with its own scaling, the safety probe at the safety
adapter itself with the scaling 1.0. Thinking is off, and rows are cut at 1,024 tokens (arXiv 2605.04572).
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
# The paper's facts on each folder. The names, including misspellings, are the authors'.
PUBLISHED: dict[str, dict[str, Any]] = {
    "Direction/Beaver-Danger": {"data": "BeaverTails, unsafe rows", "rows": 3000, "method": "sft"},
    "Direction/Ageis_Danger": {"data": "Aegis, unsafe rows", "method": "sft"},
    SAFETY: {"data": "PKU-SafeRLHF", "rows": 10000, "method": "dpo"},
    INITIAL: {"data": "Dolly", "rows": 5000, "steps": 5850, "method": "sft"},
}
DANGERS = {
    "Beaver-Danger": "danger_beaver",
    "Ageis_Danger": "danger_aegis",
}  # folder: the probe's name if both are imported
BASE_MODELS = {"Wxxxx/SQSD": "Qwen/Qwen3-8B"}  # used if the adapters name a path on their author's machine
TEMPLATE = {"enable_thinking": False}
MAX_LENGTH = 1024


@dataclass(frozen=True)
class _Source:
    """A repository at one commit, or a folder of the same layout: its files, and how to fetch some of them."""

    where: str
    facts: dict[str, str]
    licence: str | None
    paths: frozenset[str]
    fetch: Callable[[Iterable[str]], Path]


def import_pack(
    source: str, name: str, target: str | Path, *, danger: str = "Beaver-Danger", base_model: str | None = None
) -> Pack:
    """Make the pack `name` in the folder `target`. If `target` already holds the same import, load that.

    `source` is a Hub repository, `org/name[@revision]`, or a folder of the same layout. `danger` is one of `DANGERS`,
    or "both" for two danger probes of half the weight. `base_model` is needed if the adapters don't name a model of the
    Hub. Raises `PackError` if the source lacks something, `UsageError`, `DestinationExists`.
    """
    target = Path(target)
    adapters, probes = _plan(danger)
    origin = _look(source)
    for folder in adapters.values():
        _check(origin, folder)
    root = origin.fetch([f"{folder}/{file}" for folder in adapters.values() for file in ADAPTER_FILES])
    for folder in adapters.values():
        load_adapter(root / folder)
    configs = {k: json.loads((root / f / ADAPTER_FILES[0]).read_text("utf-8")) for k, f in adapters.items()}
    pack = {
        "format": FORMAT,
        "name": name,
        "base_model": base_model or _base_model(origin, configs.values()),
        "base_revision": None,
        "chat_template_kwargs": TEMPLATE,
        "max_length": MAX_LENGTH,
        "probes": [asdict(probe) for probe in probes],
        "provenance": {key: _provenance(origin, root, folder) for key, folder in adapters.items()},
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
    """The pack's adapters with the folders they come from, and its probes."""
    if danger not in (*DANGERS, BOTH):
        raise UsageError(f"There is no danger direction '{danger}': take one of {', '.join(DANGERS)} or {BOTH}.")
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
        raise PackError(f"There is no '{source}' to import: name a folder or a Hub repository, org/name.")
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
    config, tensors = ADAPTER_FILES
    if tensors not in inside and any(path.endswith(".bin") for path in inside):
        raise PackError(
            f"{source.where} holds pickled weights (.bin) in {folder}, which are never loaded: "
            f"save the adapter again with safe_serialization=True, as {tensors}."
        )
    if missing := [file for file in (config, tensors) if file not in inside]:
        raise PackError(f"{source.where} lacks {' and '.join(missing)} in {folder}: import a complete copy.")


def _base_model(source: _Source, configs: Iterable[Mapping[str, Any]]) -> str:
    """The one model of the Hub that the adapters name, or the known one of the published repository."""
    named = {str(config.get("base_model_name_or_path")) for config in configs}
    plausible = sorted(name for name in named if HUB_NAME.fullmatch(name))
    if len(plausible) > 1:
        raise UsageError(
            f"The adapters in {source.where} name several base models ({', '.join(plausible)}): choose one with "
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


def _identity(page: object) -> object:
    """The part of a pack.json that identifies an import: what scores depend on, and each adapter's source.

    Anything recorded or added later does not count. None if `page` lacks that part."""
    provenance = page.get("provenance") if isinstance(page, dict) else None
    if not isinstance(page, dict) or not isinstance(provenance, dict):
        return None
    if not all(isinstance(entry, dict) and "source" in entry for entry in provenance.values()):
        return None
    return {key: page.get(key) for key in CORE}, {name: entry["source"] for name, entry in provenance.items()}


def _read(path: Path) -> object:
    """The content of a JSON file, None if there is no such file or it is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
