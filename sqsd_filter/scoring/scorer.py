"""The scorer: conversations in; danger, safety, risk and a status for each out.

A row is scored by one forward and one backward pass at each state of the pack, in bins of rows of similar length.
What a row gets depends on its conversation, the pack and the settings, not on the rows that share its bin.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from sqsd_filter.corpus.conversation import Message, RowError
from sqsd_filter.corpus.row_formats import Columns, RowFormat
from sqsd_filter.errors import UsageError
from sqsd_filter.scoring.chat_encoder import ChatEncoder, Encoded
from sqsd_filter.scoring.fingerprint import State
from sqsd_filter.scoring.pack import Pack, load_pack
from sqsd_filter.scoring.placement import check_device, choose_device, limit_threads, sound
from sqsd_filter.scoring.results import Results, Scores, ScoringCallbacks

if TYPE_CHECKING:
    from datasets import Features

OUT_OF_MEMORY = "out_of_memory"  # a row too large for this device even alone
CRASHED = "crashed"  # a row whose process died again and again
FAILED = "failed"  # a row that makes the model fail; the detail has the error
TRANSIENT = (OUT_OF_MEMORY, FAILED, CRASHED)  # reasons that may be gone at the next try
SCORING = 3  # to be raised whenever a change gives a row another score or reason
SQSD = "sqsd"  # the scorer that this package is about
DTYPES = ("float32", "bfloat16", "float64")


class Scorer:
    """What the fast and the dense scorer share: the pack, the settings, the model loaded on first use, the tokens."""

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
    ) -> None:
        """`model` overrides the pack's base model, `max_length` (tokens) its truncation; `dtype` defaults to float32 on
        a CPU and bfloat16 on a GPU. `columns` says how the rows of a batch are read; see `__call__`. Nothing is loaded
        until the first row is scored, except the pack's own page.

        Raises `PackError` where there is no valid pack, `UsageError` for an unknown dtype or a senseless length.
        """
        self.pack = pack if isinstance(pack, Pack) else load_pack(pack)
        if dtype is not None and dtype not in DTYPES:
            raise UsageError(f"dtype must be one of {', '.join(DTYPES)}, not '{dtype}'.")
        if max_length is not None and max_length < 2:
            raise UsageError("max_length must be at least 2 tokens.")
        self.base_model = model or self.pack.base_model
        self.base_revision = self.pack.base_revision if model is None else None
        self.max_length = max_length or self.pack.max_length
        self.columns = columns or Columns()
        self.trust_remote_code = trust_remote_code
        self._device, self._dtype = device, dtype or self.default_dtype
        self._content: tuple[str | None] | None = None
        self._encoder: ChatEncoder | None = None
        self._form: tuple[frozenset[str], RowFormat] | None = None
        self._rank: int | None = None

    @property
    def device(self) -> str:
        return choose_device(self._device, self._rank)

    def check_device(self) -> None:
        """Raise `UsageError` where this process can't use the device."""
        check_device(self.device)

    @property
    def dtype(self) -> str:
        return self._dtype or ("bfloat16" if self.device.startswith("cuda") else "float32")

    @property
    def encoder(self) -> ChatEncoder:
        """Rows to tokens, with the base model's tokenizer and the pack's template settings."""
        if self._encoder is None:
            from sqsd_filter.scoring.models import load_tokenizer, longest_input

            where: Any = {"revision": self.base_revision, "trust_remote_code": self.trust_remote_code}
            tokenizer = load_tokenizer(self.base_model, **where)
            longest = min(self.max_length, longest_input(self.base_model, **where) or self.max_length)
            self._encoder = ChatEncoder(tokenizer, longest, self.pack.chat_template_kwargs)
        return self._encoder

    @property
    def base_content(self) -> str | None:
        """What tells the base model's weights from others under the same name; see `weights.content_id`."""
        if self._content is None:
            from sqsd_filter.scoring.models import content_id

            where: Any = {"revision": self.base_revision, "trust_remote_code": self.trust_remote_code}
            self._content = (content_id(self.base_model, **where),)
        return self._content[0]

    @property
    def weights(self) -> dict[str, float]:
        """The values whose weighted sum is the risk, by name."""
        return {p.name: p.weight for p in self.pack.probes}

    @property
    def values(self) -> list[str]:
        """Names of what is kept of each row."""
        return list(self.weights)

    def settings(self) -> dict[str, Any]:
        """Everything besides the conversation that a score depends on."""
        return {
            "pack": self.pack.fingerprint,
            "base_model": self.base_model,
            "base_revision": self.base_revision,
            "base_content": self.base_content,
            "scoring": SCORING,
            "dtype": self.dtype,
            "max_length": self.max_length,
        }

    def score(self, conversations: Sequence[Sequence[Message]], watch: ScoringCallbacks | None = None) -> Scores:
        """Score conversations (lists of turns as `conversation` describes them), telling `watch` as it goes.

        A row that can't be scored gets a status, never an exception. Raises `ModelError` when the model can't be
        loaded or isn't one that can be scored with.
        """
        encoded = self.encoder.encode(conversations)
        results = Results(encoded, self.values, watch or ScoringCallbacks())
        if results.rows:
            self._score(results.rows, results)
        risk = np.sum([weight * results.probes[name] for name, weight in self.weights.items()], axis=0)
        return Scores(results.probes, risk, results.status, results.detail, results.tokens)

    def _score(self, rows: Mapping[int, Encoded], results: Results) -> None:
        """Score all rows, by their number, and give `results` the values of each or the reason why it has none."""
        raise NotImplementedError

    @property
    def features(self) -> Features:
        """The types of the score columns, to be named where `datasets` can't know them: in a stream."""
        from datasets import Features, Value

        floats = ["sqsd_risk", *(f"sqsd_{name}" for name in self.values)]
        return Features({**{name: Value("float64") for name in floats}, "sqsd_status": Value("string")})

    def __call__(self, batch: Any, rank: int | None = None) -> Any:
        """The score columns of a batch: a step of `map(..., batched=True)` of anything that `datasets` has, in the
        formats None, arrow, numpy, pandas and torch, or of Ray Data's `map_batches` as a callable class (then the batch
        with the columns added).

        Columns of the same names are replaced; of the others only those of the row format are read. A row without a
        score has a null risk and its reason in `sqsd_status`. The row format is decided by `columns` on the first batch
        and kept while batches have the same columns. With `rank` (`map(..., with_rank=True)`) processes take turns on
        the GPUs.

        Raises `InputError` where no format fits, `UsageError` for a single row.
        """
        from sqsd_filter.scoring.map_step import Batch

        if rank is not None and not isinstance(rank, int):
            raise UsageError("SQSDScorer has no use for row numbers: call map with batched=True, without with_indices.")
        if self._rank is None:
            self._rank = rank
        rows = Batch(batch)
        names = frozenset(rows.names)
        if self._form is None or self._form[0] != names:
            self._form = names, self.columns.choose(rows)
        _, form = self._form
        turns: list[list[Message]] = []
        reasons: dict[int, str] = {}
        for k, row in enumerate(rows):
            try:
                turns.append(form.conversation(row))
            except RowError as problem:
                reasons[k] = problem.status
                turns.append([])
        scores = self.score(turns)
        for k, reason in reasons.items():
            scores.status[k] = reason
        return rows.with_scores(scores)


