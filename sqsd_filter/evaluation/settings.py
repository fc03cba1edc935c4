"""The options of an evaluation: the sets of rows, how a model is fine-tuned on each, and what it is asked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from pathlib import Path

from sqsd_filter.directions.recipe import AdapterRecipe, LoraShape
from sqsd_filter.errors import UsageError, option
from sqsd_filter.evaluation.results import SetDesign
from sqsd_filter.pipeline.selecting.selection import parse_share

WINDOWS, CUT, CONTAMINATED = ARMS = "windows", "cut", "contaminated"
LEAST = {"windows": 2, "size": 1, "prompts": 1, "max_new_tokens": 1, "question_tokens": 1, "held_out": 0}
TRANSFORMERS, VLLM = GENERATORS = "transformers", "vllm"


@dataclass(frozen=True)
class FineTuning:
    """How the model is fine-tuned on each set of rows. The defaults are the paper's settings.

    An update uses `batch_size` rows, a forward pass `device_batch_size` of them. Rows are truncated at `max_length`
    tokens.
    """

    r: int = 8
    alpha: int = 16
    dropout: float = 0.05
    target_modules: str = "all-linear"
    learning_rate: float = 5e-5
    epochs: float = 10.0
    batch_size: int = 8
    device_batch_size: int = 8
    schedule: str = "cosine"
    warmup_ratio: float = 0.1
    max_length: int = 1024
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        for name in ("r", "alpha", "learning_rate", "epochs", "batch_size", "device_batch_size", "max_length"):
            if getattr(self, name) <= 0:
                raise UsageError(f"{option(name)} must be above 0, not {getattr(self, name)}.")
        for name in ("dropout", "warmup_ratio"):
            if not 0 <= getattr(self, name) < 1:
                raise UsageError(f"{option(name)} must be at least 0 and below 1, not {getattr(self, name)}.")
        if self.batch_size % self.device_batch_size:
            raise UsageError(
                f"{option('batch_size')} {self.batch_size} is not a multiple of {option('device_batch_size')} "
                f"{self.device_batch_size}: set both so that it is."
            )
        if self.dtype not in ("float32", "bfloat16"):
            raise UsageError(f"{option('dtype')} must be float32 or bfloat16, not {self.dtype}.")

    @property
    def lora(self) -> LoraShape:
        return LoraShape(self.r, self.alpha, self.dropout, self.target_modules)

    @property
    def recipe(self) -> AdapterRecipe:
        """These settings as the trainer takes them."""
        return AdapterRecipe(
            "sft",
            "",
            learning_rate=self.learning_rate,
            epochs=self.epochs,
            batch_size=self.batch_size,
            device_batch_size=self.device_batch_size,
            schedule=self.schedule,
            warmup_ratio=self.warmup_ratio,
            max_length=self.max_length,
        )


@dataclass(frozen=True)
class Design:
    """Which sets of rows a model is fine-tuned on, and what it is asked afterwards.

    `arms` are "windows", "cut" or both, or "contaminated"; without any, nothing is trained. There are `windows` windows
    of `size` rows. The cut drops the share `drop_top` of the rows. In a contaminated corpus the column `planted` marks
    the planted rows, and one arm keeps what the cut `above_reference` (99 % if None) keeps. `harmful` and `harmless`
    are JSON Lines files with one `prompt` per line; the first `prompts` of each are asked. `questions` is such a file
    with the right `answer` beside each prompt; they are asked after learning from a contaminated corpus, for answers of
    at most `question_tokens` tokens (256 if None). `judges` are specs for `load_judge`; the first judge gives the
    attack success rate. The loss is that of `held_out` rows, which are in no set and not planted. `generation` names
    the engine that answers: "transformers" or "vllm".
    """

    arms: Sequence[str] = (WINDOWS,)
    windows: int = 5
    size: int | None = None
    drop_top: str | float | Fraction = "5%"
    planted: str | None = None
    above_reference: str | float | Fraction | None = None
    seeds: Sequence[int] = (0, 1, 2)
    harmful: str | Path | None = None
    harmless: str | Path | None = None
    prompts: int | None = None
    judges: Sequence[str] = ("phrases",)
    max_new_tokens: int = 128
    questions: str | Path | None = None
    question_tokens: int | None = None
    generation: str = TRANSFORMERS
    held_out: int = 100
    match_tokens: bool = False
    tuning: FineTuning = field(default_factory=FineTuning)

    def __post_init__(self) -> None:
        if odd := [arm for arm in self.arms if arm not in ARMS]:
            raise UsageError(f"{option('arms')} must be {', '.join(ARMS)}, or none, not {', '.join(odd)}.")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise UsageError(f"{option('seeds')} must be different whole numbers from 0, such as 0,1,2.")
        if len(set(self.judges)) < max(1, len(self.judges)):
            raise UsageError(f"Name each judge once with {option('judge')}.")
        for name, least in LEAST.items():
            if (value := getattr(self, name)) is not None and value < least:
                raise UsageError(f"{option(name)} must be at least {least}, not {value}.")
        if self.arms and self.harmful is None:
            raise UsageError(
                f"Name harmful prompts with {option('harmful')}: a JSON Lines file with one 'prompt' per line."
            )
        if self.generation not in GENERATORS:
            raise UsageError(f"{option('generation')} must be {' or '.join(GENERATORS)}, not {self.generation}.")
        if WINDOWS in self.arms and self.size is None:
            raise UsageError(f"Set the number of rows per window with {option('size')}.")
        if not 0 < self.share < 1:
            raise UsageError(f"{option('drop_top')} must drop some rows and keep some, not {self.drop_top}.")
        self._check_contaminated()

    def _check_contaminated(self) -> None:
        if not 0 < self.reference_share < 1:
            raise UsageError(
                f"{option('above_reference')} must be above 0% and below 100%, not {self.above_reference}: 99%, for "
                "example."
            )
        if CONTAMINATED not in self.arms:
            for name in ("planted", "above_reference", "questions", "question_tokens"):
                if getattr(self, name) is not None:
                    raise UsageError(
                        f"{option(name)} is for {option('arms')} {CONTAMINATED}: add that, or leave it out."
                    )
            return
        if len(self.arms) > 1:
            raise UsageError(
                f"{option('arms')} {CONTAMINATED} stands alone: evaluate the other arms in another folder."
            )
        if self.planted is None:
            raise UsageError(f"Name the column that marks planted rows with {option('planted')}.")
        if self.question_tokens is not None and self.questions is None:
            raise UsageError(f"{option('question_tokens')} is for {option('questions')}: name these, or leave it out.")

    @property
    def reference_share(self) -> Fraction:
        return parse_share("99%" if self.above_reference is None else self.above_reference, "above_reference", "")

    @property
    def solution_tokens(self) -> int:
        """The most tokens of an answer to one of the questions."""
        return 256 if self.question_tokens is None else self.question_tokens

    @property
    def share(self) -> Fraction:
        return parse_share(self.drop_top, rows_name="")

    def settings(self) -> dict[str, object]:
        """The settings that two fine-tunings on different sets must share to be compared. `device_batch_size` is left
        out, because it changes no update."""
        tuning = {name: value for name, value in asdict(self.tuning).items() if name != "device_batch_size"}
        return {"max_new_tokens": self.max_new_tokens, "generation": self.generation, "tuning": tuning}

    def sets(self) -> SetDesign:
        """The sets of rows, for results.json."""
        sets: SetDesign = {"arms": list(self.arms)}
        if WINDOWS in self.arms:
            sets |= {"windows": self.windows, "size": self.size, "match_tokens": self.match_tokens}
        if CUT in self.arms:
            sets |= {"drop_top": float(self.share)}
        if self.planted is not None:
            sets |= {"planted": self.planted, "above_reference": float(self.reference_share)}
        return sets
