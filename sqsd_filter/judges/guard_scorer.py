"""A chat guard as row scorer: how sure it is that the last answer of a row is unsafe.

    risk(z) = log p(unsafe | the guard's prompt about z) - log p(safe | the same)      in nats

Both are the guard's probabilities of the word that begins its verdict (`verdict`), from one forward pass per row; no
text is generated. The guard reads the row as `dialogue` gives it. It judges the last answer, with all turns before it
as context: an unsafe answer earlier in the row may go unnoticed.

A row whose texts exceed `max_length` tokens is cut at its end, as for training, so that the last answer that is left is
judged. It is cut further where the guard has too few positions for its own instructions as well. These are never cut.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Unpack

import numpy as np
import torch

from sqsd_filter.corpus.conversation import PROMPT_TOO_LONG, TEMPLATE_ERROR, Message, RowError
from sqsd_filter.errors import JudgeError, UsageError, first_line, option
from sqsd_filter.judges.dialogue import ASSISTANT, USER, Dialogue, Said
from sqsd_filter.judges.generation import rendered
from sqsd_filter.judges.guard_template import Content, as_turns, content_of
from sqsd_filter.judges.verdict import LEADS, ROOM, Verdict
from sqsd_filter.scoring.baselines.base import Baseline
from sqsd_filter.scoring.chat_encoder import Encoded, check_offsets
from sqsd_filter.scoring.fingerprint import PickleState
from sqsd_filter.scoring.loss_gradient import LossGradient
from sqsd_filter.scoring.models import load_tokenizer, longest_input
from sqsd_filter.scoring.pack import Pack
from sqsd_filter.scoring.scorer_settings import BatchedSettings
from sqsd_filter.scoring.scoring_model import ScoringModel

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

HARMLESS = [Said(USER, "What is the capital of France?"), Said(ASSISTANT, "The capital of France is Paris.")]
LEAST = 0.01  # of a guard's probability for the two words, after the best lead-in


@dataclass(frozen=True)
class GuardEncoder:
    """Rows to the tokens of a guard's prompt. The texts of a row have at most `max_length` tokens, all of it with the
    lead-in of the verdict at most `positions`, if there is such a limit."""

    tokenizer: PreTrainedTokenizerBase
    content: Content
    max_length: int
    positions: int | None

    def encode(self, turns: Sequence[Message]) -> Encoded:
        """The prompt about a row. Raises `RowError` where the row can't be judged."""
        dialogue, limit = Dialogue(turns, self.tokenizer), f"{self.max_length} tokens"
        tokens = min(len(dialogue), self.max_length)
        while tokens > 0 and (said := dialogue.first(tokens)):
            ids_t = self.tokens(self.prompt(said))
            excess = len(ids_t) + ROOM - self.positions if self.positions is not None else 0
            if excess <= 0:
                return Encoded(ids_t, np.zeros(len(ids_t), dtype=bool))  # nothing is learned of it
            tokens, limit = tokens - excess, f"the guard's {self.positions} tokens"
        raise RowError(PROMPT_TOO_LONG, f"the prompt leaves no room for an answer in {limit}")

    def prompt(self, said: Sequence[Said]) -> str:
        """The guard's question about a dialogue. Raises `RowError` where its template refuses the dialogue."""
        try:
            return rendered(self.tokenizer, as_turns(said, self.content))
        except Exception as problem:  # Jinja templates raise any exception
            raise RowError(TEMPLATE_ERROR, f"the guard's chat template refuses it: {first_line(problem)}") from problem

    def tokens(self, prompt: str) -> np.ndarray:
        """The tokens (t,) of a prompt."""
        return np.array(self.tokenizer(prompt, add_special_tokens=False)["input_ids"], dtype=np.int64)


