"""The scorer: conversations in; danger, safety, risk and a status for each out.

A row is scored by one forward and one backward pass at each state of the pack, in bins of rows of similar length.
What a row gets depends on its conversation, the pack and the settings, not on the rows that share its bin.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sqsd_filter.directions.pack import Pack, load_pack
from sqsd_filter.errors import UsageError
from sqsd_filter.scoring.conversation import NONFINITE, SCORED, ChatEncoder, Encoded, Message, RowError, choose_format

OUT_OF_MEMORY = "out_of_memory"  # a row too large for this device even alone
FAILED = "failed"  # a row that makes the model fail; the detail has the error
DTYPES = ("float32", "bfloat16", "float64")

Done = Callable[[Sequence[int], np.ndarray], None]
Failed = Callable[[int, str], None]


@dataclass(frozen=True)
class Scores:
    """What became of n conversations, in their order.

    `probes` maps each probe's name to (n,) float64, NaN where a row could not be scored; `risk` is their weighted sum;
    `status` is "scored" or the reason; `detail` says more about a reason; `tokens` counts each row's tokens.
    """

    probes: Mapping[str, np.ndarray]
    risk: np.ndarray
    status: list[str]
    detail: list[str]
    tokens: np.ndarray

    def columns(self) -> dict[str, Any]:
        """The score columns by their names in a dataset."""
        return {
            "sqsd_risk": self.risk,
            **{f"sqsd_{name}": values for name, values in self.probes.items()},
            "sqsd_status": self.status,
        }


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
        trust_remote_code: bool = False,
    ) -> None:
        """`model` overrides the pack's base model, `max_length` (tokens) its truncation; `dtype` defaults to float32 on
        a CPU and bfloat16 on a GPU. Nothing is loaded until the first row is scored, except the pack's own page.

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
        self.trust_remote_code = trust_remote_code
        self._device, self._dtype = device, dtype or self.default_dtype
        self._encoder: ChatEncoder | None = None

    @property
    def device(self) -> str:
        """Where the model runs. Raises `UsageError` for a device that isn't there."""
        import torch

        if self._device is None:
            self._device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            torch.empty(0, device=self._device)
        except (RuntimeError, AssertionError) as problem:
            first = next(iter(str(problem).splitlines()), type(problem).__name__).split(". ")[0].rstrip(".")
            raise UsageError(
                f"The device '{self._device}' can't be used ({first}): name one that torch has here."
            ) from problem
        return self._device

    @property
    def dtype(self) -> str:
        if self._dtype is None:
            self._dtype = "bfloat16" if self.device.startswith("cuda") else "float32"
        return self._dtype

    @property
    def encoder(self) -> ChatEncoder:
        """Rows to tokens, with the base model's tokenizer and the pack's template settings."""
        if self._encoder is None:
            from sqsd_filter.scoring.weights import load_tokenizer

            tokenizer = load_tokenizer(self.base_model, self.base_revision, trust_remote_code=self.trust_remote_code)
            self._encoder = ChatEncoder(tokenizer, self.max_length, self.pack.chat_template_kwargs)
        return self._encoder

    def settings(self) -> dict[str, Any]:
        """Everything besides the conversation that a score depends on."""
        return {
            "pack": self.pack.fingerprint,
            "base_model": self.base_model,
            "base_revision": self.base_revision,
            "dtype": self.dtype,
            "max_length": self.max_length,
        }

    def score(
        self, conversations: Sequence[Sequence[Message]], on_rows: Callable[[int, int], None] | None = None
    ) -> Scores:
        """Score conversations (lists of `{"role", "content"}`).

        `on_rows(rows, tokens)` is called as rows are done. A row that can't be scored gets a status, never an
        exception. Raises `ModelError` when the model can't be loaded or isn't one that can be scored with.
        """
        encoded = self.encoder.encode(conversations)
        n = len(encoded)
        probes = {p.name: np.full(n, np.nan) for p in self.pack.probes}
        status, detail = [SCORED] * n, [""] * n
        tokens = np.zeros(n, dtype=np.int64)
        rows: list[int] = []
        for k, e in enumerate(encoded):
            if isinstance(e, RowError):
                status[k], detail[k] = e.status, e.detail
            else:
                tokens[k] = len(e)
                rows.append(k)
        if on_rows and len(rows) < n:
            on_rows(n - len(rows), 0)

        def done(members: Sequence[int], values: np.ndarray) -> None:
            """Rows (indices into `rows`) with their (b, probes) values."""
            where = [rows[m] for m in members]
            for k, row in zip(where, values, strict=True):
                if not np.isfinite(row).all():
                    status[k], detail[k] = NONFINITE, "its gradient is not finite"
                    continue
                for probe, value in zip(self.pack.probes, row, strict=True):
                    probes[probe.name][k] = value
            if on_rows:
                on_rows(len(where), int(tokens[where].sum()))

        def failed(member: int, error: str) -> None:
            k = rows[member]
            status[k] = FAILED if error else OUT_OF_MEMORY
            detail[k] = error or f"{tokens[k]} tokens don't fit into the device's memory"
            if on_rows:
                on_rows(1, 0)

        if rows:
            self._score([e for e in encoded if isinstance(e, Encoded)], done, failed)
        risk = np.sum([p.weight * probes[p.name] for p in self.pack.probes], axis=0)
        return Scores(probes, risk, status, detail, tokens)

    def _score(self, encoded: Sequence[Encoded], done: Done, failed: Failed) -> None:
        """Score all rows, telling `done` of those that have values and `failed` of those that can't."""
        raise NotImplementedError

    def __call__(self, batch: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
        """A batch of columns with the score columns added, for `Dataset.map(scorer, batched=True)`.

        The row format is decided on each batch's columns. Raises `InputError` where no format fits.
        """
        columns = {name: list(values) for name, values in batch.items()}
        count = len(next(iter(columns.values()), []))
        rows = [{name: values[k] for name, values in columns.items()} for k in range(count)]
        form = choose_format(rows)
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
        return {**batch, **scores.columns()}


class SQSDScorer(Scorer):
    """SQSD (arXiv 2605.04572), batched: one shared backward pass a bin, projected in low rank.

    >>> SQSDScorer("smollm2-135m").score([[{"role": "user", "content": "2+2?"},
    ...                                    {"role": "assistant", "content": "4"}]]).risk  # doctest: +SKIP
    """

    def __init__(
        self, *args: Any, token_budget: int | None = None, attention: str | None = None, **kwargs: Any
    ) -> None:
        """As `Scorer`; `token_budget` caps a bin's padded tokens (default: by the device), `attention` names the
        attention kernel as transformers does."""
        super().__init__(*args, **kwargs)
        if token_budget is not None and token_budget < 1:
            raise UsageError("token_budget must be at least 1.")
        self.token_budget, self.attention = token_budget, attention
        self._engine: Any = None

    @property
    def engine(self) -> Any:
        """The loaded model at its states (`engine.Engine`)."""
        if self._engine is None:
            from sqsd_filter.scoring.engine import Engine

            self._engine = Engine.load(self)
        return self._engine

    def _score(self, encoded: Sequence[Encoded], done: Done, failed: Failed) -> None:
        from sqsd_filter.scoring.batching import bins, halving
        from sqsd_filter.scoring.engine import side_by_side

        engine, lock = self.engine, threading.Lock()

        def run(members: list[int]) -> None:
            values = engine.project([encoded[m] for m in members])
            with lock:
                done(members, values)

        def give_up(member: int, error: str) -> None:
            with lock:
                failed(member, error)

        work = bins([len(e) for e in encoded], self.token_budget or engine.default_budget)
        side_by_side(lambda members: halving(run, members, give_up), work, engine.workers)

    def __getstate__(self) -> dict[str, Any]:
        """Configuration only: hashing and pickling never see a loaded model."""
        return {**vars(self), "_engine": None, "_encoder": None}
