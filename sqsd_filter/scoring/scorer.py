"""The scorer: conversations in; danger, safety, risk and a status for each out.

A row is scored by one forward and one backward pass at each state of the pack, in micro-batches of similar length.
Its score depends on its conversation, the pack and the settings, not on the other rows of its micro-batch.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, Self, Unpack, cast

import numpy as np

from sqsd_filter.corpus.conversation import TEMPLATE_ERROR, Message, RowError
from sqsd_filter.corpus.row_formats import Columns, RowFormat
from sqsd_filter.errors import UsageError, option
from sqsd_filter.scoring.batch_reading import BatchReader
from sqsd_filter.scoring.chat_encoder import ChatEncoder, Encoded
from sqsd_filter.scoring.fingerprint import PickleState
from sqsd_filter.scoring.pack import Pack, load_pack
from sqsd_filter.scoring.placement import check_device, choose_device, limit_threads, sound
from sqsd_filter.scoring.results import ScoreCollector, Scores, ScoringCallbacks
from sqsd_filter.scoring.scorer_settings import DTYPES, SYSTEM, BatchedSettings, ScorerSettings
from sqsd_filter.storage.secrets import check_address

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict, Features, IterableDataset, IterableDatasetDict

    from sqsd_filter.scoring.map_step import BatchData
    from sqsd_filter.scoring.scoring_model import SQSDModel

OUT_OF_MEMORY = "out_of_memory"  # a row too large for this device even alone
CRASHED = "crashed"  # a row whose process died on every attempt
FAILED = "failed"  # a row that makes the model fail; the detail has the error
# Reasons that may not hold on the next run. A template's costs no pass of the model to find out again.
TRANSIENT = (OUT_OF_MEMORY, FAILED, CRASHED, TEMPLATE_ERROR)
SCORING = 3  # raise it with every change that gives a row a different score or reason
SQSD = "sqsd"  # the name of `SQSDScorer`


class RowModel(Protocol):
    """What a `BatchedScorer` scores rows with: a loaded model in most cases (`scoring_model.ScoringModel`)."""

    workers: int  # threads; 0 for the calling one
    default_budget: int  # padded tokens of a micro-batch

    def project(self, rows: Sequence[Encoded]) -> np.ndarray:
        """The scorer's values of each row: (b, values) float64."""


