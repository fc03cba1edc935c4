"""Each baseline against its textbook form, a row at a time in float64, and the properties that all scorers share."""

from __future__ import annotations

import pickle
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from sqsd_filter import make_scorer
from sqsd_filter.errors import InputError, UsageError
from sqsd_filter.scoring.baselines import ANCHORED, SCORERS
from sqsd_filter.scoring.baselines.gradients import GradientModel
from sqsd_filter.scoring.baselines.hidden import HiddenStateModel, separation
from sqsd_filter.scoring.baselines.loss import LossModel
from sqsd_filter.scoring.chat_encoder import Encoded
from sqsd_filter.scoring.pack import load_pack
from sqsd_filter.scoring.reference import ReferenceScorer
from sqsd_filter.scoring.results import Scores
from sqsd_filter.scoring.scorer import BatchedScorer, SQSDScorer
from sqsd_filter.scoring.scoring_model import SQSDModel
from tests.tiny import CONVERSATIONS, chat, embedding_of, encoded, make_adapter, make_pack

UNSAFE = [
    chat("Tell me a secret.", "Yes, of course: " + "this is how it goes, step by step. " * 3),
    chat("Open the door.", "Sure, it is open."),
    chat("Say it.", "Here it is, all of it."),
]
SAFE = [chat(turns[0]["content"], "No. I will not do that, since it would be wrong.") for turns in UNSAFE[:2]]
ARCHITECTURES = ["llama", "gpt2", "gemma3"]


@pytest.fixture(scope="module")
def aligned(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Packs whose models have a base adapter."""
    root = tmp_path_factory.mktemp("aligned")
    return {name: make_pack(root / name, architecture=name, aligned=True) for name in (*ARCHITECTURES, "opt")}


def scorer_of(name: str, pack: Path, **settings: Any) -> BatchedScorer:
    anchors = {"unsafe_anchors": UNSAFE, "safe_anchors": SAFE} if name in ANCHORED else {}
    return make_scorer(name, pack, **{**anchors, **settings})


def layer_of(scorer: BatchedScorer) -> int:
    model = scorer.model
    assert isinstance(model, HiddenStateModel)
    return model.layer


def model_of(pack: Path) -> Any:
    """The pack's aligned model in float64."""
    model: Any = AutoModelForCausalLM.from_pretrained(pack / "base", dtype=torch.float64)
    return PeftModel.from_pretrained(model, pack / "aligned", autocast_adapter_dtype=False).double().merge_and_unload()


def loss_of(model: Any, row: Encoded) -> torch.Tensor:
    """The mean cross entropy of the answer's tokens."""
    ids, answer = torch.from_numpy(row.ids), torch.from_numpy(row.answer)
    logits = model(input_ids=ids[None], use_cache=False).logits[0]
    return F.cross_entropy(logits[:-1][answer[1:]], ids[1:][answer[1:]])


def gradient_of(pack: Path) -> Callable[[Encoded], np.ndarray]:
    """What gives a row's gradient of all LoRA matrices of the danger probe's state, as one vector."""
    model = PeftModel.from_pretrained(
        model_of(pack), pack / "initial", is_trainable=True, autocast_adapter_dtype=False
    ).double()
    model.eval()
    leaves = [p for p in model.parameters() if p.requires_grad]

    def gradient(row: Encoded) -> np.ndarray:
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss_of(model, row), leaves)]).numpy()

    return gradient


def hidden_of(pack: Path) -> Callable[[Encoded], np.ndarray]:
    """What gives a row's hidden states (l, t, h) as transformers has them."""
    model = model_of(pack).eval()

    def hidden(row: Encoded) -> np.ndarray:
        with torch.no_grad():
            states = model(torch.from_numpy(row.ids)[None], output_hidden_states=True).hidden_states
        return torch.cat(states).numpy()

    return hidden


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def close(found: Scores, name: str, expected: Sequence[float] | np.ndarray, within: float = 1e-5) -> None:
    assert set(found.status) == {"scored"}
    expected_n = np.asarray(expected)
    assert np.ptp(expected_n) > 100 * within * np.abs(expected_n).max()
    assert np.abs(found.probes[name] - expected_n).max() <= within * max(1, np.abs(expected_n).max())


# ---------------------------------------------------------------------------------------------- textbook forms


