"""A pack's recipe, a TOML file: which adapters are trained on what, and which probes they make.

name = "my-pack"
base_model = "org/model"
seed = 0
[lora]
r = 8
alpha = 16
[adapters.danger]
method = "sft"
data = "org/dataset"           # of the Hub, or a file or folder beside the recipe
split = "30k_train"            # default: train; also config = "..." and revision = "..."
prompt = "prompt"              # columns, where their names do not say it; or messages = "..."
answer = "response"
where = { is_safe = false }    # these rows only; unless = { ... } leaves out others
licence = "CC-BY-NC-4.0"       # default: what the dataset's card says
epochs = 2
learning_rate = 2e-4
[[probes]]
name = "danger"
weight = 1.0
direction = "danger"
state = "initial"              # an adapter with take_step = "sensitive" is chosen among its checkpoints
[states]                       # by these rows, benign ones or others
data = "benign.jsonl"
prompt = "prompt"
answer = "response"
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from sqsd_filter.errors import InputError, UsageError
from sqsd_filter.scoring.pack import CORE, PROBE_NAME, RESERVED, Probe

SENSITIVE = "sensitive"
RECORDED = ("provenance", "recipe", "validation")  # what a build puts into pack.json beside what a pack is made of


@dataclass(frozen=True)
class LoraShape:
    """The adapters' shape. Defaults are the reference settings."""

    r: int = 8
    alpha: int = 16
    dropout: float = 0.05
    target_modules: str | list[str] = "all-linear"


_COLUMNS = ("messages", "prompt", "context", "system")
_METHODS = {"sft": ("answer",), "dpo": ("chosen", "rejected", "answers", "better")}


@dataclass(frozen=True)
class AdapterRecipe:
    """How one adapter is trained.

    `data` is a file or folder beside the recipe, a URL, or a dataset of the Hub, of which `config`, `split` (train) and
    `revision` may be said. Columns are named where the formats of rows that scoring knows do not fit: `messages`, or
    `prompt` with `context`, `system` and the answer. SFT has one `answer`. DPO has a `chosen` and a `rejected` one, or
    two `answers` and in the column `better` the number, 0 or 1, of the one to prefer.

    `where` keeps the rows whose columns equal the given values, `unless` leaves out those in which one does; `rows`
    then keeps a seeded sample. `batch_size` rows are one update, on however many devices; `device_batch_size` of them
    are one pass of one device. `take_step` takes the checkpoint after that many updates instead of the last one (a
    state belongs to the middle of a trajectory), or with "sensitive" the one that `states.compare_states` chooses;
    `save_steps` says how often checkpoints are written, all of which stay until the pack is done.
    """

    method: str
    data: str
    config: str | None = None
    split: str | None = None
    revision: str | None = None
    messages: str | None = None
    prompt: str | None = None
    context: str | None = None
    system: str | None = None
    answer: str | None = None
    chosen: str | None = None
    rejected: str | None = None
    answers: list[str] | None = None
    better: str | None = None
    where: Mapping[str, Any] = field(default_factory=dict)
    unless: Mapping[str, Any] = field(default_factory=dict)
    rows: int | None = None
    licence: str | None = None
    max_length: int = 1024
    epochs: float = 1.0
    learning_rate: float = 5e-6
    schedule: str = "linear"
    warmup_ratio: float = 0.1
    batch_size: int = 8
    device_batch_size: int | None = None
    beta: float = 0.1
    save_steps: int = 50
    take_step: int | str | None = None

    def __post_init__(self) -> None:
        if self.method not in _METHODS:
            raise UsageError(f"An adapter's method must be 'sft' or 'dpo', not {self.method!r}.")
        [other] = set(_METHODS) - {self.method}
        if odd := [name for name in _METHODS[other] if getattr(self, name) is not None]:
            raise UsageError(f"An adapter with method '{self.method}' has no {', '.join(odd)}.")
        if (self.answers is None) != (self.better is None) or len(self.answers or "ab") != 2:
            raise UsageError("answers (two columns) and better (the column with the number of one) go together.")
        if self.answers and (self.chosen or self.rejected):
            raise UsageError("An adapter has either answers and better, or chosen and rejected.")
        if isinstance(self.take_step, str) and self.take_step != SENSITIVE:
            raise UsageError(f"take_step must be a number of updates or '{SENSITIVE}', not {self.take_step!r}.")
        if isinstance(self.take_step, int) and self.take_step % self.save_steps:
            raise UsageError(f"take_step must be a multiple of save_steps ({self.save_steps}).")
        if self.batch_size % (self.device_batch_size or 1):
            raise UsageError("batch_size must be a multiple of device_batch_size.")

    @property
    def columns(self) -> list[str]:
        """All columns that are named to be trained on."""
        single = [getattr(self, name) for name in (*_COLUMNS, "answer", "chosen", "rejected", "better")]
        return [column for column in (*single, *(self.answers or [])) if column is not None]


