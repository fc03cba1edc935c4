"""Cuts within groups and splits: shared exactly, in proportion, and no group emptied."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sqsd_filter import Scoring, SQSDScorer, filter_dataset, score_dataset, select_dataset
from sqsd_filter.corpus.addresses import Opener
from sqsd_filter.corpus.sources import Corpus, Row
from sqsd_filter.errors import DestinationExists, InputError, UsageError
from sqsd_filter.pipeline.report import CONFIGS
from sqsd_filter.pipeline.selecting.groups import MOST_GROUPS, GroupIndex, Groups, by_split
from sqsd_filter.pipeline.selecting.selection import DROPPED, Cut, cut_rows
from tests.corpora import ids_of, make_rows, rows_of, write_jsonl

# ---------------------------------------------------------------------------------------------- shared exactly


def naive_shares(k: int, groups: list[list[float]], leave: int) -> list[int]:
    """How many rows each group gives, by fractions; `groups` has each one's risks, the highest first."""
    most = [len(group) - leave for group in groups]
    full: set[int] = set()
    while True:
        others = [g for g in range(len(groups)) if g not in full]
        left = k - sum(most[g] for g in full)
        quotas = {g: Fraction(left * len(groups[g]), sum(len(groups[o]) for o in others)) for g in others}
        if not (over := {g for g, quota in quotas.items() if quota > most[g]}):
            break
        full |= over
    shares = [most[g] if g in full else math.floor(quotas[g]) for g in range(len(groups))]
    ranked = sorted(others, key=lambda g: (math.floor(quotas[g]) - quotas[g], -next_of(groups[g], shares[g]), g))
    for g in ranked[: max(0, k - sum(shares))]:
        shares[g] += 1
    return shares


def next_of(group: list[float], share: int) -> float:
    return group[share] if share < len(group) else -math.inf


def naive_pieces(rows: list[tuple[float, str, str]], share: Fraction | None, count: int) -> tuple[set[int], list[Any]]:
    """What is dropped of rows (risk, split, value), NaN without score, and (split, value, scored, dropped, threshold)
    of each piece, where `share` of each split's rows or else `count` of them are to go."""
    dropped: set[int] = set()
    pieces: list[Any] = []
    scored = [k for k, (risk, _, _) in enumerate(rows) if not math.isnan(risk)]
    for split in dict.fromkeys(rows[k][1] for k in scored):
        inside = [k for k in scored if rows[k][1] == split]
        values = dict.fromkeys(rows[k][2] for k in inside)
        members = [sorted((-rows[k][0], k) for k in inside if rows[k][2] == value) for value in values]
        asked = min(len(inside), count) if share is None else math.ceil(share * len(inside))
        everything = asked == len(inside) if share is None else share == 1
        shares = naive_shares(asked, [[-risk for risk, _ in member] for member in members], 0 if everything else 1)
        for value, member, gives in zip(values, members, shares, strict=True):
            dropped |= {k for _, k in member[:gives]}
            pieces.append((split, value, len(member), gives, -member[gives - 1][0] if gives else None))
    return dropped, pieces


def coded(values: list[str]) -> Groups:
    known = list(dict.fromkeys(values))
    return Groups(np.array([known.index(v) for v in values], dtype=np.int32), known)


RISKS = st.integers(-3, 3).map(lambda k: k / 7) | st.just(math.nan)
ROWS = st.lists(st.tuples(RISKS, st.sampled_from(["train", "test"]), st.sampled_from("abcdef")), max_size=60)


@settings(deadline=None)
@given(rows=ROWS, share=st.none() | st.integers(0, 1000).map(lambda k: Fraction(k, 1000)), count=st.integers(0, 60))
@example(rows=[(0.1 * k, "train", "abcdef"[min(k, 5)]) for k in range(20)], share=Fraction(1, 2), count=0)
@example(rows=[(0.1 * k, "train", "abcdef"[k % 6]) for k in range(7)], share=Fraction(999, 1000), count=0)
def test_groups_within_splits_are_cut_as_sorting_each_and_counting_in_fractions_would(
    rows: list[tuple[float, str, str]], share: Fraction | None, count: int
) -> None:
    risk = np.array([risk for risk, _, _ in rows], dtype=np.float64)
    splits, groups = coded([split for _, split, _ in rows]), coded([value for _, _, value in rows])
    how: dict[str, Any] = {"drop_count": count} if share is None else {"drop_top": share if share < 1 else "100%"}
    cut = Cut.of(**how, per_group="g", per_split=True)
    selection = cut_rows(risk, np.isfinite(risk), cut, splits, groups)

    dropped, pieces = naive_pieces(rows, share, count)
    assert set(np.flatnonzero(selection.fate == DROPPED).tolist()) == dropped
    assert [(*p.key.values(), p.scored, p.dropped, p.threshold) for p in selection.pieces] == pieces
    assert selection.threshold is None
    kept = [row for k, row in enumerate(rows) if k not in dropped]
    assert selection.ties == sum(row[1:] == piece[:2] and row[0] == piece[4] for piece in pieces for row in kept)


