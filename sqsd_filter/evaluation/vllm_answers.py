"""Answers by vLLM, where it is installed: one engine has the aligned model, and takes each run's LoRA on top of it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from sqsd_filter.directions.generation import as_asked, as_text, as_turns, ends_of
from sqsd_filter.errors import SQSDError, UsageError, option
from sqsd_filter.evaluation.model import Answering, Subject, free_memory

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # for which vLLM has room


def check_vllm(rank: int) -> None:
    """Raise `SQSDError` without the extra `vllm`, `UsageError` for LoRAs of a rank that it has no room for."""
    if find_spec("vllm") is None:
        raise SQSDError(f"{option('generation')} vllm needs vLLM: pip install 'sqsd-filter[vllm]'.")
    if rank > RANKS[-1]:
        raise UsageError(f"{option('r')} must be at most {RANKS[-1]} for vLLM, not {rank}.")


@contextmanager
def vllm_answers(subject: Subject, base: Path, room: int) -> Iterator[Answering]:
    """What answers as `Subject.answers` does, greedily; the folder `base` has its model so long.

    `room` is how many tokens a prompt and its answer may have. Its kernels are not those of transformers: where two
    tokens are nearly as likely, answers may differ.
    """
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")  # stdout is for results
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from transformers import GenerationConfig

    try:
        shutil.rmtree(base, ignore_errors=True)  # what a killed one left
        subject.save(base)
        free_memory()
        engine = _engine(subject, base, room)
        try:
            ends = ends_of(GenerationConfig.from_pretrained(base), subject.tokenizer)
            yield partial(_answers, engine, subject, ends, {})
        finally:
            engine.llm_engine.engine_core.shutdown()
    finally:
        shutil.rmtree(base, ignore_errors=True)


def _engine(subject: Subject, base: Path, room: int) -> Any:
    try:
        from vllm import LLM

        return LLM(
            model=str(base),
            dtype=subject.tuning.dtype,
            max_model_len=room,
            enable_lora=True,
            max_lora_rank=min(rank for rank in RANKS if rank >= subject.tuning.r),
            generation_config="vllm",  # greedy, whatever the model's own settings say
            seed=0,
        )
    except Exception as problem:
        raise SQSDError(
            f"vLLM can't load the model ({problem}): mend that and start again, or choose another folder and leave out "
            f"{option('generation')} to have transformers answer."
        ) from problem


def _answers(
    engine: Any,
    subject: Subject,
    ends: set[int],
    loras: dict[Path, int],
    adapter: Path | None,
    prompts: Sequence[str],
    max_new_tokens: int,
) -> list[str]:
    """`loras` has the numbers by which the engine tells them apart."""
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    tokenizer, template = subject.tokenizer, subject.pack.chat_template_kwargs
    asked = [{"prompt_token_ids": list(ids)} for ids in as_asked(tokenizer, as_turns(prompts), template)]
    how = SamplingParams(temperature=0.0, max_tokens=max_new_tokens, stop_token_ids=sorted(ends), detokenize=False)
    lora = None
    if adapter is not None:
        number = loras.setdefault(adapter, len(loras) + 1)
        lora = LoRARequest(str(number), number, str(adapter))
    found = engine.generate(asked, how, lora_request=lora, use_tqdm=False)
    return [as_text(tokenizer, each.outputs[0].token_ids, ends) for each in found]
