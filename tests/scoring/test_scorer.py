"""The fast scorer against the dense one, and the properties a user relies on."""

from __future__ import annotations

import json
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AttentionInterface, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from sqsd_filter.cli.main import main
from sqsd_filter.errors import ModelError, PackError, UsageError
from sqsd_filter.scoring.chat_encoder import Encoded
from sqsd_filter.scoring.loss_gradient import LossGradient
from sqsd_filter.scoring.reference import ReferenceScorer
from sqsd_filter.scoring.results import Scores
from sqsd_filter.scoring.scorer import SQSDScorer
from tests.corpora import write_jsonl
from tests.tiny import (
    ARCHITECTURES,
    CONVERSATIONS,
    PECULIAR,
    chat,
    embedding_of,
    encoded,
    make_adapter,
    make_model,
    make_pack,
)


def gap(a: Scores, b: Scores) -> float:
    assert a.status == b.status
    pairs = [(a.risk, b.risk), *((a.probes[name], b.probes[name]) for name in a.probes)]
    return max(float(np.nanmax(np.abs(x - y))) for x, y in pairs)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_float32_batches_agree_with_the_dense_float64_form(packs: dict[str, Path], architecture: str) -> None:
    fast = SQSDScorer(packs[architecture], dtype="float32", token_budget=400).score(CONVERSATIONS)
    dense = ReferenceScorer(packs[architecture]).score(CONVERSATIONS)
    assert set(fast.status) == {"scored"}
    assert np.ptp(dense.probes["danger"]) > 0.05
    assert np.ptp(dense.probes["safety"]) > 0.05
    assert gap(fast, dense) <= 1e-5  # a tenth of what is promised


def test_float64_batches_agree_with_the_dense_form_to_rounding(packs: dict[str, Path]) -> None:
    pack = packs["gpt2"]  # the other architectures compute their norms in float32 whatever they are asked
    fast = SQSDScorer(pack, dtype="float64", token_budget=400).score(CONVERSATIONS)
    assert gap(fast, ReferenceScorer(pack).score(CONVERSATIONS)) <= 1e-8


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_base_adapter_lies_under_every_state(tmp_path: Path, architecture: str) -> None:
    aligned = make_pack(tmp_path / "aligned", architecture=architecture, aligned=True)
    plain = make_pack(tmp_path / "plain", aligned / "base")
    scores = SQSDScorer(aligned).score(CONVERSATIONS)
    assert gap(scores, ReferenceScorer(aligned).score(CONVERSATIONS)) <= 1e-5
    assert gap(scores, SQSDScorer(plain).score(CONVERSATIONS)) > 0.01


def test_a_row_scores_the_same_alone_and_among_others(tiny_pack: Path) -> None:
    together = SQSDScorer(tiny_pack, token_budget=100_000).score(CONVERSATIONS)
    alone = SQSDScorer(tiny_pack, token_budget=1).score(CONVERSATIONS)
    assert gap(together, alone) <= 1e-5


def test_the_order_of_rows_and_their_duplicates_change_no_score(tiny_pack: Path) -> None:
    order = [*range(len(CONVERSATIONS)), 2, 0, 0]
    random.Random(0).shuffle(order)
    scorer = SQSDScorer(tiny_pack)
    straight, shuffled = scorer.score(CONVERSATIONS), scorer.score([CONVERSATIONS[k] for k in order])
    assert np.abs(shuffled.risk - straight.risk[order]).max() <= 1e-5


def test_risk_is_danger_minus_safety(tiny_pack: Path) -> None:
    scores = SQSDScorer(tiny_pack).score(CONVERSATIONS)
    assert np.array_equal(scores.risk, scores.probes["danger"] - scores.probes["safety"])


def test_the_overridden_scaling_of_a_state_counts(tmp_path: Path, tiny_pack: Path) -> None:
    own = make_pack(tmp_path, tiny_pack / "base", safety_scaling=None)
    overridden, kept = SQSDScorer(tiny_pack).score(CONVERSATIONS), SQSDScorer(own).score(CONVERSATIONS)
    assert np.abs(overridden.probes["safety"] - kept.probes["safety"]).max() > 1e-3
    assert gap(kept, ReferenceScorer(own).score(CONVERSATIONS)) <= 1e-4