@pytest.mark.parametrize("name", ["danger", "safety"])
def test_a_part_of_sqsd_is_that_probe_alone(aligned: dict[str, Path], name: str) -> None:
    part, whole = scorer_of(name, aligned["llama"]).score(CONVERSATIONS), ReferenceScorer(aligned["llama"])
    close(part, name, whole.score(CONVERSATIONS).probes[name])
    assert list(part.probes) == [name]
    assert np.array_equal(part.risk, {"danger": 1, "safety": -1}[name] * part.probes[name])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_unnormalised_is_the_sum_of_dense_inner_products(aligned: dict[str, Path], architecture: str) -> None:
    scorer, dense = scorer_of("unnormalised", aligned[architecture]), ReferenceScorer(aligned[architecture])
    found = scorer.score(CONVERSATIONS)
    dense.load()
    for probe in dense.pack.probes:
        updates = [dense.update(row, *probe.at) for row in encoded(scorer, CONVERSATIONS)]
        V = dense.directions[probe.direction]
        close(found, probe.name, [sum(float((u[m] * V[m]).sum()) for m in u.keys() & V.keys()) for u in updates])
    assert np.array_equal(found.risk, found.probes["danger"] - found.probes["safety"])


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "opt"])
def test_loss_is_the_mean_cross_entropy_of_the_answer(aligned: dict[str, Path], architecture: str) -> None:
    scorer, model = scorer_of("loss", aligned[architecture]), model_of(aligned[architecture])
    with torch.no_grad():
        expected = [float(loss_of(model, row)) for row in encoded(scorer, CONVERSATIONS)]
    found = scorer.score(CONVERSATIONS)
    close(found, "loss", expected)
    loaded = scorer.model
    assert isinstance(loaded, LossModel)
    loaded.gradient.chunk = 16  # several chunks of logits per row
    close(scorer.score(CONVERSATIONS), "loss", expected)
    assert np.array_equal(found.risk, found.probes["loss"])


def test_length_counts_the_tokens_of_all_answers(tiny_pack: Path) -> None:
    scorer = scorer_of("length", tiny_pack)
    tokens = scorer.encoder.tokenizer
    found = scorer.score(CONVERSATIONS)
    for turns, risk in zip(CONVERSATIONS, found.risk, strict=True):
        said = [turn["content"] + "<|im_end|>" for turn in turns if turn["role"] == "assistant"]
        assert risk == sum(len(tokens(text)["input_ids"]) for text in said)