class BatchedScorer(Scorer):
    """A scorer that runs bins of rows on an engine: its own, this process's or another's device, the same statuses."""

    name: str  # by which the command line and the report know it
    per_module = False

    def __init__(
        self, *args: Any, token_budget: int | None = None, attention: str | None = None, **kwargs: Any
    ) -> None:
        """As `Scorer`; `token_budget` caps a bin's padded tokens (default: by the device), `attention` names the
        attention kernel as transformers does."""
        super().__init__(*args, **kwargs)
        if token_budget is not None and token_budget < 1:
            raise UsageError("token_budget must be at least 1.")
        self.token_budget, self.attention, self.gpus = token_budget, attention, 1.0
        self._engine: Any = None
        self._process: int | None = None

    @property
    def engine(self) -> Any:
        """What scores the rows of a bin: the loaded model in most cases (`engine.ModelEngine`)."""
        if self._engine is None or self._process != os.getpid():  # a fork's parent keeps what its model runs on
            self.check_device()
            limit_threads()
            self._engine, self._process = sound(self._load), os.getpid()
        return self._engine

    @property
    def passes(self) -> int:
        """How often a row goes through the model."""
        return 1

    def _load(self) -> Any:
        """The engine of this scorer: it has `project`, `workers` and `default_budget` as `engine.ModelEngine`."""
        raise NotImplementedError

    @property
    def modules(self) -> dict[str, list[str]]:
        """The modules whose cosines are values, too, by probe."""
        return {}

    def settings(self) -> dict[str, Any]:
        """As `Scorer`. The kernel counts where one was named: who does that mistrusts the default one, and must not be
        given the scores that it made."""
        named = {"scorer": self.name} if self.name != SQSD else {}
        return super().settings() | named | ({"attention": self.attention} if self.attention else {})

    def _score(self, rows: Mapping[int, Encoded], results: Results) -> None:
        from sqsd_filter.scoring.batching import micro_batches, retry_in_halves
        from sqsd_filter.scoring.engine import run_parallel

        engine, watch = self.engine, results.watch

        def run(members: list[int]) -> None:
            watch.starting(members)
            try:
                values = engine.project([rows[k] for k in members])
            finally:
                watch.finished(members)
            results.done(members, values)

        def give_up(row: int, error: str) -> None:
            too_large = f"{len(rows[row])} tokens don't fit into the device's memory"
            results.failed(row, FAILED if error else OUT_OF_MEMORY, error or too_large)

        numbers = list(rows)
        work = [
            [numbers[m] for m in members]
            for members in micro_batches([len(e) for e in rows.values()], self.token_budget or engine.default_budget)
        ]
        together = [members for members in work if watch.apart.isdisjoint(members)]
        alone = [[k] for members in work if not watch.apart.isdisjoint(members) for k in members]
        run_parallel(lambda members: retry_in_halves(run, members, give_up), together, engine.workers)
        for (k,) in [row for row in alone if row[0] in watch.given_up]:
            results.failed(k, CRASHED, "the process that scored it died, again and again")
        rest = [row for row in alone if row[0] not in watch.given_up]
        run_parallel(lambda row: retry_in_halves(run, row, give_up), rest, min(1, engine.workers))

    def on_device(self, device: str, *, gpus: float = 1.0) -> Self:
        """The same scorer for a device that may be another process's: for a share of a GPU, or with the model laid over
        several.

        A device that was named stays, as does a dtype.
        """
        placed = copy.copy(self)
        placed._device = self._device or device
        placed.gpus = gpus
        return placed

    def changed(self, *, device: str | None = None, dtype: str | None = None, attention: str | None = None) -> Self:
        """The same scorer, its model not loaded, with other settings where they are given."""
        other = copy.copy(self)
        other._device, other._dtype = device or self._device, dtype or self._dtype
        other.attention = attention or self.attention
        return other

    def beside(self, placed: Self) -> Self:
        """This scorer for rows of its own in this process, exactly as `placed`, made of it, scores elsewhere."""
        if placed is self:
            return self
        own = self.changed(dtype=placed.dtype)
        own.gpus = placed.gpus
        return own

    def with_pack(self, pack: Pack) -> Self:
        """The same scorer with its pack read from another place."""
        moved = copy.copy(self)
        moved.pack = pack
        return moved

    def content(self) -> dict[str, Any]:
        """Everything that tells this step of `map` from another, for the cache of `datasets`."""
        return {**self.settings(), "columns": vars(self.columns)}

    def __getstate__(self) -> State:
        """Configuration only: hashing and pickling never see a loaded model."""
        loaded = dict.fromkeys(("_engine", "_process", "_encoder", "_form", "_content", "_rank"))
        return State({**vars(self), **loaded}, self.content)


