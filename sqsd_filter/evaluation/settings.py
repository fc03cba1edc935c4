"""What an evaluation is: which sets of rows, how a model is fine-tuned on them, and what it is asked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

from sqsd_filter.directions.recipe import AdapterRecipe, LoraShape
from sqsd_filter.errors import UsageError, option
from sqsd_filter.pipeline.selecting.selection import parse_share

WINDOWS, CUT = "windows", "cut"
ARMS = (WINDOWS, CUT)
TRANSFORMERS, VLLM = GENERATORS = "transformers", "vllm"


@dataclass(frozen=True)
class FineTuning:
    """How the model is fine-tuned on each set. Defaults are the paper's settings, on rows of at most 1,024 tokens.

    `batch_size` rows are one update, `device_batch_size` of them one pass.
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
                raise UsageError(f"{option(name)} must be a share below 1, not {getattr(self, name)}.")
        if self.batch_size % self.device_batch_size:
            raise UsageError(
                f"{option('batch_size')} is {self.batch_size}, which is no multiple of {option('device_batch_size')} "
                f"{self.device_batch_size}: set that, too."
            )
        if self.dtype not in ("float32", "bfloat16"):
            raise UsageError(f"{option('dtype')} must be float32 or bfloat16, not {self.dtype}.")

    @property
    def lora(self) -> LoraShape:
        return LoraShape(self.r, self.alpha, self.dropout, self.target_modules)

    @property
    def recipe(self) -> AdapterRecipe:
        """The same for the trainer."""
        names = ("learning_rate", "epochs", "batch_size", "device_batch_size", "schedule", "warmup_ratio", "max_length")
        return AdapterRecipe("sft", "", **{name: getattr(self, name) for name in names})


@dataclass(frozen=True)
class Design:
    """Which sets of rows a model is fine-tuned on, and what it is asked afterwards.

    `arms` are "windows", "cut" or both; without any, nothing is trained. There are `windows` windows of `size` rows;
    the cut drops the share `drop_top`. `harmful` and `harmless` are JSON Lines files with a `prompt` a line, of which
    the first `prompts` are asked, and `judges` are specs for `load_judge`, the first of which decides. `held_out` rows,
    which are in no set, give the loss. `generation` is "transformers" or "vllm", which gives the answers.
    """

    arms: Sequence[str] = (WINDOWS,)
    windows: int = 5
    size: int | None = None
    drop_top: str | float | Fraction = "5%"
    seeds: Sequence[int] = (0, 1, 2)
    harmful: str | Path | None = None
    harmless: str | Path | None = None
    prompts: int | None = None
    judges: Sequence[str] = ("phrases",)
    max_new_tokens: int = 128
    generation: str = TRANSFORMERS
    held_out: int = 100
    match_tokens: bool = False
    tuning: FineTuning = field(default_factory=FineTuning)

    def __post_init__(self) -> None:
        if odd := [arm for arm in self.arms if arm not in ARMS]:
            raise UsageError(f"{option('arms')} must be of {', '.join(ARMS)}, or none, not {', '.join(odd)}.")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise UsageError(f"{option('seeds')} must be different whole numbers, 0 or more, as 0,1,2.")
        if len(set(self.judges)) < max(1, len(self.judges)):
            raise UsageError(f"Name each judge once by {option('judge')}.")
        for name, least in (("windows", 2), ("size", 1), ("prompts", 1), ("max_new_tokens", 1), ("held_out", 0)):
            if (value := getattr(self, name)) is not None and value < least:
                raise UsageError(f"{option(name)} must be at least {least}, not {value}.")
        if self.arms and self.harmful is None:
            raise UsageError(f"Name harmful prompts by {option('harmful')}: a JSON Lines file with a 'prompt' a line.")
        if self.generation not in GENERATORS:
            raise UsageError(f"{option('generation')} must be {' or '.join(GENERATORS)}, not {self.generation}.")
        if WINDOWS in self.arms and self.size is None:
            raise UsageError(f"Say how many rows a window has by {option('size')}.")
        if not 0 < self.share < 1:
            raise UsageError(f"{option('drop_top')} must drop some rows and keep some, not {self.drop_top}.")

    @property
    def share(self) -> Fraction:
        return parse_share(self.drop_top, rows_name="")

    def settings(self) -> dict[str, Any]:
        """What any two fine-tunings have to have in common to be compared, whatever they are trained on. How much is in
        memory at a time changes nothing."""
        how = {name: value for name, value in asdict(self.tuning).items() if name != "device_batch_size"}
        return {"max_new_tokens": self.max_new_tokens, "generation": self.generation, "tuning": how}

    def sets(self) -> dict[str, Any]:
        """What models are trained on."""
        names = ("windows", "size", "match_tokens") if WINDOWS in self.arms else ()
        found = {"arms": list(self.arms), **{name: getattr(self, name) for name in names}}
        return found | ({"drop_top": float(self.share)} if CUT in self.arms else {})
