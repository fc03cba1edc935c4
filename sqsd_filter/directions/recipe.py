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
prompt = "prompt"              # columns, if their names are not recognised; or messages = "..."
answer = "response"
where = { is_safe = false }    # these rows only; unless = { ... } leaves out others
licence = "CC-BY-NC-4.0"       # default: the licence on the dataset's card
epochs = 2
learning_rate = 2e-4
[[probes]]
name = "danger"
weight = 1.0
direction = "danger"
state = "initial"              # take_step = "sensitive" in its adapter chooses among its checkpoints
[linear.unsafe]                # another risk: a linear probe of hidden states, fitted on known rows
layers = [14, 20, 26]
[[linear.unsafe.rows]]
unsafe = true
data = "unsafe.jsonl"
by = "source"                  # rows of each value of this column count alike; the data are one source without it
[[linear.unsafe.rows]]
unsafe = false
data = "benign.jsonl"
[[risks.danger]]               # another risk, of these probes: the same keys as in [[probes]]
name = "danger"
weight = 1.0
direction = "danger"
state = "initial"
[states]                       # the rows to choose by; benign ones suffice
data = "benign.jsonl"
prompt = "prompt"
answer = "response"
[reference.dolly]              # rows that give a risk its meaning, one table per corpus; see `pack calibrate`
kind = "benign"                # or unsafe
data = "held-out.jsonl"
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Any, TypeVar, Union, get_args, get_origin, get_type_hints

from sqsd_filter.errors import InputError, UsageError
from sqsd_filter.scoring.pack import CORE, MOST_LAYERS, OWN_RISK, PROBE_NAME, REFERENCE, RESERVED, Probe
from sqsd_filter.scoring.reference_rows import BENIGN, UNSAFE

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T", bound="DataclassInstance")

SENSITIVE = "sensitive"
RECORDED = ("provenance", "recipe", "validation", REFERENCE)  # keys of pack.json that a build adds to the pack's own


@dataclass(frozen=True)
class LoraShape:
    """The shape of all adapters. The defaults are the reference settings."""

    r: int = 8
    alpha: int = 16
    dropout: float = 0.05
    target_modules: str | list[str] = "all-linear"


_COLUMNS = ("messages", "prompt", "context", "system")
_METHODS = {"sft": ("answer",), "dpo": ("chosen", "rejected", "answers", "better")}


@dataclass(frozen=True)
class AdapterRecipe:
    """How one adapter is trained.

    `data` is a file or folder beside the recipe, a URL, or a dataset of the Hub with its `config`, `split` (default:
    train) and `revision`. Columns need names only if the rows have no format that scoring recognises: `messages`, or
    `prompt` with `context`, `system` and the answer. SFT has one `answer`. DPO has a `chosen` and a `rejected` one, or
    two `answers` and a column `better` with the number, 0 or 1, of the preferred one.

    `where` keeps the rows whose columns all equal the given values; `unless` leaves out rows in which any column does;
    `rows` then takes a seeded sample. An update uses `batch_size` rows over all devices; one device runs
    `device_batch_size` rows per pass. `take_step` takes the checkpoint after that many updates instead of the last one
    (a state belongs to the middle of a trajectory), or with "sensitive" the one that `states.compare_states` chooses.
    A checkpoint is written every `save_steps` updates and kept until the pack is done.
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
            raise UsageError(f"An adapter with method '{self.method}' can't have {', '.join(odd)}: leave it out.")
        if (self.answers is None) != (self.better is None) or len(self.answers or "ab") != 2:
            raise UsageError(
                "answers (two columns) and better (the column with the number of the preferred one) go together."
            )
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
        """All columns that the recipe names to train on."""
        single = [getattr(self, name) for name in (*_COLUMNS, "answer", "chosen", "rejected", "better")]
        return [column for column in (*single, *(self.answers or [])) if column is not None]


@dataclass(frozen=True, kw_only=True)
class MeasuredRows:
    """Rows that are measured, not trained on, with the keys of `AdapterRecipe`: a seeded sample of `rows`."""

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
    rows: int | None = None

    @property
    def source(self) -> AdapterRecipe:
        """The same rows as a recipe that training can read."""
        return AdapterRecipe(method="sft", **{f.name: getattr(self, f.name) for f in fields(MeasuredRows)})


@dataclass(frozen=True, kw_only=True)
class StateRows(MeasuredRows):
    """The rows on which states are compared.

    Rows whose columns equal `positive` should have a higher risk. `answer_tokens` cuts all answers to this length and
    leaves out rows with shorter ones.
    """

    positive: Mapping[str, Any] = field(default_factory=dict)
    rows: int = 64
    answer_tokens: int | None = None


@dataclass(frozen=True, kw_only=True)
class ReferenceRecipe(MeasuredRows):
    """A reference corpus, of the `kind` benign or unsafe. None of its prompts may be in the pack's other data."""

    kind: str
    rows: int = 1000
    licence: str | None = None

    def __post_init__(self) -> None:
        if self.kind not in (BENIGN, UNSAFE):
            raise UsageError(f"A reference corpus's kind must be '{BENIGN}' or '{UNSAFE}', not {self.kind!r}.")


