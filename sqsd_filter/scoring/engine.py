"""The model at work: frozen weights, one bin of token rows in, values of each row out (SQSD: its projections)."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch

from sqsd_filter.errors import ModelError, SQSDError
from sqsd_filter.scoring.adapters import load_adapter, probe_modules
from sqsd_filter.scoring.batching import default_budget, next_tokens
from sqsd_filter.scoring.capture import Capture, Collect
from sqsd_filter.scoring.chat_encoder import Encoded
from sqsd_filter.scoring.models import load_model
from sqsd_filter.scoring.placement import thread_pool
from sqsd_filter.scoring.projection import by_token

if TYPE_CHECKING:
    from sqsd_filter.scoring.scorer import BatchedScorer

log = logging.getLogger(__name__)

LOGITS_AT_ONCE = 1 << 25  # values of one chunk of logits: 128 MiB in float32
FEWEST_POSITIONS = 16  # of a chunk: for fewer than 4, BLAS sums over the vocabulary with up to 30 times the error


class LossGradient:
    """A frozen causal model and the backward pass from its loss: input gradients only, logits where they count."""

    def __init__(self, model: Any) -> None:
        self.model = model
        embedding = model.get_input_embeddings()
        self.device: torch.device = embedding.weight.device
        # The embedding's output is the only leaf: backward computes input gradients and nothing else.
        embedding.register_forward_hook(
            lambda _module, _input, output: output.detach().requires_grad_(torch.is_grad_enabled())
        )
        vocabulary = model.get_output_embeddings().weight.shape[0]
        self._chunk = max(FEWEST_POSITIONS, LOGITS_AT_ONCE // vocabulary)
        self._output_type: Any = None
        self._given = threading.local()
        self._let_logits_in()
        self._head_apart = self._can_run_head_apart()

    @torch.inference_mode(False)
    @torch.enable_grad()
    def backward(self, ids_bt: torch.Tensor, targets_bt: torch.Tensor) -> None:
        """Backward from the sum over all rows of the cross entropy at the supervised positions."""
        if not self._head_apart:
            logits_btv = self.model(input_ids=ids_bt, use_cache=False).logits
            targets_bt = targets_bt.to(logits_btv.device)
            logits_nv = logits_btv[targets_bt >= 0]
            logits_nv.backward(_loss_gradient(logits_nv, targets_bt[targets_bt >= 0]))
            return
        output = self.model.base_model(input_ids=ids_bt, use_cache=False)
        self._output_type = type(output)
        hidden_bth = output.last_hidden_state
        targets_bt = targets_bt.to(hidden_bth.device)
        supervised_bt = targets_bt >= 0
        grad_bth = torch.zeros_like(hidden_bth)
        grad_bth[supervised_bt] = self._head_gradient(hidden_bth.detach()[supervised_bt], targets_bt[supervised_bt])
        hidden_bth.backward(grad_bth)

    @torch.no_grad()
    def losses(self, ids_bt: torch.Tensor, targets_bt: torch.Tensor) -> torch.Tensor:
        """Each row's cross entropy, summed over its supervised positions: (b,) float64. No backward pass."""
        if self._head_apart:
            found_bth = self.model.base_model(input_ids=ids_bt, use_cache=False).last_hidden_state
        else:
            found_bth = self.model(input_ids=ids_bt, use_cache=False).logits
        supervised_bt = (targets_bt := targets_bt.to(found_bth.device)) >= 0
        losses = []
        for found, targets in zip(
            found_bth[supervised_bt].split(self._chunk), targets_bt[supervised_bt].split(self._chunk), strict=True
        ):
            logits_nv = self._logits(_filled(found))[: len(targets)] if self._head_apart else found
            exact = torch.promote_types(logits_nv.dtype, torch.float32)
            losses.append(torch.nn.functional.cross_entropy(logits_nv.to(exact), targets, reduction="none"))
        by_row = torch.cat(losses).double().split(supervised_bt.sum(-1).tolist())
        return torch.stack([own.sum() for own in by_row])

    def _head_gradient(self, hidden_nh: torch.Tensor, targets_n: torch.Tensor) -> torch.Tensor:
        """∂L/∂hidden (n, h) of the summed cross entropy, the logits made a chunk at a time."""
        grads = []
        for hidden, targets in zip(hidden_nh.split(self._chunk), targets_n.split(self._chunk), strict=True):
            n = len(targets)
            hidden = _filled(hidden).requires_grad_()
            logits_nv = self._logits(hidden)[:n]
            grads.append(torch.autograd.grad(logits_nv, hidden, _loss_gradient(logits_nv, targets))[0][:n])
        return torch.cat(grads)

    def _logits(self, hidden_nh: torch.Tensor) -> torch.Tensor:
        """The model's own logits (n, v) of hidden states: its forward runs on them in place of its backbone's output,
        so that whatever it does beside the head (scaling, soft caps) is done."""
        ids = torch.zeros((1, len(hidden_nh)), dtype=torch.long, device=hidden_nh.device)
        self._given.output = self._output_type(last_hidden_state=hidden_nh.unsqueeze(0))
        try:
            logits: torch.Tensor = self.model(input_ids=ids, use_cache=False).logits[0]
        finally:
            self._given.output = None
        return logits

    def _let_logits_in(self) -> None:
        """Make the backbone answer with `_given.output` where this thread has set it."""
        backbone = self.model.base_model
        run = backbone.forward  # the class's, or one that moves tensors between devices

        def forward(*args: Any, **kwargs: Any) -> Any:
            given = getattr(self._given, "output", None)
            return run(*args, **kwargs) if given is None else given

        backbone.forward = forward

    @torch.no_grad()
    def _can_run_head_apart(self) -> bool:
        """Does the model's head give the same logits when it is handed hidden states? Not where its forward goes round
        its `base_model`; then all logits are made."""
        ids = torch.arange(4, device=self.device)[None]
        expected = self.model(input_ids=ids, use_cache=False).logits[0]
        output = self.model.base_model(input_ids=ids, use_cache=False)
        hidden = getattr(output, "last_hidden_state", None)
        if hidden is None:
            return False
        self._output_type = type(output)
        try:
            found = self._logits(hidden[0])
        except (RuntimeError, ValueError, TypeError, AttributeError) as problem:
            log.info("%s needs all logits at once: %s", type(self.model).__name__, problem)
            return False
        return found.shape == expected.shape and torch.allclose(found, expected, rtol=1e-2, atol=1e-3, equal_nan=True)


