"""The figures of contaminated corpora, computed from the outcomes of single answers; simulated where that is a must."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from sqsd_filter.errors import InputError
from sqsd_filter.evaluation.figures import draws, interval, newcombe
from sqsd_filter.evaluation.prompt_outcomes import (
    arm_lines,
    bits,
    combine,
    contaminated_figures,
    count_cell,
    difference_interval,
    difference_lines,
    intervals_over,
    mean_interval,
    prompt_hash,
)
from sqsd_filter.evaluation.results import Measured, PromptOutcomes, RunRecord
from sqsd_filter.statistics import wilson

SEEDS, PROMPTS, TRIALS = 3, 83, 250
Interval = Callable[[np.ndarray], Any]


def logistic(values: np.ndarray) -> np.ndarray:
    return np.asarray(1 / (1 + np.exp(-values)))


def rate(level: float, seed: float, prompt: float) -> float:
    """The mean over all seeds and prompts whose effects have these standard deviations."""
    noise = np.random.default_rng(1).normal(size=200_000) * np.hypot(seed, prompt)
    return float(logistic(level + noise).mean())


def simulated(level: float, seed: float, prompts_1p: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Outcomes (s, p) of an arm; prompts are as hard for each arm, seeds are not."""
    chance_sp = logistic(level + seed * rng.normal(size=(SEEDS, 1)) + prompts_1p)
    return (rng.random((SEEDS, PROMPTS)) < chance_sp).astype(float)


@pytest.mark.parametrize(
    ("level", "seed", "prompt"),
    [(0.0, 0.0, 1.5), (0.0, 0.8, 1.0), (-2.0, 0.5, 1.5), (-4.3, 0.3, 1.5)],
    ids=["no seed matters", "seeds matter", "a fifth", "few"],
)
def test_the_interval_of_a_rate_covers_it(level: float, seed: float, prompt: float) -> None:
    rng, truth = np.random.default_rng(2), rate(level, seed, prompt)
    covers = {"corrected": 0, "plain": 0}
    for _ in range(TRIALS):
        values = simulated(level, seed, prompt * rng.normal(size=(1, PROMPTS)), rng)
        for name, found in (
            ("corrected", mean_interval(values, share=True)),
            ("plain", interval(draws(values[None])[:, 0])),
        ):
            assert found is not None
            covers[name] += found[0] <= truth <= found[1]
    assert covers["corrected"] / TRIALS >= 0.92
    if seed == 0.8:
        assert covers["plain"] / TRIALS < 0.9  # what the correction is for


@pytest.mark.parametrize(
    ("level", "lower", "seed"), [(0.0, 1.0, 0.3), (-2.0, 1.5, 0.5), (0.5, 4.0, 0.8)], ids=["half", "a fifth", "safe"]
)
def test_the_interval_of_a_difference_covers_it(level: float, lower: float, seed: float) -> None:
    rng, prompt, covered = np.random.default_rng(3), 1.5, 0
    truth = rate(level, seed, prompt) - rate(level - lower, seed, prompt)
    for _ in range(TRIALS):
        prompts_1p = prompt * rng.normal(size=(1, PROMPTS))
        a, b = (simulated(each, seed, prompts_1p, rng) for each in (level, level - lower))
        found = difference_interval(a, b, share=True)
        assert found is not None
        covered += found[0] <= truth <= found[1]
    assert covered / TRIALS >= 0.92


def test_an_arm_without_any_variation_has_wilson_s_interval_over_the_prompts() -> None:
    never, always = np.zeros((3, 20)), np.ones((3, 20))
    assert mean_interval(never, share=True) == list(wilson(0, 20))
    assert mean_interval(always, share=True) == list(wilson(20, 20))
    high = wilson(0, 20)[1]
    assert difference_interval(never, never, share=True) == pytest.approx([-high, high])
    assert difference_interval(always, never, share=True) == pytest.approx([1 - high * 2**0.5, 1])