@dataclass(frozen=True, kw_only=True)
class KnownRowsRecipe(MeasuredRows):
    """Rows of a linear probe: all `unsafe`, or none. `weight` says how much they count among the rows of their kind.

    They are one source, called `name` (default: as their data, with the number of the table). With `by`, the rows of
    each value of this column are a source of their own, and these sources share the weight equally. All rows are taken
    unless `rows` is given.
    """

    unsafe: bool
    name: str | None = None
    by: str | None = None
    weight: float = 1.0
    rows: int | None = None
    licence: str | None = None

    def __post_init__(self) -> None:
        if not 0 < self.weight < math.inf:
            raise UsageError(f"The weight of a linear probe's rows must be above 0, not {self.weight!r}.")


@dataclass(frozen=True, kw_only=True)
class LinearProbeRecipe:
    """A linear probe of the hidden states at these layers, which tells unsafe rows from others.

    `ridge` is λ of `linear_probe.fit`: the larger it is, the nearer is the direction to the difference of the means.
    Rows are truncated at `max_length` tokens.
    """

    layers: tuple[int, ...]
    rows: tuple[KnownRowsRecipe, ...]
    ridge: float = 1.0
    max_length: int = 1024

    def __post_init__(self) -> None:
        if {each.unsafe for each in self.rows} != {True, False}:
            raise UsageError(
                "A linear probe needs rows with unsafe = true and rows with unsafe = false: add what it lacks."
            )
        if not self.layers or not all(type(layer) is int and 0 < layer <= MOST_LAYERS for layer in self.layers):
            raise UsageError(f"The layers of a linear probe must be numbers from 1 on, not {list(self.layers)}.")
        if not 0 < self.ridge < math.inf:
            raise UsageError(f"The ridge of a linear probe must be above 0, not {self.ridge!r}.")
        if self.max_length < 2:
            raise UsageError("The max_length of a linear probe must be at least 2 tokens.")


