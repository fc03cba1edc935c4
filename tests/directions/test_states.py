"""Which state is sensitive: the figures against textbook forms, and candidates of which the better one is known."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from sqsd_filter.cli.main import cli
from sqsd_filter.corpus.conversation import Message, RowError
from sqsd_filter.directions.states import (
    checkpoints,
    compare_states,
    fresh_state,
    reliability,
    sensitivity,
)
from sqsd_filter.errors import InputError, UsageError
from sqsd_filter.progress import Silent
from sqsd_filter.scoring.chat_encoder import Encoded
from sqsd_filter.scoring.loss_gradient import LossGradient
from sqsd_filter.scoring.pack import ADAPTER_FILES, Probe, load_pack
from sqsd_filter.scoring.reference import ReferenceScorer
from sqsd_filter.scoring.scorer import SQSDScorer
from sqsd_filter.statistics import auc, ranks, spearman
from tests.corpora import write_jsonl
from tests.tiny import chat, make_adapter, make_pack

# ---------------------------------------------------------------------------------------------- figures


def random(n: int, m: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, m))


def test_reliability_is_the_mean_over_all_ways_to_split_the_modules_into_halves() -> None:
    values_nm = random(20, 6) + random(20, 1, seed=1)
    halves = []
    for half in combinations(range(6), 3):
        a, b = values_nm[:, list(half)].sum(1), values_nm[:, [m for m in range(6) if m not in half]].sum(1)
        halves.append(4 * np.cov(a, b)[0, 1] / np.var(a + b, ddof=1))  # of the two together, as Rulon has it
    assert reliability(values_nm) == pytest.approx(np.mean(halves), abs=1e-12)
    assert reliability(values_nm) > 0.5


def test_without_an_effect_of_length_sensitivity_is_reliability() -> None:
    values_nm = random(20, 6) + random(20, 1, seed=1)
    assert sensitivity(values_nm, np.full(20, 7)) == pytest.approx(reliability(values_nm), abs=1e-12)


def test_what_only_follows_length_is_reliable_but_not_sensitive() -> None:
    tokens_n = np.array([3, 8, 8, 20, 100, 41])
    values_nm = np.outer(ranks(tokens_n), [1.0, 2.0, 0.5])
    assert reliability(values_nm) > 0.8
    assert sensitivity(values_nm, tokens_n) == pytest.approx(0, abs=1e-12)


def test_sensitivity_is_the_share_of_the_signal_in_the_variance() -> None:
    """Signal, length and each module's noise at right angles, so that the shares are known exactly."""
    n, m = 16, 4
    tokens_n = np.arange(n)
    basis = np.linalg.qr(np.column_stack([np.ones(n), tokens_n, random(n, m + 1)]))[0].T * math.sqrt(n)
    length, signal, *noise = basis[1:]
    values_nm = np.outer(signal, np.full(m, 0.5)) + np.outer(length, np.full(m, 0.75)) + 0.3 * np.array(noise).T
    variance = (0.5 * m) ** 2 + (0.75 * m) ** 2 + m * 0.3**2
    assert sensitivity(values_nm, tokens_n) == pytest.approx((0.5 * m) ** 2 / variance, abs=1e-9)


def test_noise_is_not_sensitive() -> None:
    found = [sensitivity(random(64, 30, seed), np.arange(64)) for seed in range(20)]
    assert abs(np.mean(found)) < 0.1
    assert max(found) < 0.6


@pytest.mark.parametrize("values_nm", [np.zeros((9, 3)), np.ones((9, 3)), random(9, 1)], ids=["zero", "equal", "one"])
def test_without_differences_or_modules_to_compare_nothing_is_sensitive(values_nm: np.ndarray) -> None:
    assert sensitivity(values_nm, np.arange(9)) == reliability(values_nm) == 0


# ---------------------------------------------------------------------------------------------- a known answer

WORDS = ["red", "green", "blue", "dog", "fox", "sea", "tree", "house", "moon", "stone", "bird", "road"]
ROWS = [chat(f"Name {k}.", " ".join(WORDS[(k + j) % 12] for j in range(2 + k % 3))) for k in range(12)]
ROWS += [chat(f"Name {k}.", " ".join(str(7 * k + j) for j in range(3 + k % 3))) for k in range(12)]
DIGITS = [k >= 12 for k in range(24)]