CUTS = st.one_of(
    st.integers(0, 999).map(lambda k: {"drop_top": Fraction(k, 1000)}),
    st.integers(0, 400).map(lambda n: {"drop_count": n}),
    st.integers(0, 400).map(lambda n: {"keep_lowest": n}),
)


@settings(deadline=None)
@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=12),
    seed=st.integers(0, 99),
    how=CUTS,
    levels=st.integers(1, 9),
)
def test_a_shared_cut_keeps_its_total_empties_no_group_and_takes_each_groups_riskiest(
    sizes: list[int], seed: int, how: dict[str, Any], levels: int
) -> None:
    random = np.random.default_rng(seed)
    codes = random.permutation(np.repeat(np.arange(len(sizes)), sizes)).astype(np.int32)
    risk = random.integers(0, levels, len(codes)) / 8
    cut = Cut.of(**how, per_group="g")
    n, k = len(codes), cut.count(risk)
    selection = cut_rows(risk, np.ones(n, dtype=bool), cut, groups=Groups(codes, list(range(len(sizes)))))

    everything = k == n and cut.kind != "drop_top"
    assert selection.count(DROPPED) == k - selection.spared == (n if everything else min(k, n - len(sizes)))
    all_can_give = all(k * size <= (size - 1) * n for size in sizes)
    for piece in selection.pieces:
        inside = np.flatnonzero(codes == piece.key["value"])
        gone = selection.fate[inside] == DROPPED
        assert piece.dropped == gone.sum()
        assert everything or piece.dropped < len(inside)
        riskiest = sorted(inside.tolist(), key=lambda row: (-risk[row], row))
        assert sorted(riskiest[: piece.dropped]) == inside[gone].tolist()
        if all_can_give:
            assert abs(piece.dropped - Fraction(k * piece.scored, n)) < 1


@settings(deadline=None)
@given(rows=ROWS, thousandths=st.integers(0, 1000), per_group=st.booleans())
def test_splits_cut_apart_fare_as_if_each_were_alone(
    rows: list[tuple[float, str, str]], thousandths: int, per_group: bool
) -> None:
    risk = np.array([risk for risk, _, _ in rows], dtype=np.float64)
    split = np.array([split for _, split, _ in rows])
    values = [value for _, _, value in rows]
    how: dict[str, Any] = {"drop_top": f"{thousandths / 10}%", "per_group": "g" if per_group else None}
    groups = coded(values) if per_group else None
    together = cut_rows(risk, np.isfinite(risk), Cut.of(**how, per_split=True), coded(split.tolist()), groups)
    for name in ("train", "test"):
        here = np.flatnonzero(split == name)
        alone = risk[here], np.isfinite(risk[here]), Cut.of(**how)
        selection = cut_rows(*alone, groups=coded([values[k] for k in here]) if per_group else None)
        assert np.array_equal(selection.fate, together.fate[here])
        pieces = [replace(p, key={"split": name, **p.key}) for p in selection.pieces if p.scored]
        assert pieces == [p for p in together.pieces if p.key["split"] == name]