@dataclass(frozen=True)
class PackRecipe:
    """A whole recipe, as read from its TOML file."""

    name: str
    base_model: str
    adapters: Mapping[str, AdapterRecipe]
    probes: tuple[Probe, ...]
    base_revision: str | None = None
    base_adapter: str | None = None  # trained first, then merged into the base model for the others
    seed: int = 0
    dtype: str = "bfloat16"
    quantization: str | None = None  # "nf4": train adapters on the base model in 4 bits (QLoRA)
    keep_checkpoints: bool = False
    max_length: int = 1024
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    lora: LoraShape = field(default_factory=LoraShape)
    linear: Mapping[str, LinearProbeRecipe] = field(default_factory=dict)  # each is another risk of the pack
    risks: Mapping[str, tuple[Probe, ...]] = field(default_factory=dict)
    beside: Sequence[str] = ()  # the linear probes that are read beside the pack's own risk
    states: StateRows | None = None
    reference: Mapping[str, ReferenceRecipe] = field(default_factory=dict)
    notes: Mapping[str, Any] = field(default_factory=dict)
    folder: Path = field(default_factory=Path)

    def __post_init__(self) -> None:
        if self.quantization not in (None, "nf4"):
            raise UsageError(f"quantization must be 'nf4' or left out, not {self.quantization!r}.")
        if self.reference and all(each.kind == UNSAFE for each in self.reference.values()):
            raise UsageError(f"[reference] has no corpus of the kind '{BENIGN}': add one.")
        if unknown := [name for name in self.beside if name not in self.linear]:
            raise UsageError(f"beside names '{unknown[0]}', which is no linear probe: add [linear.{unknown[0]}].")
        if taken := sorted({*CORE, *RECORDED} & set(self.notes)):
            raise UsageError(f"[notes] can't have {', '.join(taken)}, which are keys of the pack itself: rename them.")

    @classmethod
    def load(cls, path: str | Path) -> PackRecipe:
        """Read a recipe. Raises `InputError` if it can't be read, `UsageError` if its content is not valid."""
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
            "linear": {name: _linear(table, name) for name, table in data.get("linear", {}).items()},
            "risks": {
                name: tuple(_typed(Probe, table, f"[[risks.{name}]]") for table in tables)
                for name, tables in data.get("risks", {}).items()
            },
            "folder": path.parent,
        }
        if "states" in data:
            recipe["states"] = _typed(StateRows, data["states"], "[states]")
        if "reference" in data:
            recipe["reference"] = {
                name: _typed(ReferenceRecipe, table, f"[reference.{name}]") for name, table in data["reference"].items()
            }
        loaded = _typed(cls, recipe, str(path))
        for name in (*(probe.name for probe in loaded.all_probes), *loaded.linear):
            if not PROBE_NAME.fullmatch(name) or name in (*RESERVED, OWN_RISK):
                raise UsageError(f"The recipe {path}: '{name}' can't be a probe's name: use another.")
        if not loaded.probes:
            raise UsageError(f"The recipe {path} lacks [[probes]]: add what the pack needs.")
        loaded.check_adapters(path)
        loaded.check_states()
        return loaded

    @property
    def all_probes(self) -> list[Probe]:
        """The probes of the pack's own risk and of its others."""
        return [*self.probes, *(probe for probes in self.risks.values() for probe in probes)]

    def check_adapters(self, path: Path) -> None:
        """Raise `UsageError` if an adapter is missing, or a name is used twice."""
        if twice := sorted(set(self.linear) & {*self.adapters, *self.risks}):
            raise UsageError(f"The recipe {path} calls a linear probe '{twice[0]}', as something else: rename one.")
        used = {name for p in self.all_probes for name in (p.state, p.direction)}
        used |= {self.base_adapter} if self.base_adapter else set()
        if missing := sorted(used - set(self.adapters)):
            names = ", ".join(f"[adapters.{name}]" for name in missing)
            raise UsageError(f"The recipe {path} lacks {names}: add what the pack needs.")

    @property
    def sensitive(self) -> list[str]:
        """The adapters to choose among their checkpoints."""
        return [name for name, adapter in self.adapters.items() if adapter.take_step == SENSITIVE]

    def check_states(self) -> None:
        """Raise `UsageError` if [states] and the adapters to choose among don't fit together."""
        fixed = {self.base_adapter, *(p.direction for p in self.all_probes)}
        for name in self.sensitive:
            if name in fixed or name not in {p.state for p in self.probes}:
                raise UsageError(
                    f"[adapters.{name}]: take_step = '{SENSITIVE}' is for an adapter that is only a state, not a "
                    "direction or the base adapter: give it a number of updates."
                )
        if bool(self.sensitive) != (self.states is not None):
            raise UsageError(f"[states] and an adapter with take_step = '{SENSITIVE}' need each other: give both.")


def _linear(table: Mapping[str, Any], name: str) -> LinearProbeRecipe:
    rows = tuple(_typed(KnownRowsRecipe, each, f"[[linear.{name}.rows]]") for each in table.get("rows", ()))
    given = {
        key: tuple(value) if key == "layers" and isinstance(value, list) else value for key, value in table.items()
    }
    return _typed(LinearProbeRecipe, {**given, "rows": rows}, f"[linear.{name}]")


def _typed(kind: type[T], table: Mapping[str, Any], where: str) -> T:
    """An instance of a dataclass from a TOML table. Raises `UsageError` for unknown, missing or mistyped keys."""
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


def _fits(value: object, hint: object) -> bool:
    """Does a TOML value have the annotated type of a field?"""
    if get_origin(hint) in (UnionType, Union):
        return any(_fits(value, option) for option in get_args(hint))
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    kind = get_origin(hint) or hint
    return kind is Any or (isinstance(kind, type) and isinstance(value, kind))