def answer_gradients(base: Path, state: Path, rows: list[Any], encoder: Any) -> dict[str, torch.Tensor]:
    """The gradient of lora_A in every module, summed over rows, by PEFT."""
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), state, is_trainable=True).eval()
    for row in encoder.encode(rows):
        ids, answer = torch.from_numpy(row.ids), torch.from_numpy(row.answer)
        logits = model(input_ids=ids[None]).logits[0]
        F.cross_entropy(logits[:-1][answer[1:]], ids[1:][answer[1:]]).backward()
    grads = {n.replace(".default", ""): p.grad for n, p in model.named_parameters() if ".lora_A." in n}
    return {name: grad for name, grad in grads.items() if grad is not None}


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pack whose danger direction is what answers of digits do to A at the second checkpoint, at right angles to A,
    beside a little that says nothing of rows. At the first checkpoint B is 0: there only the latter is seen."""
    folder = make_pack(tmp_path_factory.mktemp("known"), ranks=(4, 4, 4))
    run, base = folder / "run", folder / "base"
    state = make_adapter(base, run / "checkpoint-8", r=4, alpha=16, seed=11)
    fresh_state(state, run / "checkpoint-4")
    encoder = SQSDScorer(folder).encoder
    digits, words = (answer_gradients(base, state, rows, encoder) for rows in (ROWS[12:], ROWS[:12]))
    tensors = load_file(state / ADAPTER_FILES[1])
    danger = {}
    for name, A in ((n, t) for n, t in tensors.items() if ".lora_A." in n):
        signal = words[name] - digits[name]
        signal = signal - signal @ torch.linalg.pinv(A) @ A  # nothing of it along A's rows
        danger[name] = signal / signal.norm() + 0.02 * torch.randn(4, 4, generator=torch.manual_seed(len(name))) @ A
        other = name.replace("lora_A", "lora_B")
        danger[other] = tensors[other].clone()
    save_file({k: v.contiguous() for k, v in danger.items()}, folder / "danger" / ADAPTER_FILES[1])
    shutil.copyfile(state / ADAPTER_FILES[0], folder / "danger" / ADAPTER_FILES[0])
    shutil.copytree(state, folder / "initial", dirs_exist_ok=True)
    return folder


def only_danger(folder: Path) -> Any:
    pack = load_pack(folder)
    return replace(pack, probes=pack.probes[:1])


def by_state(found: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {entry["state"]: entry for entry in found["candidates"]}


def test_a_trained_state_wins_against_one_that_is_blind(known: Path) -> None:
    found = compare_states(only_danger(known), checkpoints(known / "run"), ROWS, DIGITS)
    table = by_state(found)
    assert list(table) == ["fresh", "checkpoint-4", "checkpoint-8"]
    assert found["chosen"] == "checkpoint-8"
    assert table["checkpoint-8"]["sensitivity"] > 0.5 > 0.3 > table["fresh"]["sensitivity"]
    assert table["checkpoint-8"]["auc"] > 0.95
    assert {**table["checkpoint-4"], "state": "fresh", "step": 0, "stability": None} == table["fresh"]
    assert table["checkpoint-4"]["stability"] == 1
    assert (found["rows"], found["positive"], found["left_out"]) == (24, 12, {})


def test_labels_and_the_order_of_candidates_do_not_decide(known: Path) -> None:
    pack, candidates = only_danger(known), checkpoints(known / "run")
    assert [c.step for c in candidates] == [4, 8]
    labelled, plain = compare_states(pack, candidates, ROWS, DIGITS), compare_states(pack, candidates, ROWS)
    assert plain["chosen"] == labelled["chosen"]
    assert plain["positive"] is None
    assert {entry["auc"] for entry in plain["candidates"]} == {None}
    swapped = [replace(candidates[1], step=3), candidates[0]]
    assert compare_states(pack, swapped, ROWS)["chosen"] == "checkpoint-8"


def test_of_equal_states_the_earlier_is_taken(known: Path, tmp_path: Path) -> None:
    for step in (30, 4):
        shutil.copytree(known / "run" / "checkpoint-8", tmp_path / f"checkpoint-{step}")
    found = compare_states(load_pack(known), checkpoints(tmp_path), ROWS)
    assert found["chosen"] == "checkpoint-4"
    assert by_state(found)["checkpoint-30"]["stability"] == 1


def test_a_fresh_state_is_not_chosen_even_where_it_is_the_best(known: Path, tmp_path: Path) -> None:
    class Listener(Silent):
        notes: ClassVar[list[str]] = []

        def note(self, message: str) -> None:
            self.notes.append(message)

    make_adapter(known / "base", tmp_path / "checkpoint-1", r=4, alpha=400, seed=5)
    found = compare_states(load_pack(known), checkpoints(tmp_path), ROWS, progress=Listener())
    table = by_state(found)
    assert table["fresh"]["sensitivity"] > table["checkpoint-1"]["sensitivity"]
    assert found["chosen"] == "checkpoint-1"
    assert table["checkpoint-1"]["sensitivity"] < 0
    assert "don't trust the choice" in Listener.notes[-1]


def test_a_state_that_sees_the_same_in_all_directions_is_not_sensitive(known: Path) -> None:
    (danger,) = only_danger(known).probes
    same = replace(load_pack(known), probes=(danger, replace(danger, name="safety", weight=-1.0)))
    entry = by_state(compare_states(same, checkpoints(known / "run"), ROWS))["checkpoint-8"]
    assert entry["sensitivity"] == 0
    assert entry["directions"] == 1
    assert entry["probes"]["danger"]["sensitivity"] == entry["probes"]["safety"]["sensitivity"] > 0.5


def test_the_figures_are_those_of_the_dense_form(known: Path) -> None:
    """Projections and risk at a candidate, by the textbook scorer of a pack whose probes are all there."""
    pack, tokens = (
        load_pack(known),
        [int(e.answer.sum()) for e in SQSDScorer(known).encoder.encode(ROWS) if isinstance(e, Encoded)],
    )
    entry = by_state(compare_states(pack, checkpoints(known / "run"), ROWS, DIGITS))["checkpoint-8"]
    dense = ReferenceScorer(pack.at_one_state("initial")).score(ROWS)  # the same adapter
    marks = np.array(DIGITS)
    for found, score in (
        (entry, dense.risk),
        (entry["probes"]["danger"], dense.probes["danger"]),
        (entry["probes"]["safety"], -dense.probes["safety"]),  # as it enters the risk
    ):
        assert found["auc"] == pytest.approx(auc(score[marks], score[~marks]), abs=1e-4)
        assert found["length"] == pytest.approx(spearman(score, np.array(tokens)), abs=1e-2)  # ranks may swap
    assert entry["directions"] == pytest.approx(spearman(dense.probes["danger"], dense.probes["safety"]), abs=1e-2)


def test_every_row_makes_one_pass_a_candidate(known: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    real = LossGradient.backward

    def counted(self: LossGradient, ids_bt: torch.Tensor, targets_bt: torch.Tensor) -> None:
        seen.append(len(ids_bt))
        real(self, ids_bt, targets_bt)

    monkeypatch.setattr(LossGradient, "backward", counted)
    compare_states(load_pack(known), checkpoints(known / "run"), ROWS)
    assert sum(seen) == 3 * (len(ROWS) + 1)  # a row more: the engine tries itself


def test_a_base_adapter_lies_under_the_candidates(known: Path) -> None:
    plain = load_pack(known)
    make_adapter(known / "base", known / "below" / "aligned", r=3, alpha=9, seed=4)
    aligned = replace(plain, base_adapter="below/aligned")
    found = [by_state(compare_states(p, checkpoints(known / "run"), ROWS)) for p in (plain, aligned)]
    assert found[0]["checkpoint-8"]["reliability"] != found[1]["checkpoint-8"]["reliability"]
    dense = ReferenceScorer(aligned.at_one_state("initial")).score(ROWS)
    agreed = spearman(dense.probes["danger"], dense.probes["safety"])
    assert found[1]["checkpoint-8"]["directions"] == pytest.approx(agreed, abs=1e-2)


def test_the_same_rows_give_the_same_record(known: Path) -> None:
    once, again = (compare_states(load_pack(known), checkpoints(known / "run"), ROWS, DIGITS) for _ in range(2))
    assert json.dumps(once) == json.dumps(again)


def test_the_probes_of_a_pack_may_have_any_number_and_weight(known: Path) -> None:
    pack = load_pack(known)
    double = replace(pack, probes=(*pack.probes, Probe("other", 0.5, "danger", "initial")))
    entry = by_state(compare_states(double, checkpoints(known / "run"), ROWS))["checkpoint-8"]
    assert list(entry["probes"]) == ["danger", "safety", "other"]
    assert entry["probes"]["other"] == entry["probes"]["danger"]
    one_sided = by_state(compare_states(only_danger(known), checkpoints(known / "run"), ROWS))
    assert one_sided["checkpoint-8"]["directions"] is None


def test_answers_can_be_cut_to_one_length(known: Path) -> None:
    found = compare_states(load_pack(known), checkpoints(known / "run"), ROWS, answer_tokens=8)
    assert found["rows"] + found["left_out"]["too_short"] == len(ROWS)
    assert 8 <= found["rows"] < len(ROWS)
    for entry in found["candidates"]:
        assert entry["length"] is None
        assert entry["sensitivity"] == entry["reliability"]


# ---------------------------------------------------------------------------------------------- what can go wrong


@pytest.mark.parametrize("there", ["", "checkpoint-4/trainer_state.json", "checkpoint-x/adapter_config.json"])
def test_a_folder_without_checkpoints_says_so(tmp_path: Path, there: str) -> None:
    if there:
        (tmp_path / there).parent.mkdir()
        (tmp_path / there).touch()
    for run in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(InputError, match=r"no folder checkpoint-<step> with a LoRA adapter.*keep_checkpoints"):
            checkpoints(run)


def test_too_few_rows_say_why_the_others_are_missing(known: Path) -> None:
    rows: list[Sequence[Message] | RowError] = [*ROWS[:7], chat("?", ""), RowError("bad_json", "")]
    with pytest.raises(InputError, match=r"Only 7 of 9 rows can be measured \(1 bad_json, 1 no_answer\)"):
        compare_states(load_pack(known), checkpoints(known / "run"), rows)
    with pytest.raises(InputError, match=r"Only 0 of 24 rows can be measured \(24 too_short\)"):
        compare_states(load_pack(known), checkpoints(known / "run"), ROWS, answer_tokens=1000)


def test_rows_whose_gradient_is_not_finite_are_left_out(known: Path, tmp_path: Path) -> None:
    state = shutil.copytree(known / "run" / "checkpoint-8", tmp_path / "checkpoint-1") / ADAPTER_FILES[1]
    save_file({k: v * math.inf for k, v in load_file(state).items()}, state)
    with pytest.raises(InputError, match=r"Only 0 of 24 rows can be measured \(24 nonfinite\)"):
        compare_states(load_pack(known), checkpoints(tmp_path), ROWS)


@pytest.mark.parametrize(("marks", "which"), [([True] * 24, "All"), ([False] * 24, "None")], ids=["all", "none"])
def test_labels_of_one_kind_are_refused(known: Path, marks: list[bool], which: str) -> None:
    with pytest.raises(InputError, match=f"{which} of the 24 rows are positive"):
        compare_states(load_pack(known), checkpoints(known / "run"), ROWS, marks)


# ---------------------------------------------------------------------------------------------- the command


@pytest.fixture
def command(known: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    kinds = [{"messages": row, "kind": ("words", "digits")[k]} for row, k in zip(ROWS, DIGITS, strict=True)]
    rows = write_jsonl(tmp_path / "rows.jsonl", [*kinds[:12], b"broken", *kinds[12:]])

    def run(*more: str) -> str:
        arguments = ["pack", "states", str(known), "--run", str(known / "run"), "--rows", str(rows), *more]
        cli.main(args=arguments, standalone_mode=False)
        return capsys.readouterr().out

    return run


def test_the_command_prints_the_record(command: Callable[..., str], known: Path) -> None:
    found = json.loads(command("--json", "--positive", "kind=digits"))
    same = compare_states(load_pack(known), checkpoints(known / "run"), ROWS, DIGITS)
    assert found == {**same, "left_out": {"bad_json": 1}}


def test_the_command_prints_a_table(command: Callable[..., str]) -> None:
    lines = command("--answer-tokens", "3", "--dtype", "float32").splitlines()
    assert lines[0].split() == ["sensitivity", "reliability", "stability", "directions"]  # no labels, all of one length
    assert [line[:15].rstrip() for line in lines[1:4]] == ["  fresh", "  checkpoint-4", "* checkpoint-8"]
    assert lines[1].split()[3] == "-"  # nothing came before
    assert lines[4:] == ["24 rows; left out: 1 bad_json; chosen: checkpoint-8"]


def test_the_command_takes_rows_from_all_over_the_source(command: Callable[..., str]) -> None:
    found = json.loads(command("--json", "--sample", "9", "--positive", "kind=digits"))
    assert 8 <= found["rows"] <= 9
    assert 3 <= found["positive"] <= 6


@pytest.mark.parametrize("positive", ["kind", "sort=digits"])
def test_a_label_that_is_not_there_is_a_usage_error(command: Callable[..., str], positive: str) -> None:
    with pytest.raises(UsageError, match="--positive"):
        command("--positive", positive)