@pytest.mark.parametrize(
    ("groups", "drop", "gives", "spared"),
    [
        ([[9, 1, 1, 1], [8, 1, 1, 1], [7, 1, 1, 1]], 2, [1, 1, 0], 0),  # equal remainders: riskier next rows
        ([[1, 1, 1], [1, 1, 1], [1, 1, 1]], 2, [1, 1, 0], 0),  # equal risks, too: the first groups
        ([[5, 1, 1, 1], [5, 2, 2, 2], [5, 3, 3, 3]], 4, [1, 1, 2], 0),  # each group's second
        ([[9], [9], [1] * 98], 5, [0, 0, 5], 0),  # a group of one can't give its share
        ([[9], [9], [9], [1, 2]], 3, [0, 0, 0, 1], 2),  # and if none can, fewer are dropped
        ([[1, 2], [3, 4]], 4, [2, 2], 0),  # unless all are to go
        ([[1] * 10, [1] * 30, [1] * 60], 10, [1, 3, 6], 0),
    ],
    ids=["risk", "first", "next", "small", "spared", "all", "even"],
)
def test_what_is_left_over_goes_where_it_can(groups: list[list[int]], drop: int, gives: list[int], spared: int) -> None:
    codes = np.repeat(np.arange(len(groups), dtype=np.int32), [len(g) for g in groups])
    risk = np.array([r for g in groups for r in g], dtype=np.float64)
    cut = Cut.of(drop_count=drop, per_group="g")
    selection = cut_rows(risk, np.ones(len(risk), dtype=bool), cut, groups=Groups(codes, list("abcd")))
    assert [piece.dropped for piece in selection.pieces] == gives
    assert selection.spared == spared


# ---------------------------------------------------------------------------------------------- values


def row_of(value: Any, index: int = 0) -> Row:
    return Row(index, value, "in.jsonl", index + 1, "", None)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.integers(-3, 3).map(float)
    | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("ab"), inner, max_size=2),
    max_leaves=5,
)


def same(a: Any, b: Any) -> bool:
    """Equal as JSON: Python alone takes True for 1."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(same, a, b))
    return isinstance(a, bool) == isinstance(b, bool) and a == b


@settings(deadline=None)
@given(values=st.lists(JSON, max_size=8))
def test_values_are_one_group_just_when_they_are_equal(values: list[Any]) -> None:
    index = GroupIndex("g")
    for k, value in enumerate(values):
        index.visit(row_of({"g": value}, k))
    groups = index.groups(["g"])
    assert groups is not None
    assert groups.codes.dtype == np.int32
    assert all(
        (groups.codes[i] == groups.codes[j]) == same(values[i], values[j])
        for i in range(len(values))
        for j in range(len(values))
    )
    firsts = [value for k, value in enumerate(values) if not any(same(value, v) for v in values[:k])]
    assert len(groups.values) == len(firsts)
    assert all(map(same, groups.values, firsts))


def test_null_and_missing_are_one_group_and_keys_of_an_object_have_no_order() -> None:
    index = GroupIndex("g")
    rows = [{"g": None}, {"g": {"a": 1, "b": [2.0]}}, {}, None, {"g": {"b": [2], "a": 1.0}}, {"g": "null"}]
    for k, value in enumerate(rows):
        index.visit(row_of(value, k))
    groups = index.groups(["g"])
    assert groups is not None
    assert groups.codes.tolist() == [0, 1, 0, 0, 1, 2]
    assert groups.values == [None, {"a": 1, "b": [2]}, "null"]


def test_what_json_has_no_form_for_is_named_as_text(tmp_path: Path) -> None:
    table = pa.table(
        {"day": pa.array([0, 1, 0], pa.date32()), "x": [math.nan, math.inf, math.nan], "raw": [b"\xff"] * 3}
    )
    pq.write_table(table, tmp_path / "a.parquet")
    for column, values in {"day": ["1970-01-01", "1970-01-02"], "x": ["NaN", "Infinity"], "raw": ["b'\\xff'"]}.items():
        index = GroupIndex(column)
        Corpus.scan(Opener().open([str(tmp_path / "a.parquet")]), visit=index.visit, columns=index.columns)
        groups = index.groups([column])
        assert groups is not None
        assert groups.values == values
        assert json.loads(json.dumps(groups.values, allow_nan=False)) == values


def test_a_column_like_an_id_is_no_category() -> None:
    index = GroupIndex("id")
    for k in range(MOST_GROUPS):
        index.visit(row_of({"id": k}, k))
    index.visit(row_of({"id": 5}))
    with pytest.raises(InputError, match=r"'id' has more than 10,000 different values \(in\.jsonl, line 10001\)"):
        index.visit(row_of({"id": -1}, MOST_GROUPS))


# ---------------------------------------------------------------------------------------------- whole runs

CATEGORIES = ["maths", {"of": 1}, None, "maths", "maths"]
EXTRA: list[dict[str, Any] | bytes] = [b"broken", {"id": 61, "instruction": "no answer", "category": "unanswered"}]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in; in.jsonl has 60 rows with a category (some with none at all), a broken line and one row
    without an answer."""
    monkeypatch.chdir(tmp_path)
    rows = [{**row, "category": CATEGORIES[row["id"] % 5]} for row in make_rows(60)]
    for row in rows[50:]:
        if row["category"] is None:
            del row["category"]
    write_jsonl(tmp_path / "in.jsonl", [*rows, *EXTRA])
    return tmp_path


