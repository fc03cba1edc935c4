"""A pack on disk: `pack.json` beside the PEFT adapter folders of its states and directions.

    {"format": 1, "name": "...", "base_model": "<hub id | path | embedded id>", "base_revision": null,
     "chat_template_kwargs": {}, "max_length": 1024,
     "probes": [{"name": "danger", "weight": 1.0, "direction": "danger", "state": "initial", "state_scaling": null},
                {"name": "safety", "weight": -1.0, "direction": "safety", "state": "safety", "state_scaling": 1.0}]}

`direction` and `state` are adapter folders inside the pack. `state_scaling` null keeps the adapter's own α/r.
`base_adapter`, if given, is an adapter folder that is merged into the base model first. `reference`, if given, is what
known rows score (`reference_rows`). `risks` has other risks that the pack can compute, each with a
reference of its own, if it has one. They have probes like the pack's own, or are a linear probe of hidden states at
some layers (`linear_probe`), whose weights are in a folder of the risk's name:

     "risks": {"other": {"probes": [...], "reference": {...}}, "unsafe": {"layers": [14, 20, 26]}},
     "beside": ["unsafe"]

`beside` names linear probes that a run with the pack's own risk reads as well, each into a column of its own. All other
keys change no score.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar, overload

from sqsd_filter.errors import PackError, UsageError, first_line
from sqsd_filter.storage.secrets import check_address

PACK_FILE = "pack.json"
FORMAT = 1
MOST_PROBES, MOST_RISKS = 64, 64
PACKS_DIR = Path(__file__).resolve().parent.parent / "packs"  # the embedded ones
PROBE_NAME = re.compile(r"(?!.*_modules$)[a-z][a-z0-9_]*")  # sqsd_<probe>_modules is the column of --per-module
REFERENCE = "reference"  # the key of what reference rows score, in pack.json and in each risk
RESERVED = ("risk", "status", "percentile", "weight", "reason", "file", "line", "raw")  # of other columns: sqsd_<name>
HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*(@[\w./-]+)?")
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
LINEAR_FILE = "linear_probe.safetensors"
MOST_LAYERS = 10_000  # more than any model has
OWN_RISK = "sqsd"  # what a pack's own risk is called beside the others


@dataclass(frozen=True)
class Probe:
    """One projection: the row's update at `state` against `direction`, counted `weight` times in the risk."""

    name: str
    weight: float
    direction: str
    state: str
    state_scaling: float | None = None

    @property
    def at(self) -> tuple[str, float | None]:
        """The state at which the gradient is taken. Probes at the same one share a forward and backward pass."""
        return self.state, self.state_scaling


@dataclass(frozen=True)
class LinearProbe:
    """A linear probe of the model's hidden states at these layers. Its name is that of its folder and of its risk."""

    name: str
    layers: tuple[int, ...]


@dataclass(frozen=True)
class Risk:
    """Another risk of a pack: its probes, or a linear probe and no others. `reference` is what reference rows score by
    it (JSON), if that is known."""

    probes: tuple[Probe, ...] = ()
    linear: LinearProbe | None = None
    reference: object = None


