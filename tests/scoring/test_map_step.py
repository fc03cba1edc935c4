"""The scorer as a step of `datasets`: every kind and format, with all other values untouched."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from datasets import Audio, Dataset, DatasetDict, Features, Image, IterableDatasetDict, Json, List, Value

from sqsd_filter import Columns, Scoring, SQSDScorer, score_dataset, select
from sqsd_filter.errors import InputError, UsageError
from tests.corpora import write_jsonl
from tests.scoring.map_rows import TURNS, UNSCORABLE, rows
from tests.tiny import CONVERSATIONS, chat

STATUS = [*["scored"] * 3, "no_answer", "no_answer", "prompt_too_long", *["scored"] * 3]
SCORES = Features(
    {name: Value("float64") for name in ("sqsd_risk", "sqsd_danger", "sqsd_safety")} | {"sqsd_status": Value("string")}
)
FORMATS = (None, "arrow", "numpy", "pandas", "torch")
every_format = pytest.mark.parametrize("form", FORMATS)


@pytest.fixture(scope="module")
def expected(tiny_pack: Path) -> np.ndarray:
    """The risks of `TURNS`, NaN where there is none."""
    return SQSDScorer(tiny_pack).score([turns or [] for turns in TURNS]).risk


def table(dataset: Any) -> pa.Table:
    whole: pa.Table = dataset.with_format("arrow")[:]
    return whole.replace_schema_metadata(None)


def close(scored: Any, expected: np.ndarray) -> bool:
    """Are these the risks, null where there is none?"""
    risks = scored["sqsd_risk"][:] if isinstance(scored, Dataset) else [row["sqsd_risk"] for row in scored]
    nulls = [risk is None for risk in risks]
    found = np.array(risks, dtype=np.float64)
    return nulls == np.isnan(expected).tolist() and bool(np.nanmax(np.abs(found - expected)) <= 2e-6)


# ---------------------------------------------------------------------------------------------- kinds and formats


@every_format
@pytest.mark.parametrize("batch_size", [2, 1000])
def test_every_format_gets_the_same_scores(
    tiny_pack: Path, expected: np.ndarray, form: str | None, batch_size: int
) -> None:
    dataset = rows()
    scored = dataset.with_format(form).map(SQSDScorer(tiny_pack), batched=True, batch_size=batch_size)
    assert scored.format["type"] == form
    assert scored.features == {**dataset.features, **SCORES}
    plain = scored.with_format(None)
    assert plain["sqsd_status"][:] == STATUS
    assert close(plain, expected)
    assert table(plain.select_columns(dataset.column_names)).equals(table(dataset))


@every_format
def test_a_stream_gets_the_same_scores_in_every_format(tiny_pack: Path, expected: np.ndarray, form: str | None) -> None:
    stream = rows().to_iterable_dataset().with_format(form)
    scored = stream.map(SQSDScorer(tiny_pack), batched=True, batch_size=4)
    found = list(scored.with_format(None))
    assert [row["sqsd_status"] for row in found] == STATUS
    assert close(found, expected)
    assert type(next(iter(scored))) is type(next(iter(stream)))


def test_the_types_of_a_stream_stay_known_when_they_are_named(tiny_pack: Path, expected: np.ndarray) -> None:
    scorer, stream = SQSDScorer(tiny_pack), rows().to_iterable_dataset()
    assert scorer.features == SCORES
    types = Features({**stream.features, **scorer.features})
    scored = stream.map(scorer, batched=True, batch_size=2, features=types)
    assert scored.features == types
    assert close(list(scored), expected)
    kept, _, errors = select(scored, drop_count=1)
    assert kept.features == types
    assert [row["sqsd_status"] for row in errors] == [s for s in STATUS if s != "scored"]


@pytest.mark.parametrize("streamed", [False, True], ids=["stored", "streamed"])
def test_every_split_of_a_dict_is_scored(tiny_pack: Path, expected: np.ndarray, streamed: bool) -> None:
    splits: Any = DatasetDict(train=rows(TURNS[:5]), test=rows(TURNS[5:]))
    if streamed:
        splits = IterableDatasetDict({name: split.to_iterable_dataset() for name, split in splits.items()})
    scored = splits.map(SQSDScorer(tiny_pack), batched=True)
    assert type(scored) is type(splits)
    assert close([*scored["train"], *scored["test"]], expected)


@pytest.mark.parametrize("batch_size", [1, 3, 1000])
def test_scores_are_those_of_the_command(tiny_pack: Path, tmp_path: Path, batch_size: int) -> None:
    source = [{"id": k, "messages": t} for k, t in enumerate(TURNS)]
    write_jsonl(tmp_path / "in.jsonl", source)
    score_dataset(tmp_path / "in.jsonl", tmp_path / "out.parquet", Scoring(pack=tiny_pack))
    ours = Dataset.from_list(source).map(SQSDScorer(tiny_pack), batched=True, batch_size=batch_size)
    theirs = Dataset.from_parquet(str(tmp_path / "out.parquet"), cache_dir=str(tmp_path))
    for name in ("sqsd_risk", "sqsd_danger", "sqsd_safety"):
        assert ours.features[name] == theirs.features[name]
        a, b = table(ours)[name], table(theirs)[name]
        assert a.is_null().equals(b.is_null())
        assert np.nanmax(np.abs(a.to_numpy() - b.to_numpy())) <= (1e-6 if batch_size < 1000 else 0)
    assert ours["sqsd_status"][:] == theirs["sqsd_status"][:]


@pytest.mark.parametrize("with_rank", [False, True])
def test_several_processes_give_the_same_scores(tiny_pack: Path, expected: np.ndarray, with_rank: bool) -> None:
    scorer = SQSDScorer(tiny_pack)
    scorer.model  # noqa: B018  (a model that no other process may use)
    scored = rows().map(scorer, batched=True, num_proc=2, batch_size=2, with_rank=with_rank)
    assert scored["sqsd_status"][:] == STATUS
    assert close(scored, expected)


# ---------------------------------------------------------------------------------------------- values and types


def media() -> Dataset:
    """An image and a sound that are none, and JSON that reads as something else, before and after the messages."""
    broken = pa.array([{"bytes": b"no image", "path": None}] * 2, Image().pa_type)
    texts = [pa.array(['"123"', "1e400"]), pa.array(['[{"role":  "user", "content": "2+2?"}]', "null"])]
    turns = ['{"role":  "user", "content": "2+2?"}', '{"role": "assistant", "content": "4", "n": 0.30}']
    messages = pa.ListArray.from_arrays(
        pa.array([0, 2, 4], pa.int32()), pa.ExtensionArray.from_storage(pa.json_(), pa.array(turns * 2))
    )
    columns = {
        "image": broken,
        "json": pa.ExtensionArray.from_storage(pa.json_(), texts[0]),
        "messages": messages,
        "more": pa.ExtensionArray.from_storage(pa.json_(), texts[1]),
        "audio": broken.cast(Audio().pa_type),
    }
    types = Features({"image": Image(), "json": Json(), "messages": List(Json()), "more": Json(), "audio": Audio()})
    return Dataset(pa.table(columns, schema=types.arrow_schema))


@pytest.mark.parametrize("form", [None, "arrow"])
def test_columns_are_never_decoded_to_be_encoded_again(tiny_pack: Path, form: str | None) -> None:
    dataset = media()
    scored = dataset.with_format(form).map(SQSDScorer(tiny_pack), batched=True)
    assert scored.features == {**dataset.features, **SCORES}
    assert table(scored.select_columns(dataset.column_names)).equals(table(dataset))
    scores = scored.select_columns(list(SCORES)).with_format(None)
    assert close(scores, SQSDScorer(tiny_pack).score([chat("2+2?", "4")] * 2).risk)


def test_a_stream_that_does_not_decode_is_scored_without(tiny_pack: Path) -> None:
    stream = media().remove_columns("messages").to_iterable_dataset().decode(False)
    stream = stream.map(lambda row: {"messages": chat("2+2?", "4")})
    found = list(stream.map(SQSDScorer(tiny_pack), batched=True))
    assert [row["sqsd_status"] for row in found] == ["scored", "scored"]
    assert [(row["image"]["bytes"], row["json"]) for row in found] == [(b"no image", '"123"'), (b"no image", "1e400")]


@every_format
@pytest.mark.parametrize("turns", [[*UNSCORABLE, *TURNS], UNSCORABLE], ids=["at first", "at all"])
def test_types_do_not_depend_on_what_can_be_scored(tiny_pack: Path, form: str | None, turns: list[Any]) -> None:
    dataset = rows(turns).with_format(form)
    scored = dataset.map(SQSDScorer(tiny_pack, columns=Columns(messages="messages")), batched=True, batch_size=3)
    assert scored.features == {**dataset.features, **SCORES}
    assert table(scored)["sqsd_risk"][:3].null_count == 3


def test_a_table_without_rows_gets_the_same_types(tiny_pack: Path) -> None:
    scorer, batch = SQSDScorer(tiny_pack), table(rows())
    scored, empty = scorer(batch), scorer(batch.slice(0, 0))
    assert isinstance(scored, pa.Table)
    assert isinstance(empty, pa.Table)
    assert scored.schema == empty.schema


@every_format
def test_earlier_scores_are_replaced(packs: dict[str, Path], tiny_pack: Path, form: str | None) -> None:
    dataset = rows().with_format(form)
    twice = dataset.map(SQSDScorer(packs["gpt2"]), batched=True).map(SQSDScorer(tiny_pack), batched=True)
    once = dataset.map(SQSDScorer(tiny_pack), batched=True)
    assert twice.column_names == once.column_names
    assert table(twice).equals(table(once))


def test_columns_of_other_names_can_be_named(tiny_pack: Path) -> None:
    dataset = Dataset.from_dict({"q": ["2+2?", "And 3+3?"], "a": ["4", None]})
    scored = dataset.map(SQSDScorer(tiny_pack, columns=Columns(prompt="q", answer="a")), batched=True)
    assert scored["sqsd_status"][:] == ["scored", "no_answer"]
    assert close(scored, SQSDScorer(tiny_pack).score([chat("2+2?", "4"), []]).risk)
    with pytest.raises(InputError, match="No known row format fits the columns 'q', 'a'"):
        dataset.map(SQSDScorer(tiny_pack), batched=True)


def test_a_batch_without_any_conversation_is_read_as_the_batches_before(tiny_pack: Path) -> None:
    scored = rows([*CONVERSATIONS[:2], None, None]).map(SQSDScorer(tiny_pack), batched=True, batch_size=2)
    assert scored["sqsd_status"][:] == ["scored", "scored", "no_answer", "no_answer"]


def test_a_scorer_that_is_used_again_reads_the_columns_of_the_new_rows(tiny_pack: Path) -> None:
    scorer, plain = SQSDScorer(tiny_pack), {"instruction": ["2+2?"], "output": ["4"]}
    scorer(plain)
    for more in ({"input": ["And 3+3?"]}, {"system": ["Be brief."]}, {}):
        assert scorer(plain | more) == SQSDScorer(tiny_pack)(plain | more)
    assert scorer(plain) != scorer(plain | {"input": ["And 3+3?"]})


@every_format
@pytest.mark.parametrize("streamed", [False, True], ids=["stored", "streamed"])
@pytest.mark.parametrize("batch_size", [1, 1000])
def test_a_single_turn_a_row_is_an_answer(tiny_pack: Path, form: str | None, streamed: bool, batch_size: int) -> None:
    pairs = [turns[-2:] for turns in CONVERSATIONS]
    dataset: Any = Dataset.from_list([{"prompt": ask["content"], "chosen": a, "rejected": a} for ask, a in pairs])
    dataset = dataset.to_iterable_dataset() if streamed else dataset
    scored = dataset.with_format(form).map(SQSDScorer(tiny_pack), batched=True, batch_size=batch_size)
    found = scored.with_format(None)
    assert [row["sqsd_status"] for row in found] == ["scored"] * len(pairs)
    assert close(list(found), SQSDScorer(tiny_pack).score(pairs).risk)


def test_a_single_turn_a_row_is_an_answer_in_a_batch_of_lists(tiny_pack: Path) -> None:
    ask, answer = chat("2+2?", "4")
    batch = {"prompt": [ask], "chosen": [answer], "rejected": [answer]}
    assert SQSDScorer(tiny_pack)(batch) == SQSDScorer(tiny_pack)({"messages": [[ask, answer]]})


# ---------------------------------------------------------------------------------------------- wrong calls


def pairs() -> Dataset:
    return Dataset.from_dict({"instruction": ["2+2?"], "output": ["4"]})


@pytest.mark.parametrize("form", [None, "numpy", "torch"])
@pytest.mark.parametrize(
    "make",
    [
        pairs,
        lambda: rows(CONVERSATIONS),
        lambda: rows(CONVERSATIONS).select_columns("messages"),
        lambda: rows(CONVERSATIONS).map(lambda row: {"prompt": "2+2?", "chosen": row["messages"], "rejected": [row]}),
        lambda: rows([None]),
    ],
    ids=["pair", "chat", "chat-alone", "preference", "none"],
)
@pytest.mark.parametrize("streamed", [False, True], ids=["stored", "streamed"])
def test_a_single_row_is_one_sentence(
    tiny_pack: Path, make: Callable[[], Dataset], form: str | None, streamed: bool
) -> None:
    dataset: Any = make().to_iterable_dataset() if streamed else make()
    with pytest.raises(UsageError, match="call map with batched=True"):
        list(dataset.with_format(form).map(SQSDScorer(tiny_pack)))


@pytest.mark.parametrize("how", [{"with_indices": True}, {"input_columns": ["messages"]}], ids=str)
def test_what_the_scorer_has_no_use_for_is_one_sentence(tiny_pack: Path, how: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=f"call map with.* without {next(iter(how))}"):
        rows().map(SQSDScorer(tiny_pack), batched=True, **how)
