"""Base models: where the one of a pack is found, and how it is loaded.

The embedded model is fetched once, converted to safetensors and kept in the user's cache; after that nothing here
touches the network for it.
"""

from __future__ import annotations

import hashlib
import logging
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from sqsd_filter.errors import ModelError, SQSDError, UsageError, first_line, option
from sqsd_filter.scoring.embedded import EMBEDDED, SAY_EVERY, cache_dir, fetch_gguf, kept
from sqsd_filter.storage.locks import take_lock

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)

T = TypeVar("T")

_MIB = 1 << 20
_MODEL_FILES = (".json", ".jinja", ".txt", ".model", ".safetensors", ".bin", ".py")


def locate(base_model: str) -> str:
    """The folder or Hub id that transformers can load for `base_model`; fetches an embedded model on first use.

    Raises `ModelError` when an embedded model can't be fetched or is another file than expected.
    """
    embedded = EMBEDDED.get(base_model)
    if embedded is None:
        return base_model
    target = kept(base_model)
    if not (target / "config.json").is_file():
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with take_lock(target.parent / ".lock", wait=True):  # one process per machine fetches, the others wait
                if not (target / "config.json").is_file():
                    log.warning(
                        "fetching the weights of %s, once (%d MB, %s)", base_model, embedded.megabytes, embedded.licence
                    )
                    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".fetch-") as tmp:
                        converted, fetched = Path(tmp) / "converted", fetch_gguf(embedded, Path(tmp))
                        log.warning("converting them; they are kept in %s", target)
                        _convert(fetched, converted)
                        converted.rename(target)
        except OSError as problem:
            raise ModelError(
                f"The weights of {base_model} can't be stored in {cache_dir()} ({problem}): make room there or set "
                "SQSD_FILTER_CACHE to another folder."
            ) from problem
    return str(target)


def is_here(base_model: str, revision: str | None = None) -> bool:
    """Can `base_model` be loaded without fetching anything? Nothing is loaded, and no network is used."""
    if base_model in EMBEDDED:
        return (kept(base_model) / "config.json").is_file()
    if Path(base_model).is_dir():
        return (Path(base_model) / "config.json").is_file()
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    names = ("model.safetensors", "model.safetensors.index.json")
    try:
        return any(isinstance(try_to_load_from_cache(base_model, n, revision=revision), str) for n in names)
    except HFValidationError:  # a path at which nothing exists
        return False


def content_id(base_model: str, revision: str | None = None, *, trust_remote_code: bool = False) -> str | None:
    """An id of the weights behind a name, which may stand for others at another time or on another machine.

    For an embedded model it is its known hash, for a Hub id the commit, for a folder a hash of its files: all bytes of
    small ones; the size and 4 KiB of each MiB of large ones, which no retraining leaves unchanged. None where it can't
    be determined; loading the model will say why.
    """
    if base_model in EMBEDDED:
        return EMBEDDED[base_model].sha256[:16]
    folder = Path(base_model)
    if folder.is_dir():
        hashed = hashlib.blake2b(digest_size=8)
        for path in sorted(p for p in folder.iterdir() if p.suffix in _MODEL_FILES):
            size = path.stat().st_size
            hashed.update(f"{path.name} {size}\n".encode())
            with path.open("rb") as file:
                for at in range(0, size, _MIB) if size > 16 * _MIB else [0]:
                    file.seek(at)
                    hashed.update(file.read(4096 if size > 16 * _MIB else -1))
        return hashed.hexdigest()
    from transformers import AutoConfig

    try:
        with _quiet_transformers(), _as_model_error(base_model, "configuration"):
            config = AutoConfig.from_pretrained(base_model, revision=revision, trust_remote_code=trust_remote_code)
    except ModelError as problem:
        log.info("%s", problem)
        return None
    commit: str | None = getattr(config, "_commit_hash", None)
    return commit


def _convert(gguf: Path, target: Path) -> None:
    """Convert GGUF to safetensors in float32, which represents every dequantised value exactly."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    # The GGUF file gives the name of a training run as the model; transformers copies it into the config.
    with _quiet_transformers(), own_progress():
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
        )
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        tokenizer.save_pretrained(target)
        model.save_pretrained(target)


def load_tokenizer(
    base_model: str, revision: str | None = None, *, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """The tokenizer of a base model. Raises `ModelError`."""
    from transformers import AutoTokenizer

    path = locate(base_model)
    with _quiet_transformers(), _as_model_error(base_model, "tokenizer"):
        return AutoTokenizer.from_pretrained(path, revision=revision, trust_remote_code=trust_remote_code)


def input_device(model: PreTrainedModel) -> torch.device:
    """The device on which a model takes its tokens."""
    import torch

    weight = model.get_input_embeddings().weight
    assert isinstance(weight, torch.Tensor)
    return weight.device


def output_head(model: PreTrainedModel) -> torch.nn.Module:
    """The linear layer that makes the logits."""
    head: torch.nn.Module = model.get_output_embeddings()
    return head


def longest_input(base_model: str, revision: str | None = None, *, trust_remote_code: bool = False) -> int | None:
    """The number of positions that a base model has, or None where its configuration has none. Raises `ModelError`."""
    from transformers import AutoConfig

    path = locate(base_model)
    with _quiet_transformers(), _as_model_error(base_model, "configuration"):
        config = AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=trust_remote_code)
    positions: int | None = getattr(config.get_text_config(), "max_position_embeddings", None)
    return positions


def weights_folder(base_model: str, revision: str | None = None) -> Path:
    """The folder with a base model's safetensors, fetched from the Hub if necessary. Raises `ModelError`."""
    from huggingface_hub import snapshot_download

    folder = Path(locate(base_model)).expanduser()
    if folder.is_dir():
        return folder
    with _as_model_error(base_model, "weights"):
        return Path(snapshot_download(base_model, revision=revision, allow_patterns=["*.json", "model*.safetensors"]))