@dataclass(frozen=True)
class StateRows:
    """The rows on which states are compared: a seeded sample of `rows`, named as those that an adapter learns from.

    Rows whose columns equal `positive`, if that is given, should have the higher risk. `answer_tokens` cuts all answers
    to this many tokens and leaves out rows with shorter ones.
    """

    data: str
    config: str | None = None
    split: str | None = None
    revision: str | None = None
    messages: str | None = None
    prompt: str | None = None
    context: str | None = None
    system: str | None = None
    answer: str | None = None
    where: Mapping[str, Any] = field(default_factory=dict)
    unless: Mapping[str, Any] = field(default_factory=dict)
    positive: Mapping[str, Any] = field(default_factory=dict)
    rows: int = 64
    answer_tokens: int | None = None

    @property
    def source(self) -> AdapterRecipe:
        """The same rows as training would read them."""
        kept = {k: v for k, v in vars(self).items() if k not in ("positive", "answer_tokens")}
        return AdapterRecipe(method="sft", **kept)


@dataclass(frozen=True)
class PackRecipe:
    """A whole recipe, as read from its TOML file."""

    name: str
    base_model: str
    adapters: Mapping[str, AdapterRecipe]
    probes: tuple[Probe, ...]
    base_revision: str | None = None
    base_adapter: str | None = None  # trained first, and merged into the base model for the others
    seed: int = 0
    dtype: str = "bfloat16"
    quantization: str | None = None  # "nf4": the base in 4 bits while adapters are trained on it (QLoRA)
    keep_checkpoints: bool = False
    max_length: int = 1024
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    lora: LoraShape = field(default_factory=LoraShape)
    states: StateRows | None = None
    notes: Mapping[str, Any] = field(default_factory=dict)
    folder: Path = field(default_factory=Path)

    def __post_init__(self) -> None:
        if self.quantization not in (None, "nf4"):
            raise UsageError(f"quantization must be 'nf4' or left out, not {self.quantization!r}.")
        if taken := sorted({*CORE, *RECORDED} & set(self.notes)):
            raise UsageError(f"[notes] can't have {', '.join(taken)}, which a pack has anyway: name them otherwise.")

    @classmethod
    def load(cls, path: str | Path) -> PackRecipe:
        """Read a recipe. Raises `InputError` where it can't be read, `UsageError` where it makes no sense."""
        path = Path(path)
        try:
            data = tomllib.loads(path.read_text(encoding="utf-8"))
        except OSError as problem:
            raise InputError(f"The recipe {path} can't be read: {problem.strerror}.") from problem
        except ValueError as problem:
            raise InputError(f"The recipe {path} is not valid TOML: {problem}.") from problem
        recipe = {
            **data,
            "lora": _typed(LoraShape, data.get("lora", {}), "[lora]"),
            "adapters": {
                name: _typed(AdapterRecipe, table, f"[adapters.{name}]")
                for name, table in data.get("adapters", {}).items()
            },
            "probes": tuple(_typed(Probe, table, "[[probes]]") for table in data.get("probes", [])),
            "folder": path.parent,
        }
        if "states" in data:
            recipe["states"] = _typed(StateRows, data["states"], "[states]")
        for probe in recipe["probes"]:
            if not PROBE_NAME.fullmatch(probe.name) or probe.name in RESERVED:
                raise UsageError(f"[[probes]]: '{probe.name}' can't be a probe's name.")
        loaded: PackRecipe = _typed(cls, recipe, str(path))
        used = {name for p in loaded.probes for name in (p.direction, p.state)}
        if used and loaded.base_adapter:
            used.add(loaded.base_adapter)
        if not used or (missing := used - set(loaded.adapters)):
            what = f"names the adapters {', '.join(sorted(missing))} without" if used else "has no probes or"
            raise UsageError(f"The recipe {path} {what} saying how to train them.")
        loaded._check_states()
        return loaded

    @property
    def sensitive(self) -> list[str]:
        """The adapters that are chosen among their checkpoints."""
        return [name for name, adapter in self.adapters.items() if adapter.take_step == SENSITIVE]

    def _check_states(self) -> None:
        fixed = {self.base_adapter, *(p.direction for p in self.probes)}
        for name in self.sensitive:
            if name in fixed or name not in {p.state for p in self.probes}:
                raise UsageError(
                    f"[adapters.{name}]: take_step = '{SENSITIVE}' is for an adapter that is a state only, not a "
                    "direction or the base: the directions decide."
                )
        if bool(self.sensitive) != (self.states is not None):
            raise UsageError(f"[states] and an adapter with take_step = '{SENSITIVE}' need each other: give both.")


def _typed(kind: Any, table: Mapping[str, Any], where: str) -> Any:
    known = {f.name: f for f in fields(kind)}
    if unknown := sorted(set(table) - set(known)):
        raise UsageError(f"{where} has unknown keys: {', '.join(unknown)} (known: {', '.join(known)}).")
    needed = [n for n, f in known.items() if f.default is MISSING and f.default_factory is MISSING]
    if missing := [n for n in needed if n not in table]:
        raise UsageError(f"{where} lacks {', '.join(missing)}.")
    hints = get_type_hints(kind)
    for name, value in table.items():
        if not _fits(value, hints[name]):
            raise UsageError(f"{where}: '{name}' can't be {value!r}.")
    return kind(**table)


def _fits(value: Any, hint: Any) -> bool:
    """Is a TOML value of the type that a field is annotated with?"""
    if get_origin(hint) in (UnionType, Union):
        return any(_fits(value, option) for option in get_args(hint))
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    kind = get_origin(hint) or hint
    return True if kind is Any else isinstance(value, type(None) if kind is None else kind)
