"""Explanations: their parts sum to the score, their tokens are the answer's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from sqsd_filter.scoring.explain import RiskPart, explain
from sqsd_filter.scoring.reference import ReferenceScorer, cosine
from sqsd_filter.scoring.scorer import SQSDScorer
from tests.tiny import CONVERSATIONS, chat, encoded, make_adapter, make_pack

TWO = [chat("2+2?", "4 é 👩", "and 3+3?", "It is 6, of course.", system="Be brief.")]


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "phi3"])
def test_every_way_to_take_the_risk_apart_sums_to_it(packs: dict[str, Path], architecture: str) -> None:
    scorer = SQSDScorer(packs[architecture])
    for turns in [*CONVERSATIONS, *TWO]:
        scores, explained = scorer.score([turns]), explain(scorer, turns)
        assert explained["total"]["risk"] == pytest.approx(scores.risk[0], abs=1e-5)
        assert explained["total"]["probes"] == pytest.approx(
            {"danger": scores.probes["danger"][0], "safety": -scores.probes["safety"][0]}, abs=1e-5
        )
        ways: list[Sequence[RiskPart]] = [
            explained["layers"],
            explained["module_types"],
            [explained["prompt"], explained["answer"]],
            [explained["prompt"], *explained["tokens"]],
        ]
        for parts in ways:
            assert sum(part["risk"] for part in parts) == pytest.approx(scores.risk[0], abs=1e-5)
            for name, value in explained["total"]["probes"].items():
                assert sum(part["probes"][name] for part in parts) == pytest.approx(value, abs=1e-5)


def test_positions_and_modules_sum_to_the_same_in_float64(packs: dict[str, Path]) -> None:
    scorer = SQSDScorer(packs["gpt2"], dtype="float64")
    rows = encoded(scorer, CONVERSATIONS)
    for row, value in zip(rows, scorer.model.project(rows), strict=True):
        for k, (cosines_m, parts_t) in enumerate(scorer.model.parts(row)):
            assert cosines_m.sum() == pytest.approx(value[k], abs=1e-10)
            assert parts_t.sum() == pytest.approx(value[k], abs=1e-10)
            assert np.abs(parts_t).max() > 1e-3


def test_modules_carry_what_the_dense_form_says(tmp_path: Path, tiny_pack: Path) -> None:
    pack = make_pack(tmp_path, tiny_pack / "base")
    make_adapter(tiny_pack / "base", tmp_path / "danger", target_modules=["k_proj", "up_proj"], seed=9)
    scorer, dense = SQSDScorer(pack), ReferenceScorer(pack)
    dense.load()
    (row,) = encoded(scorer, [CONVERSATIONS[1]])
    for k, probe in enumerate(scorer.pack.probes):
        update = dense.update(row, *probe.at)
        V = dense.directions[probe.direction]
        expected = [cosine(update[name], V[name]) for name in scorer.model.probe_modules[probe.name]]
        assert len(expected) == {"danger": 4, "safety": 14}[probe.name]
        assert scorer.model.parts(row)[k][0] == pytest.approx(expected, abs=1e-5)


def test_the_tokens_are_those_of_the_answers_word_for_word(tiny_pack: Path) -> None:
    explained = explain(SQSDScorer(tiny_pack), TWO[0])
    text = "".join(token["text"] for token in explained["tokens"])
    assert text == "4 é 👩<|im_end|>It is 6, of course.<|im_end|>"
    assert any(token["text"] == "" for token in explained["tokens"])  # the bytes of one character are several tokens


def test_a_truncated_row_has_the_tokens_that_are_left(tiny_pack: Path) -> None:
    scorer = SQSDScorer(tiny_pack, max_length=64)
    turns = chat("Count.", " ".join(str(k) for k in range(200)))
    explained = explain(scorer, turns)
    (row,) = encoded(scorer, [turns])
    assert len(explained["tokens"]) == row.answer.sum()
    assert turns[1]["content"].startswith("".join(token["text"] for token in explained["tokens"]))
    assert explained["prompt"]["risk"] + explained["answer"]["risk"] == pytest.approx(
        scorer.score([turns]).risk[0], abs=1e-5
    )


def test_layers_and_types_are_read_from_the_names_of_modules(packs: dict[str, Path]) -> None:
    explained = explain(SQSDScorer(packs["gpt2"]), CONVERSATIONS[0])
    assert {part["layer"] for part in explained["layers"]} == {0, 1}
    assert len(explained["layers"]) == 2
    assert {part["type"] for part in explained["module_types"]} == {
        "attn.c_attn",
        "attn.c_proj",
        "mlp.c_fc",
        "mlp.c_proj",
    }
    risks = [part["risk"] for part in explained["modules"]]
    assert risks == sorted(risks, reverse=True)
    assert len(risks) == 8