@dataclass(frozen=True)
class Pack:
    """A validated pack. It has the paths of the adapters; the scorer reads them.

    `risk` names the one of its `risks` that it computes; None is the pack's own. Where that one is `linear`, there are
    no probes. `beside` is the same pack by each linear probe that is read beside its own risk.
    """

    path: Path
    name: str
    base_model: str
    probes: tuple[Probe, ...]
    base_revision: str | None = None
    base_adapter: str | None = None
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    max_length: int = 1024
    notes: Mapping[str, Any] = field(default_factory=dict)  # JSON: provenance, licences, quantiles; not interpreted
    risks: Mapping[str, Risk] = field(default_factory=dict)
    risk: str | None = None
    linear: LinearProbe | None = None
    beside: tuple[Pack, ...] = ()

    def adapter(self, name: str) -> Path:
        """The folder of one of the pack's adapters."""
        return self.path / name

    @property
    def base_folder(self) -> Path | None:
        """The folder of the adapter that turns the base model into the one that the others were trained on."""
        return self.adapter(self.base_adapter) if self.base_adapter else None

    @property
    def adapters(self) -> list[str]:
        """Names of all adapters that the probes use, sorted."""
        return sorted({name for p in self.probes for name in (p.direction, p.state)})

    @property
    def folders(self) -> list[str]:
        """Names of all adapters that the pack needs."""
        return [*self.adapters, *([self.base_adapter] if self.base_adapter else [])]

    @property
    def all_folders(self) -> list[str]:
        """The same with those that its other risks need."""
        others = {name for risk in self.risks.values() for p in risk.probes for name in (p.direction, p.state)}
        return [*self.folders, *sorted(others - set(self.folders))]

    @property
    def files(self) -> list[str]:
        """The paths in the pack's folder of all files that this risk and the other ones need."""
        adapters = [f"{name}/{file}" for name in self.all_folders for file in ADAPTER_FILES]
        weights = [f"{name}/{LINEAR_FILE}" for name, risk in self.risks.items() if risk.linear is not None]
        return [PACK_FILE, *adapters, *weights]

    @property
    def shared_state(self) -> str | None:
        """The state at which all probes are, where there is only one and some of them are of danger, some of safety (by
        the signs of their weights). This is the fast mode; the paper has two states."""
        states, signs = {p.at for p in self.probes}, {math.copysign(1, p.weight) for p in self.probes if p.weight}
        return self.probes[0].state if len(states) == 1 and len(signs) == 2 else None

    def at_one_state(self, state: str) -> Pack:
        """The pack with every probe at this one of its states, with the scaling that the state has there: all share one
        forward and backward pass, and nothing is read beside them. Scores differ, so the fingerprint does.

        Raises `UsageError` where no probe is at that state.
        """
        if self.linear is not None:
            raise UsageError(f"The risk '{self.risk}' takes no gradients: leave out --shared-state.")
        scalings = {p.state: p.state_scaling for p in reversed(self.probes)}
        if state not in scalings:
            raise UsageError(
                f"The pack {self.name} takes no gradients at '{state}': its states are {', '.join(sorted(scalings))}."
            )
        probes = (replace(p, state=state, state_scaling=scalings[state]) for p in self.probes)
        return replace(self, probes=tuple(probes), beside=())

    def with_risk(self, name: str) -> Pack:
        """The pack that computes another one of its `risks`, with that one's reference. Its fingerprint is that of a
        pack with these probes. `OWN_RISK` is the pack's own as it was loaded. Nothing is read beside it.

        Raises `UsageError` where the pack has no risk of that name.
        """
        if name == OWN_RISK and self.risk is None:
            return self.alone
        if name not in self.risks:
            raise UsageError(f"The pack {self.name} has no risk '{name}': it has {', '.join(self.all_risks)}.")
        other = self.risks[name]
        notes = {key: value for key, value in self.notes.items() if key != REFERENCE}
        notes |= {REFERENCE: other.reference} if other.reference is not None else {}
        return replace(self, probes=other.probes, linear=other.linear, risk=name, notes=notes, beside=())

    @property
    def all_risks(self) -> list[str]:
        """The names of its own risk and of the others."""
        return [OWN_RISK, *sorted(self.risks)]

    @property
    def weights(self) -> dict[str, float]:
        """The weight of each value that enters the risk, by the value's name."""
        if self.linear is not None:
            return {self.linear.name: 1.0}
        return {p.name: p.weight for p in self.probes}

    @property
    def alone(self) -> Pack:
        """The pack with nothing beside its risk."""
        return replace(self, beside=())

    def at(self, path: Path) -> Pack:
        """The same pack with its files in another folder."""
        return replace(self, path=path, beside=tuple(replace(each, path=path) for each in self.beside))

    @property
    def fingerprints(self) -> list[str]:
        """The fingerprints of everything that a scorer computes."""
        return [each.fingerprint for each in (self, *self.beside)]

    @property
    def for_reference(self) -> Pack:
        """The pack by the risk at which a cut by its reference is made: the first one beside its own that has a
        reference, or else the one that it computes."""
        return next((each for each in self.beside if REFERENCE in each.notes), self)

    def of_sign(self, sign: int) -> Pack:
        """The pack with only its danger probes, whose weight is positive, or (-1) only its safety probes. Its
        fingerprint differs.

        Raises `UsageError` where it has none.
        """
        probes = tuple(p for p in self.probes if p.weight * sign > 0)
        if not probes:
            others = [name for name, risk in self.risks.items() if any(p.weight * sign > 0 for p in risk.probes)]
            fix = f": the risk '{others[0]}' has one" if others else ""
            raise UsageError(f"The pack {self.name} has no probe of {'danger' if sign > 0 else 'safety'}{fix}.")
        return replace(self, probes=probes, beside=())

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits over everything that can change the risk: the settings, and the bytes of adapters and weights.

        The pack's name, its path and its notes are left out.
        """
        digest = hashlib.blake2b(digest_size=8)
        settings = {
            "base_model": self.base_model,
            "base_revision": self.base_revision,
            "chat_template_kwargs": dict(self.chat_template_kwargs),
            "probes": [asdict(p) for p in self.probes],
        }
        if self.base_adapter:
            settings["base_adapter"] = self.base_adapter
        files = [self.adapter(name) / file for name in self.folders for file in ADAPTER_FILES]
        if self.linear is not None:
            settings["linear"] = asdict(self.linear)
            files.append(self.path / self.linear.name / LINEAR_FILE)
        digest.update(json.dumps(settings, sort_keys=True).encode())
        for file in files:
            with file.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=32)).digest())
        return digest.hexdigest()


def embedded_packs() -> list[str]:
    """Names of the packs that are part of the package."""
    return sorted(p.parent.name for p in PACKS_DIR.glob(f"*/{PACK_FILE}"))


def load_pack(where: str | Path) -> Pack:
    """Load a pack by the name of an embedded one, from a folder, or from a Hub repository (`org/name[@revision]`).

    Write `./name` for a folder with the name of an embedded pack.

    Raises `PackError` where no pack is found or it is not valid.
    """
    text = str(where)
    check_address(text)
    folder = Path(text).expanduser()
    if text in embedded_packs():
        return _read(PACKS_DIR / text)
    if folder.is_dir():
        return _read(folder)
    if HUB_NAME.fullmatch(text) and not folder.exists():
        return _read(_download(text))
    raise PackError(
        f"There is no pack '{text}': give one of {', '.join(embedded_packs()) or '(none embedded)'}, a folder that "
        f"holds {PACK_FILE}, or a Hub repository as org/name."
    )


def _download(where: str) -> Path:
    from huggingface_hub import snapshot_download

    repo, _, revision = where.partition("@")
    patterns = [PACK_FILE, *(f"*{name}" for name in (*ADAPTER_FILES, LINEAR_FILE))]
    with from_hub(f"pack '{where}'"):
        return Path(snapshot_download(repo, revision=revision or None, allow_patterns=patterns))


@contextmanager
def from_hub(what: str) -> Iterator[None]:
    """Turn what the Hub's client raises while it fetches `what` into `PackError`."""
    from huggingface_hub.errors import HFValidationError, HTTPError  # type: ignore[attr-defined]  # httpx, or its fork

    try:
        yield
    except (HTTPError, HFValidationError, OSError) as problem:
        raise PackError(
            f"The {what} is not a local folder and can't be fetched from the Hub ({first_line(problem)}): check the "
            "name, the network and, for a private repository, the token in HF_TOKEN."
        ) from problem