def test_several_directions_at_one_state_equal_each_alone(tmp_path: Path, tiny_pack: Path) -> None:
    probes = [
        {"name": "danger", "weight": 1.0, "direction": "danger", "state": "initial", "state_scaling": None},
        {"name": "other", "weight": 0.5, "direction": "safety", "state": "initial", "state_scaling": None},
        {"name": "own", "weight": -1.0, "direction": "safety", "state": "safety", "state_scaling": 1.0},
    ]
    pack = make_pack(tmp_path, tiny_pack / "base", probes=probes)
    scores = SQSDScorer(pack).score(CONVERSATIONS)
    assert gap(scores, ReferenceScorer(pack).score(CONVERSATIONS)) <= 1e-4
    two = SQSDScorer(tiny_pack).score(CONVERSATIONS)
    assert np.abs(scores.probes["danger"] - two.probes["danger"]).max() <= 1e-5
    assert np.abs(scores.probes["own"] - two.probes["safety"]).max() <= 1e-5


def test_modules_that_only_one_adapter_covers_are_left_out(tmp_path: Path, tiny_pack: Path) -> None:
    pack = make_pack(tmp_path, tiny_pack / "base")
    make_adapter(tiny_pack / "base", tmp_path / "danger", r=6, target_modules=["k_proj", "up_proj", "down_proj"])
    make_adapter(
        tiny_pack / "base", tmp_path / "initial", r=4, target_modules=["q_proj", "v_proj", "k_proj", "up_proj"]
    )
    scorer = SQSDScorer(pack)
    assert gap(scorer.score(CONVERSATIONS), ReferenceScorer(pack).score(CONVERSATIONS)) <= 1e-4
    assert scorer.model.coverage == {"danger": 4, "safety": 14}  # k_proj and up_proj of two layers; everything


@pytest.mark.parametrize(
    "config", [{"use_rslora": True}, {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 32}}]
)
def test_unusual_scalings_are_read_as_peft_reads_them(tmp_path: Path, tiny_pack: Path, config: dict[str, Any]) -> None:
    pack = make_pack(tmp_path, tiny_pack / "base", safety_scaling=None)
    for name, seed in (("initial", 5), ("safety", 6)):
        make_adapter(tiny_pack / "base", tmp_path / name, seed=seed, **config)
    assert gap(SQSDScorer(pack).score(CONVERSATIONS), ReferenceScorer(pack).score(CONVERSATIONS)) <= 1e-4


def test_a_fresh_state_uses_the_half_of_the_signal_that_is_there(tmp_path: Path, tiny_pack: Path) -> None:
    pack = make_pack(tmp_path, tiny_pack / "base")
    make_adapter(tiny_pack / "base", tmp_path / "initial", fresh=True)
    assert gap(SQSDScorer(pack).score(CONVERSATIONS), ReferenceScorer(pack).score(CONVERSATIONS)) <= 1e-4


def test_rows_that_cannot_be_scored_say_why_and_leave_the_others_alone(tiny_pack: Path) -> None:
    bad = [chat("no answer?", "  "), chat("x " * 400, "too long"), []]
    mixed = SQSDScorer(tiny_pack).score([bad[0], *CONVERSATIONS[:2], bad[1], CONVERSATIONS[2], bad[2]])
    good = SQSDScorer(tiny_pack).score(CONVERSATIONS[:3])
    assert mixed.status == ["no_answer", "scored", "scored", "prompt_too_long", "scored", "no_answer"]
    assert np.isnan(mixed.risk[[0, 3, 5]]).all()
    assert np.abs(mixed.risk[[1, 2, 4]] - good.risk).max() <= 1e-5


def test_a_gradient_that_is_not_finite_is_named_and_stays_with_its_row(tmp_path: Path) -> None:
    model = make_model(tmp_path / "base")
    pack = make_pack(tmp_path / "pack", model)
    scorer = SQSDScorer(pack, token_budget=10_000)
    marked = chat("x", "zebra %")
    token = scorer.encoder.tokenizer("%", add_special_tokens=False)["input_ids"][0]
    with torch.no_grad():
        embedding_of(scorer.model.gradient.model)[token] = float("nan")
    scores = scorer.score([*CONVERSATIONS, marked])
    assert scores.status == ["scored"] * len(CONVERSATIONS) + ["nonfinite"]
    assert np.abs(scores.risk[:-1] - SQSDScorer(pack).score(CONVERSATIONS).risk).max() <= 1e-5


