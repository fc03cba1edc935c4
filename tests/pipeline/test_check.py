"""`check`: sound scores pass, real faults are found and the flag that is named fixes them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from transformers import AttentionInterface, AutoModelForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from sqsd_filter.cli.main import main
from sqsd_filter.errors import InputError, UsageError
from sqsd_filter.pipeline.check import ROWS, CheckReport, Comparison, check_pack
from sqsd_filter.pipeline.comparison import FEWEST, compare
from sqsd_filter.pipeline.selecting.selection import Cut
from sqsd_filter.scoring.chat_encoder import Encoded
from sqsd_filter.scoring.pack import load_pack
from sqsd_filter.scoring.reference import ReferenceScorer
from sqsd_filter.scoring.results import Scores
from sqsd_filter.scoring.scorer import SQSDScorer
from tests.corpora import make_rows, write_jsonl
from tests.tiny import make_pack

NAMES = [
    "batched against alone",
    "bfloat16 against float32",
    "sdpa against eager attention",
    "fast against dense",
]


def kernel(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> str:
    """A faulty attention kernel under this name: sdpa's output (b, t, heads, d), changed."""

    def forward(*arguments: Any, **named: Any) -> tuple[torch.Tensor, None]:
        output, _ = sdpa_attention_forward(*arguments, **named)
        return change(output), None

    AttentionInterface.register(name, forward)
    return name


def by_name(report: CheckReport) -> dict[str, Comparison]:
    return {comparison["name"]: comparison for comparison in report["comparisons"]}


def test_the_rows_that_come_along_are_two_dozen_of_many_lengths(tiny_pack: Path) -> None:
    rows = [json.loads(line)["messages"] for line in ROWS.read_text(encoding="utf-8").splitlines()]
    encoded = SQSDScorer(tiny_pack, max_length=10_000).encoder.encode(rows)
    lengths = [len(row) for row in encoded if isinstance(row, Encoded)]
    assert len(rows) == 24
    assert max(lengths) > 10 * min(lengths)


def test_a_sound_pack_can_be_trusted(tiny_pack: Path) -> None:
    found = check_pack(tiny_pack)
    assert found["trusted"]
    assert [one["name"] for one in found["comparisons"]] == NAMES
    assert (found["rows"], found["unscored"], found["unreadable"], found["skipped"]) == (24, 0, 0, [])
    assert (found["dtype"], found["device"], found["attention"]) == ("float32", "cpu", "sdpa")
    for name, one in by_name(found).items():
        assert one["ok"]
        assert set(one["difference"]) == {"risk", "danger", "safety"}
        assert one["used"] is (name != "bfloat16 against float32")
        assert 0 < one["difference"]["risk"] < (1e-5 if one["used"] else 1)
        assert one["rank"] == (None if name == "fast against dense" else pytest.approx(1, abs=0.01))


def test_a_kernel_that_mixes_the_rows_of_a_batch_is_found_and_fixed(tiny_pack: Path) -> None:
    mixing = kernel("mixing", lambda output: output + 0.1 * (output.mean(0) - output[0]))
    found = check_pack(tiny_pack, scorer=SQSDScorer(tiny_pack, attention=mixing), limit=8)
    bad = by_name(found)["batched against alone"]
    assert not found["trusted"]
    assert not bad["ok"]
    assert bad["used"]
    assert bad["fix"] == "--token-budget 1"
    assert bad["difference"]["risk"] > 1e-3
    assert "more than 0.0001" in bad["why"]
    fixed = check_pack(tiny_pack, scorer=SQSDScorer(tiny_pack, attention=mixing, token_budget=1), limit=8)
    assert fixed["trusted"]
    assert [gap["name"] for gap in fixed["skipped"]] == ["batched against alone"]