class SQSDScorer(BatchedScorer):
    """SQSD (arXiv 2605.04572), batched: one shared backward pass a bin, projected in low rank.

    >>> from datasets import Dataset
    >>> rows = Dataset.from_list([{"question": "2+2?", "answer": "4"}, {"question": "And 3+3?", "answer": ""}])
    >>> scored = rows.map(SQSDScorer("smollm2-135m"), batched=True)
    >>> scored.column_names
    ['question', 'answer', 'sqsd_risk', 'sqsd_danger', 'sqsd_safety', 'sqsd_status']
    >>> scored["sqsd_status"][:]
    ['scored', 'no_answer']

    Rows with other columns: `SQSDScorer("smollm2-135m", columns=Columns(prompt="q", answer="a"))`. A stream forgets its
    types in `map`, unless they are named: `stream.map(scorer, batched=True, features=Features({**stream.features,
    **scorer.features}))`.
    """

    name = SQSD

    def __init__(self, *args: Any, per_module: bool = False, **kwargs: Any) -> None:
        """As `BatchedScorer`. With `per_module` the cosine at each module is a value, too, named PROBE/MODULE."""
        super().__init__(*args, **kwargs)
        self.per_module = per_module
        self._modules: dict[str, list[str]] | None = None

    @property
    def passes(self) -> int:
        """Once at each state."""
        return len({p.at for p in self.pack.probes})

    def _load(self) -> Any:
        from sqsd_filter.scoring.engine import SQSDModel

        engine = SQSDModel.load(self)
        self._modules = engine.probe_modules  # from now on the pack's files are not needed
        return engine

    @property
    def modules(self) -> dict[str, list[str]]:
        """The modules that each probe sums the cosines of, in their order in files; {} unless `per_module`."""
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

    def settings(self) -> dict[str, Any]:
        return super().settings() | ({"per_module": True} if self.per_module else {})

    def __getstate__(self) -> State:
        return State({**super().__getstate__(), "_modules": None}, self.content)