def skeleton(base_model: str, revision: str | None = None) -> PreTrainedModel:
    """A base model's modules without their weights (on the device `meta`). Raises `ModelError`."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    path = locate(base_model)
    with _quiet_transformers(), _as_model_error(base_model, "configuration"), torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path, revision=revision))
        return model


def load_model(
    base_model: str,
    revision: str | None = None,
    *,
    dtype: torch.dtype,
    device: str | None = "cpu",
    attention: str | None = None,
    adapter: Path | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """A frozen causal language model in evaluation mode; device None spreads it over all GPUs.

    `adapter` is a LoRA folder, merged into the weights before they are rounded to `dtype`. Raises `ModelError`,
    `PackError`; `UsageError` where the kernel named by `attention` is not available.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from sqsd_filter.scoring.adapters import load_adapter, merge

    path = locate(base_model)
    with _quiet_transformers(), _as_model_error(base_model, "weights", attention):
        exact = True
        if adapter is not None:
            stored = AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=trust_remote_code).dtype
            exact = stored is not None and torch.promote_types(stored, dtype) == dtype
        model = AutoModelForCausalLM.from_pretrained(
            path,
            revision=revision,
            trust_remote_code=trust_remote_code,
            dtype=dtype if exact else "auto",  # where it is spread over GPUs, its size counts
            device_map="auto" if device is None else None,
            attn_implementation=attention,
        )
    if device is not None:
        torch.nn.Module.to(model, device)  # transformers wraps it in a type that takes no device
    if adapter is not None:
        merge(model, load_adapter(adapter), dtype)
    model.eval().requires_grad_(False)
    return model


def load_in_4bit(
    base_model: str, revision: str | None = None, *, dtype: torch.dtype, device: str | None
) -> PreTrainedModel:
    """A frozen model whose linear layers hold 4-bit NormalFloat weights, for QLoRA; it computes in `dtype`.

    Device None spreads it over all GPUs. Raises `ModelError`.
    """
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    path = locate(base_model)
    with _quiet_transformers(), _as_model_error(base_model, "weights"):
        model = AutoModelForCausalLM.from_pretrained(
            path,
            revision=revision,
            dtype=dtype,
            quantization_config=config,
            device_map="auto" if device is None else {"": device},
        )
    # not in evaluation mode, in which a CPU would repack the weights for a product that has no gradient
    model.requires_grad_(False).train()
    return model


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """No progress bars and no advice from transformers while a model loads; errors still come through."""
    from transformers.utils import logging as hf_logging

    level, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(level)
        if bars:
            hf_logging.enable_progress_bar()


@contextmanager
def own_progress() -> Iterator[None]:
    """Lines of this package instead of the bar that transformers draws while it converts, whatever its settings say."""
    from transformers import modeling_gguf_pytorch_utils as gguf

    def told(tensors: Sequence[T], **_: object) -> Iterator[T]:
        said = time.monotonic()
        for done, tensor in enumerate(tensors):
            if time.monotonic() - said >= SAY_EVERY:
                said = time.monotonic()
                log.warning("converting: %d of %d tensors", done, len(tensors))
            yield tensor

    drawn = vars(gguf)["tqdm"]
    vars(gguf)["tqdm"] = told
    try:
        yield
    finally:
        vars(gguf)["tqdm"] = drawn


@contextmanager
def _as_model_error(base_model: str, what: str, attention: str | None = None) -> Iterator[None]:
    """Turn what transformers raises while it loads a model into one sentence: `ModelError`, or `UsageError` where the
    attention kernel is to blame."""
    try:
        yield
    except SQSDError:
        raise
    except Exception as problem:  # what damaged files lead transformers, tokenizers and torch to
        about = f"The {what} of '{base_model}' can't be loaded"
        first = first_line(problem)
        if attention is not None and isinstance(problem, ValueError | ImportError):
            raise UsageError(
                f"{about} with the attention kernel '{attention}' ({first.rstrip('.')}): name another by "
                f"{option('attention')}, such as eager or sdpa, or leave the choice to the model."
            ) from problem
        raise ModelError(
            f"{about} ({first}): check the name, and that this machine has it or can reach the Hub."
        ) from problem