class Scorer:
    """The common part of the fast and the dense scorer: the pack, the settings and the tokens of each row."""

    default_dtype: str | None = None

    def __init__(
        self,
        pack: str | Path | Pack,
        model: str | None = None,
        device: str | None = None,
        dtype: str | None = None,
        max_length: int | None = None,
        *,
        columns: Columns | None = None,
        trust_remote_code: bool = False,
        system: str = SYSTEM[0],
    ) -> None:
        """`model` overrides the pack's base model, `max_length` (tokens) its truncation; `dtype` defaults to float32 on
        a CPU and bfloat16 on a GPU. `columns` says how the rows of a batch are read; see `__call__`. A `system` prompt
        that the chat template refuses goes to the first user turn ("fold") or makes its row a `template_error`
        ("error"). Only `pack.json` is read now; the model and the adapters are loaded when the first row is scored.

        Raises `PackError` where there is no valid pack, `UsageError` for an unknown dtype or `system`, and for a length
        below 2.
        """
        self.pack = pack if isinstance(pack, Pack) else load_pack(pack)
        if dtype is not None and dtype not in DTYPES:
            raise UsageError(f"dtype must be one of {', '.join(DTYPES)}, not '{dtype}'.")
        if system not in SYSTEM:
            raise UsageError(f"{option('system')} must be one of {', '.join(SYSTEM)}, not '{system}'.")
        if max_length is not None and max_length < 2:
            raise UsageError("max_length must be at least 2 tokens.")
        self.base_model = model or self.pack.base_model
        check_address(self.base_model)
        self.base_revision = self.pack.base_revision if model is None else None
        self.max_length = max_length or self.pack.max_length
        self.columns = columns or Columns()
        self.trust_remote_code, self.system = trust_remote_code, system
        self.named_device, self.named_dtype = device, dtype or self.default_dtype
        self._content: tuple[str | None] | None = None
        self._encoder: ChatEncoder | None = None
        self._decided: RowFormat | None = None  # by `reading`
        self._reader: BatchReader | None = None
        self._rank: int | None = None

    @property
    def device(self) -> str:
        return choose_device(self.named_device, self._rank)

    def check_device(self) -> None:
        """Raise `UsageError` where this process can't use the device."""
        check_device(self.device)

    @property
    def dtype(self) -> str:
        return self.named_dtype or ("bfloat16" if self.device.startswith("cuda") else "float32")

    @property
    def encoder(self) -> ChatEncoder:
        """Rows to tokens, with the base model's tokenizer and the pack's template settings."""
        if self._encoder is None:
            from sqsd_filter.scoring.models import load_tokenizer, longest_input

            trust = self.trust_remote_code
            tokenizer = load_tokenizer(self.base_model, self.base_revision, trust_remote_code=trust)
            positions = longest_input(self.base_model, self.base_revision, trust_remote_code=trust)
            longest = min(self.max_length, positions or self.max_length)
            self._encoder = ChatEncoder(
                tokenizer, longest, self.pack.chat_template_kwargs, folds_system=self.system == SYSTEM[0]
            )
        return self._encoder

    @property
    def base_content(self) -> str | None:
        """An id of the base model's weights; see `models.content_id`."""
        if self._content is None:
            from sqsd_filter.scoring.models import content_id

            trust = self.trust_remote_code
            self._content = (content_id(self.base_model, self.base_revision, trust_remote_code=trust),)
        return self._content[0]

    @property
    def weights(self) -> dict[str, float]:
        """The weight in the risk of each value, by the value's name; 0 for linear probes beside the risk."""
        beside = (name for pack in self.pack.beside for name in pack.weights)
        return self.pack.weights | dict.fromkeys(beside, 0.0)

    @property
    def values(self) -> list[str]:
        """The names of the values of each row."""
        return list(self.weights)

    def settings(self) -> dict[str, object]:
        """Everything besides the conversation that a score depends on."""
        return {
            "pack": self.pack.fingerprint,
            "base_model": self.base_model,
            "base_revision": self.base_revision,
            "base_content": self.base_content,
            "scoring": SCORING,
            "dtype": self.dtype,
            "max_length": self.max_length,
            **({"system": self.system} if self.system != SYSTEM[0] else {}),
        }

    def encode(self, conversations: Sequence[Sequence[Message]]) -> list[Encoded | RowError]:
        """What is scored of each conversation, or the reason why it can't be scored."""
        return self.encoder.encode(conversations)

    def score(self, conversations: Sequence[Sequence[Message]], callbacks: ScoringCallbacks | None = None) -> Scores:
        """Score conversations (lists of turns as in `corpus.conversation`), and call `callbacks` meanwhile.

        A row that can't be scored gets a status, never an exception. Raises `ModelError` when the model can't be loaded
        or can't be scored with.
        """
        encoded = self.encode(conversations)
        collector = ScoreCollector(encoded, self.values, callbacks or ScoringCallbacks())
        if collector.rows:
            self._score(collector.rows, collector)
        risk = np.sum([weight * collector.probes[name] for name, weight in self.weights.items()], axis=0)
        return Scores(collector.probes, risk, collector.status, collector.detail, collector.tokens)

    def _score(self, rows: Mapping[int, Encoded], collector: ScoreCollector) -> None:
        """Score all rows, by their number, and give the collector each row's values or the reason for none."""
        raise NotImplementedError

    @property
    def features(self) -> Features:
        """The types of the score columns. `datasets` needs them for a stream."""
        from datasets import Features, Value

        floats = ["sqsd_risk", *(f"sqsd_{name}" for name in self.values)]
        return Features({**{name: Value("float64") for name in floats}, "sqsd_status": Value("string")})

    def __call__(self, batch: BatchData, rank: int | None = None) -> BatchData:
        """The score columns of a batch, for `map(..., batched=True)` of any dataset of `datasets`, in the formats None,
        arrow, numpy, pandas and torch; or, with the batch's own columns, for Ray Data's `map_batches`, which takes the
        scorer as a callable class.

        Existing columns of the same names are replaced, and only the columns of the row format are read. A row without
        a score has a null risk and its reason in `sqsd_status`. The row format is chosen by `columns` and the names of
        the batch's columns, so that every batch and process chooses the same; `reading` decides it over a dataset's
        values, as the command does. With `rank` (`map(..., with_rank=True)`), processes are spread over the GPUs.

        Raises `InputError` where no format fits, `UsageError` for a single row.
        """
        from sqsd_filter.scoring.map_step import Batch

        if rank is not None and not isinstance(rank, int):
            raise UsageError("SQSDScorer takes no row numbers: call map with batched=True, without with_indices.")
        if self._rank is None:
            self._rank = rank
        rows = Batch(batch)
        self._reader = self._reader or BatchReader(self.columns, self._decided)
        turns, reasons = self._reader.conversations(rows)
        scores = self.score(turns)
        for k, reason in reasons.items():
            scores.status[k] = reason
        return rows.with_scores(scores)

    def reading(self, dataset: Dataset | DatasetDict | IterableDataset | IterableDatasetDict) -> Self:
        """The same scorer for `map` of this dataset, with the row format decided over its first rows.

        >>> from datasets import Dataset
        >>> rows = Dataset.from_list([{"question": "2+2?", "answer": "4", "tools": ["a hammer"]}])
        >>> scored = rows.map(SQSDScorer("smollm2-135m").reading(rows), batched=True)
        >>> scored["sqsd_status"][:]
        ['scored']

        Raises `InputError` where no format fits.
        """
        from sqsd_filter.scoring.map_step import sample_of

        bound = copy.copy(self)
        vars(bound).update(_decided=self.columns.choose(sample_of(dataset)), _reader=None)
        return bound