def test_long_rows_keep_the_head_of_their_answer(tiny_pack: Path) -> None:
    long = chat("Count.", " ".join(str(k) for k in range(200)))
    short = SQSDScorer(tiny_pack, max_length=64)
    (row,) = encoded(short, [long])
    assert len(row) == 64
    assert row.answer[-1]
    assert gap(short.score([long]), ReferenceScorer(tiny_pack, max_length=64).score([long])) <= 1e-4


def test_bfloat16_ranks_rows_as_float32_does(tiny_pack: Path) -> None:
    full, half = (SQSDScorer(tiny_pack, dtype=d).score(CONVERSATIONS).risk for d in ("float32", "bfloat16"))
    assert np.corrcoef(full, half)[0, 1] > 0.99


def test_a_model_that_the_pack_was_not_made_for_is_refused(packs: dict[str, Path]) -> None:
    with pytest.raises(PackError, match="made for another model"):
        SQSDScorer(packs["llama"], model=str(packs["gpt2"] / "base")).score(CONVERSATIONS)


def test_an_unknown_dtype_is_a_usage_error(tiny_pack: Path) -> None:
    with pytest.raises(UsageError, match="float16"):
        SQSDScorer(tiny_pack, dtype="float16")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_command_gives_the_dense_float64_scores(packs: dict[str, Path], architecture: str, tmp_path: Path) -> None:
    rows = [{"id": k, "messages": turns} for k, turns in enumerate(CONVERSATIONS)]
    source, scored = write_jsonl(tmp_path / "in.jsonl", rows), tmp_path / "scored.parquet"
    with pytest.raises(SystemExit) as left:
        main(["score", str(source), str(scored), "--pack", str(packs[architecture]), "--dtype", "float32", "-q"])
    assert not left.value.code
    found, expected = pq.read_table(scored), ReferenceScorer(packs[architecture]).score(CONVERSATIONS).columns()
    assert found["id"].to_pylist() == list(range(len(rows)))
    assert set(found["sqsd_status"].to_pylist()) == {"scored"}
    for name in ("sqsd_danger", "sqsd_safety", "sqsd_risk"):
        assert np.abs(found[name].to_numpy() - expected[name]).max() <= 1e-4


@pytest.mark.parametrize("architecture", PECULIAR)
def test_models_with_peculiar_forwards_are_scored_exactly_too(architecture: str, tmp_path: Path) -> None:
    pack = make_pack(tmp_path, architecture=architecture)
    dense = ReferenceScorer(pack, dtype="float32" if architecture == "qwen2_moe" else "float64")
    assert gap(SQSDScorer(pack).score(CONVERSATIONS), dense.score(CONVERSATIONS)) <= 1e-4