def test_intervals_of_shares_end_where_shares_end_and_a_single_value_has_none() -> None:
    values = np.array([[1.0] * 10, [0.0] * 10])
    assert mean_interval(values, share=True) == [0, 1]
    assert difference_interval(values, 1 - values, share=True) == [-1, 1]
    assert mean_interval(np.array([[1.5]]), share=False) is None
    one, two, three = (np.full((3, 1), k) + np.array([[0.1], [0.2], [0.4]]) for k in (1.0, 2.0, 3.0))
    low, high = mean_interval(one, share=False) or [0.0, 0.0]
    assert low < one.mean() < high
    assert difference_interval(three, two, share=False) == pytest.approx([1, 1])  # all seeds differ alike


def run(arm: str, seed: int, unsafe: str, scorer: str = "sqsd", **changes: Any) -> RunRecord:
    record: RunRecord = {
        "scorer": scorer,
        "arm": arm,
        "seed": seed,
        "rows": 10,
        "tokens": 100 + seed,
        "dropped": {"unsafe": 0, "benign": seed},
        "unsafe": {"phrases": unsafe, "guard": unsafe[::-1]},
        "refused": {"phrases": unsafe.translate({48: 49, 49: 48}), "guard": "0000"},
        "degenerate": {"phrases": "0000", "guard": "0000"},
        "harmless_refused": "10",
        "right": "",
        "loss": 1.0 + seed,
    }
    return {**record, **changes}  # type: ignore[typeddict-item]  # keys are those of the record


def outcomes(*runs: RunRecord) -> PromptOutcomes:
    return {
        "model": {"name": "tiny", "pack": "tiny", "fingerprint": "0"},
        "sets": {"arms": ["contaminated"]},
        "settings": {},
        "judges": ["phrases", "guard"],
        "prompts": {"harmful": list("abcd"), "harmless": list("ef"), "questions": []},
        "runs": list(runs),
    }


def test_figures_follow_from_the_outcomes_of_single_answers() -> None:
    untuned = run("untuned", 0, "0000", "", dropped={}, rows=0)
    arms = [run(arm, seed, text) for seed in (0, 1) for arm, text in (("all", f"110{seed}"), ("clean", "1000"))]
    other = [run("cut", seed, "0100", "unsafe", loss=None if seed else 2.0) for seed in (0, 1)]
    figures = contaminated_figures(outcomes(untuned, *arms, *other))
    assert list(figures) == ["sqsd", "unsafe"]
    assert list(figures["sqsd"]["arms"]) == ["untuned", "all", "clean"]
    every = figures["sqsd"]["arms"]["all"]
    assert (every["seeds"], every["rows"], every["tokens"]) == ([0, 1], 10, 100.5)
    assert every["dropped"] == {"unsafe": 0, "benign": 0.5}
    assert every["measures"]["unsafe by phrases"]["mean"] == 5 / 8
    assert every["measures"]["unsafe by phrases"]["by_seed"] == [0.5, 0.75]
    assert every["measures"]["unsafe by guard"]["by_seed"] == [0.5, 0.75]
    assert every["measures"]["refused"]["mean"] == 3 / 8
    assert every["measures"]["harmless refused"]["by_seed"] == [0.5, 0.5]
    assert every["measures"]["loss"]["by_seed"] == [1, 2]
    assert "right" not in every["measures"]
    assert list(figures["sqsd"]["differences"]) == ["all - clean"]
    difference = figures["sqsd"]["differences"]["all - clean"]
    assert difference["unsafe by phrases"]["mean"] == 5 / 8 - 1 / 4
    assert difference["loss"] == {"mean": 0, "ci": [0, 0]}
    assert figures["unsafe"]["differences"] == {}
    assert "loss" not in figures["unsafe"]["arms"]["cut"]["measures"]  # it overflowed once


def test_a_difference_is_one_of_the_seeds_that_both_arms_have() -> None:
    runs = [run("all", 0, "1100"), run("all", 1, "1111"), run("clean", 1, "0000")]
    figures = contaminated_figures(outcomes(*runs))["sqsd"]
    assert figures["differences"]["all - clean"]["unsafe by phrases"]["mean"] == 1


