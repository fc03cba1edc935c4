"""Answers by vLLM, where it is installed: one engine holds the aligned model and applies the LoRA of each run."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from sqsd_filter.errors import SQSDError, UsageError, option
from sqsd_filter.evaluation.model import Answerer, Subject
from sqsd_filter.judges.generation import as_asked, as_text, as_turns, ends_of
from sqsd_filter.scoring.placement import release_memory

if TYPE_CHECKING:
    from vllm import LLM

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # of LoRAs that vLLM can hold


def check_vllm(rank: int, device: str) -> None:
    """Raise `SQSDError` where vLLM can't be imported, `UsageError` for a LoRA rank that it does not support, or for a
    device that it was not built for."""
    if rank > RANKS[-1]:
        raise UsageError(f"{option('r')} must be at most {RANKS[-1]} for vLLM, not {rank}.")
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")  # stdout is for results
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    try:
        from vllm.platforms import current_platform
    except ImportError as problem:
        raise SQSDError(
            f"{option('generation')} vllm needs vLLM ({problem}): pip install 'sqsd-filter[vllm]'."
        ) from problem
    if (own := current_platform.device_type) != device.split(":")[0]:
        raise UsageError(f"vLLM runs on {own or 'no device'} here, not on {device}: set {option('device')} to it.")


@contextmanager
def vllm_answers(subject: Subject, base: Path, room: int) -> Iterator[Answerer]:
    """Answers greedily, as `Subject.answers` does. The folder `base` holds the model until the end.

    `room` is the maximum of tokens of a prompt with its answer. vLLM's kernels are not those of transformers: where two
    tokens are almost equally likely, answers may differ.
    """
    from transformers import GenerationConfig

    try:
        subject.save(base)
        release_memory()
        engine = _engine(subject, base, room)
        try:
            ends = ends_of(GenerationConfig.from_pretrained(base), subject.tokenizer)
            yield partial(_answers, engine, subject, ends, {})
        finally:
            engine.llm_engine.engine_core.shutdown()
    finally:
        shutil.rmtree(base, ignore_errors=True)


def _engine(subject: Subject, base: Path, room: int) -> LLM:
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
            **_memory(subject.device),
        )
    except Exception as problem:
        raise SQSDError(
            f"vLLM can't load the model ({problem}): fix this and start again. If it has not answered anything yet, "
            f"you can also leave out {option('generation')}; transformers answers then."
        ) from problem


def _memory(device: str) -> dict[str, float]:
    """The share of a GPU that it may take: most of what is free."""
    if device == "cpu":
        return {}
    free, total = torch.cuda.mem_get_info(device)
    return {"gpu_memory_utilization": 0.9 * free / total}


def _answers(
    engine: LLM,
    subject: Subject,
    ends: set[int],
    loras: dict[Path, int],
    adapter: Path | None,
    prompts: Sequence[str],
    max_new_tokens: int,
) -> list[str]:
    """`loras` numbers the LoRAs by their folder, as the engine needs."""
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    tokenizer, template = subject.tokenizer, subject.pack.chat_template_kwargs
    asked = [{"prompt_token_ids": list(ids)} for ids in as_asked(tokenizer, as_turns(prompts), template)]
    sampling = SamplingParams(temperature=0.0, max_tokens=max_new_tokens, stop_token_ids=sorted(ends), detokenize=False)
    lora = None
    if adapter is not None:
        number = loras.setdefault(adapter, len(loras) + 1)
        lora = LoRARequest(str(number), number, str(adapter))
    answers = engine.generate(asked, sampling, lora_request=lora, use_tqdm=False)
    return [as_text(tokenizer, each.outputs[0].token_ids, ends) for each in answers]