def test_a_kernel_that_is_wrong_is_found_and_fixed(tiny_pack: Path) -> None:
    wrong = kernel("wrong", lambda output: output * 1.01)
    found = check_pack(tiny_pack, scorer=SQSDScorer(tiny_pack, attention=wrong), limit=8)
    checks = by_name(found)
    bad = checks["wrong against eager attention"]
    assert not found["trusted"]
    assert not bad["ok"]
    assert bad["used"]
    assert bad["fix"] == "--attention eager"
    assert not checks["fast against dense"]["ok"]
    assert checks["batched against alone"]["ok"]
    assert checks["sdpa against eager attention"]["ok"]
    assert not checks["sdpa against eager attention"]["used"]
    assert check_pack(tiny_pack, scorer=SQSDScorer(tiny_pack, attention="eager"), limit=8)["trusted"]


def test_values_too_near_for_bfloat16_are_found_and_fixed(tiny_pack: Path, tmp_path: Path) -> None:
    same = {"direction": "danger", "state": "initial"}  # a risk that is the difference of nearly equal values
    probes = [{"name": "danger", "weight": 1, **same, "state_scaling": 2.0}]
    probes += [{"name": "safety", "weight": -1, **same, "state_scaling": 2.002}]
    pack = make_pack(tmp_path, tiny_pack / "base", probes=probes)
    found = check_pack(pack, scorer=SQSDScorer(pack, dtype="bfloat16"), limit=8)
    bad = by_name(found)["bfloat16 against float32"]
    assert not found["trusted"]
    assert not bad["ok"]
    assert bad["used"]
    assert bad["fix"] == "--dtype float32"
    assert bad["rank"] is not None
    assert bad["rank"] < 0.99
    assert f"{bad['rank']:.4f}" in bad["why"]
    fixed = check_pack(pack, scorer=SQSDScorer(pack, dtype="float32"), limit=8)
    assert fixed["trusted"]
    assert not by_name(fixed)["bfloat16 against float32"]["ok"]


def narrow(module: Any, query: torch.Tensor, *arguments: Any, **named: Any) -> tuple[torch.Tensor, None]:
    """An attention kernel that has no room for float32."""
    if query.dtype == torch.float32:
        raise torch.OutOfMemoryError("out of memory")
    return sdpa_attention_forward(module, query, *arguments, **named)


def test_a_kernel_for_halves_only_is_held_against_the_eager_one_in_float32(tiny_pack: Path) -> None:
    AttentionInterface.register("narrow", narrow)
    found = check_pack(tiny_pack, scorer=SQSDScorer(tiny_pack, dtype="bfloat16", attention="narrow"), limit=8)
    assert found["trusted"]
    assert found["skipped"] == []
    assert by_name(found)["bfloat16 against float32"]["used"]