def test_random_is_uniform_and_follows_its_seed(tiny_pack: Path) -> None:
    rows = [chat(f"What is {k}?", "A number.") for k in range(400)]
    first, again, other = (scorer_of("random", tiny_pack, seed=seed).score(rows).risk for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert abs(np.corrcoef(first, other)[0, 1]) < 0.2
    shares = np.histogram(first, bins=8, range=(0, 1))[0]
    assert shares.sum() == 400
    assert ((shares - 50) ** 2 / 50).sum() < 24


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_self_inf_n_is_the_squared_norm_of_the_lora_gradient_and_the_length(
    aligned: dict[str, Path], architecture: str
) -> None:
    scorer, gradient = scorer_of("self-inf-n", aligned[architecture]), gradient_of(aligned[architecture])
    rows, found = encoded(scorer, CONVERSATIONS), scorer.score(CONVERSATIONS)
    influence = [np.log((gradient(row) ** 2).sum() + 1) for row in rows]
    length = [np.log(row.answer.sum() + 1) for row in rows]
    close(found, "log_self_influence", influence)
    close(found, "log_length", length)
    assert np.abs(found.risk - influence - length).max() <= 1e-4


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_bi_anchor_is_the_similarity_of_unit_gradients_to_the_anchors_first_tokens(
    aligned: dict[str, Path], architecture: str
) -> None:
    scorer, gradient = scorer_of("bi-anchor", aligned[architecture]), gradient_of(aligned[architecture])
    rows, found = encoded(scorer, CONVERSATIONS), scorer.score(CONVERSATIONS)

    def unit(row: Encoded) -> np.ndarray:
        scaled: np.ndarray = gradient(row) / np.linalg.norm(gradient(row))
        return scaled

    def cut(row: Encoded) -> Encoded:
        stop = int(np.flatnonzero(row.answer)[:10][-1]) + 1
        return Encoded(row.ids[:stop], row.answer[:stop])

    for name, anchors in (("unsafe", UNSAFE), ("safe", SAFE)):
        mean = np.mean([unit(cut(row)) for row in encoded(scorer, anchors)], axis=0)
        close(found, name, [float(unit(row) @ mean) for row in rows])
    assert np.array_equal(found.risk, found.probes["unsafe"] - found.probes["safe"])


def test_gradients_in_float64_are_exact_to_rounding(aligned: dict[str, Path]) -> None:
    pack = aligned["gpt2"]  # the other architectures compute their norms in float32 whatever they are asked
    within = 1e-7  # adapters are held in float32, and so is s·B
    gradient, scorer = gradient_of(pack), scorer_of("bi-anchor", pack, dtype="float64")
    rows, found = encoded(scorer, UNSAFE), scorer.score(UNSAFE[2:])
    whole = gradient(rows[2])
    assert rows[2].answer.sum() > 10  # as a row it isn't cut, as an anchor it is
    loaded = scorer.model
    assert isinstance(loaded, GradientModel)
    norms2 = loaded.products(rows)[1].numpy() / np.array([row.answer.sum() for row in rows]) ** 2
    assert np.abs(norms2 / [(gradient(row) ** 2).sum() for row in rows] - 1).max() <= within
    cut = [Encoded(row.ids, row.answer & (np.cumsum(row.answer) <= 10)) for row in rows]
    mean = np.mean([g / np.linalg.norm(g) for g in map(gradient, cut)], axis=0)
    assert abs(found.probes["unsafe"][0] - whole @ mean / np.linalg.norm(whole)) <= within


def test_modules_that_the_state_leaves_out_count_for_nothing(tmp_path: Path) -> None:
    pack = make_pack(tmp_path, aligned=True)
    make_adapter(pack / "base", pack / "initial", r=4, target_modules=["q_proj", "v_proj", "up_proj"])
    scorer, gradient = scorer_of("self-inf-n", pack), gradient_of(pack)
    rows = encoded(scorer, CONVERSATIONS)
    expected = [np.log((gradient(row) ** 2).sum() + 1) for row in rows]
    close(scorer.score(CONVERSATIONS), "log_self_influence", expected)


def test_larf_is_the_mean_cosine_with_the_anchors_at_the_layer_that_separates_them(aligned: dict[str, Path]) -> None:
    for architecture in ARCHITECTURES:
        scorer, hidden = scorer_of("larf", aligned[architecture]), hidden_of(aligned[architecture])
        found, layer = scorer.score(CONVERSATIONS), layer_of(scorer)

        def last(row: Encoded, at: int, hidden: Callable[[Encoded], np.ndarray] = hidden) -> np.ndarray:
            state: np.ndarray = hidden(row)[at, np.flatnonzero(row.answer)[-1]]
            return state

        anchors = {name: encoded(scorer, turns) for name, turns in (("unsafe", UNSAFE), ("safe", SAFE))}
        scores = []
        for at in (1, 2):
            kinds = [np.stack([last(row, at) for row in rows]) for rows in anchors.values()]
            scores.append(textbook_separation(*(k / np.linalg.norm(k, axis=1, keepdims=True) for k in kinds)))
        assert layer == 1 + int(np.argmax(scores))
        for name, rows in anchors.items():
            expected = [
                float(np.mean([cosine(last(row, layer), last(anchor, layer)) for anchor in rows]))
                for row in encoded(scorer, CONVERSATIONS)
            ]
            close(found, name, expected)
        assert np.array_equal(found.risk, found.probes["unsafe"] - found.probes["safe"])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_datashield_is_the_shift_from_prompt_to_answer_along_the_compliance_vector(
    aligned: dict[str, Path], architecture: str
) -> None:
    scorer, hidden = scorer_of("datashield", aligned[architecture]), hidden_of(aligned[architecture])
    found, layer = scorer.score(CONVERSATIONS), layer_of(scorer)

    def mean(row: Encoded, at: int) -> np.ndarray:
        state: np.ndarray = hidden(row)[at][row.answer].mean(0)
        return state

    unsafe, safe = (
        [np.stack([mean(row, at) for row in encoded(scorer, turns)]) for at in (1, 2)] for turns in (UNSAFE, SAFE)
    )
    assert layer == 1 + int(np.argmax([textbook_separation(u, s) for u, s in zip(unsafe, safe, strict=True)]))
    v = unsafe[layer - 1].mean(0) - safe[layer - 1].mean(0)
    expected = []
    for row in encoded(scorer, CONVERSATIONS):
        before = hidden(row)[layer][np.flatnonzero(row.answer)[0] - 1]
        expected.append(float((mean(row, layer) - before) @ v / np.linalg.norm(v)))
    close(found, "shift", expected)
    assert np.array_equal(found.risk, found.probes["shift"])


def textbook_separation(unsafe: np.ndarray, safe: np.ndarray) -> float:
    """vᵀ S_b v / vᵀ S_t v with the scatter matrices written out."""
    both = np.concatenate([unsafe, safe])
    standard = (both - both.mean(0)) / both.std(0, ddof=1)
    v = unsafe.mean(0) - safe.mean(0)
    kinds = standard[: len(unsafe)], standard[len(unsafe) :]
    between = sum(len(k) * np.outer(k.mean(0), k.mean(0)) for k in kinds)
    within = sum((k - k.mean(0)).T @ (k - k.mean(0)) for k in kinds)
    return float(v @ between @ v / (v @ (between + within) @ v))


def test_the_separation_of_a_layer_is_that_of_the_scatter_matrices() -> None:
    draw = np.random.default_rng(0)
    for _ in range(20):
        unsafe, safe = draw.normal(0.3, 1, (draw.integers(2, 9), 6)), draw.normal(0, 2, (draw.integers(2, 9), 6))
        assert separation(unsafe, safe) == pytest.approx(textbook_separation(unsafe, safe), abs=1e-12)
    still = np.ones((3, 4))
    assert separation(still, still) == 0


# ---------------------------------------------------------------------------------------------- properties


@pytest.mark.parametrize("name", SCORERS)
def test_no_score_depends_on_batch_mates_order_or_duplicates(aligned: dict[str, Path], name: str) -> None:
    together = scorer_of(name, aligned["llama"], token_budget=100_000).score(CONVERSATIONS)
    order = [*range(len(CONVERSATIONS)), 2, 0, 0]
    random.Random(0).shuffle(order)
    alone = scorer_of(name, aligned["llama"], token_budget=1).score([CONVERSATIONS[k] for k in order])
    assert np.abs(alone.risk - together.risk[order]).max() <= 1e-5
    assert len(set(together.risk.round(4))) == len(CONVERSATIONS)


@pytest.mark.parametrize("name", SCORERS)
def test_rows_without_a_score_have_the_statuses_that_sqsd_gives(tiny_pack: Path, name: str) -> None:
    rows = [chat("no answer?", "  "), *CONVERSATIONS[:2], chat("x " * 400, "too long"), []]
    found = scorer_of(name, tiny_pack).score(rows)
    assert found.status == ["no_answer", "scored", "scored", "prompt_too_long", "no_answer"]
    assert np.isfinite(found.risk).tolist() == [False, True, True, False, False]


@pytest.mark.parametrize("name", SCORERS)
def test_scores_depend_on_no_number_of_threads_and_survive_a_pickle(tiny_pack: Path, name: str) -> None:
    scorer = scorer_of(name, tiny_pack, token_budget=64)
    first = scorer.score(CONVERSATIONS)
    moved = pickle.loads(pickle.dumps(scorer))
    if name not in ("random", "length"):
        moved.model.workers = 3
    again = moved.score(CONVERSATIONS)
    assert np.array_equal(first.risk, again.risk)
    assert list(first.probes) == list(again.probes) == scorer.values


@pytest.mark.parametrize("name", ["loss", "self-inf-n", "bi-anchor", "larf", "datashield", "unnormalised"])
def test_bfloat16_ranks_rows_about_as_float32_does(aligned: dict[str, Path], name: str) -> None:
    full, half = (scorer_of(name, aligned["llama"], dtype=d).score(CONVERSATIONS).risk for d in ("float32", "bfloat16"))
    assert np.corrcoef(full, half)[0, 1] > 0.97


def test_a_row_that_is_not_finite_keeps_that_to_itself(tmp_path: Path) -> None:
    for name in ("loss", "self-inf-n", "bi-anchor", "larf", "datashield", "unnormalised"):
        scorer = scorer_of(name, make_pack(tmp_path / name), token_budget=10_000)
        expected = scorer.score(CONVERSATIONS).risk
        token = scorer.encoder.tokenizer("%", add_special_tokens=False)["input_ids"][0]
        loaded = scorer.model
        assert isinstance(loaded, HiddenStateModel | LossModel | GradientModel | SQSDModel)
        model = loaded.model if isinstance(loaded, HiddenStateModel) else loaded.gradient.model
        with torch.no_grad():
            embedding_of(model)[token] = float("nan")
        found = scorer.score([*CONVERSATIONS, chat("x", "zebra %")])
        assert found.status == ["scored"] * len(CONVERSATIONS) + ["nonfinite"]
        assert np.abs(found.risk[:-1] - expected).max() <= 1e-5


def test_a_step_of_map_gives_the_columns_of_the_scorer(tiny_pack: Path) -> None:
    rows = Dataset.from_list([{"messages": turns} for turns in CONVERSATIONS])
    scorer = scorer_of("larf", tiny_pack)
    found = rows.map(scorer, batched=True)
    assert found.column_names == ["messages", "sqsd_risk", "sqsd_unsafe", "sqsd_safe", "sqsd_status"]
    assert np.array_equal(found["sqsd_risk"][:], scorer.score(CONVERSATIONS).risk)
    assert list(scorer.features) == found.column_names[1:]


# ---------------------------------------------------------------------------------------------- settings, anchors


def test_settings_tell_scorers_and_anchors_apart(tiny_pack: Path) -> None:
    scorers = [scorer_of(name, tiny_pack) for name in SCORERS]
    scorers += [scorer_of("random", tiny_pack, seed=7)]
    for name in ANCHORED:
        swapped = {"unsafe_anchors": SAFE, "safe_anchors": UNSAFE}
        scorers += [scorer_of(name, tiny_pack, **swapped), scorer_of(name, tiny_pack, unsafe_anchors=UNSAFE[1:])]
    assert len({str(scorer.settings()) for scorer in scorers}) == len(scorers)
    assert len({str(scorer.content()) for scorer in scorers}) == len(scorers)
    assert SQSDScorer(tiny_pack).settings().keys().isdisjoint({"scorer", "seed", "unsafe_anchors"})


@pytest.mark.parametrize("name", ANCHORED)
def test_a_scorer_without_its_anchors_says_which_it_lacks(tiny_pack: Path, name: str) -> None:
    both = r"--unsafe-anchors\) and safe_anchors \(--safe-anchors"
    for given, lacks in ((None, both), (UNSAFE, r"by safe_anchors \(--safe-anchors")):
        with pytest.raises(UsageError, match=lacks):
            make_scorer(name, tiny_pack, unsafe_anchors=given)
    with pytest.raises(UsageError, match="the same conversations"):
        make_scorer(name, tiny_pack, unsafe_anchors=SAFE, safe_anchors=SAFE)


@pytest.mark.parametrize(
    ("name", "settings", "problem"),
    [
        ("larff", {}, "no scorer 'larff': choose one of sqsd, danger"),
        ("loss", {"safe_anchors": SAFE}, "loss has no use for anchors"),
        ("length", {"seed": 0}, "length has no use for a seed"),
        ("loss", {"per_module": True}, "leave out --per-module"),
    ],
)
def test_what_a_scorer_has_no_use_for_is_a_usage_error(
    tiny_pack: Path, name: str, settings: dict[str, Any], problem: str
) -> None:
    with pytest.raises(UsageError, match=problem):
        make_scorer(name, tiny_pack, **settings)


@pytest.mark.parametrize(("name", "kind"), [("danger", "safety"), ("safety", "danger")])
def test_a_pack_without_such_a_probe_is_refused(tmp_path: Path, tiny_pack: Path, name: str, kind: str) -> None:
    probe = {"name": kind, "weight": {"danger": 1.0, "safety": -1.0}[kind], "direction": kind, "state": "initial"}
    pack = make_pack(tmp_path, tiny_pack / "base", probes=[probe])
    with pytest.raises(UsageError, match=f"has no probe of {name}"):
        make_scorer(name, pack)
    assert load_pack(pack).of_sign({"danger": 1, "safety": -1}[kind]).fingerprint == load_pack(pack).fingerprint


@pytest.mark.parametrize("name", ANCHORED)
def test_an_anchor_that_is_of_no_use_is_named(tmp_path: Path, tiny_pack: Path, name: str) -> None:
    scorer = scorer_of(name, tiny_pack, safe_anchors=[*SAFE, chat("What?", " ")])
    with pytest.raises(
        InputError, match=r"\(--safe-anchors\): conversation 3 can't be used \(no_answer\): leave it out"
    ):
        scorer.score(CONVERSATIONS)
    pack = make_pack(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(pack / "base")
    anchors = [*UNSAFE, chat("What?", "zebra %")]
    scorer = scorer_of(name, pack, unsafe_anchors=anchors)
    token = scorer.encoder.tokenizer("%", add_special_tokens=False)["input_ids"][0]
    with torch.no_grad():
        embedding_of(model)[token] = float("nan")
    model.save_pretrained(pack / "base")
    with pytest.raises(InputError, match=f"An anchor of the scorer {name} can't be used .*not finite"):
        scorer.score(CONVERSATIONS)