@pytest.mark.parametrize("seeds", [(0,), (0, 1)], ids=["one seed", "two"])
def test_arms_that_are_one_model_differ_by_exactly_nothing(seeds: Sequence[int]) -> None:
    def difference(clean: str | None, last: str | None) -> dict[str, Measured]:
        keys = [*[clean] * (len(seeds) - 1), last]
        runs = [run("cut", seed, "1100", run=f"key {seed}") for seed in seeds]
        own = [{} if key is None else {"run": f"{key} {seed}"} for seed, key in zip(seeds, keys, strict=True)]
        runs += [run("clean", seed, "1100", **each) for seed, each in zip(seeds, own, strict=True)]
        return contaminated_figures(outcomes(*runs))["sqsd"]["differences"]["cut - clean"]

    assert all(each == {"mean": 0, "ci": [0, 0]} for each in difference("key", "key").values())
    half = mean_interval(np.array([[1.0, 1, 0, 0]] * len(seeds)), share=True)
    assert half is not None
    for last in ("other", None):  # another model with equal outcomes, and a file without keys
        apart = difference("key", last)["unsafe by phrases"]
        assert apart == {"mean": 0, "ci": newcombe(0.5, half, 0.5, half)}
        assert apart["ci"] != [0, 0]


def test_the_intervals_of_one_seed_are_over_its_prompts_and_said_to_be() -> None:
    untuned, every = run("untuned", 0, "0000", "", dropped={}), run("all", 0, "1100", rows=1234)
    figures = contaminated_figures(outcomes(untuned, every, run("clean", 0, "1000", rows=1233.0)))["sqsd"]
    found = figures["arms"]["all"]["measures"]
    values = np.array([1.0, 1, 0, 0])
    reach = 3.182446 * values.std(ddof=1) / 2  # Student's t of four prompts
    assert found["unsafe by phrases"]["ci"] == pytest.approx([max(0, 0.5 - reach), min(1, 0.5 + reach)], abs=0.03)
    assert found["loss"]["ci"] is None
    assert "over prompts only, because there is one seed" in intervals_over([0])
    assert "over seeds and prompts together" in intervals_over([0, 1])


def test_tables_have_one_line_per_arm_and_per_difference() -> None:
    def share(value: float, ci: Sequence[float] | None) -> str:
        return f"{value} of 1{' with an interval' if ci else ''}"

    runs = [run("untuned", 0, "0000", "", dropped={}, rows=0, loss=None), run("all", 0, "1100", rows=1234)]
    figures = contaminated_figures(outcomes(*runs, run("clean", 0, "1100", rows=1200)))["sqsd"]
    titles, *lines = arm_lines(figures, share)
    assert titles[:5] == ["", "rows", "unsafe dropped", "benign dropped", "unsafe by phrases"]
    assert [line[0] for line in lines] == ["untuned", "all", "clean"]
    by_title = [dict(zip(titles, line, strict=True)) for line in lines]
    assert [line["rows"] for line in by_title] == ["0", "1,234", "1,200"]
    assert [line["benign dropped"] for line in by_title] == ["-", "0", "0"]
    assert [line["loss"] for line in by_title] == ["-", "1.000", "1.000"]
    assert by_title[1]["unsafe by phrases"] == "0.5 of 1 with an interval"
    titles, line = difference_lines(figures, share)
    assert line[titles.index("difference")] == "all - clean"
    assert line[titles.index("loss")] == "0.000"
    assert [count_cell(count) for count in (24 + 1 / 3, 1234.0, None)] == ["24.3", "1,234", "-"]


def test_corpora_are_combined_only_if_they_can_be_compared() -> None:
    one, two = (outcomes(run("untuned", seed, "0000", ""), run("all", seed, "1100")) for seed in (0, 1))
    both = combine([one, two])
    assert both["runs"] == [*one["runs"], *two["runs"]]
    assert contaminated_figures(both)["sqsd"]["arms"]["untuned"]["seeds"] == [0, 1]
    with pytest.raises(InputError, match="have the same seed"):
        combine([one, one])
    other = copy.deepcopy(two)
    other["prompts"]["harmful"][0] = "z"
    with pytest.raises(InputError, match="different prompts"):
        combine([one, other])


def test_prompts_are_known_by_a_hash_and_outcomes_by_a_digit() -> None:
    assert bits([True, False, True]) == "101"
    assert len(prompt_hash("How?")) == 16
    assert prompt_hash("How?") != prompt_hash("How")