def test_without_the_comparison_that_decides_nothing_can_be_trusted(
    tiny_pack: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(AttentionInterface._global_mapping, "sdpa", narrow)  # noqa: SLF001  (it has no public name)
    how = ("--limit", "8", "--dtype", "bfloat16")
    code, out = run(capfd, str(tiny_pack), *how, "--json", "-q")
    found = json.loads(out)
    assert (code, found["trusted"], found["missing"]) == (1, False, ["bfloat16 against float32"])
    assert found["comparisons"]
    assert all(one["ok"] for one in found["comparisons"])
    assert {"float32", "the dense form"} <= {gap["name"] for gap in found["skipped"]}
    code, out = run(capfd, str(tiny_pack), *how)
    assert out.endswith("cannot be trusted: there is no comparison bfloat16 against float32.\n")


def test_the_dense_form_is_left_out_where_it_does_not_fit_into_memory(
    tiny_pack: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = ReferenceScorer(tiny_pack, dtype="float64")
    dense.load()
    (row,) = dense.encoder.encode([[{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]])
    assert isinstance(row, Encoded)
    updates = [dense.update(row, *at).values() for at in {probe.at for probe in dense.pack.probes}]
    matrices = [
        *chain.from_iterable(updates),
        *chain.from_iterable(each.values() for each in dense.directions.values()),
    ]
    need = dense.dense_bytes
    assert need == sum(matrix.nbytes for matrix in matrices)
    model = AutoModelForCausalLM.from_pretrained(dense.base_model, dtype=torch.float64)
    need += sum(parameter.nbytes for parameter in model.parameters())
    for free in (need, need - 1):
        monkeypatch.setattr(psutil, "virtual_memory", lambda free=free: SimpleNamespace(available=free))
        found = check_pack(tiny_pack, limit=8)
        assert found["trusted"]
        assert ("fast against dense" in by_name(found)) is (free == need)
        assert [gap["name"] for gap in found["skipped"]] == ["the dense form"] * (free < need)


def test_rows_of_ones_own_are_read_as_a_run_reads_them(tiny_pack: Path, tmp_path: Path) -> None:
    rows = [
        *make_rows(10),
        {"id": 10, "instruction": 5, "output": "x"},
        {"id": 11, "instruction": "too long " * 99, "output": "x"},
    ]
    source = write_jsonl(tmp_path / "in.jsonl", [*rows, *make_rows(20)])
    found = check_pack(tiny_pack, source, limit=12)
    assert (found["rows"], found["unscored"], found["unreadable"]) == (10, 1, 1)
    with pytest.raises(InputError, match=f"Only 7 rows .* at least {FEWEST}"):
        check_pack(tiny_pack, source, limit=7)


def test_a_cut_that_makes_no_sense_is_refused_before_any_work(tiny_pack: Path) -> None:
    with pytest.raises(UsageError, match="5%"):
        check_pack(tiny_pack, "no/such.jsonl", drop_top="5")


def scores(risk: list[float]) -> Scores:
    values = np.array(risk)
    return Scores({"danger": values}, values, ["scored"] * len(values), [""] * len(values), np.ones(len(values)))


def test_rows_change_sides_as_the_cut_drops_them() -> None:
    a, b = scores([*range(20)]), scores([*range(18), 18.5, 18.4])
    found = compare(a, b, Cut.of(drop_count=1), exact=False)
    assert (found["sides"], found["ok"]) == (2, True)  # one may change places
    assert compare(a, b, Cut.of(drop_count=2), exact=False)["sides"] == 0
    assert not compare(a, b, Cut.of(drop_count=1), exact=True)["ok"]
    b = scores([*range(10), 18, 19, *range(12, 18), 10.5, 11.5])
    found = compare(a, b, Cut.of(drop_count=2), exact=False)
    assert (found["sides"], found["ok"]) == (4, False)


def test_a_row_that_has_a_score_one_way_only_is_not_passed_over() -> None:
    a, b = scores([*range(9), math.nan]), scores([math.nan, *range(1, 9), math.nan])
    found = compare(a, b, Cut.of(drop_top="10%"), exact=True)
    assert (found["rows"], found["ok"], found["why"]) == (8, False, "1 of 10 rows have a score in one way only")


def run(capfd: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    capfd.readouterr()
    with pytest.raises(SystemExit) as left:
        main(["check", *arguments])
    return int(left.value.code or 0), capfd.readouterr().out


def test_the_command_checks_the_form_that_is_asked_for(tiny_pack: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code, out = run(capfd, str(tiny_pack), "--limit", "8", "--shared-state", "initial")
    fingerprint = load_pack(tiny_pack).at_one_state("initial").fingerprint
    assert code == 0
    assert out.startswith(f"tiny ({fingerprint}) on ")
    assert out.splitlines()[0].endswith("attention, shared state: initial")


def test_the_command_prints_a_table_and_leaves_with_its_verdict(
    tiny_pack: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    code, out = run(capfd, str(tiny_pack), "--limit", "8", "-q", "--json")
    found = json.loads(out)
    assert (code, found["trusted"], found["rows"]) == (0, True, 8)
    tilting = kernel("tilting", lambda output: output * 1.02)
    code, out = run(capfd, str(tiny_pack), "--limit", "8", "--attention", tilting)
    assert code == 1
    for name in (*NAMES, "tilting against eager attention"):
        assert f"  {name} " in out
    assert "Use --attention eager." in out
    assert out.endswith("Scores by these options cannot be trusted.\n")
