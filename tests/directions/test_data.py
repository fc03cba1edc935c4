"""What a recipe's adapters are trained on: any columns, from files and from the Hub, with their commit and licence."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from sqsd_filter.directions.data import TrainingData, prompt_and_reply, read_data
from sqsd_filter.directions.recipe import AdapterRecipe, PackRecipe
from sqsd_filter.errors import InputError, PackError, UsageError
from tests.corpora import make_rows, write_jsonl
from tests.directions import hub_data
from tests.hub import Hub
from tests.tiny import chat


def read(folder: Path, method: str, data: str, seed: int = 0, **how: Any) -> TrainingData:
    adapter = AdapterRecipe(method, data, **how)
    return read_data(PackRecipe("tiny", "base", {"a": adapter}, (), seed=seed, folder=folder), adapter)


def texts(data: TrainingData) -> list[tuple[str, ...]]:
    """Prompt and answer, or prompt, chosen and rejected answer of each example."""
    found = []
    for example in data.examples:
        parts = [prompt_and_reply(turns) for turns in example]
        assert [turn["role"] for turn in parts[0][0]] == ["user"]
        found.append((parts[0][0][0]["content"], *(reply[0]["content"] for _, reply in parts)))
    return found


def test_unsafe_rows_of_beavertails(hub: Hub, tmp_path: Path) -> None:
    commits = hub_data.serve(hub)
    how: dict[str, Any] = {"prompt": "prompt", "answer": "response", "where": {"is_safe": False}}
    data = read(tmp_path, "sft", hub_data.BEAVERTAILS, split="30k_train", **how)
    assert texts(data) == [(f"Question {k}?", f"Answer {k}.") for k in range(1, 24, 2)]
    identity = {"id": hub_data.BEAVERTAILS, "revision": commits[hub_data.BEAVERTAILS]}
    assert data.source["dataset"] == {**identity, "config": "default", "split": "30k_train"}
    assert data.source["files"][0]["rows"] == 24
    assert data.licence == "cc-by-nc-4.0"
    assert not data.left_out


def test_pairs_of_saferlhf_are_chosen_by_the_number_of_the_safer_answer(hub: Hub, tmp_path: Path) -> None:
    hub_data.serve(hub, 6)
    how: dict[str, Any] = {"prompt": "prompt", "answers": ["response_0", "response_1"], "better": "safer_response_id"}
    data = read(tmp_path, "dpo", hub_data.SAFERLHF, **how)
    both = [(f"No {k}.", f"Yes {k}.") for k in range(6)]
    assert texts(data) == [(f"Question {k}?", *(pair if k % 3 != 1 else reversed(pair))) for k, pair in enumerate(both)]
    assert data.licence == "cc-by-nc-4.0"


def test_unsafe_answers_of_aegis_whose_prompt_is_there(hub: Hub, tmp_path: Path) -> None:
    hub_data.serve(hub)
    how: dict[str, Any] = {"where": {"response_label": "unsafe"}, "unless": {"prompt": "REDACTED"}}
    data = read(tmp_path, "sft", hub_data.AEGIS, prompt="prompt", answer="response", **how)
    kept = [k for k in range(24) if k % 3 and k % 5 and k % 2]
    assert texts(data) == [(f"Question {k}?", f"Answer {k}.") for k in kept]
    assert not data.left_out
    everything = read(tmp_path, "sft", hub_data.AEGIS, licence="CC-BY-4.0 (NVIDIA)")  # columns by their names
    assert everything.left_out == {"no_answer": 8}
    assert len(everything.examples) == 16
    assert (data.licence, everything.licence) == ("cc-by-4.0", "CC-BY-4.0 (NVIDIA)")


def test_dolly_needs_no_columns_to_be_named(hub: Hub, tmp_path: Path) -> None:
    hub_data.serve(hub, 2)
    data = read(tmp_path, "sft", hub_data.DOLLY)
    assert texts(data) == [("Instruction 0.", "Response 0."), ("Instruction 1.\nContext 1.", "Response 1.")]
    assert data.licence == "cc-by-sa-3.0"


def test_a_revision_is_pinned_to_its_commit_and_a_config_is_taken(hub: Hub, tmp_path: Path) -> None:
    old = hub.add(
        "org/d", {"a/train.jsonl": hub_data.lines(make_rows(3)), "b/train.jsonl": hub_data.lines(make_rows(4))}
    )
    configs = "".join(f"- {{config_name: {name}, data_files: {name}/train.jsonl}}\n" for name in "ab")
    head = f"---\nconfigs:\n{configs}---\n".encode()
    new = hub.add("org/d", {"README.md": head, "b/train.jsonl": hub_data.lines(make_rows(5))})
    found = read(tmp_path, "sft", "org/d", config="b")
    assert found.source["dataset"] == {"id": "org/d", "revision": new, "config": "b", "split": "train"}
    assert len(found.examples) == 5
    assert found.licence is None
    before = read(tmp_path, "sft", "org/d", revision=old)
    assert before.source["dataset"]["revision"] == old
    assert len(before.examples) == 7


def test_conversations_are_trained_on_as_they_are_scored(tmp_path: Path) -> None:
    turns = [chat("a?", "b", "c?", "d", system="s"), chat("e?", "f")]
    write_jsonl(tmp_path / "chats.jsonl", [{"messages": each, "other": each[:1]} for each in turns])
    assert [example for (example,) in read(tmp_path, "sft", "chats.jsonl").examples] == turns
    named = read(tmp_path, "sft", "chats.jsonl", messages="messages")
    assert [example for (example,) in named.examples] == turns
    asked = [{"prompt": each[:-1], "chosen": each[-1:], "rejected": "No."} for each in turns]
    write_jsonl(tmp_path / "pairs.jsonl", asked)
    for chosen, rejected in read(tmp_path, "dpo", "pairs.jsonl").examples:
        assert prompt_and_reply(chosen)[0] == prompt_and_reply(rejected)[0]
        assert prompt_and_reply(rejected)[1] == [{"role": "assistant", "content": "No."}]


def test_a_sample_is_the_one_that_datasets_would_take(tmp_path: Path) -> None:
    rows = make_rows(50)
    write_jsonl(tmp_path / "rows.jsonl", rows)
    for seed in (0, 7):
        sample = Dataset.from_list(rows).shuffle(seed=seed).select(range(9))
        expected = [(row["instruction"], row["output"]) for row in sample]
        assert texts(read(tmp_path, "sft", "rows.jsonl", seed=seed, rows=9)) == expected
    assert len(read(tmp_path, "sft", "rows.jsonl", rows=60).examples) == 50


def test_rows_that_are_no_examples_are_left_out_and_counted(tmp_path: Path) -> None:
    rows = [{"prompt": "p", "a": "x", "b": "y", "n": n} for n in (0, 1, 2, None)]
    rows += [{"prompt": "p", "a": "", "b": "y", "n": 1}, {"prompt": None, "a": "x", "b": "y", "n": 1}]
    write_jsonl(tmp_path / "pairs.jsonl", [*rows, b"{"])
    data = read(tmp_path, "dpo", "pairs.jsonl", prompt="prompt", answers=["a", "b"], better="n")
    assert texts(data) == [("p", "x", "y"), ("p", "y", "x")]
    assert data.left_out == {"bad_row": 3, "no_answer": 1, "bad_json": 1}
    with pytest.raises(PackError, match=r"No row .*pairs\.jsonl, line 7: "):
        read(tmp_path, "dpo", "pairs.jsonl", prompt="prompt", answers=["a", "b"], better="n", where={"n": 5})


def test_where_and_unless_choose_rows(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "rows.jsonl", [{**row, "k": row["id"] % 3} for row in make_rows(9)])
    data = read(tmp_path, "sft", "rows.jsonl", where={"k": 1}, unless={"id": 4})
    assert texts(data) == [(row["instruction"], row["output"]) for row in make_rows(9) if row["id"] in (1, 7)]


WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no file": ({"data": "none.jsonl"}, InputError, r"none\.jsonl does not exist"),
    "a file's split": ({"split": "train"}, UsageError, "not a dataset of the Hub"),
    "no column": ({"answer": "out"}, InputError, "lacks the columns out; it has id, instruction, output"),
    "no filter": ({"unless": {"safe": 1}}, InputError, "lacks the columns safe"),
    "no format": ({"data": "text.jsonl"}, InputError, "It isn't clear which of the columns text"),
    "no rows": ({"where": {"id": -1}}, PackError, "No row of rows.jsonl is left"),
    "nothing to read": ({"data": "bad.jsonl"}, InputError, "no readable row"),
}


@pytest.mark.parametrize(("change", "kind", "complaint"), WRONG.values(), ids=WRONG)
def test_data_that_can_not_be_had_is_one_sentence(
    change: dict[str, Any], kind: type[Exception], complaint: str, tmp_path: Path
) -> None:
    write_jsonl(tmp_path / "rows.jsonl", make_rows(3))
    write_jsonl(tmp_path / "text.jsonl", [{"text": "a"}])
    write_jsonl(tmp_path / "bad.jsonl", [b"{"])
    with pytest.raises(kind, match=complaint):
        read(tmp_path, "sft", **{"data": "rows.jsonl", **change})


def test_a_dataset_that_is_not_on_the_hub_is_one_sentence(hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="org/none"):
        read(tmp_path, "sft", "org/none")


@pytest.mark.parametrize(
    ("method", "how", "complaint"),
    [
        ("sft", {"chosen": "a"}, "'sft' can't have chosen"),
        ("dpo", {"answer": "a"}, "'dpo' can't have answer"),
        ("dpo", {"answers": ["a", "b"]}, "go together"),
        ("dpo", {"answers": ["a"], "better": "n"}, "two columns"),
        ("dpo", {"answers": ["a", "b"], "better": "n", "chosen": "a"}, "either"),
    ],
    ids=str,
)
def test_columns_that_do_not_go_together_are_refused(method: str, how: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UsageError, match=complaint):
        replace(AdapterRecipe(method, "rows.jsonl"), **how)