def _filled(hidden_nh: torch.Tensor) -> torch.Tensor:
    """As many positions as a chunk has at least."""
    return torch.nn.functional.pad(hidden_nh, (0, 0, 0, max(0, FEWEST_POSITIONS - len(hidden_nh))))


def _loss_gradient(logits_nv: torch.Tensor, targets_n: torch.Tensor) -> torch.Tensor:
    """∂L/∂logits (n, v) of the summed cross entropy: softmax minus one-hot.

    The target's entry, p - 1, is taken as minus the others' sum: near p = 1 the difference would be all rounding.
    """
    exact = logits_nv.dtype if logits_nv.dtype == torch.float64 else torch.float32
    error_nv = torch.softmax(logits_nv.detach(), dim=-1, dtype=exact)
    at = torch.arange(len(targets_n), device=targets_n.device)
    error_nv[at, targets_n] = 0
    error_nv[at, targets_n] = -error_nv.sum(-1)
    return error_nv.to(logits_nv.dtype)


def run_parallel(run: Callable[[list[int]], None], batches: Iterable[list[int]], workers: int) -> None:
    """`run` every bin, so many at a time; on a CPU each in a single thread, whatever torch is set to outside.

    The first error ends it, once the bins that are running are done.
    """
    if workers == 0:
        for members in batches:
            run(members)
        return
    outside = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with thread_pool(workers, partial(torch.set_num_threads, 1)) as pool:
            try:
                for future in [pool.submit(run, members) for members in batches]:
                    future.result()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
    finally:
        torch.set_num_threads(outside)


def _room(model: Any, device: torch.device, gpus: float) -> int:
    """Bytes that a model leaves of its share of a GPU. Not what happens to be free: a replica's neighbours must not
    change its bins, and with them the last bits of scores."""
    held = sum(p.numel() * p.element_size() for p in model.parameters() if p.device == device)
    return max(0, int(torch.cuda.get_device_properties(device).total_memory * min(1.0, gpus)) - held)


class ModelEngine:
    """A loaded model, and what a device bears of it. `project` is all a scorer needs."""

    def __init__(self, model: Any, scorer: BatchedScorer) -> None:
        device = model.get_input_embeddings().weight.device
        config = model.config.get_text_config()
        # On a CPU bins run side by side, a thread each: what a row scores then depends on no number of threads, and
        # two small products keep two cores busier than one of twice the size. Some rotary embeddings keep state.
        rope = getattr(config, "rope_parameters", None) or {}
        stateful = isinstance(rope, dict) and any(k in str(rope) for k in ("dynamic", "longrope"))
        self.workers = 0 if device.type != "cpu" else 1 if stateful else torch.get_num_threads()
        self.default_budget = default_budget(
            free_bytes=_room(model, device, scorer.gpus) if device.type == "cuda" else None,
            layers=config.num_hidden_layers,
            hidden=config.hidden_size,
            intermediate=getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
            bytes_per_value=next(model.parameters()).element_size(),
        )

    @classmethod
    def load(cls, scorer: BatchedScorer) -> Self:
        """Load the scorer's model in its dtype on its device. Raises `ModelError`, `PackError`."""
        model = load_model(
            scorer.base_model,
            scorer.base_revision,
            dtype=getattr(torch, scorer.dtype),
            device=None if scorer.gpus > 1 else scorer.device,
            attention=scorer.attention,
            adapter=scorer.pack.base_folder,
            trust_remote_code=scorer.trust_remote_code,
        )
        try:
            engine = cls(model, scorer)
            engine.project([Encoded(np.arange(8), np.arange(8) > 3)])
        except SQSDError:
            raise
        except Exception as problem:  # whatever this architecture does that others don't
            named = scorer.attention is not None
            raise ModelError(
                f"{type(model).__name__} can't be scored ({type(problem).__name__}: {problem}): choose another "
                f"{'attention kernel with --attention, or another ' * named}model with --pack or --model."
            ) from problem
        return engine

    def project(self, rows: Sequence[Encoded]) -> np.ndarray:
        """The scorer's values of each row: (b, values) float64."""
        raise NotImplementedError