class GuardModel(ScoringModel):
    """A loaded guard, for forward passes only."""

    def __init__(self, model: PreTrainedModel, scorer: GuardScorer) -> None:
        """Raises `JudgeError` for a model that gives no verdict."""
        super().__init__(model, scorer)
        self.gradient = LossGradient(model)
        rows = scorer.rows
        prompt = rows.prompt(HARMLESS)
        verdicts = [Verdict.after(prompt, lead, rows.tokenizer) for lead in LEADS]
        mass, self.verdict = max(
            ((self._mass(verdict, rows.tokens(prompt)), verdict) for verdict in verdicts), key=lambda pair: pair[0]
        )
        if not mass >= LEAST:
            raise JudgeError(
                f"{scorer.base_model} gives no verdict: asked about a harmless answer, it says 'safe' or 'unsafe' with "
                f"a probability of {100 * mass:.2g} %. Name a chat guard that says these words, such as Llama-Guard-3."
            )

    def project(self, rows: Sequence[Encoded]) -> np.ndarray:
        """log p(unsafe) - log p(safe) of each row: (b, 1)."""
        awaited = [self.verdict.awaited(row.ids) for row in rows]
        ends_b = torch.tensor([len(ids_t) - 1 for ids_t in awaited])
        logits_bv = self._logits(awaited, ends_b[:, None] == torch.arange(int(ends_b.max()) + 1))
        values_b = logits_bv[:, self.verdict.unsafe].double() - logits_bv[:, self.verdict.safe].double()
        values: np.ndarray = values_b[:, None].cpu().numpy()
        return values

    def _mass(self, verdict: Verdict, prompt_t: np.ndarray) -> float:
        """The probability that the guard begins its answer with the lead-in and one of the two words."""
        awaited = verdict.awaited(prompt_t)
        chosen_t = torch.arange(len(awaited)) >= len(awaited) - len(verdict.lead) - 1
        *leads_v, word_v = self._logits([awaited], chosen_t[None]).double().softmax(-1)
        before = [leads_v[k][token] for k, token in enumerate(verdict.lead)]
        return float(np.prod([float(p) for p in before]) * float(word_v[verdict.safe] + word_v[verdict.unsafe]))

    def _logits(self, rows: Sequence[np.ndarray], chosen_bt: torch.Tensor) -> torch.Tensor:
        """The logits (n, v) at the chosen positions. Rows are padded on the right, where no causal model sees it."""
        ids_bt = torch.nn.utils.rnn.pad_sequence([torch.from_numpy(ids_t) for ids_t in rows], batch_first=True)
        return self.gradient.logits(ids_bt.to(self.gradient.device), chosen_bt)


class GuardScorer(Baseline):
    """The log-odds of unsafe against safe by a chat guard such as Llama-Guard-3.

    The guard takes the place of the pack's base model. Of the pack only its `max_length` is used.
    """

    plus = ("unsafe",)
    model_type = GuardModel

    def __init__(
        self, pack: str | Path | Pack, model: str | None = None, *, source: str, **settings: Unpack[BatchedSettings]
    ) -> None:
        """`source` is the guard's folder or its name on the Hub. Raises `UsageError` if another model is named; see
        `BatchedScorer` for all else. A guard without a template for answers is a `JudgeError` when rows are scored."""
        if model is not None:
            raise UsageError(f"The scorer guard:{source} is a model itself: leave out {option('model')}.")
        folder = Path(source).absolute() if Path(source).is_dir() else None  # replicas have other working folders
        super().__init__(pack, str(folder or source), **settings)
        self.name = f"guard:{folder.resolve().name if folder else source}"
        self._rows: GuardEncoder | None = None

    @property
    def base_adapter(self) -> None:
        """None: the pack's adapter is for another model."""

    @property
    def rows(self) -> GuardEncoder:
        """What gives the guard's prompts. Raises `JudgeError` if its template shows no answer, `ModelError`."""
        if self._rows is None:
            tokenizer = load_tokenizer(self.base_model, trust_remote_code=self.trust_remote_code)
            check_offsets(tokenizer, self.base_model)
            positions = longest_input(self.base_model, trust_remote_code=self.trust_remote_code)
            self._rows = GuardEncoder(tokenizer, content_of(tokenizer, self.base_model), self.max_length, positions)
        return self._rows

    def encode(self, conversations: Sequence[Sequence[Message]]) -> list[Encoded | RowError]:
        return [self._encoded(turns) for turns in conversations]

    def _encoded(self, turns: Sequence[Message]) -> Encoded | RowError:
        try:
            return self.rows.encode(turns)
        except RowError as problem:
            return problem

    def __getstate__(self) -> PickleState:
        return PickleState({**super().__getstate__(), "_rows": None}, self.content)
