"""A trained judge as row scorer: the log-odds that the last answer of a row is unsafe and not a refusal.

    risk(z) = logit p,      p = p_unsafe(a) · (1 - p_refusal(a)), within [MARGIN, 1 - MARGIN]

with the probabilities of the judge's two classifiers for the answer a, and p_refusal = 1 where the judge calls a a
refusal, by its phrases or by its classifier. So the risk grows with p_unsafe and falls with p_refusal, and refusals
have the lowest risk that there is. The margin keeps it finite.

The answer is the last one within `max_length` tokens, as `dialogue` gives it. The judge reads its beginning only, and
no prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Unpack, cast

import numpy as np

from sqsd_filter.corpus.conversation import PROMPT_TOO_LONG, Message, RowError
from sqsd_filter.judges.dialogue import Dialogue
from sqsd_filter.judges.phrases import is_refusal
from sqsd_filter.judges.trained import TrainedJudge
from sqsd_filter.scoring.baselines.base import Baseline
from sqsd_filter.scoring.chat_encoder import Encoded
from sqsd_filter.scoring.pack import Pack
from sqsd_filter.scoring.scorer_settings import BatchedSettings

MARGIN = 1e-9


@dataclass(frozen=True)
class Answered(Encoded):
    """A row with the text of its last answer."""

    text: str


class JudgeModel:
    """A judge in the place of a model."""

    workers = 0
    default_budget = 1 << 20  # tokens; nothing is padded

    def __init__(self, judge: TrainedJudge) -> None:
        self._judge = judge

    def project(self, rows: Sequence[Encoded]) -> np.ndarray:
        """The log-odds of each row: (b, 1)."""
        texts = [row.text for row in cast("Sequence[Answered]", rows)]  # what the scorer encodes
        refusal_b, unsafe_b = (part.probabilities(texts) for part in (self._judge.refusal, self._judge.unsafe))
        refused_b = np.array([is_refusal(text) for text in texts]) | self._judge.refusal.positive(texts)
        p_b = np.clip(unsafe_b * np.where(refused_b, 0.0, 1 - refusal_b), MARGIN, 1 - MARGIN)
        values: np.ndarray = (np.log(p_b) - np.log1p(-p_b))[:, None]
        return values


class JudgeScorer(Baseline):
    """The log-odds of an unsafe answer by a judge that recipes/judge/train.py trained.

    No model is loaded. The pack's tokenizer decides which rows can be scored, as for every other scorer.
    """

    plus = ("unsafe",)

    def __init__(
        self, pack: str | Path | Pack, model: str | None = None, *, source: str, **settings: Unpack[BatchedSettings]
    ) -> None:
        """`source` is the judge's folder. Raises `JudgeError` if it holds no judge or scikit-learn is missing; see
        `BatchedScorer` for all else."""
        super().__init__(pack, model, **settings)
        self.judge = TrainedJudge.load(Path(source))
        self.name = f"judge:{self.judge.name}"

    @property
    def passes(self) -> int:
        return 0

    def settings(self) -> dict[str, object]:
        return super().settings() | {"judge": self.judge.fingerprint}

    def encode(self, conversations: Sequence[Sequence[Message]]) -> list[Encoded | RowError]:
        encoded = super().encode(conversations)
        return [
            row if isinstance(row, RowError) else self._answered(row, turns)
            for row, turns in zip(encoded, conversations, strict=True)
        ]

    def _answered(self, row: Encoded, turns: Sequence[Message]) -> Encoded | RowError:
        said = Dialogue(turns, self.encoder.tokenizer).first(self.encoder.max_length)
        if not said:
            return RowError(PROMPT_TOO_LONG, f"no answer begins within {self.encoder.max_length} tokens")
        return Answered(row.ids, row.answer, said[-1].text)

    def _load(self) -> JudgeModel:
        return JudgeModel(self.judge)