def by_risk(dest: str) -> list[dict[str, Any]]:
    """The scored rows of a run, the riskiest first."""
    return sorted(
        rows_of(Path(dest), "kept") + rows_of(Path(dest), "dropped"), key=lambda r: (-r["sqsd_risk"], r["id"])
    )


def test_each_category_gives_its_share_of_its_riskiest_rows(folder: Path, scorer: SQSDScorer) -> None:
    report = filter_dataset("in.jsonl", "out", drop_top="10%", per_group="category", scorer=scorer)
    assert [report["rows"][name] for name in ("kept", "dropped", "errors")] == [54, 6, 2]
    assert report["cut"] == 'drop-top 10%, per-group "category"'
    assert report["threshold"] is None
    groups = report["groups"]
    assert (groups["column"], groups["spared"]) == ("category", 0)
    assert [(g["value"], g["scored"]) for g in groups["groups"]] == [("maths", 36), ({"of": 1}, 12), (None, 12)]
    ranked = by_risk("out")
    gone = set(ids_of(Path("out"), "dropped"))
    for group, most in zip(groups["groups"], (4, 2, 2), strict=True):
        inside = [row for row in ranked if row["category"] == group["value"]]
        assert group["dropped"] in (most - 1, most)  # 3.6 and 1.2 each
        assert [row["id"] in gone for row in inside] == [k < group["dropped"] for k in range(len(inside))]
        assert group["threshold"] == inside[group["dropped"] - 1]["sqsd_risk"]


@pytest.mark.parametrize("source", ["run", "scored.parquet"])
def test_selecting_by_group_from_scores_equals_filtering(source: str, folder: Path, scorer: SQSDScorer) -> None:
    filtered = filter_dataset("in.jsonl", "filtered", drop_top="30%", per_group="category", scorer=scorer)
    filter_dataset("in.jsonl", "run", drop_count=0, scorer=scorer)
    score_dataset("in.jsonl", "scored.parquet", Scoring(scorer=scorer))
    selected = select_dataset(source, "selected", Cut.of(drop_top="30%", per_group="category"))
    for key in ("groups", "cut", "threshold", "ties"):
        assert selected[key] == filtered[key]
    for config in CONFIGS:
        chosen, expected = (rows_of(Path(where), config) for where in ("selected", "filtered"))
        if source != "run":  # the rows are named by the file that they are in
            expected = [
                {**row, "sqsd_row": row["sqsd_row"].replace("in.jsonl", source)} if "sqsd_row" in row else row
                for row in expected
            ]
        assert chosen == expected


def test_a_csv_has_groups_too_and_a_limit_sees_only_its_rows(folder: Path, scorer: SQSDScorer) -> None:
    lines = [f"q{k},a{k},{'xyz'[k // 4]}" for k in range(12)]
    (folder / "a.csv").write_text("\n".join(["instruction,output,kind", *lines]))
    report = filter_dataset("a.csv", "out", drop_count=2, per_group="kind", limit=8, scorer=scorer)
    assert [(g["value"], g["scored"], g["dropped"]) for g in report["groups"]["groups"]] == [("x", 4, 1), ("y", 4, 1)]


def test_other_groups_are_another_run(folder: Path, scorer: SQSDScorer) -> None:
    how: dict[str, Any] = {"drop_top": "10%", "scorer": scorer}
    filter_dataset("in.jsonl", "out", **how, per_group="category")
    assert filter_dataset("in.jsonl", "out", **how, per_group="category")["already_done"]
    for other in ({}, {"per_group": "id"}, {"per_split": True}, {"per_group": "category", "per_split": True}):
        with pytest.raises(DestinationExists, match=r"cut: drop-top 10%, per-group \"category\" there, drop-top 10%"):
            filter_dataset("in.jsonl", "out", **how, **other)


