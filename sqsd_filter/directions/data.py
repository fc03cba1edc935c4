"""The rows that an adapter is trained on: from files beside the recipe, or from the Hub at one commit.

They are read by the same code as rows to score, so training takes every format that scoring takes.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from sqsd_filter.corpus.addresses import Opener, Source, look
from sqsd_filter.corpus.conversation import (
    BAD_JSON,
    BAD_ROW,
    TEMPLATE_SETTINGS,
    TOOLS,
    Message,
    RowError,
    is_supervised,
)
from sqsd_filter.corpus.repositories import HUB
from sqsd_filter.corpus.row_formats import Columns, RowFormat
from sqsd_filter.corpus.sources import Corpus, Row
from sqsd_filter.directions.recipe import AdapterRecipe, PackRecipe
from sqsd_filter.errors import InputError, PackError, UsageError
from sqsd_filter.pipeline.writing.originals import Original

Example = tuple[list[Message], ...]  # one conversation for SFT, the chosen and the rejected one for DPO


@dataclass(frozen=True)
class TrainingData:
    """The examples of an adapter, their source, and the number of rows left out by reason. `positive` marks examples,
    and `sources` has each example's value of a column, if that was asked for."""

    examples: list[Example]
    positive: list[bool] | None
    sources: list[str] | None
    source: dict[str, Any]
    licence: str | None
    left_out: Counter[str]


def read_data(
    recipe: PackRecipe, adapter: AdapterRecipe, positive: Mapping[str, Any] | None = None, by: str | None = None
) -> TrainingData:
    """The examples of one adapter: the rows that its filters keep, or a seeded sample of them if it sets `rows`.

    With `positive`, examples whose columns equal it are marked; `by` names a column whose values are kept. Raises
    `InputError` if the data can't be read or lacks columns, `PackError` if no row is left.
    """
    with closing(Opener()) as opener:
        sources = opener.open([_spec(recipe.folder, adapter)])
        extra = [*(positive or ()), *([by] if by is not None else [])]
        sample, problem = look(sources)
        if not sample:
            why = f" (the first is {problem})" if problem else ""
            raise InputError(
                f"{adapter.data} has no readable row{why}: name JSON Lines, CSV, parquet or another supported format."
            )
        read, columns = _reader(adapter, sample, extra)
        examples: list[Example] = []
        values: list[str] = []
        marks: list[bool] = []
        left_out: Counter[str] = Counter()
        first: list[str] = []

        def visit(row: Row) -> None:
            try:
                if row.value is None:
                    raise RowError(BAD_JSON, row.problem)
                if _wanted(adapter, row.value):
                    examples.append(read(row.value))
                    values.append(str(row.value.get(by)) if by is not None else "")
                    marks.append(all(row.value.get(column) == value for column, value in (positive or {}).items()))
            except RowError as problem:
                left_out[problem.status] += 1
                first[:] = first or [f"{row.file}, line {row.line}: {problem.detail}"]

        corpus = Corpus.scan(sources, visit=visit, columns=columns)
    if not examples:
        why = f" ({first[0]})" if first else ""
        raise PackError(f"No row of {adapter.data} is left for training{why}: check its columns, where and unless.")
    if adapter.rows is not None and len(examples) > adapter.rows:
        chosen = np.random.default_rng(recipe.seed).permutation(len(examples))[: adapter.rows].tolist()
        examples, marks, values = [examples[k] for k in chosen], [marks[k] for k in chosen], [values[k] for k in chosen]
    marked, named = marks if positive else None, values if by is not None else None
    return TrainingData(
        examples, marked, named, source_of(corpus, sources), adapter.licence or licence_of(sources), left_out
    )


def _spec(folder: Path, adapter: AdapterRecipe) -> str:
    """The data's address for `Opener`: a file or folder beside the recipe, a URL, or a dataset of the Hub."""
    split = adapter.split or "train"
    part = f"{adapter.config}/{split}" if adapter.config else split
    beside = folder / adapter.data
    if beside.exists() or "://" in adapter.data or not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", adapter.data):
        if adapter.revision or ((adapter.config or adapter.split) and not beside.is_dir()):
            raise UsageError(f"{adapter.data} is not a dataset of the Hub: leave out its config, split and revision.")
        named = f":{part}" if adapter.config or adapter.split else ""
        return adapter.data if "://" in adapter.data else f"{beside}{named}"
    return f"{HUB}{adapter.data}{f'@{adapter.revision}' if adapter.revision else ''}:{part}"