def _read(folder: Path) -> Pack:
    path = folder / PACK_FILE
    if path.exists() and not path.is_file():
        raise PackError(f"{path} is not a file.")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as problem:
        raise PackError(f"{folder} is not a pack: it has no {PACK_FILE}.") from problem
    except (OSError, ValueError, RecursionError) as problem:
        raise PackError(f"{path} can't be read as JSON ({problem}).") from problem
    if not isinstance(data, dict):
        raise PackError(f"{path} must hold a JSON object.")
    if data.get("format") != FORMAT:
        raise PackError(f"{path} has format {data.get('format')!r}; this version reads format {FORMAT}.")
    risks = _field(data, "risks", dict, path, {})
    if len(risks) > MOST_RISKS:
        raise PackError(f"{path} lists {len(risks):,} risks: {MOST_RISKS} are the most.")
    pack = Pack(
        path=folder,
        name=_field(data, "name", str, path),
        base_model=_field(data, "base_model", str, path),
        base_revision=_field(data, "base_revision", str, path, None),
        base_adapter=_field(data, "base_adapter", str, path, None),
        chat_template_kwargs=_field(data, "chat_template_kwargs", dict, path, {}),
        max_length=_field(data, "max_length", int, path, 1024),
        probes=_probes(data.get("probes"), path),
        notes={k: v for k, v in data.items() if k not in CORE},
        risks={name: _risk(name, entry, path) for name, entry in risks.items()},
    )
    if pack.max_length < 2:
        raise PackError(f"{path}: max_length must be at least 2 tokens.")
    for name in pack.all_folders:
        parts = PurePosixPath(name)
        if parts.is_absolute() or ".." in parts.parts:
            raise PackError(f"{path}: the adapter '{name}' must be a folder inside the pack.")
        for file in ADAPTER_FILES:
            if not (folder / name / file).is_file():
                raise PackError(f"{path} names the adapter '{name}', but {folder / name / file} is missing.")
    for name, risk in pack.risks.items():
        if risk.linear is not None and not (weights := folder / name / LINEAR_FILE).is_file():
            raise PackError(f"{path} has the linear probe '{name}', but {weights} is missing.")
    return replace(pack, beside=_beside(pack, data.get("beside", []), path))