class SQSDModel(ModelEngine):
    """A loaded model at the pack's states."""

    def __init__(self, model: Any, scorer: BatchedScorer) -> None:
        pack = scorer.pack
        self.probes, self.per_module = pack.probes, scorer.per_module
        adapters = {name: load_adapter(pack.adapter(name)) for name in pack.adapters}
        self.passes = list(dict.fromkeys(p.at for p in pack.probes))
        self.members = {at: [k for k, p in enumerate(pack.probes) if p.at == at] for at in self.passes}
        states = {
            at: (
                adapters[at[0]].with_scaling(at[1]),
                [adapters[pack.probes[k].direction] for k in self.members[at]],
            )
            for at in self.passes
        }
        device = model.get_input_embeddings().weight.device
        self.capture = Capture(model, states, torch.zeros((1, 2), dtype=torch.long, device=device))
        self.gradient = LossGradient(model)
        self.coverage = {
            self.probes[k].name: count
            for at in self.passes
            for k, count in zip(self.members[at], self.capture.coverage(at), strict=True)
        }
        self.modules = {at: self.capture.modules(at) for at in self.passes}
        self.probe_modules = probe_modules(self.probes, adapters)
        super().__init__(model, scorer)

    def project(self, rows: Sequence[Encoded]) -> np.ndarray:
        """Σ_m cos for each row and probe: (b, probes) float64; for a scorer with `per_module`, behind these the cosines
        of each probe's modules, as `probe_modules` has them."""
        out = np.empty((len(rows), len(self.probes)))
        found = self.cosines(rows)
        for at, cosines_bpm in found.items():
            out[:, self.members[at]] = cosines_bpm.double().sum(-1).cpu().numpy()
        each = [self._of_probe(k, found[probe.at]) for k, probe in enumerate(self.probes)] if self.per_module else []
        return np.concatenate([out, *each], axis=1)

    def cosines(self, rows: Sequence[Encoded]) -> dict[tuple[str, float | None], torch.Tensor]:
        """Each pass's cos (b, p, m): rows, the pass's probes, its modules (`self.modules`)."""
        return {at: self.capture.cosines() for at in self._passes(rows)}

    def parts(self, row: Encoded) -> list[tuple[np.ndarray, np.ndarray]]:
        """What a row's value of each probe is the sum of, taken apart in two ways: the cosine of each of its modules
        (m,), as `probe_modules` has them, and what each position adds (t,), of all tokens up to the last but one."""
        found = {}
        for at in self._passes([row], collect=by_token):
            parts_btp = self.capture.token_parts()
            found[at] = self.capture.cosines(), parts_btp.double().cpu().numpy()
        return [
            (self._of_probe(k, found[p.at][0])[0], found[p.at][1][0, :, self.members[p.at].index(k)])
            for k, p in enumerate(self.probes)
        ]

    def _passes(self, rows: Sequence[Encoded], *, collect: Collect | None = None) -> Iterator[tuple[str, float | None]]:
        """Each pass of the probes, when its backward is done."""
        ids_bt, targets_bt = next_tokens(rows, self.gradient.device)
        for at in self.passes:
            self.capture.use(at, (ids_bt.shape[0], ids_bt.shape[1]), collect=collect)
            self.gradient.backward(ids_bt, targets_bt)
            yield at

    def _of_probe(self, k: int, cosines_bpm: torch.Tensor) -> np.ndarray:
        """The cosines (b, m) float64 of probe k's own modules among those of its pass."""
        at = self.probes[k].at
        columns = [self.modules[at].index(name) for name in self.probe_modules[self.probes[k].name]]
        cosines: np.ndarray = cosines_bpm[:, self.members[at].index(k), columns].double().cpu().numpy()
        return cosines