class BatchedScorer(Scorer):
    """A scorer that runs micro-batches of rows, on a device of this process or of another one."""

    name: str  # on the command line and in the report
    per_module = False

    def __init__(
        self,
        pack: str | Path | Pack,
        model: str | None = None,
        *,
        token_budget: int | None = None,
        attention: str | None = None,
        **settings: Unpack[ScorerSettings],
    ) -> None:
        """As `Scorer`. `token_budget` limits the padded tokens of a micro-batch (default: by the device), `attention`
        names the attention kernel as in transformers."""
        super().__init__(pack, model, **settings)
        if token_budget is not None and token_budget < 1:
            raise UsageError("token_budget must be at least 1.")
        self.token_budget, self.attention, self.gpus = token_budget, attention, 1.0
        self._model: RowModel | None = None
        self._process: int | None = None

    @property
    def model(self) -> RowModel:
        """The loaded model, which is loaded on first use in each process."""
        if self._model is None or self._process != os.getpid():  # after a fork, threads and GPU belong to the parent
            self.check_device()
            limit_threads()
            self._model, self._process = sound(self._load), os.getpid()
        return self._model

    @property
    def base_adapter(self) -> Path | None:
        """The folder of the adapter that is merged into the model, None without one."""
        return self.pack.base_folder

    @property
    def passes(self) -> int:
        """The number of passes of each row through the model."""
        return 1

    def _load(self) -> RowModel:
        """Load the model of this scorer."""
        raise NotImplementedError

    @property
    def modules(self) -> dict[str, list[str]]:
        """By probe, the modules whose cosines are values as well."""
        return {}

    def settings(self) -> dict[str, object]:
        """As `Scorer`, with the attention kernel where one was named: the user who names one must not get stored scores
        that the default kernel made."""
        named = {"scorer": self.name} if self.name != SQSD else {}
        return super().settings() | named | ({"attention": self.attention} if self.attention else {})

    def _score(self, rows: Mapping[int, Encoded], collector: ScoreCollector) -> None:
        from sqsd_filter.scoring.batching import micro_batches, retry_in_halves, run_parallel

        model, callbacks = self.model, collector.callbacks

        def run(members: list[int]) -> None:
            callbacks.starting(members)
            try:
                values = model.project([rows[k] for k in members])
            finally:
                callbacks.finished(members)
            collector.done(members, values)

        def give_up(row: int, error: str) -> None:
            too_large = f"{len(rows[row])} tokens don't fit into the device's memory"
            collector.failed(row, FAILED if error else OUT_OF_MEMORY, error or too_large)

        numbers = list(rows)
        work = [
            [numbers[m] for m in members]
            for members in micro_batches([len(e) for e in rows.values()], self.token_budget or model.default_budget)
        ]
        together = [members for members in work if callbacks.apart.isdisjoint(members)]
        alone = [[k] for members in work if not callbacks.apart.isdisjoint(members) for k in members]
        run_parallel(lambda members: retry_in_halves(run, members, give_up), together, model.workers)
        for (k,) in [row for row in alone if row[0] in callbacks.given_up]:
            collector.failed(k, CRASHED, "the process that scored it died on every attempt")
        rest = [row for row in alone if row[0] not in callbacks.given_up]
        run_parallel(lambda row: retry_in_halves(run, row, give_up), rest, min(1, model.workers))

    def on_device(self, device: str, *, gpus: float = 1.0) -> Self:
        """The same scorer for a device, which may be another process's: with `gpus` < 1 for a share of a GPU, with
        `gpus` > 1 for a model spread over several.

        A device or dtype that the user named is kept.
        """
        placed = copy.copy(self)
        placed.named_device = self.named_device or device
        placed.gpus = gpus
        return placed

    def changed(self, *, device: str | None = None, dtype: str | None = None, attention: str | None = None) -> Self:
        """The same scorer with other settings where they are given; its model is not loaded."""
        other = copy.copy(self)
        other.named_device, other.named_dtype = device or self.named_device, dtype or self.named_dtype
        other.attention = attention or self.attention
        return other

    def beside(self, placed: Self) -> Self:
        """This scorer for rows of this process, with the same scores as `placed`, its copy that scores elsewhere."""
        if placed is self:
            return self
        own = self.changed(dtype=placed.dtype)
        own.gpus = placed.gpus
        return own

    def with_pack(self, pack: Pack) -> Self:
        """The same scorer with its pack read from another folder."""
        moved = copy.copy(self)
        moved.pack = pack
        return moved

    def content(self) -> dict[str, object]:
        """Everything that the result of `map` depends on, for the cache of `datasets`."""
        decided = {"row_format": self._decided.facts} if self._decided is not None else {}
        return {**self.settings(), "columns": vars(self.columns), **decided}

    def __getstate__(self) -> PickleState:
        """The configuration only: hashing and pickling never see a loaded model."""
        loaded = dict.fromkeys(("_model", "_process", "_encoder", "_reader", "_content", "_rank"))
        return PickleState({**vars(self), **loaded}, self.content)