def _beside(pack: Pack, names: object, path: Path) -> tuple[Pack, ...]:
    """The pack by each of the linear probes with these names. Raises `PackError` for other names, and for one that is
    a probe's, too."""
    linear = [name for name, risk in pack.risks.items() if risk.linear is not None]
    if not isinstance(names, list) or not all(name in linear for name in names) or len(set(names)) < len(names):
        known = ", ".join(linear) or "which it has none of"
        raise PackError(f"{path}: 'beside' must be a list of different linear probes ({known}), not {names!r}.")
    if twice := [probe.name for probe in pack.probes if probe.name in names]:
        raise PackError(f"{path}: '{twice[0]}' is the name of a probe and of a linear probe beside it: rename one.")
    return tuple(pack.with_risk(name) for name in names)


CORE = {
    *("format", "name", "base_model", "base_revision", "base_adapter"),
    *("chat_template_kwargs", "max_length", "probes", "risks", "beside"),
}
_REQUIRED = object()
Value = TypeVar("Value")
Default = TypeVar("Default")


@overload
def _field(data: Mapping[str, Any], key: str, kind: type[Value], path: Path) -> Value: ...
@overload
def _field(data: Mapping[str, Any], key: str, kind: type[Value], path: Path, default: Default) -> Value | Default: ...
def _field(data: Mapping[str, Any], key: str, kind: type, path: Path, default: object = _REQUIRED) -> object:
    """A field of `pack.json`. Raises `PackError` where it has another type, or is missing and has no default."""
    value = data.get(key, default)
    if value is _REQUIRED:
        raise PackError(f"{path} lacks '{key}'.")
    number = isinstance(value, int | float) and not isinstance(value, bool)
    fits = number and math.isfinite(value) if kind is float else isinstance(value, kind) and not isinstance(value, bool)
    if value is not default and not fits:
        raise PackError(f"{path}: '{key}' must be of type {kind.__name__}, not {value!r}.")
    if isinstance(value, str) and not value.isprintable():
        raise PackError(f"{path}: '{key}' must be text that can be printed, not {value!a}.")
    return value


def _risk(name: str, entry: object, path: Path) -> Risk:
    if name == OWN_RISK:
        raise PackError(f"{path}: a risk can't be called '{name}', which is the pack's own: rename it.")
    if not isinstance(entry, dict):
        raise PackError(f"{path}: each of the risks must be an object, not {entry!r}.")
    reference = entry.get(REFERENCE)
    if "layers" not in entry:
        return Risk(_probes(entry.get("probes"), path), reference=reference)
    layers = _field(entry, "layers", list, path)
    if not layers or not all(type(layer) is int and 0 < layer <= MOST_LAYERS for layer in layers):
        raise PackError(f"{path}: the layers of the risk '{name}' must be numbers from 1 on, not {layers!r}.")
    return Risk(linear=LinearProbe(_column(name, path), tuple(layers)), reference=reference)


def _probes(entries: object, path: Path) -> tuple[Probe, ...]:
    if not isinstance(entries, list) or not entries:
        raise PackError(f"{path} needs a list of probes.")
    if len(entries) > MOST_PROBES:
        raise PackError(f"{path} lists {len(entries):,} probes for one risk: {MOST_PROBES} are the most.")
    probes = tuple(_probe(entry, path) for entry in entries)
    names = [p.name for p in probes]
    if len(set(names)) < len(names):
        raise PackError(f"{path} names a probe twice: {', '.join(names)}.")
    return probes


def _probe(entry: object, path: Path) -> Probe:
    if not isinstance(entry, dict):
        raise PackError(f"{path}: each probe must be an object, not {entry!r}.")
    scaling = _field(entry, "state_scaling", float, path, None)
    probe = Probe(
        name=_field(entry, "name", str, path),
        weight=float(_field(entry, "weight", float, path)),
        direction=_field(entry, "direction", str, path),
        state=_field(entry, "state", str, path),
        state_scaling=None if scaling is None else float(scaling),
    )
    _column(probe.name, path)
    return probe


def _column(name: str, path: Path) -> str:
    """The name of a probe. Raises `PackError` where no column can be called so."""
    if not PROBE_NAME.fullmatch(name) or name in RESERVED:
        raise PackError(f"{path}: '{name}' can't be a probe's name: it becomes the column sqsd_{name}.")
    return name