@pytest.mark.parametrize("sharpness", [40, 60, 80])
def test_an_answer_that_the_model_is_sure_of_is_scored_as_exactly(tmp_path: Path, sharpness: int) -> None:
    base = make_model(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(base)
    model.lm_head.weight.data *= sharpness
    model.save_pretrained(base)
    pack = make_pack(tmp_path / "pack", base)
    fast, dense = SQSDScorer(pack), ReferenceScorer(pack)
    dense.load()
    prompt = encoded(fast, [CONVERSATIONS[0]])[0].ids[:20]
    with torch.no_grad():
        answer = fast.model.gradient.model(torch.from_numpy(prompt)[None]).logits[0, -1].argmax()
    sure = Encoded(np.append(prompt, int(answer)), np.arange(21) == 20)
    assert np.abs(fast.model.project([sure]) - dense.project(sure)).max() <= 1e-4


def test_a_large_vocabulary_loses_nothing_for_short_answers() -> None:
    """With fewer than 4 positions BLAS takes another road through the 49,152 terms of each sum."""
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=49_152, hidden_size=64, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    model = LlamaForCausalLM(shape)
    model.requires_grad_(False)
    gradient = LossGradient(model)
    n = gradient.chunk + 2  # so that the second chunk is a short one
    hidden_nh, targets_n = torch.randn(n, 64) * 20, torch.randint(49_152, (n,))
    all_nh = gradient.head_gradient(hidden_nh, targets_n)
    for few in (slice(0, 1), slice(5, 7), slice(8, 11), slice(n - 3, n)):
        few_nh = gradient.head_gradient(hidden_nh[few], targets_n[few])
        assert ((few_nh - all_nh[few]).norm(dim=1) / all_nh[few].norm(dim=1)).max() < 1e-6
    exact_nh = hidden_nh.double().requires_grad_()
    torch.nn.functional.cross_entropy(model.double().lm_head(exact_nh), targets_n, reduction="sum").backward()
    assert exact_nh.grad is not None
    assert ((all_nh.double() - exact_nh.grad).norm(dim=1) / exact_nh.grad.norm(dim=1)).max() < 3e-5


def test_backward_may_run_in_another_thread_as_it_does_on_a_gpu(
    tiny_pack: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = SQSDScorer(tiny_pack).score(CONVERSATIONS)
    run = torch.Tensor.backward

    def elsewhere(*arguments: Any, **named: Any) -> None:
        with ThreadPoolExecutor(1) as pool:
            pool.submit(run, *arguments, **named).result()

    monkeypatch.setattr(torch.Tensor, "backward", elsewhere)
    scorer = SQSDScorer(tiny_pack)
    scorer.model.workers = 0
    assert gap(scorer.score(CONVERSATIONS), expected) <= 1e-6


def test_a_model_that_cannot_be_scored_is_one_sentence_about_the_model(tmp_path: Path) -> None:
    pack = make_pack(tmp_path)
    scorer = SQSDScorer(pack)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sqsd_filter.scoring.capture.contract", None)
        with pytest.raises(ModelError, match=r"LlamaForCausalLM can't be scored .*TypeError.*--model"):
            scorer.score(CONVERSATIONS)


def test_an_attention_kernel_that_fails_at_work_is_one_sentence_about_it(tiny_pack: Path) -> None:
    def forward(*_: Any, **__: Any) -> None:
        raise RuntimeError("no kernel image")

    AttentionInterface.register("failing", forward)
    with pytest.raises(ModelError, match=r"no kernel image\): choose another attention kernel with --attention, or"):
        SQSDScorer(tiny_pack, attention="failing").score(CONVERSATIONS)


def test_scores_do_not_depend_on_the_number_of_threads(tiny_pack: Path) -> None:
    by_one, by_three = SQSDScorer(tiny_pack, token_budget=64), SQSDScorer(tiny_pack, token_budget=64)
    by_one.model.workers, by_three.model.workers = 1, 3
    assert np.array_equal(by_one.score(CONVERSATIONS * 3).risk, by_three.score(CONVERSATIONS * 3).risk)
    assert torch.get_num_threads() == 1  # as conftest set it


def test_a_model_with_code_of_its_own_is_scored_by_both_forms_where_that_is_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    pack = make_pack(tmp_path)
    own = "from transformers import LlamaConfig, LlamaForCausalLM\n\n\nclass Own{0}(Llama{0}):\n    {1}\n"
    code = own.format("Config", 'model_type = "own"') + own.format("ForCausalLM", "config_class = OwnConfig")
    (tmp_path / "base" / "own.py").write_text(code)
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    classes = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    (tmp_path / "base" / "config.json").write_text(json.dumps({**config, "model_type": "own", "auto_map": classes}))
    fast, dense = (form(pack, trust_remote_code=True).score(CONVERSATIONS) for form in (SQSDScorer, ReferenceScorer))
    assert gap(fast, dense) <= 1e-5
    for form in (SQSDScorer, ReferenceScorer):
        with pytest.raises(ModelError, match="custom code"):
            form(pack).score(CONVERSATIONS)


def test_rows_longer_than_the_models_positions_are_truncated(tmp_path: Path) -> None:
    pack = make_pack(tmp_path, architecture="gpt2", max_length=2048)
    scores = SQSDScorer(pack).score([chat("Count.", "word " * 900)])
    assert (scores.status, scores.tokens.tolist()) == (["scored"], [512])