def _wanted(adapter: AdapterRecipe, row: Mapping[str, Any]) -> bool:
    has = all(row.get(column) == value for column, value in adapter.where.items())
    return has and not any(row.get(column) == value for column, value in adapter.unless.items())


def _reader(
    adapter: AdapterRecipe, sample: Sequence[Mapping[str, Any]], besides: Sequence[str]
) -> tuple[Callable[[Mapping[str, Any]], Example], list[str]]:
    """A function from a row to its example, and the columns that it reads."""
    seen = list(dict.fromkeys(column for row in sample for column in row))
    asked = [*adapter.columns, *adapter.where, *adapter.unless, *besides]
    if missing := [column for column in asked if column not in seen]:
        raise InputError(f"{adapter.data} lacks the columns {', '.join(missing)}; it has {', '.join(seen)}.")
    chosen = (adapter.answers or [adapter.chosen or "chosen"])[0]
    how = {"answer": adapter.answer} if adapter.method == "sft" else {"answer": chosen, "format": "preference"}
    named = {name: getattr(adapter, name) for name in ("messages", "prompt", "context", "system")}
    try:
        form = Columns(**named, **how, labels="all").choose(sample)  # `where` chooses by labels
    except InputError as problem:
        raise InputError(
            f"It isn't clear which of the columns {', '.join(seen)} of {adapter.data} to train on: name them in the "
            f"recipe, as messages, or as prompt and {'answer' if adapter.method == 'sft' else 'chosen and rejected'}."
        ) from problem
    if adapter.method == "sft":
        return lambda row: (form.conversation(row),), [*form.columns, *asked]
    return lambda row: _pair(form, adapter, row), [*form.columns, adapter.rejected or "rejected", *asked]


def _pair(form: RowFormat, adapter: AdapterRecipe, row: Mapping[str, Any]) -> Example:
    """The chosen and the rejected conversation, which share their prompt. Raises `RowError`."""
    columns = [adapter.chosen or "chosen", adapter.rejected or "rejected"]
    if adapter.answers:
        better = row.get(str(adapter.better))
        if better not in (0, 1):
            raise RowError(BAD_ROW, f"column '{adapter.better}' holds {better!r}, which is neither 0 nor 1")
        columns = adapter.answers if better == 0 else adapter.answers[::-1]
    chosen, rejected = (replace(form, answer=column).conversation(row) for column in columns)
    if chosen[0]["role"] in (TOOLS, TEMPLATE_SETTINGS):
        raise RowError(BAD_ROW, "the row has tools or settings of the template, which DPO does not train on")
    if prompt_and_reply(chosen)[0] != prompt_and_reply(rejected)[0]:
        raise RowError(BAD_ROW, f"the columns '{columns[0]}' and '{columns[1]}' answer different prompts")
    return chosen, rejected


def prompt_and_reply(turns: list[Message]) -> tuple[list[Message], list[Message]]:
    """The turns before the first supervised one, and the rest."""
    start = next(k for k, turn in enumerate(turns) if is_supervised(turn))
    return turns[:start], turns[start:]


def prompt_of(turns: list[Message]) -> str:
    """The text of the user's turns before the first answer, without differences in case and spaces."""
    prompt, _ = prompt_and_reply(turns)
    return " ".join(" ".join(turn["content"] for turn in prompt if turn["role"] == "user").lower().split())


def source_of(corpus: Corpus, sources: Sequence[Source]) -> dict[str, Any]:
    """The files that were read, without this machine's folders, and the dataset with its commit."""
    files = [{**given, "path": _name(given["path"])} for given in corpus.inputs]
    datasets = [source.dataset for source in sources if source.dataset is not None]
    return {"files": files, **({"dataset": dict(datasets[0])} if datasets else {})}


def _name(path: str) -> str:
    return path if "://" in path else Path(path).name


def licence_of(sources: Sequence[Source]) -> str | None:
    """The licence that the dataset's card names."""
    cards = {source.card for source in sources if source.card is not None}
    return ", ".join(licence for card in sorted(cards) for licence in Original.of(*card).licences) or None
