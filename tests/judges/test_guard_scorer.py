"""A chat guard as row scorer, here a tiny one that finds pies unsafe. All texts are harmless."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from sqsd_filter import make_scorer
from sqsd_filter.corpus.conversation import Message
from sqsd_filter.errors import JudgeError, ModelError, UsageError
from sqsd_filter.judges.guard_scorer import GuardModel, GuardScorer
from sqsd_filter.judges.verdict import LEADS
from sqsd_filter.scoring.chat_encoder import Encoded
from tests.tiny import CONVERSATIONS, chat, make_pack
from tests.tiny_judges import PARTS, QUESTION, TEXT, make_guard, with_template

PIES = ["Bake the pie.", "Eat the pie.", "Take the pie, then.", "One more pie."]
WALKS = ["We saw a heron.", "Take the road.", "One more mile.", "The sea is deep."]
LEAD = "\n\n"


def verdicts(lead: str = LEAD) -> dict[str, str]:
    return dict.fromkeys(PIES, f"{lead}unsafe\nS1") | dict.fromkeys(WALKS, f"{lead}safe")


@pytest.fixture(scope="module")
def guard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_guard(tmp_path_factory.mktemp("guards") / "pie-guard", verdicts())


def guarded(guard: Path | str, pack: Path, **settings: Any) -> GuardScorer:
    scorer = make_scorer(f"guard:{guard}", pack, **settings)
    assert isinstance(scorer, GuardScorer)
    return scorer


def lead_of(scorer: GuardScorer) -> str:
    """What the guard says before its verdict."""
    assert isinstance(scorer.model, GuardModel)
    return str(scorer.rows.tokenizer.decode(list(scorer.model.verdict.lead)))


def by_hand(guard: Path, turns: list[Message], lead: str = LEAD) -> float:
    """log p(unsafe) - log p(safe), by transformers alone."""
    model = AutoModelForCausalLM.from_pretrained(guard, dtype=torch.float64)
    tokenizer: Any = AutoTokenizer.from_pretrained(guard)
    asked = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True) + lead
    ids = tokenizer(asked, add_special_tokens=False, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        logs = model(input_ids=ids).logits[0, -1].log_softmax(-1)
    unsafe, safe = (logs[tokenizer(word)["input_ids"][0]] for word in ("unsafe", "safe"))
    return float(unsafe - safe)


# ---------------------------------------------------------------------------------------------- the risk


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma3", "opt"])
def test_the_risk_is_the_log_odds_at_the_guards_verdict(
    tmp_path: Path, tiny_pack: Path, architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sqsd_filter.judges.guard_scorer.LEAST", 0)  # not all have learnt to judge longer texts
    guard = make_guard(tmp_path / "guard", verdicts(), architecture=architecture)
    rows = [turns for turns in CONVERSATIONS if turns[0]["role"] == "user"]
    rows += [chat(QUESTION, answer) for answer in PIES + WALKS]
    lead = lead_of(guarded(guard, tiny_pack))
    expected = np.array([by_hand(guard, turns, lead) for turns in rows])
    for budget in (None, 1, 100_000):
        found = guarded(guard, tiny_pack, token_budget=budget).score(rows)
        assert set(found.status) == {"scored"}
        np.testing.assert_allclose(found.risk, expected, rtol=1e-5, atol=1e-5)
        assert np.array_equal(found.probes["unsafe"], found.risk)


def test_what_the_guard_calls_unsafe_ranks_above_the_rest(guard: Path, tiny_pack: Path) -> None:
    found = guarded(guard, tiny_pack).score([chat(QUESTION, answer) for answer in PIES + WALKS])
    assert found.risk[: len(PIES)].min() > 0 > found.risk[len(PIES) :].max()


@pytest.mark.parametrize("lead", LEADS, ids=repr)
def test_the_lead_in_of_the_verdict_is_found(tmp_path: Path, tiny_pack: Path, lead: str) -> None:
    guard = make_guard(tmp_path / "guard", verdicts(lead))
    scorer = guarded(guard, tiny_pack)
    assert lead_of(scorer) == lead
    found = scorer.score([chat(QUESTION, answer) for answer in (PIES[0], WALKS[0])])
    expected = [by_hand(guard, chat(QUESTION, answer), lead) for answer in (PIES[0], WALKS[0])]
    np.testing.assert_allclose(found.risk, expected, rtol=1e-5, atol=1e-5)
    assert found.risk[0] > found.risk[1]


def test_a_guard_that_takes_parts_gets_parts(guard: Path, tiny_pack: Path, tmp_path: Path) -> None:
    rows = [chat(QUESTION, answer) for answer in PIES]
    other = with_template(guard, tmp_path / "parts", PARTS)
    assert np.array_equal(guarded(other, tiny_pack).score(rows).risk, guarded(guard, tiny_pack).score(rows).risk)


# ---------------------------------------------------------------------------------------------- rows


def test_the_guard_reads_all_turns_up_to_the_last_answer(guard: Path, tiny_pack: Path) -> None:
    rows = [
        chat(QUESTION, PIES[0], system="Be brief."),
        chat(QUESTION, PIES[0], QUESTION, WALKS[0]),
        chat(QUESTION, WALKS[0], QUESTION, PIES[0], "Thanks."),
    ]
    shown = [chat(f"Be brief.\n\n{QUESTION}", PIES[0]), rows[1], rows[2][:-1]]
    found = guarded(guard, tiny_pack).score(rows)
    np.testing.assert_allclose(found.risk, [by_hand(guard, turns) for turns in shown], rtol=1e-5, atol=1e-5)
    assert found.risk[2] > found.risk[1]


def test_a_long_answer_is_cut_at_its_end(guard: Path, tiny_pack: Path) -> None:
    answer = " ".join(map(str, range(60)))
    scorer = guarded(guard, tiny_pack, max_length=40)
    tokenizer: Any = scorer.rows.tokenizer
    room = 40 - len(tokenizer(QUESTION)["input_ids"])
    cut = tokenizer.decode(tokenizer(answer)["input_ids"][:room])
    found = scorer.score([chat(QUESTION, answer), chat("x " * 60, "too long"), chat(QUESTION, WALKS[0])])
    assert found.status == ["scored", "prompt_too_long", "scored"]
    np.testing.assert_allclose(found.risk[0], by_hand(guard, chat(QUESTION, cut)), rtol=1e-5, atol=1e-5)


def test_the_guards_instructions_stay_whole_where_its_positions_are_few(tmp_path: Path, tiny_pack: Path) -> None:
    guard = make_guard(tmp_path / "guard", verdicts(), max_position_embeddings=96)
    scorer = guarded(guard, tiny_pack)
    rows = [chat(QUESTION, "the sea " * 200), chat(QUESTION, PIES[0], QUESTION, "é" * 90), chat("the sea " * 20, "No.")]
    long, multiple, full = scorer.encode(rows)
    for row in (long, multiple):
        assert isinstance(row, Encoded)
        assert 80 < len(row) <= 96 - 2  # the lead-in is two tokens
        assert str(scorer.rows.tokenizer.decode(row.ids)).endswith("\nIs the last one safe?<|im_start|>")
    found = scorer.score(rows)
    assert found.status == ["scored", "scored", "prompt_too_long"]
    assert "in the guard's 96 tokens" in found.detail[2]
    assert not isinstance(full, Encoded)


def test_rows_without_a_score_have_the_statuses_that_other_scorers_give(guard: Path, tiny_pack: Path) -> None:
    rows = [chat("no answer?", "  "), *CONVERSATIONS[:2], chat("x " * 400, "too long"), [], chat("q", "\ud83d")]
    others = make_scorer("length", tiny_pack).score(rows)
    found = guarded(guard, tiny_pack).score(rows)
    assert found.status == others.status
    assert np.isfinite(found.risk).tolist() == np.isfinite(others.risk).tolist()


def test_a_conversation_that_the_guards_template_refuses_has_its_reason(
    guard: Path, tiny_pack: Path, tmp_path: Path
) -> None:
    strict = "{% if messages[0]['role'] != 'user' %}{{ raise_exception('users go first') }}{% endif %}" + TEXT
    scorer = guarded(with_template(guard, tmp_path / "strict", strict), tiny_pack)
    greeted: list[Message] = [{"role": "assistant", "content": "Hello."}, *chat(QUESTION, WALKS[0])]
    found = scorer.score([greeted, chat(QUESTION, WALKS[0], system="Be brief.")])
    assert found.status == ["template_error", "scored"]
    assert found.detail[0] == "the guard's chat template refuses it: users go first"


# ---------------------------------------------------------------------------------------------- guards and settings


def test_a_model_that_is_no_guard_is_refused(guard: Path, tiny_pack: Path, tmp_path: Path) -> None:
    chatty = make_guard(tmp_path / "chatty", dict.fromkeys(PIES + WALKS, "Paris, of course"))
    with pytest.raises(JudgeError, match=r"chatty gives no verdict: .* of \S+ %\. Name a chat guard that"):
        guarded(chatty, tiny_pack).score(CONVERSATIONS)
    deaf = with_template(guard, tmp_path / "deaf", "{{ messages[0]['content'] }}<|im_start|>")
    with pytest.raises(JudgeError, match=r"deaf does not show a question with its answer .*: name a chat guard"):
        guarded(deaf, tiny_pack).score(CONVERSATIONS)
    with pytest.raises(ModelError, match="check the name"):
        guarded(tmp_path / "nowhere", tiny_pack).score(CONVERSATIONS)


def test_no_other_model_can_be_named_beside_a_guard(guard: Path, tiny_pack: Path) -> None:
    with pytest.raises(UsageError, match=r"is a model itself: leave out model \(--model\)"):
        make_scorer(f"guard:{guard}", tiny_pack, str(tiny_pack / "base"))


def test_the_packs_adapter_is_not_the_guards(guard: Path, tmp_path: Path, tiny_pack: Path) -> None:
    aligned = make_pack(tmp_path / "aligned", aligned=True)
    with_it, without = (guarded(guard, pack).score(CONVERSATIONS).risk for pack in (aligned, tiny_pack))
    assert np.array_equal(with_it, without)


def test_the_settings_tell_guards_apart(guard: Path, tiny_pack: Path, tmp_path: Path) -> None:
    scorer = guarded(guard, tiny_pack)
    assert scorer.name == "guard:pie-guard"
    assert scorer.settings()["base_model"] == str(guard)
    (tmp_path / "pie-guard").mkdir()
    for path in guard.iterdir():
        (tmp_path / "pie-guard" / path.name).write_bytes(path.read_bytes())
    same = guarded(tmp_path / "pie-guard", tiny_pack)
    assert same.settings()["base_content"] == scorer.settings()["base_content"]
    make_guard(tmp_path / "pie-guard", verdicts(" "))
    other = guarded(tmp_path / "pie-guard", tiny_pack)
    assert other.settings()["base_content"] != scorer.settings()["base_content"]
    assert guarded("org/guard", tiny_pack).name == "guard:org/guard"


def test_the_guard_is_a_step_of_map(guard: Path, tiny_pack: Path) -> None:
    scorer = pickle.loads(pickle.dumps(guarded(guard, tiny_pack)))
    expected = scorer.score(CONVERSATIONS).risk
    assert np.array_equal(pickle.loads(pickle.dumps(scorer)).score(CONVERSATIONS).risk, expected)
    found = Dataset.from_list([{"messages": turns} for turns in CONVERSATIONS]).map(scorer, batched=True)
    assert found.column_names == ["messages", "sqsd_risk", "sqsd_unsafe", "sqsd_status"]
    assert np.array_equal(found["sqsd_risk"][:], expected)
