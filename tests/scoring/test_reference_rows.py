"""The reference that gives a risk its meaning: shares, quantiles and thresholds as numpy has them from all rows."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sqsd_filter.errors import PackError, UsageError
from sqsd_filter.scoring.pack import load_pack
from sqsd_filter.scoring.reference_rows import (
    HIGHEST,
    LEVELS,
    SPREAD,
    Pool,
    Reference,
    kept_ranks,
    settings_of,
    share_of,
    summarise_rows,
)
from sqsd_filter.scoring.scorer import SQSDScorer
from tests.references import make_reference

RISKS = st.lists(st.floats(-50, 50) | st.integers(-3, 3).map(float), min_size=1, max_size=60)


def pool(*corpora: Any) -> Pool:
    rows = [np.array(risks, np.float64) for risks in corpora]
    return Pool.of([summarise_rows(f"c{k}", "benign", "0", {"risk": risks}) for k, risks in enumerate(rows)])


@settings(deadline=None)
@given(corpora=st.lists(RISKS, min_size=1, max_size=3), risk=st.floats(-60, 60), thousandths=st.integers(0, 1000))
@example(corpora=[[1.0, 1.0, 1.0], [1.0]], risk=1.0, thousandths=750)
@example(corpora=[list(map(float, range(10)))], risk=9.0, thousandths=1000)
def test_shares_and_quantiles_of_kept_rows_are_exact(corpora: list[list[float]], risk: float, thousandths: int) -> None:
    everything = np.concatenate(corpora)
    small = pool(*corpora)
    asked = np.array([risk, *everything])
    assert small.rows == len(everything)
    assert small.below(asked).tolist() == [(everything < each).sum() for each in asked]
    assert small.above(risk, including=False) == (everything > risk).sum()
    assert small.above(risk, including=True) == (everything >= risk).sum()
    ordered, share = np.sort(everything), Fraction(thousandths, 1000)
    enough = [value for k, value in enumerate(ordered, 1) if Fraction(k, len(ordered)) >= share]
    assert small.quantile(share) == enough[0]


@pytest.mark.parametrize("rows", [20, 500, 501, 1000, 30_000])
def test_the_quantiles_in_the_pack_are_numpys(rows: int) -> None:
    risk = np.random.default_rng(rows).normal(size=rows)
    record = summarise_rows("c", "benign", "0", {"risk": risk, "danger": -risk})
    for name, values in {"risk": risk, "danger": -risk}.items():
        expected = [np.quantile(values, float(share_of(level)), method="inverted_cdf") for level in LEVELS]
        assert list(record["quantiles"][name].values()) == expected
    assert record["risks"] == sorted(record["risks"])
    assert len(record["risks"]) == min(rows, HIGHEST + SPREAD)


@pytest.mark.parametrize("rows", [500, 501, 700, 5000, 100_000])
def test_what_is_kept_of_many_rows_is_exact_at_the_top_and_close_below(rows: int) -> None:
    risk = np.random.default_rng(0).normal(size=rows)
    thinned, ordered = pool(risk), np.sort(risk)
    top = ordered[-HIGHEST:]
    assert thinned.below(top).tolist() == list(range(rows - HIGHEST, rows))
    low = ordered[:-HIGHEST]
    missed = np.arange(len(low)) - thinned.below(low)
    assert missed.min() >= 0
    assert missed.max() <= rows / SPREAD
    assert thinned.below(ordered[:1]).tolist() == [0]
    kept = kept_ranks(rows)
    assert len(set(kept.tolist())) == len(kept)


def test_each_row_counts_once_whatever_its_corpus() -> None:
    both = pool([0.0] * 30, [1.0] * 10)
    assert both.below(np.array([0.5])).tolist() == [30]
    assert both.corpora == {"c0": 30, "c1": 10}


def test_a_share_needs_a_row_above_it() -> None:
    reference = make_reference(benign=[list(range(300))])
    assert reference.threshold(Fraction(99, 100)) == 296.0  # the rows 297, 298 and 299 are above
    with pytest.raises(UsageError, match=r"^The pack tiny has 300 benign reference rows, .* 99.9%.* at least 1,000;"):
        reference.threshold(Fraction(999, 1000))
    with pytest.raises(UsageError, match="smaller share"):
        reference.threshold(Fraction(1))
    assert make_reference(benign=[list(range(1000))]).threshold(Fraction(999, 1000)) == 998.0
    assert set(LEVELS) - set(reference.benign.quantiles()) == {"99.9%"}


def test_a_pack_without_a_reference_has_none(tiny_pack: Path) -> None:
    assert Reference.of(load_pack(tiny_pack)) is None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"max_length": 99}, "max_length 256, these rows by max_length 99"),
        ({"scoring": 1}, "version 3 of the scoring, these rows by version 1"),
        ({"scorer": "length"}, "the scorer sqsd, these rows by the scorer length"),
        ({"shared_state": "initial"}, "the shared state None, these rows by the shared state initial"),
        ({"pack": "0" * 16}, "these rows by the pack's fingerprint 0000000000000000"),
        ({"base_content": "other"}, "the base model base"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_scores_by_other_settings_have_no_reference(change: dict[str, Any], words: str) -> None:
    reference = make_reference(benign=[[0.0] * 20])
    own = reference.record["settings"]
    assert reference.mismatch(own) is None
    assert reference.mismatch({**own, "dtype": "bfloat16"}) is None
    why = reference.mismatch({**own, **change})  # type: ignore[typeddict-item]  # the keys are ReferenceSettings'
    assert why is not None
    assert words in why
    assert "calibrate" in why


def test_a_copy_of_the_base_model_elsewhere_is_the_same_model() -> None:
    reference = make_reference(benign=[[0.0] * 20])
    assert reference.mismatch({**reference.record["settings"], "base_model": "/elsewhere"}) is None


def test_the_settings_are_the_scorers(tiny_pack: Path) -> None:
    fast = SQSDScorer(load_pack(tiny_pack).at_one_state("initial"), max_length=64)
    own = settings_of(fast)
    assert own["shared_state"] == "initial"
    assert own["max_length"] == 64
    assert own["pack"] == fast.pack.fingerprint != load_pack(tiny_pack).fingerprint
    assert own["scorer"] == "sqsd"


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda _: [], "TypeError"),
        (lambda record: {**record, "corpora": []}, "no benign corpus"),
        (lambda record: {**record, "settings": {}}, "lack"),
        (lambda record: _corpus(record, rows=21), "not those of 21 rows"),
        (lambda record: _corpus(record, risks=[1.0, 0.0] * 10), "not those of 20 rows"),
        (lambda record: _corpus(record, risks=["a"] * 20), "ValueError"),
        (lambda record: _corpus(record, sha256=""), "sha256"),
    ],
    ids=["no object", "empty", "settings", "rows", "order", "text", "sha256"],
)
def test_a_damaged_reference_is_refused_in_one_sentence(tiny_pack: Path, damage: Any, words: str) -> None:
    record = make_reference(benign=[[0.0] * 20]).record
    pack = replace(load_pack(tiny_pack), notes={"reference": damage(record)})
    with pytest.raises(PackError, match=words) as problem:
        Reference.of(pack)
    assert "calibrate" in str(problem.value)


def _corpus(record: Any, **changes: Any) -> Any:
    return {**record, "corpora": [{**record["corpora"][0], **changes}]}