@pytest.mark.parametrize("run", ["filter", "select a file", "select a run"])
def test_a_column_that_no_row_has_is_an_error_that_names_those_there_are(
    run: str, folder: Path, scorer: SQSDScorer
) -> None:
    calls: dict[str, Callable[..., Any]] = {
        "filter": lambda **how: filter_dataset("in.jsonl", "out", scorer=scorer, **how),
        "select a file": lambda **cut: select_dataset("scored.parquet", "out", Cut.of(**cut)),
        "select a run": lambda **cut: select_dataset("run", "out", Cut.of(**cut)),
    }
    if run == "select a file":
        score_dataset("in.jsonl", "scored.parquet", Scoring(scorer=scorer))
    elif run == "select a run":
        filter_dataset("in.jsonl", "run", drop_count=0, scorer=scorer)
    with pytest.raises(
        InputError, match=r"'topic' that per_group \(--per-group\) names; the columns are 'id', 'instruction', 'output'"
    ):
        calls[run](drop_count=1, per_group="topic")
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("apart", "match"),
    [
        ({"per_group": "category"}, "every group: leave out per_group"),
        ({"per_split": True}, "every split: leave out per_split"),
    ],
    ids=["group", "split"],
)
def test_one_risk_for_all_is_no_cut_within_groups(apart: dict[str, Any], match: str) -> None:
    with pytest.raises(UsageError, match=match):
        filter_dataset("missing.jsonl", "out", max_risk=0.5, **apart)


# ---------------------------------------------------------------------------------------------- splits


@pytest.fixture
def splits(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Three inputs of 10, 25 and 5 rows, which are read as the splits train, test and train."""
    for name, start, stop in (("a", 0, 10), ("b", 10, 35), ("c", 35, 40)):
        rows = [{**row, "kind": "xyz"[row["id"] % 3]} for row in make_rows(60)[start:stop]]
        write_jsonl(folder / f"{name}.jsonl", rows)
    scan = Corpus.scan

    def with_splits(*arguments: Any, **named: Any) -> Corpus:
        corpus = scan(*arguments, **named)
        return replace(corpus, parts=[replace(p, split="test" if p.rows == 25 else "train") for p in corpus.parts])

    monkeypatch.setattr(Corpus, "scan", with_splits)
    return ["a.jsonl", "b.jsonl", "c.jsonl"]


def test_splits_are_cut_together_unless_each_is_to_be_cut_on_its_own(splits: list[str], scorer: SQSDScorer) -> None:
    assert by_split(Corpus.scan(Opener().open(splits)).parts).codes.tolist() == [0] * 10 + [1] * 25 + [0] * 5
    together = filter_dataset(splits, "together", drop_top="10%", scorer=scorer)
    apart = filter_dataset(splits, "apart", drop_top="10%", per_split=True, scorer=scorer)
    assert (together["rows"]["dropped"], apart["rows"]["dropped"]) == (4, 5)  # 2 of 15, 3 of 25
    assert "groups" not in together
    assert together["threshold"] is not None
    ranked = by_risk("apart")
    tested = [row for row in ranked if 10 <= row["id"] < 35]
    trained = [row for row in ranked if row not in tested]
    assert sorted(ids_of(Path("together"), "dropped")) == sorted(row["id"] for row in ranked[:4])
    assert sorted(ids_of(Path("apart"), "dropped")) == sorted(row["id"] for row in trained[:2] + tested[:3])
    assert (apart["cut"], apart["threshold"]) == ("drop-top 10%, per-split", None)
    assert apart["groups"] == {
        "column": None,
        "spared": 0,
        "groups": [
            {"split": "train", "scored": 15, "dropped": 2, "threshold": trained[1]["sqsd_risk"]},
            {"split": "test", "scored": 25, "dropped": 3, "threshold": tested[2]["sqsd_risk"]},
        ],
    }


def test_groups_share_the_cut_of_their_split(splits: list[str], scorer: SQSDScorer) -> None:
    report = filter_dataset(splits, "out", drop_count=6, per_split=True, per_group="kind", scorer=scorer)
    figures = [(g["split"], g["value"], g["scored"], g["dropped"]) for g in report["groups"]["groups"]]
    assert figures[:3] == [("train", "x", 6, 2), ("train", "y", 4, 2), ("train", "z", 5, 2)]  # of 2.4, 1.6 and 2
    assert figures[3:] == [("test", "y", 9, 2), ("test", "z", 8, 2), ("test", "x", 8, 2)]
    assert report["rows"]["dropped"] == 12