class SQSDScorer(BatchedScorer):
    """SQSD (arXiv 2605.04572), batched: one shared backward pass per micro-batch, projected in low rank.

    >>> from datasets import Dataset
    >>> rows = Dataset.from_list([{"question": "2+2?", "answer": "4"}, {"question": "And 3+3?", "answer": ""}])
    >>> scored = rows.map(SQSDScorer("smollm2-135m"), batched=True)
    >>> scored.column_names
    ['question', 'answer', 'sqsd_risk', 'sqsd_danger', 'sqsd_safety', 'sqsd_unsafe', 'sqsd_status']
    >>> scored["sqsd_status"][:]
    ['scored', 'no_answer']

    Rows with other columns: `SQSDScorer("smollm2-135m", columns=Columns(prompt="q", answer="a"))`. A stream loses its
    types in `map` unless they are given: `stream.map(scorer, batched=True, features=Features({**stream.features,
    **scorer.features}))`.
    """

    name = SQSD

    def __init__(
        self,
        pack: str | Path | Pack,
        model: str | None = None,
        *,
        per_module: bool = False,
        **settings: Unpack[BatchedSettings],
    ) -> None:
        """As `BatchedScorer`. With `per_module`, the cosine of each module is a value as well, named PROBE/MODULE."""
        super().__init__(pack, model, **settings)
        if per_module and self.pack.linear is not None:
            raise UsageError(f"The risk '{self.pack.risk}' has no cosine at each module: leave out --per-module.")
        self.per_module = per_module
        self._modules: dict[str, list[str]] | None = None

    @property
    def model(self) -> SQSDModel:
        return cast("SQSDModel", super().model)  # what `_load` gives for probes

    @property
    def passes(self) -> int:
        """One at each state, and one for each linear probe."""
        return len({p.at for p in self.pack.probes}) + (self.pack.linear is not None) + len(self.pack.beside)

    def _load(self) -> RowModel:
        if self.pack.linear is not None:
            from sqsd_filter.scoring.linear_probe import LinearModel

            return LinearModel.load(self)
        from sqsd_filter.scoring.beside import BesideModel
        from sqsd_filter.scoring.scoring_model import SQSDModel

        model = (BesideModel if self.pack.beside else SQSDModel).load(self)
        self._modules = model.probe_modules  # from now on, the pack's files are not needed
        return model

    @property
    def modules(self) -> dict[str, list[str]]:
        """The modules over which each probe sums cosines, in their order in files; {} unless `per_module`."""
        if not self.per_module:
            return {}
        if self._modules is None:
            from sqsd_filter.scoring.adapters import load_adapter, probe_modules

            adapters = {name: load_adapter(self.pack.adapter(name)) for name in self.pack.adapters}
            self._modules = probe_modules(self.pack.probes, adapters)
        return self._modules

    @property
    def values(self) -> list[str]:
        return super().values + [f"{name}/{module}" for name, modules in self.modules.items() for module in modules]

    def settings(self) -> dict[str, object]:
        known = {pack.risk: pack.fingerprint for pack in self.pack.beside}
        beside = {"beside": known} if known else {}
        return super().settings() | beside | ({"per_module": True} if self.per_module else {})

    def __getstate__(self) -> PickleState:
        return PickleState({**super().__getstate__(), "_modules": None}, self.content)
